"""The PyTorch model that ours is measured beside is the same model."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.models import nn
from llmjax.models.attention import RopeScaling
from llmjax.models.gpt2 import GPT2
from llmjax.models.llama import Llama
from llmjax.train.loss import NextToken

torch = pytest.importorskip("torch", reason="the extra `torch` is not installed")

from llmjax.bench import reference  # noqa: E402  it needs torch

LLAMA = Llama(vocab=61, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ff=48, positions=64)
STRETCHED = dataclasses.replace(LLAMA, tied=True, theta=100.0, scaling=RopeScaling(original=16))
GPT = GPT2(vocab=61, layers=2, width=32, heads=4, head_dim=8, ff=64, positions=64)


@pytest.fixture(autouse=True)
def one_device():
    axes = meshes.fill(meshes.Axes(), 1, used=layouts.dp.axes(), rest="data")
    with jax.set_mesh(meshes.device_mesh(axes, jax.devices()[:1])), nn.compute(nn.Compute()):
        yield


def path(name: str) -> str:
    """Where PyTorch's model keeps what ours calls `query_bias_HK` (query.bias) or `mlp_scale_D` (mlp_norm.weight)."""
    word, *kind = name.split("_")[:-1]
    module = f"{word}_norm" if kind and word in ("attention", "mlp", "final") else word
    return f"{module}.{'bias' if kind == ['bias'] else 'weight'}"


def laid_out(name: str, x: np.ndarray) -> np.ndarray:
    """The array as PyTorch lays it out: matrices as [columns, rows], tables as they are."""
    if "_bias_" in name or "_scale_" in name:
        return x.reshape(-1)
    if name in ("embed_VD", "position_PD"):
        return x
    rows = 2 if name.endswith("HKD") else 1
    return x.reshape(int(np.prod(x.shape[:rows])), -1).T


def pairs(ours, theirs) -> Iterator[tuple[np.ndarray, "torch.nn.Parameter"]]:
    """Every array of a model or of its gradients with the parameter of PyTorch's model that stands for it."""
    for keys, x in jax.tree_util.tree_leaves_with_path(ours):
        *words, name = jax.tree_util.keystr(keys, simple=True, separator=".").removesuffix(".value").split(".")
        layers = (
            [(theirs.blocks[i], part) for i, part in enumerate(np.asarray(x))] if words else [(theirs, np.asarray(x))]
        )
        for module, part in layers:
            yield laid_out(name, part), module.get_parameter(path(name))


@pytest.mark.parametrize("config", [LLAMA, STRETCHED, GPT], ids=["llama", "tied-scaled", "gpt2"])
def test_the_same_weights_give_the_same_loss_and_gradients(config):
    tokens, targets = np.random.default_rng(0).integers(0, config.vocab, (2, 3, 48))
    batch = dict(tokens=np.int32(tokens), targets=np.int32(targets), weights=np.ones((3, 48), np.float32))
    ours = config.init(jax.random.key(0))
    (total, _), slopes = jax.value_and_grad(NextToken(), has_aux=True)(ours, jax.tree.map(jax.numpy.asarray, batch))
    theirs = reference.Model(config, sequence=48)
    copied = list(pairs(ours, theirs))
    assert {id(weight) for _, weight in copied} == {id(weight) for weight in theirs.parameters()}
    with torch.no_grad():
        for x, weight in copied:
            weight.copy_(torch.tensor(x))
    mean = theirs(torch.from_numpy(tokens), torch.from_numpy(targets))
    mean.backward()
    assert mean.item() == pytest.approx(float(total) / tokens.size, rel=1e-5)
    found = [(slope / tokens.size, weight.grad.numpy()) for slope, weight in pairs(slopes, theirs)]
    largest = max(np.abs(slope).max() for slope, _ in found)  # that of a key's bias is 0 but for rounding
    for slope, grad in found:
        np.testing.assert_allclose(grad, slope, rtol=1e-4, atol=1e-6 * largest)
