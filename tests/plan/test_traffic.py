"""Training communicates what theory says, to the byte, and nothing else."""

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import P
from jax.sharding import NamedSharding

from llmjax import layout as layouts
from llmjax import mesh as meshes
from llmjax.layout import Pipeline
from llmjax.mesh import Axes
from llmjax.models import moe, nn
from llmjax.models.llama import Llama
from llmjax.models.mixtral import Mixtral
from llmjax.optim.adamw import AdamW
from llmjax.plan import work
from llmjax.plan.collectives import collectives, departures, report, table
from llmjax.run import Run
from llmjax.train import step as steps
from llmjax.train.loss import NextToken
from llmjax.train.routed import RoutedNextToken
from meshes import cpu8

B, T, D, H, G, K, F, V, L = 16, 32, 40, 8, 4, 14, 72, 48, 4  # B is a microbatch's
SHAPES = dict(vocab=V, layers=L, width=D, heads=H, kv_heads=G, head_dim=K, ff=F, positions=T)
MODEL = Llama(**SHAPES)
FLOAT = 4  # bytes

ATTENTION, MLP = D * K * (2 * H + 2 * G), 3 * D * F
LAYERS = L * (ATTENTION + MLP)  # the matrices of all layers
TABLE = HEAD = V * D
SCALES = (2 * L + 1) * D  # of the norms
STREAM = B * T * D
KEYS_AND_VALUES = 2 * B * T * G * K

AR, AG, CP, RS, AA = "all-reduce", "all-gather", "collective-permute", "reduce-scatter", "all-to-all"


def tx() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


@functools.cache
def step(layout: str, axes: Axes, accumulate: int = 1, loss=NextToken(), model=MODEL, pipeline=Pipeline()):
    """The collectives of a train step on eight devices."""
    layout, mesh = layouts.preset(layout), meshes.device_mesh(axes, jax.devices())
    shape, place = (accumulate, B, T), NamedSharding(mesh, P(None, layout.inner["B"]))
    types = dict(tokens=jnp.int32, targets=jnp.int32, weights=jnp.float32)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in types.items()}
    with jax.set_mesh(mesh), nn.compute(nn.Compute(layout=layout, pipeline=pipeline)):
        state = jax.eval_shape(
            functools.partial(steps.init, model.init, tx()), jax.eval_shape(lambda: jax.random.key(0))
        )
        call = jax.jit(functools.partial(steps.train_step, loss=loss, tx=tx()), donate_argnums=0)
        return collectives(call.lower(state, batch).compile(), mesh)


def axes(**sizes: int) -> Axes:
    return Axes(**dict.fromkeys(meshes.AXES, 1) | sizes)


