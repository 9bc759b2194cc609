"""Any run is a valid plan or is refused in a sentence; any damage to a checkpoint is found before it is used."""

import dataclasses
import re
import time
import typing
from collections import Counter
from pathlib import Path
from types import NoneType, UnionType

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.checkpoint import manifest
from llmjax.checkpoint.checkpoints import Checkpoints
from llmjax.checkpoint.retention import Retention
from llmjax.commands.train import acceptable
from llmjax.data.dataset import Synthetic
from llmjax.errors import USAGE, Refused
from llmjax.models.attention import RopeScaling
from llmjax.models.gpt2 import GPT2
from llmjax.models.llama import Llama
from llmjax.models.mixtral import Mixtral
from llmjax.optim import adafactor, adamw, lion, schedules, sgd
from llmjax.run import Run
from llmjax.trackers.mlflow import MLflow
from llmjax.trackers.tensorboard import TensorBoard
from llmjax.trackers.wandb import WandB
from llmjax.tracking import Tracker
from llmjax.train.loss import NextToken
from llmjax.train.program import make, resolve
from llmjax.train.routed import RoutedNextToken
from meshes import chips, cpu8, local, v5e_256, v5p_64

SIZES = dict(vocab=512, layers=2, width=64, heads=8, head_dim=8, ff=256, positions=256)
MODELS = (
    Llama(**SIZES, kv_heads=8),
    Llama(**SIZES, kv_heads=2, tied=True, scaling=RopeScaling()),
    GPT2(**SIZES),
    Mixtral(**SIZES, kv_heads=8, experts=8),
)
SCHEDULES = (schedules.Constant(), schedules.Cosine(), schedules.Linear(), schedules.WSD())
OPTIMIZERS = (adamw.AdamW(), lion.Lion(), sgd.SGD(), adafactor.Adafactor())
MESHES = (cpu8.cluster, cpu8.cluster, v5p_64.cluster, v5e_256.cluster, local.cluster)
SMALL = (0, 1, 2, 3, 4, 6, 8, 16, 64, 256)
HUGE = (-1, -(10**9), 7919, 10**6, 2**31 - 1, 2**31, 2**40, 2**63, 2**64, 10**30)
FLOATS = (0.0, -1.0, 1e-30, 0.5, 1.0, 2.5, 1e9, 1e38, 1e300, float("nan"), float("inf"), -float("inf"))


def values(kind) -> some.SearchStrategy | None:
    """Values that the command line gives to a field of this type; None where it gives none."""
    if kind is bool:
        return some.booleans()
    if kind is int:
        return some.sampled_from(SMALL) | some.sampled_from(HUGE) | some.integers()
    if kind is float:
        return some.sampled_from(FLOATS) | some.floats()
    if kind is str:
        return some.sampled_from(["a", "", "../x", "runs", "-x", "a b", "\0", "x" * 300]) | some.text(max_size=8)
    if typing.get_origin(kind) is typing.Literal:
        return some.sampled_from(typing.get_args(kind))
    if kind is Tracker:
        return some.sampled_from([TensorBoard(), WandB(project="a b", mode="online"), MLflow(store="\0")])
    if typing.get_origin(kind) is tuple:
        return some.lists(values(typing.get_args(kind)[0]), max_size=3).map(tuple)
    if typing.get_origin(kind) in (UnionType, typing.Union) and NoneType in typing.get_args(kind):
        return some.none()
    return None


def fields(value, path: tuple[str, ...] = ()):
    """(path, strategy) of every field of a dataclass, those inside its fields included."""
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        inner, where = getattr(value, field.name), (*path, field.name)
        if where in (("mesh",), ("layout",), ("fallback_mesh",)):
            continue
        if dataclasses.is_dataclass(inner):
            yield from fields(inner, where)
        elif (strategy := values(hints[field.name])) is not None:
            yield where, strategy


def changed(value, path: tuple[str, ...], new):
    name, *inner = path
    new = changed(getattr(value, name), tuple(inner), new) if inner else new
    return dataclasses.replace(value, **{name: new})


@some.composite
def runs(draw) -> tuple[Run, list[tuple[tuple[str, ...], typing.Any]]]:
    """A run that is often possible, and some of its fields with any value at all."""
    model = draw(some.sampled_from(MODELS))
    loss = draw(
        some.sampled_from([NextToken(), RoutedNextToken() if isinstance(model, Mixtral) else NextToken(z=1e-4)])
    )
    optimizer = draw(some.sampled_from(OPTIMIZERS))
    layout = "_".join(draw(some.lists(some.sampled_from(sorted(layouts.KINDS)), min_size=1, max_size=3, unique=True)))
    run = Run(
        model=model,
        data=Synthetic(vocab=64),
        optimizer=dataclasses.replace(optimizer, schedule=draw(some.sampled_from(SCHEDULES))),
        loss=loss,
        mesh=draw(some.sampled_from(MESHES)),
        fallback_mesh=draw(some.sampled_from([None, cpu8.cluster])),
        layout=layouts.preset(layout),
        batch=draw(some.sampled_from([256, 256, 512, 64, 8])),
        sequence=draw(some.sampled_from([64, 128, 256])),
        name="fuzzed",
    )
    if draw(some.integers(0, 4)) == 0:
        run = changed(run, ("local", "every"), 10)
    every = dict(fields(run))
    parts = some.sampled_from(sorted({path[:-1] for path in every}))  # so that a part with few fields is no rarity
    within = parts.flatmap(lambda part: some.sampled_from(sorted(path for path in every if path[:-1] == part)))
    paths = draw(some.lists(within, min_size=2, max_size=6, unique_by=lambda path: path))
    ordered = sorted(paths, key=len, reverse=True)  # a field inside another comes first: the other may become none
    return run, [(path, draw(every[path])) for path in ordered]


