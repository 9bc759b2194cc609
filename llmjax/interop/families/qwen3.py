"""Qwen 3: transformers' Qwen3ForCausalLM."""

from llmjax.interop.configs import HEAD, KEYS, Family, rope
from llmjax.interop.families import llama
from llmjax.interop.families.qwen2 import FULL
from llmjax.interop.weights import Weight, of_layers
from llmjax.models.qwen3 import Qwen3

SCALES = (
    Weight("query_scale_K", "model.layers.{L}.self_attn.q_norm.weight", "K"),
    Weight("key_scale_K", "model.layers.{L}.self_attn.k_norm.weight", "K"),
)

FAMILY = Family(
    model=Qwen3,
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    fields=llama.FIELDS,
    defaults=dict(tie_word_embeddings=False, rms_norm_eps=1e-6),
    fixed=dict(hidden_act=("silu",), attention_bias=(False,)),
    parts=(KEYS, HEAD, rope(10_000.0), FULL),
    weights=lambda c: llama.ends(c) + of_layers(llama.ATTENTION + SCALES + llama.MLP + llama.NORMS, c.layers),
)
