"""Layers in stages: the numbers of one device, memory bounded by stages under 1F1B, and bubbles as long as they say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.checkpoint.checkpoints import like, named
from llmjax.data.dataset import Synthetic
from llmjax.layout import Pipeline, axes_of
from llmjax.mesh import Axes
from llmjax.models import nn
from llmjax.models.gpt2 import GPT2
from llmjax.models.llama import Llama, LlamaModel
from llmjax.models.pipeline import backward_at, deals, forward_at, ticks
from llmjax.optim.adamw import AdamW
from llmjax.plan.collectives import collectives
from llmjax.run import Run
from llmjax.train import program
from llmjax.train import step as steps
from llmjax.train.loss import NextToken
from meshes import cpu8
from meshes.chips import CPU

FAMILIES = {
    "gpt2": GPT2(vocab=64, layers=4, width=32, heads=4, head_dim=8, ff=64, positions=16),
    "llama": Llama(vocab=64, layers=4, width=32, heads=4, kv_heads=2, head_dim=8, ff=64, positions=16),
    "llama tied": Llama(vocab=64, layers=4, width=32, heads=4, kv_heads=2, head_dim=8, ff=64, positions=16, tied=True),
}
LOSS = NextToken(z=1e-3)
ONE = dict.fromkeys(meshes.AXES, 1)
SCHEDULES = ("gpipe", "circular", "1f1b")


def mesh_of(**sizes: int):
    axes = Axes(**ONE | sizes)
    return meshes.device_mesh(axes, jax.devices()[: int(np.prod(axes.sizes()))])


def batch(segments: bool) -> dict[str, np.ndarray]:
    """Two microbatches of accumulation, each with 8 rows, an uneven mask and, if asked for, several documents a row."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, 64, (2, 8, 17)).astype(np.int32)
    weights = (random.random((2, 8, 16)) < 0.6).astype(np.float32)
    documents = np.sort(random.integers(0, 3, (2, 8, 16)), -1).astype(np.int32)
    parts = {"tokens": tokens[..., :-1], "targets": tokens[..., 1:], "weights": weights}
    return parts | {"segments": documents} if segments else parts


@functools.cache
def weights(family: str):
    with jax.set_mesh(mesh_of()), nn.compute(nn.Compute()):
        return jax.tree.map(np.asarray, jax.jit(FAMILIES[family].init)(jax.random.key(0)))


def places(tree) -> dict[str, tuple]:
    specs = {name: getattr(x.sharding, "spec", ()) for name, x in named(tree).items()}
    return {name: tuple(map(axes_of, spec)) for name, spec in specs.items()}


def gradients(family: str, mesh, how: nn.Compute, segments: bool):
    """(loss, gradients) as NumPy; the gradients lie where the weights do."""
    with jax.set_mesh(mesh), nn.compute(how):
        model = like(jax.eval_shape(FAMILIES[family].init, jax.random.key(0)), mesh)
        model = jax.device_put(weights(family), jax.tree.map(lambda x: x.sharding, model))
        parts = jax.device_put(batch(segments), NamedSharding(mesh, jax.P(None, how.layout.inner["B"])))
        loss, _, grads = jax.jit(functools.partial(steps.gradients, loss=LOSS))(model, parts)
        assert places(grads) == places(model)
    return float(loss), {name: np.asarray(x) for name, x in named(grads).items()}


@functools.cache
def expected(family: str, segments: bool):
    return gradients(family, mesh_of(), nn.Compute(), segments)


