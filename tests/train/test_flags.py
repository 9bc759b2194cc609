"""Steps are compiled with their platform's options, and with those only that the installed XLA has."""

import importlib.util

import jax
import pytest

from llmjax import mesh as meshes
from llmjax.mesh import AXES, Axes, Cluster
from llmjax.plan import topology
from llmjax.train import flags
from meshes import chips

ONE = Axes(**dict.fromkeys(AXES, 1))


def test_an_option_that_this_xla_has_not_is_left_out_with_a_warning_and_the_others_stay():
    mesh = meshes.device_mesh(ONE, jax.devices()[:1])
    asked = {"xla_no_such_option": True, "xla_cpu_enable_fast_math": False, "xla_nor_this": 1}
    with pytest.warns(UserWarning, match="xla_no_such_option") as said:
        assert flags.known(asked, mesh) == {"xla_cpu_enable_fast_math": False}
    assert len(said) == 2 and "xla_nor_this" in str(said[1].message)


def test_an_option_with_a_value_that_it_cannot_have_is_not_passed_over():
    mesh = meshes.device_mesh(ONE, jax.devices()[:1])
    with pytest.raises(jax.errors.JaxRuntimeError, match="maybe"):
        flags.known({"xla_cpu_enable_fast_math": "maybe"}, mesh)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="the TPU compiler is not installed")
@pytest.mark.parametrize("chip", [chips.TPU_V5E, chips.TPU_V5P, chips.TPU_V6E], ids=lambda chip: chip.name)
def test_the_tpu_compiler_has_every_option(chip, recwarn):
    cluster = Cluster("four", chip, 4, topology="2x2x1" if chip.torus == 3 else "2x2")
    mesh = meshes.device_mesh(Axes(**dict.fromkeys(AXES, 1) | dict(fsdp=4)), topology.devices(cluster))
    asked = flags.options(chip)
    assert flags.known(asked, mesh) == asked and not recwarn.list
