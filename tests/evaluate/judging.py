"""A tiny model that reads bytes, as a judge on any mesh."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import jax

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.data.dataset import Text
from llmjax.data.tokenizer import Bytes
from llmjax.evaluate.likelihood import Judge
from llmjax.mesh import Chip
from llmjax.models.llama import Llama
from llmjax.optim.adamw import AdamW
from llmjax.run import Run
from llmjax.train.loss import NextToken
from llmjax.train.program import Program, make
from meshes import local

RUN = Run(
    model=Llama(vocab=260, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, ff=64, positions=64),
    data=Text(path="corpus", tokenizer=Bytes()),
    optimizer=AdamW(lr=3e-3),
    loss=NextToken(),
    mesh=local.cluster,
    batch=8,
    sequence=64,
    dtype="float32",
)


@functools.cache
def program(layout: str = "dp", devices: int = 1, **changes) -> Program:
    """The run on so many devices, none of them more than a layout asks for."""
    run = dataclasses.replace(RUN, layout=layouts.preset(layout), **changes)
    used, rest = run.layout.axes(), run.layout.rest()
    axes = meshes.fill(meshes.Axes(), devices, used=used, rest=rest, tensor=2)
    return make(run, meshes.device_mesh(axes, jax.devices()[:devices]), Chip("cpu", "cpu"))


@contextlib.contextmanager
def judging(layout: str = "dp", devices: int = 1, **more) -> Iterator[Judge]:
    """A judge of weights that a seed gives, in the context of its program."""
    here = program(layout, devices)
    with here.context():
        yield Judge(here, weights(here), Bytes().build(), **more)


@functools.lru_cache
def weights(here: Program):
    """Weights that a seed gives, on the program's mesh."""
    with here.context():
        return jax.jit(RUN.model.init)(jax.random.key(0))
