"""OLMo 2: transformers' Olmo2ForCausalLM."""

from llmjax.interop.configs import HEAD, KEYS, Family, rope
from llmjax.interop.families import llama
from llmjax.interop.weights import Weight, of_layers
from llmjax.models.olmo2 import Olmo2

NORMS = (
    Weight("attention_scale_D", "model.layers.{L}.post_attention_layernorm.weight", "D"),
    Weight("mlp_scale_D", "model.layers.{L}.post_feedforward_layernorm.weight", "D"),
    Weight("query_scale_HK", "model.layers.{L}.self_attn.q_norm.weight", "HK"),
    Weight("key_scale_GK", "model.layers.{L}.self_attn.k_norm.weight", "GK"),
)

FAMILY = Family(
    model=Olmo2,
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    fields=llama.FIELDS,
    defaults=dict(tie_word_embeddings=False, rms_norm_eps=1e-5),
    fixed=dict(hidden_act=("silu",), attention_bias=(False,)),
    parts=(KEYS, HEAD, rope(10_000.0)),
    weights=lambda c: llama.ends(c) + of_layers(llama.ATTENTION + llama.MLP + NORMS, c.layers),
)