# By layout and mesh: how many numbers (not bytes) of V a device communicates for one microbatch. A CPU's compiler keeps
# an all-reduce and takes its part of the result where a TPU's has a reduce-scatter: as many numbers, half as many sent.
THEORY = {
    # Data parallelism: every gradient once.
    "dp": (axes(data=8), {(AR, ("data",)): LAYERS + TABLE + HEAD + SCALES}),
    # Every weight is gathered for the forward pass and a matrix of a layer again for the backward pass (the head's are
    # next to each other); gradients are summed to where weights rest.
    "fsdp": (
        axes(fsdp=8),
        {
            (AG, ("fsdp",)): 2 * LAYERS + TABLE + HEAD + SCALES,
            (AR, ("fsdp",)): LAYERS + TABLE + HEAD + SCALES,
        },
    ),
    # With data around it, only the part that a device keeps crosses the slower axis. Table and norms are summed over
    # both at once: a sum that scatters rows, or is no product, cannot be left open over one of them.
    "fsdp in data": (
        axes(data=2, fsdp=4),
        {
            (AG, ("fsdp",)): 2 * LAYERS + TABLE + HEAD + SCALES,
            (AR, ("fsdp",)): LAYERS + HEAD,
            (AR, ("data",)): (LAYERS + HEAD) // 4,
            (AR, ("data", "fsdp")): TABLE + SCALES,
        },
    ),
    # Tensor parallelism: the stream after attention and after the MLP, and its gradient before each; once after the
    # table and before the head; and of each target the highest logit, their sum, and its own.
    "tp": (
        axes(data=4, tensor=2),
        {
            (AR, ("tensor",)): (4 * L + 2) * STREAM // 4 + 3 * B * T // 4,
            (AR, ("data",)): (LAYERS + TABLE + HEAD) // 2 + SCALES,
        },
    ),
    # With the stream cut over T in between, what was one all-reduce is a sum to a part (an all-reduce here) and a
    # gathering; the norms see a part of the positions each.
    "fsdp_tp_sp": (
        axes(fsdp=4, tensor=2),
        {
            (AG, ("fsdp",)): (2 * LAYERS + TABLE + HEAD) // 2 + SCALES,
            (AR, ("fsdp",)): (LAYERS + TABLE + HEAD) // 2 + SCALES,
            (AG, ("tensor",)): (4 * L + 2) * STREAM // 4,
            (AR, ("tensor",)): (4 * L + 2) * STREAM // 4 + 3 * B * T // 4 + SCALES,
        },
    ),
    # Positions cut over context: keys and values are gathered and their gradients summed. A gradient is a sum over data
    # and context; table and norms take it over one after the other, see "fsdp in data".
    "cp": (
        axes(data=2, context=4),
        {
            (AG, ("context",)): L * KEYS_AND_VALUES // 2,
            (AR, ("context",)): L * KEYS_AND_VALUES // 2 + TABLE + SCALES,
            (AR, ("data",)): TABLE + SCALES,
            (AR, ("data", "context")): LAYERS + HEAD,
        },
    ),
    # Around a ring of n = 4: (n-1)/n of the keys and values forward, the same again backward, and with these their
    # gradients, which go one hop further, home.
    "ring": (
        axes(data=2, context=4),
        {
            (CP, ("context",)): L * KEYS_AND_VALUES // 2 * (3 + 3 + 4) // 4,
            (AR, ("context",)): TABLE + SCALES,
            (AR, ("data",)): TABLE + SCALES,
            (AR, ("data", "context")): LAYERS + HEAD,
        },
    ),
}


A = 3  # microbatches
# Their gradients are added up before devices exchange them, but for those of scales and over axes that cut the weight.
# XLA takes the gathering of what lies outside the layers out of the loop over microbatches.
ACCUMULATED = {
    "dp": {(AR, ("data",)): LAYERS + TABLE + HEAD + SCALES + A * SCALES},
    "fsdp in data": {
        (AG, ("fsdp",)): A * 2 * LAYERS + A * 2 * L * D + TABLE + HEAD + D,
        (AR, ("fsdp",)): A * (LAYERS + TABLE + HEAD),
        (AR, ("data", "fsdp")): A * SCALES,
        (AR, ("data",)): (LAYERS + TABLE + HEAD + SCALES) // 4,
    },
    "ring": {
        (CP, ("context",)): A * L * KEYS_AND_VALUES // 2 * (3 + 3 + 4) // 4,
        (AR, ("context",)): A * SCALES,
        (AR, ("data",)): A * SCALES,
        (AR, ("data", "context")): LAYERS + TABLE + HEAD + SCALES,
    },
}


