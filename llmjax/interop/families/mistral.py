"""Mistral: transformers' MistralForCausalLM."""

from llmjax.interop.configs import HEAD, KEYS, Family, Part, rope
from llmjax.interop.families import llama
from llmjax.models.mistral import Mistral

WINDOW = Part(
    ("sliding_window",),
    lambda given: dict(window=given.get("sliding_window", 0)),
    lambda model: dict(sliding_window=model.window or None),
)

FAMILY = Family(
    model=Mistral,
    architecture="MistralForCausalLM",
    model_type="mistral",
    fields=llama.FIELDS,
    defaults=dict(tie_word_embeddings=False, rms_norm_eps=1e-6),
    fixed=dict(hidden_act=("silu",)),
    parts=(KEYS, HEAD, rope(10_000.0), WINDOW),
    weights=llama.FAMILY.weights,
)
