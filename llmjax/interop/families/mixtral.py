"""Mixtral: transformers' MixtralForCausalLM, whose experts are a tensor each."""

from llmjax.interop.configs import HEAD, KEYS, Family, rope
from llmjax.interop.families import llama
from llmjax.interop.weights import Weight, of_layers
from llmjax.models.mixtral import Mixtral

EXPERTS = (
    Weight("router_DE", "model.layers.{L}.block_sparse_moe.gate.weight", "E,D"),
    Weight("gate_EDF", "model.layers.{L}.block_sparse_moe.experts.{E}.w1.weight", "F,D"),
    Weight("up_EDF", "model.layers.{L}.block_sparse_moe.experts.{E}.w3.weight", "F,D"),
    Weight("down_EFD", "model.layers.{L}.block_sparse_moe.experts.{E}.w2.weight", "D,F"),
)

FAMILY = Family(
    model=Mixtral,
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    fields=llama.FIELDS | dict(num_local_experts="experts", num_experts_per_tok="top_k"),
    defaults=dict(tie_word_embeddings=False, rms_norm_eps=1e-5, num_local_experts=8, num_experts_per_tok=2),
    fixed=dict(hidden_act=("silu",), sliding_window=(None,), router_jitter_noise=(0.0, 0)),
    parts=(KEYS, HEAD, rope(1e6)),
    weights=lambda c: llama.ends(c) + of_layers(llama.ATTENTION + EXPERTS + llama.NORMS, c.layers),
)