S, N, R = 2, 4, 2  # stages, microbatches of a pipeline, laps of the circular schedule
PASSED = B * T * D // 4 // N  # what a stage hands to the next: the stream of one microbatch on one of four devices
STAGE = (LAYERS + 2 * L * D) // S  # the weights of a stage
ENDS = TABLE + HEAD + D  # all others, which every stage has
FORWARD_AND_BACKWARD = 2 * (N + S - 1) * PASSED  # a hop in every tick, with nothing of use in as many as stages idle
# What leaves the last stage is summed over stages, of which one has it and the others zeros, and so is the gradient of
# what enters the first. 1f1b has neither: embedding and head run in the ticks, and only their gradients are summed.
BORDERS = 2 * N * PASSED
# A tick of a lap hops as well. Weights are dealt out to where laps use them, and their gradients back, one group per
# stage and round; in one of two rounds, with two stages, the groups are where they belong.
LAPS = 2 * (R * N + S - 1) * PASSED + 2 * STAGE // R
STAGES = {
    ("pp", "gpipe"): {
        (CP, ("stage",)): FORWARD_AND_BACKWARD,
        (AR, ("stage",)): BORDERS,
        (AR, ("data",)): STAGE + ENDS,
    },
    ("pp", "circular"): {
        (CP, ("stage",)): LAPS,
        (AR, ("stage",)): BORDERS,
        (AR, ("data",)): STAGE + ENDS,
    },
    # Two stages drain in one tick, which is no loop, so that XLA leaves out its hop, which nobody needs.
    ("pp", "1f1b"): {
        (CP, ("stage",)): FORWARD_AND_BACKWARD - PASSED,
        (AR, ("data",)): STAGE,
        (AR, ("data", "stage")): ENDS,
    },
    # Weights are gathered, and whole gradients summed, once in a step and outside of the ticks; groups are dealt before
    # that. The head is outside of the stages, but for 1f1b, and summed as in "fsdp in data".
    ("fsdp_pp", "gpipe"): {
        (CP, ("stage",)): FORWARD_AND_BACKWARD,
        (AR, ("stage",)): BORDERS,
        (AG, ("fsdp",)): STAGE + ENDS,
        (AR, ("data", "fsdp")): STAGE + TABLE + D,
        (AR, ("fsdp",)): HEAD,
        (AR, ("data",)): HEAD // 2,
    },
    ("fsdp_pp", "circular"): {
        (CP, ("stage",)): 2 * (R * N + S - 1) * PASSED + 2 * STAGE // R // 2,
        (AR, ("stage",)): BORDERS,
        (AG, ("fsdp",)): STAGE + ENDS,
        (AR, ("data", "fsdp")): STAGE + TABLE + D,
        (AR, ("fsdp",)): HEAD,
        (AR, ("data",)): HEAD // 2,
    },
    ("fsdp_pp", "1f1b"): {
        (CP, ("stage",)): FORWARD_AND_BACKWARD - PASSED,
        (AG, ("fsdp",)): STAGE + ENDS,
        (AR, ("data", "fsdp")): STAGE,
        (AR, ("data", "stage", "fsdp")): ENDS,
    },
}


