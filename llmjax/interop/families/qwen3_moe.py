"""Qwen 3 with experts in every layer: transformers' Qwen3MoeForCausalLM."""

from llmjax.interop.configs import HEAD, KEYS, Family, Part, rope
from llmjax.interop.families import llama
from llmjax.interop.families.qwen2 import FULL
from llmjax.interop.families.qwen3 import SCALES
from llmjax.interop.weights import Weight, of_layers
from llmjax.models.qwen3_moe import Qwen3Moe

EXPERTS = (
    Weight("router_DE", "model.layers.{L}.mlp.gate.weight", "E,D"),
    Weight("gate_EDF", "model.layers.{L}.mlp.experts.{E}.gate_proj.weight", "F,D"),
    Weight("up_EDF", "model.layers.{L}.mlp.experts.{E}.up_proj.weight", "F,D"),
    Weight("down_EFD", "model.layers.{L}.mlp.experts.{E}.down_proj.weight", "D,F"),
)
# The width of dense layers, of which there are none; and two names of one number.
EXPERT = Part(
    ("intermediate_size", "num_experts", "num_local_experts"),
    lambda given: dict(experts=given["num_experts"] if "num_experts" in given else given["num_local_experts"]),
    lambda model: dict(num_experts=model.experts, intermediate_size=model.ff),
)
FIELDS = {theirs: ours for theirs, ours in llama.FIELDS.items() if ours != "ff"}

FAMILY = Family(
    model=Qwen3Moe,
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    fields=FIELDS | dict(moe_intermediate_size="ff", num_experts_per_tok="top_k", norm_topk_prob="normalised"),
    defaults=dict(tie_word_embeddings=False, rms_norm_eps=1e-6, num_experts_per_tok=8, norm_topk_prob=False),
    fixed=dict(hidden_act=("silu",), attention_bias=(False,), decoder_sparse_step=(1,), mlp_only_layers=([],)),
    parts=(KEYS, HEAD, rope(10_000.0), FULL, EXPERT),
    weights=lambda c: llama.ends(c) + of_layers(llama.ATTENTION + SCALES + EXPERTS + llama.NORMS, c.layers),
)
