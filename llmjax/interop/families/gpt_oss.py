"""gpt-oss: transformers' GptOssForCausalLM, in bfloat16 or float32. Its gates and ups take turns in one tensor."""

from llmjax.interop.configs import HEAD, KEYS, Family, Part, rope
from llmjax.interop.families import gemma2, llama, qwen2
from llmjax.interop.weights import Weight, of_layers
from llmjax.models.gpt_oss import GptOss

LAYER = (
    Weight("out_bias_D", "model.layers.{L}.self_attn.o_proj.bias", "D"),
    Weight("sinks_H", "model.layers.{L}.self_attn.sinks", "H"),
    Weight("router_DE", "model.layers.{L}.mlp.router.weight", "E,D"),
    Weight("logit_bias_E", "model.layers.{L}.mlp.router.bias", "E"),
    Weight("gate_EDF", "model.layers.{L}.mlp.experts.gate_up_proj", "E,D,F2", 0),
    Weight("up_EDF", "model.layers.{L}.mlp.experts.gate_up_proj", "E,D,F2", 1),
    Weight("gate_bias_EF", "model.layers.{L}.mlp.experts.gate_up_proj_bias", "E,F2", 0),
    Weight("up_bias_EF", "model.layers.{L}.mlp.experts.gate_up_proj_bias", "E,F2", 1),
    Weight("down_EFD", "model.layers.{L}.mlp.experts.down_proj", "E,F,D"),
    Weight("down_bias_ED", "model.layers.{L}.mlp.experts.down_proj_bias", "E,D"),
)
ATTENTION = llama.ATTENTION + qwen2.BIASES
# Older names of what is said elsewhere.
TWICE = Part(("experts_per_token", "initial_context_length"), lambda given: {}, lambda model: {})

FAMILY = Family(
    model=GptOss,
    architecture="GptOssForCausalLM",
    model_type="gpt_oss",
    fields=llama.FIELDS
    | dict(
        num_local_experts="experts",
        num_experts_per_tok="top_k",
        sliding_window="window",
        swiglu_limit="limit",
        swiglu_alpha="slope",
    ),
    defaults=dict(
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
        num_experts_per_tok=4,
        sliding_window=128,
        swiglu_limit=7.0,
        swiglu_alpha=1.702,
        head_dim=64,
    ),
    fixed=dict(hidden_act=("silu",), attention_bias=(True,)),
    parts=(KEYS, HEAD, rope(150_000.0), gemma2.turns(2), TWICE),
    weights=lambda c: llama.ends(c) + of_layers(ATTENTION + LAYER + llama.NORMS, c.layers, c.every),
)