E, CHOICES, WAYS = 8, 2, 4  # experts, those that a token goes to, and devices that share them
EXPERTS = L * E * 3 * D * F // WAYS  # the weights of experts on a device
ROUTERS, LOADS = L * D * E, L * E
BUFFERS = E * math.ceil(1.25 * T * CHOICES / E) * D * B // 8  # E C D for each sequence of a device
TOKENS = B * T // 8
SLOTS = math.ceil(moe.SLACK * TOKENS * CHOICES / WAYS)  # rows for each device that a device sends in a round
# Rounds, if all tokens of a device go to the same two experts. How many there are depends on the load, one where it is
# nearly even: all are in the program, each under a condition, and are counted here as if run. Every round sends rows,
# to whom they go, and results; all again in the backward pass, and the gradients of both; and a gradient of weights.
ROUNDS = math.ceil(TOKENS * CHOICES / SLOTS)
ROUNDS_OF_ALL_LAYERS = L * ROUNDS * WAYS * SLOTS * (6 * D + 2)
# Gradients of dense weights, and how many tokens chose an expert, are summed over all devices, those of experts over
# devices that have the same experts. Routers are stored in parts, as experts are.
SPARSE = {
    ("ep", 1.25): {
        (AA, ("expert",)): 4 * L * BUFFERS,  # there and back, forward and backward
        (AG, ("expert",)): ROUTERS,
        (AR, ("data", "expert")): L * ATTENTION + TABLE + HEAD + SCALES + ROUTERS + LOADS,
        (AR, ("data",)): EXPERTS,
    },
    ("ep", 0.0): {
        (AA, ("expert",)): ROUNDS_OF_ALL_LAYERS,
        (AG, ("expert",)): ROUTERS,
        (AR, ("data", "expert")): L * ATTENTION + TABLE + HEAD + SCALES + ROUTERS + LOADS,
        (AR, ("data",)): ROUNDS * EXPERTS,
    },
    ("fsdp_ep", 1.25): {
        (AA, ("expert",)): 4 * L * BUFFERS,
        (AG, ("fsdp",)): 2 * L * ATTENTION + 2 * EXPERTS + TABLE + HEAD + SCALES + ROUTERS,
        (AG, ("expert",)): ROUTERS // 2,
        (RS, ("fsdp",)): EXPERTS,
        (AR, ("fsdp",)): L * ATTENTION + HEAD,
        (AR, ("expert",)): (L * ATTENTION + HEAD) // 2,
        (AR, ("fsdp", "expert")): TABLE + SCALES + ROUTERS + LOADS,
    },
    ("fsdp_ep", 0.0): {
        (AA, ("expert",)): ROUNDS_OF_ALL_LAYERS,
        (AG, ("fsdp",)): 2 * L * ATTENTION + 3 * ROUNDS * EXPERTS + TABLE + HEAD + SCALES + ROUTERS,
        (AG, ("expert",)): ROUTERS // 2,
        (RS, ("fsdp",)): ROUNDS * EXPERTS,
        (AR, ("fsdp",)): L * ATTENTION + HEAD,
        (AR, ("expert",)): (L * ATTENTION + HEAD) // 2,
        (AR, ("fsdp", "expert")): TABLE + SCALES + ROUTERS + LOADS,
    },
}


def in_bytes(numbers: dict) -> dict:
    return {key: FLOAT * count for key, count in numbers.items()}


@pytest.mark.parametrize("case", THEORY)
def test_a_step_communicates_what_theory_says_and_nothing_else(case):
    mesh, numbers = THEORY[case]
    found = step(case.split()[0], mesh)
    assert not departures(found, in_bytes(numbers)), report(found)


@pytest.mark.parametrize("case", ACCUMULATED)
def test_gradients_of_several_microbatches_are_exchanged_once(case):
    found = step(case.split()[0], THEORY[case][0], A)
    assert not departures(found, in_bytes(ACCUMULATED[case])), report(found)