def outcome(run: Run, changes) -> str:
    """What comes of a run on its cluster, with no device; anything but a refusal of the documented form is raised."""
    try:
        for path, value in changes:
            run = changed(run, path, value)
        acceptable(run)
        mesh = meshes.abstract_mesh(resolve(run, run.mesh.chips or 1))
        program = make(run, mesh, run.mesh.chip or chips.CPU)
        program.abstract_step()
        run.data.open(run.sequence, Path("nowhere"))
    except Refused as refused:
        assert refused.code == USAGE and re.fullmatch(r"[^\n]+: [^\n]+\.", str(refused)), str(refused)
        return "refused"
    return "valid"


def fuzz(cases: int) -> Counter:
    found: Counter = Counter()

    @settings(max_examples=cases, derandomize=True, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(runs())
    def case(drawn):
        found[outcome(*drawn)] += 1

    case()
    return found


@pytest.mark.fast
def test_F4_forty_random_runs_are_valid_plans_or_refused_in_a_sentence():
    found = fuzz(40)
    assert found.total() >= 40 and min(found["valid"], found["refused"]) > 4, found


@pytest.mark.faults
def test_F4_five_hundred_random_runs_are_valid_plans_or_refused_in_a_sentence(capsys):
    found = fuzz(500)
    with capsys.disabled():
        print(f"\nF4: {found['valid']} of {found.total()} random runs are valid plans, {found['refused']} are refused")
    assert found.total() >= 500 and min(found["valid"], found["refused"]) > 75, found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    with Checkpoints(folder, Retention(2)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"w": jnp.arange(3000.0), "step": jnp.asarray(step)}, {"tokens": step})
    return folder


def test_K_every_damage_to_any_range_of_any_file_of_a_checkpoint_is_found_before_it_is_used(checkpoint, capsys):
    step = checkpoint / "2"
    paths = sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size)
    found: Counter = Counter()

    @settings(max_examples=400, derandomize=True, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(some.data())
    def case(data):
        path = data.draw(some.sampled_from(paths))
        content = path.read_bytes()
        start = data.draw(some.integers(0, len(content) - 1))
        end = data.draw(some.integers(start + 1, min(len(content), start + 64)) | some.just(len(content)))
        new = data.draw(some.binary(max_size=8) | some.binary(min_size=end - start, max_size=end - start) | some.none())
        if new is None:  # one bit
            end, new = start + 1, bytes([content[start] ^ 1 << data.draw(some.integers(0, 7))])
        harmed = content[:start] + new + content[end:]
        if harmed == content:
            return
        path.write_bytes(harmed)
        try:
            found["tried"] += 1
            found["detected"] += manifest.damage(step) is not None
        finally:
            path.write_bytes(content)

    case()
    with capsys.disabled():
        print(f"\nK: {found['detected']} of {found['tried']} damages to a checkpoint detected")
    assert found["detected"] == found["tried"] > 350
    assert manifest.damage(step) is None


def test_K_a_damaged_checkpoint_is_passed_over_for_the_one_before_whatever_file_it_is(checkpoint):
    random = np.random.default_rng(0)
    for path in sorted(path for path in (checkpoint / "2").rglob("*") if path.is_file() and path.stat().st_size):
        content = path.read_bytes()
        at = int(random.integers(len(content)))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << random.integers(8)]) + content[at + 1 :])
        with Checkpoints(checkpoint, say=lambda line: None) as checkpoints:
            assert checkpoints.newest_verified() == 1, path
        path.write_bytes(content)


@pytest.mark.parametrize("field", ["steps", "batch", "sequence", "accumulate", "model.layers", "model.width",
                                   "model.vocab", "pipeline.microbatches", "pipeline.repeats", "axes.data",
                                   "local.every", "local.fragments", "data.vocab", "data.rows"])  # fmt: skip
def test_F4_a_huge_number_is_answered_at_once(field):
    """What is counted or looked for one by one would take for ever."""
    run = Run(MODELS[0], Synthetic(vocab=64), OPTIMIZERS[0], NextToken(), cpu8.cluster, name="huge",
              layout=layouts.preset("pp" if field.startswith(("pipeline", "batch")) else "dp"))  # fmt: skip
    for value in (2**31 - 1, 2**40, 10**30):
        began = time.monotonic()
        assert outcome(run, [(tuple(field.split(".")), value)]) in ("valid", "refused")
        assert time.monotonic() - began < 60
