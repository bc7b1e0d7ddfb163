"""Where the parts of a transformer are, as declarations: one for each way of naming them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

Adapter = Callable[[Any, Any], Tensor]  # of the model and its tokens (batch, pos): the logits (batch, pos, vocab)


LATER = {"identity": "if changed"}
FUNCTIONAL = "F."  # how the paths of norms begin that are functions, not modules


@dataclass(frozen=True)
class Layout:
    """Paths of the modules of a transformer; "" is a part that the model does not have.

    `blocks` (the list of layers), `embed`, `norm` (before the unembedding) and `unembed` are relative to the module
    that holds the blocks' list by that path; all others are relative to a block:

    - `query`, `key`, `value`: the linear maps of all heads side by side; or `qkv`, one map for all three (or the path
      of an `nn.MultiheadAttention`), whose output is ordered as `fused` says: "parts" (all queries, all keys, all
      values), "heads" (by key-value head: its queries, its key, its value), or the axes from the outermost, as in
      "head dim part"; in another order of the three "parts:kqv" and the like
    - `out`: the linear map that takes the heads' outputs side by side and writes what attention adds
    - `neurons`: the linear map that takes the MLP's activations and writes what the MLP adds
    - `attention_norm`, `mlp_norm`: what the residual stream passes on its way in; here and for `norm`, "F.rms_norm" and
      "F.layer_norm" are norms that the model calls as functions, without weights
    - `attention_end`, `mlp_end`: a norm or a scale between `out` or `neurons` and the residual stream; without
      `neurons`, `mlp_end` is the module that gives what the MLP adds (a mixture of experts)
    - `heads`: the number of query heads, or the path of an attribute that holds it, from the block or from the module
      that holds the list; grouped key and value heads are counted from the size of `key`
    - `parallel`: attention and MLP read the same stream (or the path of an attribute that says so)
    - `post_norm`: the stream itself passes `attention_end` and `mlp_end` after each addition, as in BERT; what the
      layers add does then not sum up to the final stream
    - `direct`: the unembedding reads the stream right after `norm`, with no further layer of its head between
    - `cap`: c, or the path of an attribute that holds it, logits being c tanh(logits / c)
    - `together`: modules of the list that make a layer, as 2 where attention and MLP alternate; paths then begin with
      the number of the module in its layer, "0.attn.q" and "1.mlp.down"
    - `enter`, `leave`: the modules of a layer whose input and whose output are the stream before and after it, where
      the layer is not itself called (by default the layer, or the first and last of those `together`)
    - `hybrid`: the list holds blocks without these parts too (convolutions, state spaces), which are passed over:
      layers are counted among the blocks that have them
    - `batch_first`: False where the stream is (pos, batch, d) within the layers, as torch's own have it by default
    - `logits`: how logits (batch, pos, vocab) are had of the model: "flat" (it returns them as (batch · pos, vocab)),
      "last" (it returns those of the last place; all are made of `norm` and `unembed`), or a function of the model and
      the tokens, as in `lambda model, tokens: model(tokens, targets=tokens)[0]`

    A module declares itself with a class attribute `anatomy = Layout(...)`. One with `logits` alone says nothing of
    parts.
    """

    blocks: str = ""
    out: str = ""
    query: str = ""
    key: str = ""
    value: str = ""
    qkv: str = ""
    fused: str = "parts"
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
    cap: str | float = "config.final_logit_softcapping"
    # What came after runs were stored with the fields above.
    together: int = field(default=1, metadata=LATER)
    enter: str = field(default="", metadata=LATER)
    leave: str = field(default="", metadata=LATER)
    hybrid: bool = field(default=False, metadata=LATER)
    batch_first: bool = field(default=True, metadata=LATER)
    logits: str | Adapter = field(default="", metadata=LATER)

    @property
    def in_block(self) -> tuple[str, ...]:
        """The paths that every block must have."""
        parts = (self.query, self.key, self.value, self.qkv, self.out, self.neurons, self.attention_norm, self.mlp_norm)
        ends = (self.attention_end, self.mlp_end, self.enter, self.leave)
        return tuple(path for path in (*parts, *ends) if path and not path.startswith(FUNCTIONAL))

    def layers(self, body: nn.Module) -> list[nn.Module]:
        """The layers that the list at `blocks` of `body` makes; a layer of several modules is a list of its own.

        Raises AttributeError where `body` has no such path.
        """
        children = list(body.get_submodule(self.blocks).children())
        if self.together > 1:
            count = self.together
            children = [nn.ModuleList(children[i : i + count]) for i in range(0, len(children), count)]
        return [child for child in children if not lacks(child, self.in_block)] if self.hybrid else children

    def ends(self, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
        """The modules of a layer by which the stream enters and leaves it."""
        first, last = ("0", str(self.together - 1)) if self.together > 1 else ("", "")
        return layer.get_submodule(self.enter or first), layer.get_submodule(self.leave or last)


def lacks(module: nn.Module, paths: tuple[str, ...]) -> str:
    """The first of the paths that the module does not have, "" for none."""
    for path in paths:
        try:
            module.get_submodule(path)
        except AttributeError:
            return path
    return ""


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
MPT = Layout(
    blocks="blocks",
    qkv="attn.Wqkv",
    out="attn.out_proj",
    neurons="ffn.down_proj",
    attention_norm="norm_1",
    mlp_norm="norm_2",
    embed="wte",
    norm="norm_f",
)
PERSIMMON = replace(
    GPT_NEOX,
    qkv="self_attn.query_key_value",
    out="self_attn.dense",
    embed="embed_tokens",
    parallel=False,
    norm="final_layernorm",
)
CTRL = Layout(
    blocks="h",
    query="multi_head_attention.Wq",
    key="multi_head_attention.Wk",
    value="multi_head_attention.Wv",
    out="multi_head_attention.dense",
    neurons="ffn.2",
    attention_norm="layernorm1",
    mlp_norm="layernorm2",
    embed="w",
    norm="layernorm",
)
STABLELM_PARALLEL = replace(LLAMA, mlp_norm="", parallel=True)
OPT = replace(
    LLAMA,
    out="self_attn.out_proj",
    neurons="fc2",
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    norm="final_layer_norm",
)
BIOGPT = replace(OPT, norm="layer_norm")
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
    "apertus": replace(LLAMA, attention_norm="attention_layernorm", mlp_norm="feedforward_layernorm"),
    "glm4": replace(LLAMA, attention_end="post_self_attn_layernorm", mlp_end="post_mlp_layernorm"),
    "vaultgemma": replace(LLAMA, mlp_norm="pre_feedforward_layernorm"),
    "biogpt": BIOGPT,
    "xglm": BIOGPT,
    "mpt": MPT,
    "persimmon": PERSIMMON,
    "ctrl": CTRL,
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_bigcode, by head": GPT_BIGCODE_BY_HEAD,
    "gpt_neo": GPT_NEO,
    "gptj": GPT_J,
    "bloom": BLOOM,
    "falcon": FALCON,
    "falcon, by group": FALCON_BY_GROUP,
    "falcon, by group, one norm": replace(FALCON_BY_GROUP, attention_norm="input_layernorm", mlp_norm=""),
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
