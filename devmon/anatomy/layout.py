"""Where the parts of a transformer are, as declarations: one for each way of naming them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Layout:
    """Paths of the modules of a transformer; "" is a part that the model does not have.

    `blocks` (the list of layers), `embed`, `norm` (before the unembedding) and `unembed` are relative to the module
    that holds the blocks' list by that path; all others are relative to a block:

    - `query`, `key`, `value`: the linear maps of all heads side by side; or `qkv`, one map for all three, whose output
      is ordered as `fused` says: "parts" (all queries, all keys, all values) or "heads" (by key-value head: its
      queries, its key, its value)
    - `out`: the linear map that takes the heads' outputs side by side and writes what attention adds
    - `neurons`: the linear map that takes the MLP's activations and writes what the MLP adds
    - `attention_norm`, `mlp_norm`: what the residual stream passes on its way in
    - `attention_end`, `mlp_end`: a norm or a scale between `out` or `neurons` and the residual stream; without
      `neurons`, `mlp_end` is the module that gives what the MLP adds (a mixture of experts)
    - `heads`: the number of query heads, or the path of an attribute that holds it, from the block or from the module
      that holds the list; grouped key and value heads are counted from the size of `key`
    - `parallel`: attention and MLP read the same stream (or the path of an attribute that says so)
    - `post_norm`: the stream itself passes `attention_end` and `mlp_end` after each addition, as in BERT; what the
      layers add does then not sum up to the final stream
    - `direct`: the unembedding reads the stream right after `norm`, with no further layer of its head between
    - `cap`: the path of an attribute c, logits being c tanh(logits / c)

    A module declares itself with a class attribute `anatomy = Layout(...)`.
    """

    blocks: str
    out: str
    query: str = ""
    key: str = ""
    value: str = ""
    qkv: str = ""
    fused: Literal["parts", "heads"] = "parts"
    neurons: str = ""
    attention_norm: str = ""
    mlp_norm: str = ""
    attention_end: str = ""
    mlp_end: str = ""
    embed: str = ""
    norm: str = ""
    unembed: str = ""
    heads: int | str = "config.num_attention_heads"
    parallel: bool | str = False
    post_norm: bool = False
    direct: bool = True
    cap: str = "config.final_logit_softcapping"

    @property
    def in_block(self) -> tuple[str, ...]:
        """The paths that every block must have."""
        parts = (self.query, self.key, self.value, self.qkv, self.out, self.neurons, self.attention_norm, self.mlp_norm)
        return tuple(path for path in (*parts, self.attention_end, self.mlp_end) if path)


LLAMA = Layout(
    blocks="layers",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    out="self_attn.o_proj",
    neurons="mlp.down_proj",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    embed="embed_tokens",
    norm="norm",
)
GEMMA = replace(
    LLAMA,
    mlp_norm="pre_feedforward_layernorm",
    attention_end="post_attention_layernorm",
    mlp_end="post_feedforward_layernorm",
)
OLMO2 = replace(
    LLAMA,
    attention_norm="",
    mlp_norm="",
    attention_end="post_attention_layernorm",
    mlp_end="post_feedforward_layernorm",
)
EXPERTS = replace(LLAMA, neurons="", mlp_end="mlp")
PHI = replace(LLAMA, out="self_attn.dense", neurons="mlp.fc2", mlp_norm="", norm="final_layernorm", parallel=True)
PHI3 = replace(LLAMA, query="", key="", value="", qkv="self_attn.qkv_proj")
GPT2 = Layout(
    blocks="h",
    qkv="attn.c_attn",
    out="attn.c_proj",
    neurons="mlp.c_proj",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    embed="wte",
    norm="ln_f",
)
GPT_BIGCODE_BY_HEAD = replace(GPT2, fused="heads")
GPT_NEOX = Layout(
    blocks="layers",
    qkv="attention.query_key_value",
    fused="heads",
    out="attention.dense",
    neurons="mlp.dense_4h_to_h",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    embed="embed_in",
    norm="final_layer_norm",
    parallel="config.use_parallel_residual",
)
GPT_NEO = replace(
    GPT2,
    qkv="",
    query="attn.attention.q_proj",
    key="attn.attention.k_proj",
    value="attn.attention.v_proj",
    out="attn.attention.out_proj",
)
GPT_J = replace(
    GPT_NEO,
    query="attn.q_proj",
    key="attn.k_proj",
    value="attn.v_proj",
    out="attn.out_proj",
    neurons="mlp.fc_out",
    mlp_norm="",
    parallel=True,
)
BLOOM = replace(
    GPT_NEOX,
    blocks="h",
    qkv="self_attention.query_key_value",
    out="self_attention.dense",
    embed="word_embeddings",
    norm="ln_f",
    parallel=False,
)
FALCON = replace(BLOOM, fused="parts", mlp_norm="", parallel=True)
FALCON_BY_GROUP = replace(BLOOM, attention_norm="ln_attn", mlp_norm="ln_mlp", parallel=True)
STABLELM_PARALLEL = replace(LLAMA, mlp_norm="", parallel=True)
OPT = replace(
    LLAMA,
    out="self_attn.out_proj",
    neurons="fc2",
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    norm="final_layer_norm",
)
OPT_POST_NORM = replace(
    OPT,
    attention_norm="",
    mlp_norm="",
    attention_end="self_attn_layer_norm",
    mlp_end="final_layer_norm",
    norm="",
    post_norm=True,
    direct=False,
)
VIT = Layout(
    blocks="layers",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    out="attention.o_proj",
    neurons="mlp.fc2",
    attention_norm="layernorm_before",
    mlp_norm="layernorm_after",
    norm="layernorm",
)
DINOV2 = replace(
    VIT,
    blocks="encoder.layer",
    attention_norm="norm1",
    mlp_norm="norm2",
    attention_end="layer_scale1",
    mlp_end="layer_scale2",
)
CLIP_VISION = replace(
    LLAMA,
    blocks="encoder.layers",
    out="self_attn.out_proj",
    neurons="mlp.fc2",
    attention_norm="layer_norm1",
    mlp_norm="layer_norm2",
    embed="",
    norm="",
)
BERT = Layout(
    blocks="encoder.layer",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    out="attention.output.dense",
    neurons="output.dense",
    attention_end="attention.output.LayerNorm",
    mlp_end="output.LayerNorm",
    embed="embeddings.word_embeddings",
    post_norm=True,
    direct=False,
)
ESM = replace(
    BERT,
    attention_norm="attention.LayerNorm",
    mlp_norm="LayerNorm",
    attention_end="",
    mlp_end="",
    norm="encoder.emb_layer_norm_after",
    post_norm=False,
)

LAYOUTS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "gemma3_text": GEMMA,
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "phi": PHI,
    "phi3": PHI3,
    "olmo": LLAMA,
    "stablelm": LLAMA,
    "starcoder2": replace(LLAMA, neurons="mlp.c_proj"),
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "olmoe": EXPERTS,
    "stablelm, parallel": STABLELM_PARALLEL,
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_bigcode, by head": GPT_BIGCODE_BY_HEAD,
    "gpt_neo": GPT_NEO,
    "gptj": GPT_J,
    "bloom": BLOOM,
    "falcon": FALCON,
    "falcon, by group": FALCON_BY_GROUP,
    "gpt_neox": GPT_NEOX,
    "opt": OPT,
    "opt, norms after": OPT_POST_NORM,
    "vit": VIT,
    "dinov2": DINOV2,
    "clip_vision_model": CLIP_VISION,
    "bert": BERT,
    "esm": ESM,
}
"""By `config.model_type` of transformers. Variants and other models are tried against all of them; none is trusted."""
