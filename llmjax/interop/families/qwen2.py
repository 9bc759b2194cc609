"""Qwen 2 and 2.5: transformers' Qwen2ForCausalLM."""

from llmjax.interop.configs import HEAD, KEYS, Family, Part, rope
from llmjax.interop.families import llama
from llmjax.interop.weights import Weight, of_layers
from llmjax.models.qwen2 import Qwen2

BIASES = (
    Weight("query_bias_HK", "model.layers.{L}.self_attn.q_proj.bias", "HK"),
    Weight("key_bias_GK", "model.layers.{L}.self_attn.k_proj.bias", "GK"),
    Weight("value_bias_GK", "model.layers.{L}.self_attn.v_proj.bias", "GK"),
)


def _no_windows(given):
    if given.get("use_sliding_window") and given.get("sliding_window"):
        raise ValueError("use_sliding_window true")
    if set(given.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        raise ValueError(f"layer_types with {', '.join(sorted(set(given['layer_types'])))}")
    return {}


# Without use_sliding_window the others say nothing.
FULL = Part(("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"), _no_windows, lambda model: {})

FAMILY = Family(
    model=Qwen2,
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    fields=llama.FIELDS,
    defaults=dict(tie_word_embeddings=False, rms_norm_eps=1e-6),
    fixed=dict(hidden_act=("silu",), use_mrope=(False,)),
    parts=(KEYS, HEAD, rope(10_000.0), FULL),
    weights=lambda c: llama.ends(c) + of_layers(llama.ATTENTION + BIASES + llama.MLP + llama.NORMS, c.layers),
)
