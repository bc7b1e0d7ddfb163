"""Tiny random models of the families of transformers: those whose parts are known, and those that are refused."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers
from torch import Tensor

VOCAB, LENGTH, D, HEADS = 23, 9, 32, 4
SMALL: dict[str, Any] = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": HEADS}
TEXT = SMALL | {"intermediate_size": 48, "vocab_size": VOCAB, "max_position_embeddings": 32}
GROUPED = TEXT | {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
IMAGE = SMALL | {"image_size": 16, "patch_size": 8}
STACKS = {
    "d_model": D,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
}
FOUR = GROUPED | {"num_hidden_layers": 4}
T = transformers
CONFIGS: dict[str, Any] = {
    "gpt2": lambda: T.GPT2Config(n_embd=D, n_layer=2, n_head=HEADS, vocab_size=VOCAB, n_positions=32),
    "gpt_neox": lambda: T.GPTNeoXConfig(**TEXT),
    "gpt_neox in sequence": lambda: T.GPTNeoXConfig(**TEXT, use_parallel_residual=False),
    "llama": lambda: T.LlamaConfig(**GROUPED),
    "llama, tied": lambda: T.LlamaConfig(**GROUPED, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "mistral": lambda: T.MistralConfig(**GROUPED, sliding_window=4),
    "qwen2": lambda: T.Qwen2Config(**GROUPED),
    "qwen3": lambda: T.Qwen3Config(**GROUPED, head_dim=12),
    "gemma": lambda: T.GemmaConfig(**GROUPED, head_dim=12),
    "gemma2": lambda: T.Gemma2Config(**GROUPED, head_dim=12, sliding_window=4, final_logit_softcapping=3.0),
    "gemma3": lambda: T.Gemma3TextConfig(**GROUPED, head_dim=12, sliding_window=4),
    "olmo2": lambda: T.Olmo2Config(**GROUPED),
    "opt": lambda: T.OPTConfig(
        **SMALL, ffn_dim=48, vocab_size=VOCAB, max_position_embeddings=32, word_embed_proj_dim=D
    ),
    "phi": lambda: T.PhiConfig(**TEXT),
    "phi3": lambda: T.Phi3Config(**GROUPED, pad_token_id=0),
    "bloom": lambda: T.BloomConfig(hidden_size=D, n_layer=2, n_head=HEADS, vocab_size=VOCAB),
    "gptj": lambda: T.GPTJConfig(n_embd=D, n_layer=2, n_head=HEADS, vocab_size=VOCAB, n_positions=32, rotary_dim=4),
    "gpt_neo": lambda: T.GPTNeoConfig(
        hidden_size=D,
        num_layers=2,
        num_heads=HEADS,
        attention_types=[[["global", "local"], 1]],
        vocab_size=VOCAB,
        max_position_embeddings=32,
    ),
    "gpt_bigcode": lambda: T.GPTBigCodeConfig(n_embd=D, n_layer=2, n_head=HEADS, vocab_size=VOCAB, n_positions=32),
    "gpt_bigcode, by head": lambda: T.GPTBigCodeConfig(
        n_embd=D, n_layer=2, n_head=HEADS, vocab_size=VOCAB, n_positions=32, multi_query=False
    ),
    "falcon": lambda: T.FalconConfig(**SMALL, vocab_size=VOCAB),
    "falcon, in sequence": lambda: T.FalconConfig(**SMALL, vocab_size=VOCAB, parallel_attn=False),
    "falcon, alibi": lambda: T.FalconConfig(
        **SMALL, vocab_size=VOCAB, parallel_attn=False, multi_query=False, alibi=True, bias=True
    ),
    "falcon, by group": lambda: T.FalconConfig(
        **SMALL, vocab_size=VOCAB, new_decoder_architecture=True, num_kv_heads=2
    ),
    "stablelm": lambda: T.StableLmConfig(**GROUPED),
    "stablelm, parallel": lambda: T.StableLmConfig(**GROUPED, use_parallel_residual=True),
    "mixtral": lambda: T.MixtralConfig(**GROUPED, num_local_experts=4),
    "qwen2_moe": lambda: T.Qwen2MoeConfig(**GROUPED, **EXPERTS, shared_expert_intermediate_size=16),
    "qwen3_moe": lambda: T.Qwen3MoeConfig(**GROUPED, **EXPERTS, head_dim=8),
    "olmoe": lambda: T.OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2),
    "starcoder2": lambda: T.Starcoder2Config(**GROUPED),
    "smollm3, by its names": lambda: T.SmolLM3Config(**GROUPED, pad_token_id=0),
    "bert": lambda: T.BertConfig(**TEXT),
    "esm": lambda: T.EsmConfig(**TEXT, pad_token_id=1, mask_token_id=2),
    "vit": lambda: T.ViTConfig(**IMAGE, intermediate_size=48),
    "dinov2": lambda: T.Dinov2Config(**IMAGE),
    "clip": lambda: T.CLIPVisionConfig(**IMAGE, intermediate_size=48),
}
OTHERS: dict[str, Any] = {
    # language models in which some instruments have nothing to read
    "opt, norms after": lambda: T.OPTConfig(
        **SMALL,
        ffn_dim=48,
        vocab_size=VOCAB,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
        do_layer_norm_before=False,
    ),
    "gpt_oss": lambda: T.GptOssConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    "llava": lambda: T.LlavaConfig(
        text_config=T.LlamaConfig(**GROUPED),
        vision_config=T.CLIPVisionConfig(**IMAGE, intermediate_size=48),
        image_token_index=VOCAB - 1,
    ),
    "bloom, stream from the norm": lambda: T.BloomConfig(
        hidden_size=D, n_layer=2, n_head=HEADS, vocab_size=VOCAB, apply_residual_connection_post_layernorm=True
    ),
    "granite": lambda: T.GraniteConfig(**GROUPED, residual_multiplier=0.5),
    "diffllama": lambda: T.DiffLlamaConfig(**GROUPED),
    "qwen3_next": lambda: T.Qwen3NextConfig(
        **FOUR,
        **EXPERTS,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        shared_expert_intermediate_size=16,
    ),
    "recurrent_gemma": lambda: T.RecurrentGemmaConfig(**(GROUPED | {"num_hidden_layers": 3}), lru_width=D, head_dim=8),
    "jamba": lambda: T.JambaConfig(
        **FOUR,
        attn_layer_period=4,
        attn_layer_offset=2,
        num_experts=2,
        expert_layer_period=2,
        use_mamba_kernels=False,
        mamba_d_state=4,
    ),
    "minimax": lambda: T.MiniMaxConfig(
        **FOUR,
        num_local_experts=2,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"] * 2,
        block_size=4,
    ),
    # encoders of text
    "roberta": lambda: T.RobertaConfig(**TEXT, pad_token_id=1),
    "electra": lambda: T.ElectraConfig(**TEXT, embedding_size=16),
    "albert": lambda: T.AlbertConfig(**TEXT, embedding_size=16),
    "distilbert": lambda: T.DistilBertConfig(
        dim=D, n_layers=2, n_heads=HEADS, hidden_dim=48, vocab_size=VOCAB, max_position_embeddings=32
    ),
    "deberta_v2": lambda: T.DebertaV2Config(**TEXT),
    "roformer": lambda: T.RoFormerConfig(**TEXT),
    "modernbert": lambda: T.ModernBertConfig(**TEXT, pad_token_id=0, local_attention=8),
    "longformer": lambda: T.LongformerConfig(**TEXT, attention_window=[4, 4], pad_token_id=1),
    # two stacks, or two towers
    "bart": lambda: T.BartConfig(**STACKS),
    "mbart": lambda: T.MBartConfig(**STACKS),
    "marian": lambda: T.MarianConfig(**STACKS),
    "t5": lambda: T.T5Config(
        d_model=D, num_layers=2, num_heads=HEADS, d_kv=8, d_ff=48, vocab_size=VOCAB, decoder_start_token_id=0
    ),
    "whisper": lambda: T.WhisperConfig(
        **{key: value for key, value in STACKS.items() if key != "max_position_embeddings"},
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "clip, both towers": lambda: T.CLIPConfig(text_config=dict(TEXT), vision_config=dict(IMAGE, intermediate_size=48)),
    # images
    "beit": lambda: T.BeitConfig(**IMAGE, intermediate_size=48),
    "swin": lambda: T.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    ),
    "resnet": lambda: T.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 2, 1], layer_type="basic"
    ),
    "resnet, narrow": lambda: T.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 4, 8], depths=[1, 1, 1], layer_type="basic"
    ),
    "convnext": lambda: T.ConvNextConfig(hidden_sizes=[8, 16, 32], depths=[1, 2, 1], num_stages=3),
    "pvt": lambda: T.PvtConfig(
        image_size=32, hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 2, 4], num_encoder_blocks=4
    ),
}
MASKED, VISION = ("bert", "esm"), ("vit", "dinov2", "clip")
ENCODERS = ("roberta", "electra", "albert", "distilbert", "deberta_v2", "roformer", "modernbert", "longformer")
PYRAMIDS = ("swin", "resnet", "resnet, narrow", "convnext", "pvt")  # whose stages differ in width
TWO_STACKS = ("bart", "mbart", "marian", "t5", "whisper")
KINDS = (
    dict.fromkeys((*MASKED, *ENCODERS), T.AutoModelForMaskedLM)
    | dict.fromkeys((*VISION, *PYRAMIDS, "beit", "clip, both towers"), T.AutoModel)
    | dict.fromkeys(TWO_STACKS, T.AutoModelForSeq2SeqLM)
    | {"llava": T.AutoModelForImageTextToText, "whisper": T.AutoModelForSpeechSeq2Seq}
)


def family(name: str, seed: int = 0) -> Any:
    """A tiny random model whose norms, biases and attention are far from trivial."""
    config = (CONFIGS | OTHERS)[name]()
    if name not in TWO_STACKS:
        config.bos_token_id = config.eos_token_id = None
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = KINDS.get(name, T.AutoModelForCausalLM).from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim in (2, 3):
                parameter.data.normal_(std=0.3)
            elif parameter.ndim == 1:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def inputs(name: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if KINDS.get(name) is T.AutoModel:
        side = 32 if name in PYRAMIDS else 16
        return torch.randn(2, 3, side, side, generator=generator)
    return torch.randint(3, VOCAB - 1, (2, LENGTH), generator=generator)