@pytest.mark.parametrize(
    ("schedule", "family", "layout", "sizes", "remat", "gather_once", "segments"),
    [
        ("gpipe", "gpt2", "fsdp_tp_sp_pp", dict(stage=2, fsdp=2, tensor=2), "none", True, False),
        ("gpipe", "llama", "fsdp_ring_pp", dict(stage=2, fsdp=2, context=2), "dots", True, True),
        ("gpipe", "llama tied", "cp_pp_vp", dict(stage=4, context=2), "full", False, True),
        ("circular", "gpt2", "fsdp_pp_vp", dict(data=2, stage=2, fsdp=2), "full", True, True),
        ("circular", "llama", "ring_tp_pp", dict(stage=2, context=2, tensor=2), "none", False, True),
        ("1f1b", "gpt2", "fsdp_tp_sp_pp", dict(stage=2, fsdp=2, tensor=2), "full", False, True),
        ("1f1b", "llama", "fsdp_ring_pp", dict(stage=2, fsdp=2, context=2), "none", True, True),
        ("1f1b", "llama tied", "pp_vp", dict(data=2, stage=4), "dots", True, False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_schedule_gives_the_loss_and_gradients_of_one_device(
    schedule, family, layout, sizes, remat, gather_once, segments, capfd
):
    pipeline = Pipeline(schedule, microbatches=4 if sizes["stage"] * sizes.get("data", 1) < 4 else 0)
    how = nn.Compute(layout=layouts.preset(layout), remat=remat, pipeline=pipeline)
    loss, grads = gradients(family, mesh_of(**sizes), how, segments)
    want, expected_grads = expected(family, segments)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    largest = max(np.abs(grad).max() for grad in expected_grads.values())
    for name, grad in expected_grads.items():
        scale = max(np.abs(grad).max(), 1e-3 * largest)
        np.testing.assert_allclose(grads[name], grad, rtol=0, atol=1e-4 * scale, err_msg=f"gradient of {name}")
    assert "rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("schedule", "repeats", "N"), [("gpipe", 1, 4), ("gpipe", 1, 1), ("circular", 3, 4), ("circular", 3, 1)]
)
def test_what_layers_count_is_summed_over_microbatches_and_keeps_its_layer(schedule, repeats, N):
    """As for a router's balance: the gradient goes through what is counted too, and bubbles count nothing."""
    random = np.random.default_rng(0)
    weight_LD, x_BTD = random.normal(size=(6, 4)).astype(np.float32), random.normal(size=(8, 3, 4)).astype(np.float32)

    def layer(weight_D, x_BTD, _):
        x_BTD = jnp.sin(x_BTD + weight_D[None, None])
        return x_BTD, {"tokens": jnp.float32(x_BTD.shape[0]), "sizes": jnp.sum(x_BTD**2, (0, 1))}

    def call(weight_LD, x_BTD):
        x_BTD, sums = nn.scan(weight_LD, x_BTD, None, layer)
        return jnp.sum(x_BTD) + jnp.sum(jnp.cos(sums["sizes"])), (x_BTD, sums)

    def result(mesh, how):
        with jax.set_mesh(mesh), nn.compute(how):
            args = jax.device_put((weight_LD, x_BTD), (how.layout.at_rest("LD"), how.layout.activation("BTD")))
            return jax.jit(jax.value_and_grad(call, has_aux=True))(*args)

    pipeline = Pipeline(schedule, microbatches=N, repeats=repeats)
    found = result(mesh_of(fsdp=2, stage=2), nn.Compute(layout=layouts.fsdp | layouts.pp, pipeline=pipeline))
    (_, (_, sums)), _ = found
    assert sums["sizes"].sharding.spec[0] == "stage"
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5), found, result(mesh_of(), nn.Compute()))


def test_no_tick_of_a_circular_schedule_keeps_a_copy_of_its_weights():
    how = nn.Compute(layout=layouts.pp, pipeline=Pipeline("circular", microbatches=4))

    mesh = meshes.abstract_mesh(Axes(**ONE | {"stage": 2}))

    def saved(weight_LDF, x_BTD):
        def layer(weight_DF, x_BTD, _):
            return jnp.einsum("BTD,DF->BTF", x_BTD, weight_DF), None

        return jax.vjp(lambda w, x: nn.scan(w, x, None, layer)[0], weight_LDF, x_BTD)[1]

    def shape(sizes, place):
        return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=NamedSharding(mesh, place))

    with jax.sharding.use_abstract_mesh(mesh), nn.compute(how):
        args = shape((4, 64, 64), how.layout.at_rest("LDF")), shape((4, 1, 64), how.layout.activation("BTD"))
        kept = sum(x.size for x in jax.tree.leaves(jax.eval_shape(saved, *args)))
    assert kept < 3 * args[0].size, "copies of nine ticks would be more"


class CountingModel(LlamaModel):
    def layer(self, block, x_BTD, segments_BT):
        return block(x_BTD, segments_BT)[0], {"tokens": jnp.float32(x_BTD.size)}


