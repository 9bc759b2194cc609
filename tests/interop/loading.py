"""Checkpoints of the fixtures, on meshes."""

from pathlib import Path

import jax
import numpy as np

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.checkpoint.checkpoints import like
from llmjax.interop import folder
from llmjax.models import nn

FIXTURES = Path(__file__).parent / "fixtures"
CASES = sorted(path.name for path in FIXTURES.iterdir())


def on_mesh(layout: str = "dp", **axes: int):
    """(mesh, Compute) for a layout on so many devices."""
    sizes = meshes.Axes(**(dict.fromkeys(meshes.AXES, 1) | axes))
    mesh = meshes.device_mesh(sizes, jax.devices()[: int(np.prod(sizes.sizes()))])
    return mesh, nn.Compute(layout=layouts.preset(layout))


def loaded(case: str, layout: str = "dp", **axes: int):
    """(what the folder says, the model on a mesh)."""
    found, (mesh, how) = folder.read(FIXTURES / case), on_mesh(layout, **axes)
    with jax.set_mesh(mesh), nn.compute(how):
        return found, found.load(like(jax.eval_shape(found.model.init, jax.random.key(0)), mesh))
