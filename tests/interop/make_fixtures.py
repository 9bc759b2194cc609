"""Makes the checkpoints of tests/interop/fixtures: tiny random ones, written by transformers, with what it computes.

    python tests/interop/make_fixtures.py

needs torch and transformers (2.13.0 and 5.24.0 were used). Every folder holds a checkpoint and expected.npz: `tokens`
int32 [2, 24], `logits` float32 of them, and `grad.NAME` of the mean next-token loss for a few tensors.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
import transformers

HERE = Path(__file__).parent / "fixtures"
SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, head_dim=8, bos_token_id=1, eos_token_id=2,
    pad_token_id=63,  # whose embedding torch gives no gradient: it is not among the tokens
)  # fmt: skip
LLAMA31 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=16)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
GPT_OSS_YARN = YARN | dict(truncate=False, beta_fast=32.0, beta_slow=1.0, rope_theta=150_000.0)
LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=2.0)
GEMMA3_ROPE = dict(
    sliding_attention=dict(rope_type="default", rope_theta=1e4), full_attention=dict(LINEAR, rope_theta=1e6, factor=8.0)
)
GPT2 = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2)
MOE = dict(intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)
QWEN_MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
DEEPSEEK = {name: size for name, size in SIZES.items() if name != "head_dim"} | dict(
    num_key_value_heads=4,
    n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3, q_lora_rank=12, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, moe_intermediate_size=8, n_shared_experts=2,
    first_k_dense_replace=1,
)  # fmt: skip

CASES = {
    "llama_grouped": ("Llama", SIZES),
    "llama_tied_scaled": ("Llama", SIZES | dict(tie_word_embeddings=True, rope_parameters=LLAMA31)),
    "llama_all_heads_linear": ("Llama", SIZES | dict(num_key_value_heads=4, rope_parameters=LINEAR)),
    "llama_wide_heads_yarn": ("Llama", SIZES | dict(head_dim=16, num_key_value_heads=1, rope_parameters=YARN)),
    "gpt2": ("GPT2", GPT2),
    "gpt2_wide": ("GPT2", GPT2 | dict(n_inner=40, n_head=2)),
    "mixtral": ("Mixtral", SIZES | MOE),
    "mixtral_tied_top3": ("Mixtral", SIZES | MOE | dict(num_experts_per_tok=3, tie_word_embeddings=True)),
    "mistral_window": ("Mistral", SIZES | dict(sliding_window=7)),
    "mistral_whole": ("Mistral", SIZES | dict(sliding_window=None, tie_word_embeddings=True)),
    "qwen2_tied": ("Qwen2", SIZES | dict(tie_word_embeddings=True)),
    "qwen2_yarn": ("Qwen2", SIZES | dict(rope_parameters=YARN)),
    "qwen3": ("Qwen3", SIZES | dict(head_dim=16)),
    "qwen3_tied": ("Qwen3", SIZES | dict(tie_word_embeddings=True)),
    "qwen3_moe": ("Qwen3Moe", SIZES | QWEN_MOE | dict(norm_topk_prob=True)),
    "qwen3_moe_shares": ("Qwen3Moe", SIZES | QWEN_MOE | dict(norm_topk_prob=False, head_dim=16)),
    "olmo2": ("Olmo2", SIZES),
    "olmo2_all_heads": ("Olmo2", SIZES | dict(num_key_value_heads=4, tie_word_embeddings=True)),
    "gemma2": ("Gemma2", SIZES | dict(sliding_window=6, query_pre_attn_scalar=12, attn_logit_softcapping=2.0,
                                      final_logit_softcapping=3.0)),
    "gemma2_plain": ("Gemma2", SIZES | dict(num_hidden_layers=3, sliding_window=5, attn_logit_softcapping=None,
                                            final_logit_softcapping=None)),
    "gemma3": ("Gemma3Text", SIZES | dict(num_hidden_layers=7, sliding_window=6, query_pre_attn_scalar=12,
                                          rope_parameters=GEMMA3_ROPE, intermediate_size=32)),
    "gemma3_short_turns": ("Gemma3Text", SIZES | dict(num_hidden_layers=5, sliding_window=4, sliding_window_pattern=3,
                                                      intermediate_size=32)),
    "gpt_oss": ("GptOss", SIZES | MOE | dict(sliding_window=6, rope_parameters=GPT_OSS_YARN)),
    "gpt_oss_odd": ("GptOss", SIZES | MOE | dict(intermediate_size=16, num_hidden_layers=3, sliding_window=5,
                                                 num_local_experts=3, swiglu_limit=0.5)),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK | dict(rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0))),
    "deepseek_v3_plain": ("DeepseekV3", DEEPSEEK | dict(q_lora_rank=None, first_k_dense_replace=0, n_group=1,
                                                        topk_group=1, rope_interleave=False, norm_topk_prob=False)),
}  # fmt: skip
SHARDED = {"llama_grouped"}  # written as several files with an index
FLOAT32 = {"llama_grouped", "gpt2", "gemma3_short_turns"}  # the others are written in bfloat16
GRADIENTS = (
    "embed",
    "wte",
    "q_proj",
    "c_attn",
    "norm",
    "router",
    "gate",
    "sinks",
    "experts.1.",
    "down_proj",
    "ln_1",
    "_a_",
    "_b_",
)


def config_of(family: str, fields: dict):
    return getattr(transformers, f"{family}Config")(**fields)


def model_of(family: str, fields: dict) -> torch.nn.Module:
    """A model with weights and scales that are all random, so that a wrong one shows."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family, fields), attn_implementation="eager")
    model = model.float().eval()
    with torch.no_grad():
        for _name, weight in model.named_parameters():
            vector = weight.ndim < 2
            weight.add_(torch.randn_like(weight) * (0.2 if vector else 0.1))
            weight.copy_(weight.bfloat16())
        for name, bias in model.named_buffers():
            if "correction_bias" in name:
                bias.copy_((0.1 * torch.randn_like(bias)).bfloat16())
    return model


def in_files(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The gradients by the names and in the shapes that the weights have in files."""
    with tempfile.TemporaryDirectory() as folder:
        grads = {name: x.grad for name, x in model.named_parameters()}
        model.save_pretrained(folder, state_dict=grads | dict(model.named_buffers()))
        return safetensors.numpy.load_file(Path(folder) / "model.safetensors")


def expected(model: torch.nn.Module, vocab: int) -> dict[str, np.ndarray]:
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, vocab - 1, (2, 24)))
    logits = model(tokens, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    found = dict(tokens=tokens.numpy().astype(np.int32), logits=logits.detach().numpy(), loss=loss.detach().numpy())
    for name, grad in in_files(model).items():
        first = ".0." in name or (".layers." not in name and ".h." not in name)
        if first and any(word in name for word in GRADIENTS) and grad.size < 2100 and "correction_bias" not in name:
            found[f"grad.{name}"] = grad
    return found


def main(chosen: list[str]) -> None:
    for case in chosen or CASES:
        family, fields = CASES[case]
        shutil.rmtree(HERE / case, ignore_errors=True)
        model = model_of(family, fields)
        found = expected(model, fields["vocab_size"])
        model.to(torch.float32 if case in FLOAT32 else torch.bfloat16)
        model.save_pretrained(HERE / case, max_shard_size="20KB" if case in SHARDED else "5GB")
        np.savez_compressed(HERE / case / "expected.npz", **found)


if __name__ == "__main__":
    main(sys.argv[1:])
