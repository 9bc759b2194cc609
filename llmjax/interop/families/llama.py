"""Llama 2, 3, 3.1, 3.2: transformers' LlamaForCausalLM."""

from llmjax.interop.configs import HEAD, KEYS, Family, rope
from llmjax.interop.weights import Weight, of_layers
from llmjax.models.llama import Llama

FIELDS = dict(
    vocab_size="vocab", num_hidden_layers="layers", hidden_size="width", num_attention_heads="heads",
    intermediate_size="ff", max_position_embeddings="positions", tie_word_embeddings="tied", rms_norm_eps="epsilon",
)  # fmt: skip
PLAIN = dict(hidden_act=("silu", "swish"), attention_bias=(False,), mlp_bias=(False,))
ATTENTION = (
    Weight("query_DHK", "model.layers.{L}.self_attn.q_proj.weight", "HK,D"),
    Weight("key_DGK", "model.layers.{L}.self_attn.k_proj.weight", "GK,D"),
    Weight("value_DGK", "model.layers.{L}.self_attn.v_proj.weight", "GK,D"),
    Weight("out_HKD", "model.layers.{L}.self_attn.o_proj.weight", "D,HK"),
)
MLP = (
    Weight("gate_DF", "model.layers.{L}.mlp.gate_proj.weight", "F,D"),
    Weight("up_DF", "model.layers.{L}.mlp.up_proj.weight", "F,D"),
    Weight("down_FD", "model.layers.{L}.mlp.down_proj.weight", "D,F"),
)
NORMS = (
    Weight("attention_scale_D", "model.layers.{L}.input_layernorm.weight", "D"),
    Weight("mlp_scale_D", "model.layers.{L}.post_attention_layernorm.weight", "D"),
)


def ends(c: Llama) -> list[Weight]:
    """Embedding, last norm, and the head where there is one."""
    ends = [Weight("embed_VD", "model.embed_tokens.weight", "V,D"), Weight("final_scale_D", "model.norm.weight", "D")]
    return ends if c.tied else [*ends, Weight("head_DV", "lm_head.weight", "V,D")]


FAMILY = Family(
    model=Llama,
    architecture="LlamaForCausalLM",
    model_type="llama",
    fields=FIELDS,
    defaults=dict(tie_word_embeddings=False, rms_norm_eps=1e-6),
    fixed=PLAIN,
    parts=(KEYS, HEAD, rope(10_000.0)),
    weights=lambda c: ends(c) + of_layers(ATTENTION + MLP + NORMS, c.layers),
)
