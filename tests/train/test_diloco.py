"""Local SGD: workers train alone, exchange what they changed, and little crosses the axis between them."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from llmjax import cli
from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.checkpoint.checkpoints import Checkpoints, like, named
from llmjax.checks import check
from llmjax.data.dataset import Synthetic
from llmjax.errors import Refused
from llmjax.mesh import Axes
from llmjax.models.llama import Llama
from llmjax.optim.adamw import AdamW
from llmjax.optim.schedules import Constant
from llmjax.optim.sgd import SGD
from llmjax.plan.collectives import collectives
from llmjax.run import DiLoCo, Run
from llmjax.train import diloco
from llmjax.train import step as steps
from llmjax.train.loss import NextToken
from llmjax.train.program import Program, bytes_per_device, make
from llmjax.train.resume import restore
from meshes import chips, cpu8

TINY = Run(
    model=Llama(vocab=64, layers=2, width=32, heads=4, kv_heads=4, head_dim=8, ff=64, positions=16),
    data=Synthetic(vocab=64),
    optimizer=AdamW(lr=3e-3),
    loss=NextToken(),
    mesh=cpu8.cluster,
    axes=Axes(2, 1, 2, 1, 1, 2),
    layout=layouts.fsdp_tp,
    steps=10,
    batch=8,
    sequence=16,
    accumulate=1,
    name="tiny",
)
TWO = Axes(2, 1, 1, 1, 1, 1)
EVERY_4 = dataclasses.replace(TINY, local=DiLoCo(every=4))
STREAMED = dataclasses.replace(TINY, local=DiLoCo(every=4, fragments=2))


@functools.cache
def program(run: Run) -> Program:
    devices = int(np.prod(run.axes.sizes()))
    return make(run, meshes.device_mesh(run.axes, jax.devices()[:devices]), chips.CPU)


def batch(program: Program, step: int):
    """Rows in which most tokens follow from the one before."""
    random, rows = np.random.default_rng(step), []
    for t in range(17):
        rows.append(random.integers(0, 64, 8) if t == 0 else (5 * rows[-1] + 3 + (random.random(8) < 0.1)) % 64)
    rows = np.stack(rows, 1).astype(np.int32)[None]
    parts = dict(tokens=rows[..., :-1], targets=rows[..., 1:], weights=np.ones((1, 8, 16), np.float32))
    return jax.device_put(parts, program.batch_sharding())


@functools.cache
def compiled(run: Run) -> jax.stages.Compiled:
    """The step of a run: what is read and what is run are one program."""
    with program(run).context():
        return program(run).step.lower(program(run).abstract_state(), program(run).abstract_batch()).compile()


def start(run: Run):
    with program(run).context():
        return program(run).init(jax.random.key(0))


def train(run: Run, state, start: int, stop: int):
    """(state, losses, each the mean over workers) of steps `start` to `stop - 1`."""
    losses = []
    for step in range(start, stop):
        state, metrics = compiled(run)(state, batch(program(run), step))
        losses.append(diloco.mean(metrics, "loss"))
    return state, losses


def numbers(tree) -> dict[str, np.ndarray]:
    return {name: np.array(x) for name, x in named(tree).items()}


def compiled_exchange(run: Run) -> jax.stages.Compiled:
    """An exchange of everything."""
    state = program(run).abstract_state()
    [whole] = diloco.fragments(state.model, 1)
    with program(run).context():
        return jax.jit(functools.partial(diloco.exchange, part=whole, how=run.local)).lower(state).compile()


def crossing(program: jax.stages.Compiled, run: Run) -> list[tuple[str, str, float]]:
    """(computation, dtype, bytes that a device sends) of every array in a collective that joins several workers."""
    found = [x for x in collectives(program, meshes.abstract_mesh(run.axes)) if diloco.WORKERS in x.axes or not x.axes]
    return [(x.computation, a.dtype, x.count * x.sent * a.bytes / x.bytes) for x in found for a in x.arrays]


def branches(program: jax.stages.Compiled, run: Run) -> list[str]:
    """The computations to choose among after a step: no exchange, each fragment, and all of them if several.

    The step has another choice, whether to take the update, which joins no workers.
    """
    found = re.findall(r"(?:branch_computations=\{(.*?)\}|(true_computation=.*))", program.as_text())
    choices = [re.findall(r"%([\w.]+)", "".join(names)) for names in found]
    joining = {computation for computation, *_ in crossing(program, run)}
    [exchanges] = [names for names in choices if joining & set(names)]
    return exchanges


def held(run: Run) -> int:
    """Bytes of the model on one device."""
    return bytes_per_device(program(run).abstract_state().model, program(run).mesh)


def test_between_exchanges_nothing_crosses_data_and_an_exchange_sends_the_parameters_once():
    found = crossing(compiled(EVERY_4), EVERY_4)
    none, exchange = branches(compiled(EVERY_4), EVERY_4)
    assert {computation for computation, *_ in found} == {exchange} != {none}
    assert {dtype for _, dtype, _ in found} == {"f32"}
    assert sum(sent for *_, sent in found) == held(EVERY_4)  # 2 (W - 1) / W of it, with two workers


def test_bytes_over_data_per_step_are_those_of_synchronous_training_divided_by_every():
    local = dataclasses.replace(EVERY_4, layout=layouts.dp, axes=TWO)
    synchronous = dataclasses.replace(local, local=DiLoCo(every=0))
    sums = 4 * 2  # the loss and its weight, whose mean is known to nobody while workers are alone
    per_step = sum(sent for *_, sent in crossing(compiled(synchronous), synchronous)) - sums
    exchange = sum(sent for *_, sent in crossing(compiled(local), local))
    assert exchange / local.local.every == per_step / local.local.every == held(local) / 4


@pytest.mark.parametrize("axes", [TINY.axes, Axes(4, 1, 1, 1, 1, 2)], ids=["two workers", "four workers"])
def test_compressed_changes_are_a_half_and_a_quarter_of_the_bytes(axes):
    run = dataclasses.replace(TINY, axes=axes)
    whole = held(run) * 2 * (axes.data - 1) / axes.data
    for delta, dtype, share in (("float32", "f32", 1), ("bfloat16", "u16", 2), ("int8", "s8", 4)):
        run = dataclasses.replace(run, local=DiLoCo(every=4, delta=delta))
        sent = crossing(compiled_exchange(run), run)
        assert sum(size for _, kind, size in sent if kind == dtype) == whole / share
        scales = [size for _, kind, size in sent if kind != dtype]
        tensors = len(jax.tree.leaves(program(run).abstract_state().model))
        assert sum(scales) <= (delta == "int8") * tensors * 8


def test_an_exchange_sends_the_fragment_that_is_due_and_each_once_in_every_steps():
    run = STREAMED
    none, *parts, everything = branches(compiled(run), run)
    sent = {
        name: sum(size for at, _, size in crossing(compiled(run), run) if at == name)
        for name in branches(compiled(run), run)
    }
    assert sent[none] == 0 and sent[everything] == held(run) == sum(sent[part] for part in parts)
    assert max(sent[part] for part in parts) < 0.6 * held(run)
    state = start(run)
    before = numbers(state.model)
    stacked, layers, changed = [name for name in before if name.startswith("blocks.")], range(len(parts)), []
    for step in range(8):
        state, _ = train(run, state, step, step + 1)
        after = numbers(state.model)
        changed.append(
            {name for name in before if name not in stacked and (after[name] != before[name]).any()}
            | {(name, i) for name in stacked for i in layers if (after[name][i] != before[name][i]).any()}
        )
        before = after
    assert [bool(found) for found in changed] == [False, True, False, True] * 2
    first, second = changed[1], changed[3]
    assert first == changed[5] and second == changed[7] and not first & second
    assert first | second == set(before) - set(stacked) | {(name, i) for name in stacked for i in layers}
    assert first >= {(name, 0) for name in stacked} and second >= {(name, 1) for name in stacked}


def test_workers_differ_between_exchanges_and_agree_after_one_and_after_the_last_step():
    state = start(EVERY_4)
    for step in range(10):
        state, _ = train(EVERY_4, state, step, step + 1)
        models, model = numbers(state.opt.models), numbers(state.model)
        apart = [name for name, x in models.items() if (x[0] != x[1]).any()]
        if step + 1 in (4, 8, 10):
            assert not apart
            for name, x in models.items():
                np.testing.assert_array_equal(x[0], model[name], err_msg=name)
        else:
            assert len(apart) == len(models)


def test_every_step_with_plain_averaging_is_synchronous_training():
    plain = dict(optimizer=SGD(lr=0.3, momentum=0, schedule=Constant()), clip=0.0)
    synchronous = dataclasses.replace(TINY, **plain)
    local = dataclasses.replace(synchronous, local=DiLoCo(every=1, lr=1, momentum=0))
    expected, found = start(synchronous), start(local)
    expected, losses = train(synchronous, expected, 0, 10)
    found, local_losses = train(local, found, 0, 10)
    assert losses[-1] < 0.98 * losses[0], "it does not learn, so the curve says nothing"
    np.testing.assert_allclose(local_losses, losses, rtol=1e-6)
    model = numbers(expected.model)
    for name, x in numbers(found.model).items():
        np.testing.assert_allclose(x, model[name], rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("layout", "axes"), [("fsdp_tp_sp", TINY.axes), ("tp_ring", Axes(2, 1, 1, 1, 2, 2))])
def test_what_cuts_a_worker_changes_nothing_and_nothing_is_gathered_at_a_border(layout, axes, capfd):
    """A border is that of a worker, or of a ring inside: there an array whose dims other axes cut stays cut."""
    run = dataclasses.replace(EVERY_4, layout=layouts.preset(layout), axes=axes)
    alone = dataclasses.replace(EVERY_4, layout=layouts.dp, axes=TWO)
    _, losses = train(alone, start(alone), 0, 10)
    _, cut_losses = train(run, start(run), 0, 10)
    np.testing.assert_allclose(cut_losses, losses, rtol=1e-5)
    assert "rematerialization" not in capfd.readouterr().err
    found = collectives(compiled(run), program(run).mesh)
    assert found
    assert not [x for x in found if re.search(r"shard_map(?![/\w])", x.source)]


def test_a_run_stopped_between_exchanges_continues_bit_for_bit_and_on_other_devices_of_a_worker(tmp_path):
    whole, losses = train(EVERY_4, start(EVERY_4), 0, 10)
    state, _ = train(EVERY_4, start(EVERY_4), 0, 6)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(6, state, {})
        checkpoints.wait()
        state = checkpoints.restore(6, like(program(EVERY_4).abstract_state(), program(EVERY_4).mesh))
        other = dataclasses.replace(EVERY_4, layout=layouts.dp, axes=TWO)
        moved = checkpoints.restore(6, like(program(other).abstract_state(), program(other).mesh))
    state, again = train(EVERY_4, state, 6, 10)
    assert again == losses[6:]
    expected = numbers(whole)
    for name, x in numbers(state).items():
        np.testing.assert_array_equal(x, expected[name], err_msg=name)
    _, elsewhere = train(other, moved, 6, 10)
    np.testing.assert_allclose(elsewhere, losses[6:], rtol=1e-5)


def test_another_number_of_workers_is_refused_when_a_run_continues():
    checkpoints = types.SimpleNamespace(newest_verified=lambda: 6, facts=lambda step: dict(mesh=dict(data=4)))
    ledger = types.SimpleNamespace(checkpoints=checkpoints, records=None)
    with pytest.raises(Refused, match=r"axes.data is 2, but checkpoint 6 .* 4 workers .* --axes.data 4") as refusal:
        restore(program(EVERY_4), types.SimpleNamespace(fingerprint="same"), ledger)
    assert refusal.value.code == 2


def exchanged(how: DiLoCo, axes: Axes, start: np.ndarray, moves: np.ndarray):
    """(model, momentum) after each of some exchanges; before each, every worker moves: [exchanges, W, ...]."""
    mesh = meshes.device_mesh(axes, jax.devices()[: int(np.prod(axes.sizes()))])
    place = jax.P("fsdp", "tensor")
    call, found = jax.jit(functools.partial(diloco.exchange, part=[...], how=how)), []
    with jax.set_mesh(mesh):
        model, momentum = jax.device_put((start, np.zeros_like(start)), place)
        models = jax.device_put(np.stack([start] * axes.data), jax.P("data", *place))
        for move in moves:
            models = models + jax.device_put(move, jax.P("data", *place))
            state = call(steps.State(jnp.int32(0), model, diloco.Outer(momentum, models, ())))
            model, momentum, models = state.model, state.opt.momentum, state.opt.models
            np.testing.assert_array_equal(models, np.stack([np.asarray(model)] * axes.data))
            found.append(np.asarray(model))
    return found


def moves(exchanges: int, workers: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(exchanges, workers, 6, 10)).astype(np.float32)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("nesterov", [True, False])
def test_the_outer_step_is_sgd_on_the_mean_change(workers, nesterov):
    start, moved = np.ones((6, 10), np.float32), moves(3, workers)
    found = exchanged(DiLoCo(nesterov=nesterov), Axes(workers, 1, 1, 1, 1, 1), start, moved)
    tx = optax.sgd(0.7, 0.9, nesterov=nesterov)
    model, momentum, other = start.astype(np.float64), np.zeros(start.shape), jnp.asarray(start)
    state = tx.init(other)
    for move, new in zip(moved, found, strict=True):
        change = -move.astype(np.float64).mean(0)
        momentum = change + 0.9 * momentum
        model = model - 0.7 * (change + 0.9 * momentum if nesterov else momentum)
        np.testing.assert_allclose(new, model, rtol=0, atol=1e-5)
        updates, state = tx.update(-jnp.asarray(move).mean(0), state, other)
        other = optax.apply_updates(other, updates)
        np.testing.assert_allclose(new, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("delta", ["bfloat16", "int8"])
@pytest.mark.parametrize("workers", [2, 4])
def test_compressed_changes_average_to_within_their_precision_on_any_devices_of_a_worker(workers, delta):
    start, moved, how = np.zeros((6, 10), np.float32), moves(1, workers), DiLoCo(lr=1, momentum=0, delta=delta)
    [alone] = exchanged(how, Axes(workers, 1, 1, 1, 1, 1), start, moved)
    mean, largest = moved[0].mean(0), np.abs(moved).max()
    error = np.abs(alone - mean)
    assert error.max() > 0
    if delta == "int8":
        assert error.max() <= 1.001 * largest / 127  # half a unit on each of two hops
    else:
        assert (error <= 2**-8 * (np.abs(moved[0]).mean(0) + 1.01 * np.abs(mean))).all()
    [cut] = exchanged(how, Axes(workers, 1, 2, 1, 1, 1), start, moved)
    np.testing.assert_array_equal(cut, alone)


def test_a_model_that_did_not_change_has_an_int8_change_of_zero():
    start = np.ones((6, 10), np.float32)
    [found] = exchanged(DiLoCo(delta="int8"), TWO, start, np.zeros((1, 2, 6, 10), np.float32))
    np.testing.assert_array_equal(found, start)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_parameter_is_in_the_fragments_exactly_once(count):
    deeper = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, layers=4))
    model = program(deeper).abstract_state().model
    parts = diloco.fragments(model, count)
    assert len(parts) == count
    for i, (name, x) in enumerate(named(model).items()):
        covered = np.zeros(x.shape)
        for part in parts:
            if part[i] is not None:
                covered[part[i]] += 1
        assert (covered == 1).all(), name


def test_a_metric_is_the_mean_over_workers_by_their_targets():
    mesh = meshes.device_mesh(Axes(2, 1, 1, 1, 1, 2), jax.devices()[:4])
    place = NamedSharding(mesh, jax.P("data"))
    metrics = jax.device_put(dict(loss=np.float32([1, 4]), weight=np.float32([2, 1])), place)
    assert diloco.mean(metrics, "loss") == 2.0
    assert diloco.mean(dict(loss=jnp.float32(3)), "loss") == 3.0


def test_the_command_line_switches_it_on_with_its_defaults():
    assert TINY.local.every == 0
    run = cli.parse(TINY, ["--local.every", "30", "--local.delta", "int8"], "train tiny")
    assert run.local == dataclasses.replace(DiLoCo(), delta="int8")
    assert (DiLoCo().every, DiLoCo().lr, DiLoCo().momentum, DiLoCo().nesterov) == (30, 0.7, 0.9, True)


@pytest.mark.parametrize(
    ("wrong", "words", "remedy"),
    [
        (dict(every=-1), "local.every is -1: give", dict(every=0)),
        (dict(lr=0.0), "local.lr is 0.0: give a positive", dict(lr=1.0)),
        (dict(lr=float("nan")), "local.lr is nan: give a positive", dict(lr=1.0)),
        (dict(momentum=1.0), "local.momentum is 1.0: give at least 0 and less than 1", dict(momentum=0.0)),
        (dict(momentum=-0.1), "local.momentum is -0.1: give", dict(momentum=0.99)),
        (dict(fragments=0), "local.fragments is 0: give 1 to 2", dict(fragments=1)),
        (dict(fragments=3), "local.fragments is 3: give 1 to 2, as there are 2 layers", dict(fragments=2)),
        (dict(every=1, fragments=2), "local.fragments is 2: give 1 to 1", dict(every=1, fragments=1)),
        (dict(delta="int4"), "local.delta is 'int4': give one of float32, bfloat16, int8", dict(delta="int8")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_local_sgd_that_cannot_be_is_refused_in_one_sentence_whose_remedy_works(wrong, words, remedy):
    def checked(**fields):
        check(dataclasses.replace(TINY, local=dataclasses.replace(DiLoCo(every=4), **fields)), TINY.axes, 1)

    with pytest.raises(Refused) as refusal:
        checked(**wrong)
    message = str(refusal.value)
    assert words in message and refusal.value.code == 2
    assert re.fullmatch(r"[^\n]+: [^\n]+\.", message) and not re.search(r"\. [A-Z]", message)
    checked(**remedy)


def test_fragments_of_layers_in_stages_and_rows_that_workers_cannot_share_are_refused():
    staged = dataclasses.replace(STREAMED, layout=layouts.pp, axes=Axes(2, 2, 1, 1, 1, 1))
    with pytest.raises(Refused, match=r"the layers are cut over 'stage': set --local.fragments 1"):
        check(staged, staged.axes, 1)
    check(dataclasses.replace(staged, local=EVERY_4.local), staged.axes, 1)
    with pytest.raises(Refused, match="batch is 7, which data 2 x fsdp 2 = 4 does not divide"):
        check(dataclasses.replace(EVERY_4, batch=7), EVERY_4.axes, 1)
