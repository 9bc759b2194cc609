"""DeepSeek-V3 and R1: transformers' DeepseekV3ForCausalLM, in bfloat16 or float32.

The layers that predict more than one token, which transformers leaves out as well, are not read.
"""

from llmjax.interop.configs import Family, Part, rope, scaling_of
from llmjax.interop.families import llama
from llmjax.interop.weights import Weight, stacked
from llmjax.models.attention import Yarn
from llmjax.models.deepseek_v3 import DeepseekV3

LATENT = (
    Weight("latent_DZ", "model.layers.{L}.self_attn.kv_a_proj_with_mqa.weight", "Z,D"),
    Weight("latent_scale_M", "model.layers.{L}.self_attn.kv_a_layernorm.weight", "M"),
    Weight("key_value_MHN", "model.layers.{L}.self_attn.kv_b_proj.weight", "HN,M"),
    Weight("out_HYD", "model.layers.{L}.self_attn.o_proj.weight", "D,HY"),
)
QUERIES = (
    Weight("query_down_DQ", "model.layers.{L}.self_attn.q_a_proj.weight", "Q,D"),
    Weight("query_latent_scale_Q", "model.layers.{L}.self_attn.q_a_layernorm.weight", "Q"),
    Weight("query_QHK", "model.layers.{L}.self_attn.q_b_proj.weight", "HK,Q"),
)
QUERY = (Weight("query_DHK", "model.layers.{L}.self_attn.q_proj.weight", "HK,D"),)
EXPERTS = (
    Weight("router_DE", "model.layers.{L}.mlp.gate.weight", "E,D"),
    Weight("router_bias_E", "model.layers.{L}.mlp.gate.e_score_correction_bias", "E", float32=True),
    Weight("gate_EDF", "model.layers.{L}.mlp.experts.{E}.gate_proj.weight", "F,D"),
    Weight("up_EDF", "model.layers.{L}.mlp.experts.{E}.up_proj.weight", "F,D"),
    Weight("down_EFD", "model.layers.{L}.mlp.experts.{E}.down_proj.weight", "D,F"),
    Weight("shared_gate_DF", "model.layers.{L}.mlp.shared_experts.gate_proj.weight", "F,D"),
    Weight("shared_up_DF", "model.layers.{L}.mlp.shared_experts.up_proj.weight", "F,D"),
    Weight("shared_down_FD", "model.layers.{L}.mlp.shared_experts.down_proj.weight", "D,F"),
)


def weights(c: DeepseekV3) -> list[Weight]:
    attention = LATENT + (QUERIES if c.query_latent else QUERY) + llama.NORMS
    first = stacked("first", attention + llama.MLP, range(c.dense)) if c.dense else []
    return llama.ends(c) + first + stacked("blocks", attention + EXPERTS, range(c.dense, c.layers))


def _heads(given):
    return dict(
        kv_heads=given["num_attention_heads"],
        head_dim=given["qk_nope_head_dim"] + given["qk_rope_head_dim"],
        query_latent=given.get("q_lora_rank", 0),
    )


HEADS = Part(
    ("num_key_value_heads", "head_dim", "qk_head_dim", "qk_nope_head_dim", "q_lora_rank"),
    _heads,
    lambda model: dict(
        num_key_value_heads=model.heads,
        qk_nope_head_dim=model.head_dim - model.rotary,
        q_lora_rank=model.query_latent or None,
    ),
)
ROPE = rope(10_000.0)


def _positions(given):
    said = given.get("rope_parameters") or given.get("rope_scaling") or {}
    ours = ROPE.read(given)
    return ours | dict(
        score_weight=float(said.get("mscale_all_dim") or 0) if isinstance(ours["scaling"], Yarn) else 0.0
    )


def _their_positions(model):
    said = scaling_of(model.scaling, model.positions)
    return dict(rope_theta=model.theta, rope_scaling=said and said | dict(mscale_all_dim=model.score_weight))


FIELDS = {theirs: ours for theirs, ours in llama.FIELDS.items() if ours != "ff"}
OWN = dict(
    intermediate_size="dense_ff", moe_intermediate_size="ff", n_routed_experts="experts", n_shared_experts="shared",
    num_experts_per_tok="top_k", routed_scaling_factor="factor", kv_lora_rank="latent", qk_rope_head_dim="rotary",
    v_head_dim="value_dim", n_group="groups", topk_group="top_groups", first_k_dense_replace="dense",
    norm_topk_prob="normalised", rope_interleave="neighbours",
)  # fmt: skip
# How it was trained, and more tokens predicted at once.
TRAINED = Part(
    ("aux_loss_alpha", "seq_aux", "ep_size", "num_nextn_predict_layers", "num_mtp_layers"),
    lambda given: {},
    lambda model: dict(num_nextn_predict_layers=0),
)

FAMILY = Family(
    model=DeepseekV3,
    architecture="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    fields=FIELDS | OWN,
    defaults=dict(tie_word_embeddings=False, rms_norm_eps=1e-6, rope_interleave=True, norm_topk_prob=True),
    fixed=dict(
        hidden_act=("silu",),
        attention_bias=(False,),
        scoring_func=("sigmoid",),
        topk_method=("noaux_tc",),
        moe_layer_freq=(1,),
    ),
    parts=(HEADS, Part(ROPE.names, _positions, _their_positions), TRAINED),
    weights=weights,
    spare=(r"rotary_emb\.inv_freq$", r"^model\.layers\.{layers}\."),
)