@pytest.mark.parametrize(("layout", "schedule"), STAGES)
def test_stages_pass_on_one_activation_per_tick_and_exchange_weights_and_gradients_once(layout, schedule):
    mesh = axes(stage=S, data=4) if layout == "pp" else axes(stage=S, data=2, fsdp=2)
    found = step(layout, mesh, pipeline=Pipeline(schedule, microbatches=N, repeats=R))
    assert not departures(found, in_bytes(STAGES[layout, schedule])), report(found)
    assert all(x.count == 1 for x in found if x.axes != ("stage",)), "outside of the ticks"


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="jax 0.10 gathers what a stage takes, gives and saves over explicit axes at the border of its region",
)
@pytest.mark.parametrize("schedule", ["gpipe", "circular", "1f1b"])
def test_nothing_is_gathered_over_tensor_at_the_border_of_a_stage(schedule):
    found = step("fsdp_tp_pp", axes(stage=S, fsdp=2, tensor=2), pipeline=Pipeline(schedule, N, repeats=R))
    gathered = {key: size for key, size in table(found).items() if key[0] == AG}
    matrices = LAYERS // S + TABLE + HEAD
    numbers = {(AG, ("fsdp",)): matrices // 2 + (2 * L // S + 1) * D}
    if schedule == "1f1b":  # looks up in whole tables; see nn.embed
        numbers[AG, ("tensor",)] = TABLE
    assert gathered == in_bytes(numbers), report(found)


@pytest.mark.parametrize(("layout", "capacity"), SPARSE)
def test_tokens_travel_to_experts_and_back_and_experts_gradients_do_not(layout, capacity):
    mesh = axes(expert=WAYS, **{"data" if layout == "ep" else "fsdp": 2})
    model = Mixtral(**SHAPES, experts=E, top_k=CHOICES, capacity=capacity)
    found = step(layout, mesh, loss=RoutedNextToken(), model=model)
    assert not departures(found, in_bytes(SPARSE[layout, capacity])), report(found)


def wasteful(model, batch):
    """Copies the logits to every device, and is right."""
    logits_BTV = model(batch["tokens"])
    whole = jax.reshard(logits_BTV, P())  # nobody needs this
    return NextToken().of(jax.reshard(whole, jax.typeof(logits_BTV).sharding), batch)


def test_a_needless_collective_is_named_by_the_operation_it_comes_from():
    mesh, numbers = THEORY["dp"]
    said = departures(step("dp", mesh, loss=wasteful), in_bytes(numbers))
    gathered = next(text for text in said if text.startswith("all-gather over data"))
    assert f"{2 * FLOAT * B * T * V:,} bytes in a step, unexpected" in gathered  # logits, and their gradient
    # jax 0.10 names the reshard; later ones the operation whose result it reshards.
    assert re.search(rf"f32\[{B},{T},{V}\].*from .*(reshard|BTD,DV->BTV.*) at .*\.py:\d+", gathered)


def test_too_many_and_too_few_bytes_are_both_departures():
    mesh, numbers = THEORY["dp"]
    [(key, count)] = numbers.items()
    for wrong in (count - 1, count + 1):
        [text] = departures(step("dp", mesh), {key: FLOAT * wrong})
        assert f"{FLOAT * count:,} bytes in a step, not {FLOAT * wrong:,}" in text
    [text] = departures(step("dp", mesh), {key: FLOAT * count, (CP, ("data",)): 8})
    assert "collective-permute over data: 0 bytes in a step, not 8" in text


def test_the_report_shows_every_kind_and_axis_with_its_bytes():
    lines = report(step("tp", THEORY["tp"][0])).splitlines()
    assert lines[0].split() == ["collective", "over", "runs", "bytes", "sent", "per", "device"]
    assert {tuple(line.split()[:2]) for line in lines[1:]} == {(AR, "tensor"), (AR, "data")}


# What the planner counts without a program, up to what it leaves out: norms, and the loss's sums.
@pytest.mark.parametrize("case", THEORY)
def test_the_planner_counts_the_numbers_that_theory_says(case):
    sizes, theory = THEORY[case]
    run = Run(
        MODEL, None, AdamW(), NextToken(), cpu8.cluster, layout=layouts.preset(case.split()[0]), batch=B, sequence=T
    )
    expected, counted = collections.Counter(), collections.Counter()
    for (kind, over), numbers in theory.items():
        expected[kind, over] += numbers
    for message in work.count(run, sizes, 1).messages:
        kind = AR if message.kind == RS else message.kind
        gradient = message.kind in (AR, RS) and (message.hidden or "context" in message.axes)
        gradient = gradient or (kind == CP and message.count == L * sizes.context)  # those of keys and values
        counted[kind, message.axes] += message.count * message.bytes / (FLOAT if gradient else 2)
    # XLA sums a table, which is no product, over all axes at once; the planner as it does products.
    for numbers in (expected, counted):
        for kind, over in list(numbers):
            if kind == AR and "data" in over:
                numbers[kind, ("data",)] += numbers.pop((kind, over))
    rest = 4 * SCALES + 3 * B * T + TABLE * 2 * ("in data" in case or case in ("cp", "ring"))
    assert {key for key in counted if counted[key] > rest} == {key for key in expected if expected[key] > rest}
    for key in counted:
        assert counted[key] == pytest.approx(expected[key], abs=rest), key