def timetable(schedule: str, stages: int, N: int, laps: int):
    """[(tick, stage, "F" or "B", microbatch, lap)] of all real work, and the ticks of each kind, as the loops run."""
    forwards, both, backwards = ticks(schedule, stages, N, laps)
    work = []
    for tick in range(forwards + both + backwards):
        for stage in range(stages):
            n, lap, real = forward_at(tick, stage, N, laps)
            if real and tick < forwards + both:
                work.append((tick, stage, "F", n, lap))
            if schedule == "1f1b":
                n, real = backward_at(tick, stage, stages, N)
                if real and tick >= forwards:
                    work.append((tick, stage, "B", n, 0))
    return work, (forwards, both, backwards)


@pytest.mark.parametrize(
    ("schedule", "stages", "N", "laps"),
    [
        ("gpipe", 4, 8, 1),
        ("gpipe", 3, 3, 1),
        ("circular", 4, 8, 2),
        ("circular", 2, 3, 5),
        ("1f1b", 4, 8, 1),
        ("1f1b", 2, 9, 1),
    ],
)
def test_bubbles_counted_in_ticks_are_those_of_the_papers(schedule, stages, N, laps):
    work, (forwards, both, backwards) = timetable(schedule, stages, N, laps)
    costs = {"F": 1, "B": 2}  # a backward takes two forwards
    total = forwards + 3 * both + 2 * backwards
    if schedule != "1f1b":  # the backward of these is their forward turned round, by differentiation
        work += [(tick, stage, "B", n, lap) for tick, stage, _, n, lap in work]
    assert len({entry[1:] for entry in work}) == len(work) == 2 * stages * N * laps, "all of the work, and none twice"
    assert len({entry[:3] for entry in work}) == len(work), "one of a kind on a stage in a tick"
    for stage in range(stages):
        busy = sum(costs[kind] for _, where, kind, *_ in work if where == stage)
        assert 1 - busy / total == pytest.approx((stages - 1) / (laps * N + stages - 1), rel=1e-12)


@pytest.mark.parametrize(("schedule", "laps"), [("gpipe", 1), ("circular", 2), ("1f1b", 1)])
def test_work_is_done_in_the_tick_after_what_it_needs(schedule, laps):
    stages, N = 4, 6
    work, _ = timetable(schedule, stages, N, laps)
    at = {entry[1:]: entry[0] for entry in work}
    for (stage, kind, n, lap), tick in at.items():
        if kind == "F" and stage:
            assert at[stage - 1, "F", n, lap] == tick - 1
        if kind == "F" and not stage and lap:
            assert at[stages - 1, "F", n, lap - 1] < tick
        if kind == "B" and stage == stages - 1:
            assert at[stage, "F", n, lap] == tick
        if kind == "B" and stage < stages - 1:
            assert at[stage + 1, "B", n, lap] == tick - 1
            assert tick - at[stage, "F", n, lap] < 2 * stages - 1, "it would have lost its input"


@pytest.mark.parametrize(("stages", "laps"), [(2, 2), (4, 2), (2, 4), (4, 6), (6, 4), (3, 5)])
def test_layers_are_dealt_to_where_laps_use_them_one_group_per_stage_and_round(stages, laps):
    moves = deals(stages, laps)
    for moved in moves:
        for side in zip(*moved, strict=True):
            assert {stage for stage, _ in side} == set(range(stages))
    whole = dict(move for moved in moves for move in moved)
    for group in range(stages * laps):
        assert whole[group // laps, group % laps] == (group % stages, group // stages)


def compiled(schedule: str, microbatches: int, mesh, layout, **how):
    """The compiled gradient of so many microbatches of 2 rows per device."""
    c = Llama(vocab=64, layers=4, width=64, heads=4, kv_heads=4, head_dim=16, ff=128, positions=64)
    place = NamedSharding(mesh, jax.P(None, layout.inner["B"]))
    shape = (1, 2 * microbatches * mesh.shape["fsdp"], 64)
    types = dict(tokens=jnp.int32, targets=jnp.int32, weights=jnp.float32)
    parts = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in types.items()}
    compute = nn.Compute(layout=layout, pipeline=Pipeline(schedule, microbatches, **how))
    with jax.set_mesh(mesh), nn.compute(compute):
        model = like(jax.eval_shape(c.init, jax.random.key(0)), mesh)
        return jax.jit(functools.partial(steps.gradients, loss=NextToken())).lower(model, parts).compile()


