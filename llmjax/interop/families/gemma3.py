"""Gemma 3, text: transformers' Gemma3ForCausalLM."""

from llmjax.interop.configs import HEAD, KEYS, Family, Part, scaling, scaling_of
from llmjax.interop.families import gemma2, llama
from llmjax.interop.families.qwen3 import SCALES
from llmjax.interop.weights import of_layers
from llmjax.models.gemma3 import Gemma3


def _rope(given):
    both = given.get("rope_parameters") or {}
    local = both.get("sliding_attention", dict(rope_theta=given.get("rope_local_base_freq", 10_000.0)))
    far = both.get("full_attention", dict(given.get("rope_scaling") or {}, rope_theta=given.get("rope_theta", 1e6)))
    if scaling(local, None) is not None:
        raise ValueError("scaled rotary positions in local layers")
    positions = given.get("max_position_embeddings")
    return dict(theta=float(far["rope_theta"]), local_theta=float(local["rope_theta"]), scaling=scaling(far, positions))


ROPE = Part(
    ("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq"),
    _rope,
    lambda model: dict(
        rope_theta=model.theta,
        rope_local_base_freq=model.local_theta,
        rope_scaling=scaling_of(model.scaling, model.positions),
    ),
)

FAMILY = Family(
    model=Gemma3,
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    fields=gemma2.FAMILY.fields,
    defaults=gemma2.FAMILY.defaults | dict(max_position_embeddings=131_072),
    fixed=gemma2.FAMILY.fixed,
    parts=(KEYS, HEAD, ROPE, gemma2.CAPS, gemma2.SCALAR, gemma2.turns(6)),
    weights=lambda c: llama.ends(c) + of_layers(llama.ATTENTION + SCALES + llama.MLP + gemma2.NORMS, c.layers, c.every),
)
