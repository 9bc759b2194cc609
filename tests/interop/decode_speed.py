"""Tokens per second of greedy decoding on this machine's CPU: ours with a cache and without, and transformers'.

    uv run --extra transformers python tests/interop/decode_speed.py

The same random Llama (6 layers, 384 wide, 12.2 M parameters, float32) continues the same prompts, 32 tokens each, by
256. Each way is run once before it is timed; the best of three times is shown, but of one without a cache, which takes
minutes. All must give the same tokens.
"""

import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llmjax import mesh as meshes
from llmjax.checkpoint.checkpoints import like
from llmjax.evaluate.generate import Sampling, complete
from llmjax.interop import folder
from llmjax.models import nn
from llmjax.train.program import UNROLLED

SHAPE = dict(vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
             num_key_value_heads=6, max_position_embeddings=1024)  # fmt: skip
PROMPT, NEW = 32, 256


@functools.partial(jax.jit, static_argnums=2)
def without_cache(model, tokens_BT: jax.Array, start: int) -> jax.Array:
    """Every token runs the whole sequence again."""

    def turn(at, tokens_BT):
        likeliest_B = jnp.argmax(jax.reshard(model(tokens_BT), jax.P(None, None, None))[:, at - 1], -1)
        return tokens_BT.at[:, at].set(likeliest_B.astype(jnp.int32))

    return jax.lax.fori_loop(start, tokens_BT.shape[1], turn, tokens_BT)


def timed(call: Callable[[], np.ndarray], tries: int = 3) -> tuple[np.ndarray, float]:
    """(tokens, seconds)."""
    tokens, seconds = call(), []
    for _ in range(tries):
        begun = time.perf_counter()
        tokens = call()
        seconds.append(time.perf_counter() - begun)
    return tokens, min(seconds)


def ours(path: Path, prompts: np.ndarray) -> dict[str, tuple[np.ndarray, float]]:
    found, mesh = folder.read(path), meshes.device_mesh(meshes.Axes(1, 1, 1, 1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh), nn.compute(nn.Compute(unroll=UNROLLED)):
        model = found.load(like(jax.eval_shape(found.model.init, jax.random.key(0)), mesh))
        padded = np.pad(prompts, ((0, 0), (0, NEW))).astype(np.int32)
        how = Sampling(tokens=NEW)
        cached = timed(lambda: np.array(complete(model, prompts.tolist(), how, positions=found.model.positions)))
        again = timed(lambda: np.asarray(without_cache(model, padded, PROMPT))[:, PROMPT:], tries=1)
    return {"llmjax": cached, "llmjax without a cache": again}


def theirs(path: Path, prompts: np.ndarray) -> tuple[np.ndarray, float]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens = torch.from_numpy(prompts)
    settings = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.inference_mode():
        mask = torch.ones_like(tokens)
        return timed(lambda: model.generate(tokens, attention_mask=mask, **settings)[:, PROMPT:].numpy())


def main() -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, initializer_range=0.2, tie_word_embeddings=False)
    with tempfile.TemporaryDirectory() as scratch:
        transformers.LlamaForCausalLM(config).save_pretrained(scratch)
        for rows in (1, 8):
            prompts = np.random.default_rng(rows).integers(0, SHAPE["vocab_size"], (rows, PROMPT))
            found = ours(Path(scratch), prompts) | {"transformers": theirs(Path(scratch), prompts)}
            reference = found["transformers"][0]
            for name, (tokens, seconds) in found.items():
                same = np.mean(tokens == reference)
                rate = f"{rows * NEW / seconds:8,.0f} tokens/s"
                print(f"{rows} at once   {name:<22} {rate}   {same:.1%} of its tokens are transformers'", flush=True)


if __name__ == "__main__":
    main()