def test_memory_under_1f1b_is_bounded_by_stages_and_under_gpipe_grows_with_microbatches():
    mesh = mesh_of(stage=4)
    used = {
        (schedule, N): compiled(schedule, N, mesh, layouts.pp).memory_analysis().temp_size_in_bytes
        for schedule in ("gpipe", "1f1b")
        for N in (4, 8, 16)
    }
    print("\n".join(f"{schedule:6} {N:3} microbatches {size / 2**20:6.2f} MiB" for (schedule, N), size in used.items()))
    stream = 4 * 2 * 64 * 64  # bytes of one microbatch between layers
    assert used["gpipe", 16] - used["gpipe", 8] > 8 * 4 * stream
    assert used["1f1b", 16] - used["1f1b", 4] < stream
    assert used["1f1b", 4] < used["gpipe", 4]


@pytest.mark.parametrize("schedule", ("gpipe", "1f1b"))
def test_weights_are_gathered_once_per_step_or_in_every_tick_as_the_field_says(schedule):
    mesh, layout = mesh_of(stage=2, fsdp=2), layouts.fsdp | layouts.pp

    def exchanged(gather_once: bool, kind: str) -> tuple[int, int]:
        """How many arrays of a kind are exchanged over fsdp (once, in every tick)."""
        found = collectives(compiled(schedule, 4, mesh, layout, gather_once=gather_once), mesh)
        counts = [x.count for x in found if x.kind == kind and "fsdp" in x.axes for _ in x.arrays]
        return counts.count(1), len(counts) - counts.count(1)

    assert exchanged(False, "all-gather")[1] >= 7, "the products' weights of a layer"
    once, in_ticks = exchanged(True, "all-gather")
    assert in_ticks == 0 and 7 <= once <= 12, "the model has twelve weights"
    assert exchanged(False, "all-reduce")[1] >= 1 and exchanged(True, "all-reduce")[1] == 0, "gradients' sums"


def run_of(**fields) -> Run:
    fields = dict(layout=layouts.fsdp | layouts.pp, axes=Axes(stage=2, fsdp=4), batch=16, sequence=16) | fields
    return Run(
        model=FAMILIES["llama"], data=Synthetic(vocab=64), optimizer=AdamW(), loss=LOSS, mesh=cpu8.cluster, **fields
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_is_traced_without_devices_and_keeps_every_array_in_its_place(schedule):
    run = run_of(pipeline=Pipeline(schedule), layout=layouts.preset("fsdp_pp_vp"), batch=4096)
    made = program.make(run, meshes.abstract_mesh(program.resolve(run, 8)), CPU)
    assert made.accumulate == 1, "the pipeline's microbatches are small already"
    state, _ = made.abstract_step()
    before = made.abstract_state()
    assert places(state) == places(before)
    assert {place[0] for place in places(before.model.blocks).values()} == {("stage",)}


def test_layers_are_born_on_their_stage_with_the_weights_they_have_on_one_device():
    c = Llama(vocab=64, layers=8, width=128, heads=4, kv_heads=4, head_dim=32, ff=512, positions=16)
    with jax.set_mesh(mesh_of()), nn.compute(nn.Compute()):
        alone = jax.jit(c.init)(jax.random.key(0))
    with jax.set_mesh(mesh_of(stage=8)), nn.compute(nn.Compute(layout=layouts.pp)):
        born = jax.jit(c.init).lower(jax.random.key(0)).compile()
        staged = born(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, staged, alone)
    whole = sum(x.nbytes for x in jax.tree.leaves(alone))
    used = born.memory_analysis()
    assert used.output_size_in_bytes < whole / 6 and used.temp_size_in_bytes < whole / 2


def test_one_stage_is_the_program_without_a_pipeline():
    def program_of(layout, pipeline):
        mesh = mesh_of(fsdp=2)
        with jax.set_mesh(mesh), nn.compute(nn.Compute(layout=layout, pipeline=pipeline)):
            model = like(jax.eval_shape(FAMILIES["llama"].init, jax.random.key(0)), mesh)
            parts = jax.device_put(batch(True), NamedSharding(mesh, jax.P(None, layout.inner["B"])))
            return jax.jit(functools.partial(steps.gradients, loss=LOSS)).lower(model, parts).as_text()

    plain = program_of(layouts.fsdp, Pipeline())
    assert program_of(layouts.fsdp | layouts.pp, Pipeline("1f1b")) == plain
