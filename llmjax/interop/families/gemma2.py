"""Gemma 2: transformers' Gemma2ForCausalLM."""

from llmjax.interop.configs import HEAD, KEYS, Family, Part, rope
from llmjax.interop.families import llama
from llmjax.interop.weights import Weight, of_layers
from llmjax.models.gemma2 import Gemma2

NORMS = (
    Weight("attention_scale_D", "model.layers.{L}.input_layernorm.weight", "D"),
    Weight("after_attention_scale_D", "model.layers.{L}.post_attention_layernorm.weight", "D"),
    Weight("mlp_scale_D", "model.layers.{L}.pre_feedforward_layernorm.weight", "D"),
    Weight("after_mlp_scale_D", "model.layers.{L}.post_feedforward_layernorm.weight", "D"),
)
CAPS = Part(
    ("attn_logit_softcapping", "final_logit_softcapping"),
    lambda given: dict(
        cap=float(given.get("attn_logit_softcapping", 0)), logit_cap=float(given.get("final_logit_softcapping", 0))
    ),
    lambda model: dict(
        attn_logit_softcapping=model.cap or None,
        final_logit_softcapping=model.logit_cap or None,
    ),
)
SCALAR = Part(
    ("query_pre_attn_scalar",),
    lambda given: dict(query_scalar=float(given.get("query_pre_attn_scalar", 256))),
    lambda model: dict(query_pre_attn_scalar=_whole(model.query_scalar or model.head_dim)),
)


def _whole(number: float) -> float | int:
    """transformers takes a whole number as an int only."""
    return int(number) if number == int(number) else number


def _kind(number: int, every: int) -> str:
    return "sliding_attention" if (number + 1) % every else "full_attention"


def turns(every: int) -> Part:
    """Which layers are global: every so many where it is not said."""

    def read(given):
        kinds, often = given.get("layer_types"), given.get("sliding_window_pattern", every)
        often = given.get("_sliding_window_pattern", often)
        if kinds:
            often = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
            if kinds != [_kind(number, often) for number in range(len(kinds))]:
                raise ValueError("layer_types that are no turns of local layers and a global one")
        return dict(every=often)

    def write(model):
        return dict(layer_types=[_kind(number, model.every) for number in range(model.layers)])

    return Part(("layer_types", "sliding_window_pattern", "_sliding_window_pattern"), read, write)


FAMILY = Family(
    model=Gemma2,
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    fields=llama.FIELDS | dict(sliding_window="window"),
    defaults=dict(
        tie_word_embeddings=True, rms_norm_eps=1e-6, head_dim=256, sliding_window=4096, max_position_embeddings=8192
    ),
    fixed=dict(
        hidden_activation=("gelu_pytorch_tanh",),
        hidden_act=("gelu_pytorch_tanh",),
        attention_bias=(False,),
        use_bidirectional_attention=(False, None),
    ),
    parts=(KEYS, HEAD, rope(10_000.0), CAPS, SCALAR, turns(2)),
    weights=lambda c: llama.ends(c) + of_layers(llama.ATTENTION + llama.MLP + NORMS, c.layers, c.every),
)
