"""GPT-2: transformers' GPT2LMHeadModel. Its matrices are [in, out], and query, key and value are one."""

from llmjax.interop.configs import Family, Part
from llmjax.interop.weights import Weight, of_layers
from llmjax.models.gpt2 import GPT2

LAYER = (
    Weight("attention_scale_D", "transformer.h.{L}.ln_1.weight", "D"),
    Weight("attention_bias_D", "transformer.h.{L}.ln_1.bias", "D"),
    *(
        weight
        for part, name in enumerate(("query", "key", "value"))
        for weight in (
            Weight(f"{name}_DHK", "transformer.h.{L}.attn.c_attn.weight", "D,3HK", part),
            Weight(f"{name}_bias_HK", "transformer.h.{L}.attn.c_attn.bias", "3HK", part),
        )
    ),
    Weight("out_HKD", "transformer.h.{L}.attn.c_proj.weight", "HK,D"),
    Weight("out_bias_D", "transformer.h.{L}.attn.c_proj.bias", "D"),
    Weight("mlp_scale_D", "transformer.h.{L}.ln_2.weight", "D"),
    Weight("mlp_bias_D", "transformer.h.{L}.ln_2.bias", "D"),
    Weight("up_DF", "transformer.h.{L}.mlp.c_fc.weight", "D,F"),
    Weight("up_bias_F", "transformer.h.{L}.mlp.c_fc.bias", "F"),
    Weight("down_FD", "transformer.h.{L}.mlp.c_proj.weight", "F,D"),
    Weight("down_bias_D", "transformer.h.{L}.mlp.c_proj.bias", "D"),
)
ENDS = [
    Weight("embed_VD", "transformer.wte.weight", "V,D"),
    Weight("position_PD", "transformer.wpe.weight", "P,D"),
    Weight("final_scale_D", "transformer.ln_f.weight", "D"),
    Weight("final_bias_D", "transformer.ln_f.bias", "D"),
]
WIDTHS = Part(
    ("n_inner",),
    lambda given: dict(head_dim=given["n_embd"] // given["n_head"], ff=given.get("n_inner", 4 * given["n_embd"])),
    lambda model: dict(n_inner=model.ff),
)
CLASSIFIER = Part(
    ("n_ctx", "summary_activation", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
    lambda given: {},
    lambda model: {},
)

FAMILY = Family(
    model=GPT2,
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    fields=dict(
        vocab_size="vocab",
        n_layer="layers",
        n_embd="width",
        n_head="heads",
        n_positions="positions",
        layer_norm_epsilon="epsilon",
    ),
    defaults=dict(layer_norm_epsilon=1e-5),
    fixed=dict(
        activation_function=("gelu_new", "gelu_pytorch_tanh"),
        scale_attn_weights=(True,),
        tie_word_embeddings=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        reorder_and_upcast_attn=(False, True),
        add_cross_attention=(False,),
    ),
    parts=(WIDTHS, CLASSIFIER),
    weights=lambda c: ENDS + of_layers(LAYER, c.layers),
    spare=(r"\.attn\.(masked_)?bias$", r"^lm_head\.weight$"),
    prefix="transformer.",
)
