"""Program: what a Run becomes on a mesh. Nothing here touches a device or a file until it is called."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import P
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from llmjax import mesh as meshes
from llmjax.checks import check, check_chip
from llmjax.errors import Refused
from llmjax.layout import ways
from llmjax.mesh import Axes, Chip
from llmjax.models import nn, quantized
from llmjax.optim import parameters
from llmjax.run import Run
from llmjax.train import adapters, diloco, flags, kernels
from llmjax.train import step as steps

LARGE, PIECE = 2**30, 4096  # bytes of a device's float32 logits that are taken in pieces, of so many tokens
HOST = "pinned_host"  # the memory that a device moves arrays to and from
WARM = 512  # tokens whose activations stay in a CPU's caches
UNROLLED = 12  # layers per turn of the loop on a CPU, where a turn copies weights and activations
MANY = 8  # microbatches, from which on a CPU takes two per turn: sums of gradients are read and written once for both
ONCE = {"xla_backend_optimization_level": 1}  # for what a CPU runs once: it compiles in a third of the time


@dataclasses.dataclass(frozen=True)
class Program:
    """A run on a mesh: the functions to call, and how its arrays are cut."""

    run: Run
    mesh: Mesh | AbstractMesh
    compute: nn.Compute
    accumulate: int
    init: Callable[[jax.Array], steps.State]
    begin: Callable[[nnx.Module], steps.State]
    step: Callable[[steps.State, Any], tuple[steps.State, dict[str, jax.Array]]]
    evaluate: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    pass_over: Callable[[steps.State], steps.State]
    try_again: Callable[[steps.State], steps.State]
    flops_per_token: float | None = None  # causal attention; None where the model does not say
    peak: float | None = None  # bfloat16 FLOP/s of all chips; None where it is not known
    lacking: str = ""  # why attention is not in the kernel that such chips have

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Everything of this program is traced and called inside this context."""
        placed = jax.sharding.use_abstract_mesh if isinstance(self.mesh, AbstractMesh) else jax.set_mesh
        with placed(self.mesh), nn.compute(self.compute):
            yield

    def differentiated(self, state: steps.State) -> nnx.Module:
        """The model that a step of this state takes its gradient at."""
        point = getattr(self.run.optimizer, "point", None)
        return point(state.model, state.opt) if point else state.model

    def whole(self, state: steps.State) -> nnx.Module:
        """The model that evaluation and generation use: with adapters, where there are any. It shares all arrays."""
        return adapters.attached(state.frozen, state.model, self.run.lora) if self.run.lora.rank else state.model

    def size(self, state: steps.State) -> int:
        """Parameters of the model, without adapters."""
        return sum(x.size for x in jax.tree.leaves(state.frozen if self.run.lora.rank else state.model))

    def reference(self, state: steps.State) -> tuple[nnx.Module, ...]:
        """What the loss takes besides model and batch: the frozen weights, where it compares with them."""
        return (state.frozen,) if hasattr(self.run.loss, "reference") else ()

    def loss(self, state: steps.State) -> steps.Loss:
        """The run's loss as a function of what is trained and the batch."""
        return steps.bound(self.run.loss, _whole(self.run), state.frozen)

    def abstract_model(self) -> nnx.Module:
        """Shapes and shardings of the model as it is stored, without adapters; no array is made."""
        with self.context():
            return jax.eval_shape(weights(self.run), jax.eval_shape(lambda: jax.random.key(0)))

    def batch_sharding(self) -> NamedSharding:
        """Where a batch with leading dims [A, B] lives."""
        return NamedSharding(self.mesh, P(None, self.run.layout.inner["B"]))

    def abstract_state(self) -> steps.State:
        """Shapes and shardings of the state; no array is made."""
        with self.context():
            state = jax.eval_shape(self.init, jax.eval_shape(lambda: jax.random.key(0)))
        if not self.run.offload_optimizer:
            return state

        def on_host(x):  # of which eval_shape says nothing
            if not x.ndim:
                return x
            place = NamedSharding(x.sharding.mesh, x.sharding.spec, memory_kind=HOST)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

        return dataclasses.replace(state, opt=jax.tree.map(on_host, state.opt))

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of the batch of a language model: [A, B/A, T], of several sequences [A, B/A, n, T]."""
        count = getattr(self.run.loss, "sequences", 1)
        shape = (self.accumulate, self.run.batch // self.accumulate, *(count,) * (count > 1), self.run.sequence)
        types = dict(tokens=jnp.int32, targets=jnp.int32, weights=jnp.float32)
        return {k: jax.ShapeDtypeStruct(shape, v, sharding=self.batch_sharding()) for k, v in types.items()}

    def abstract_step(self) -> tuple[steps.State, dict[str, jax.ShapeDtypeStruct]]:
        """What a step of a language model returns: traces all of it, so a shape or sharding that is wrong fails here.

        On an AbstractMesh it needs no device.
        """
        with self.context():
            return jax.eval_shape(self.step, self.abstract_state(), self.abstract_batch())


def make(run: Run, mesh: Mesh | AbstractMesh, chip: Chip) -> Program:
    """The program of a run on a mesh of these chips.

    Raises:
      Refused: the run's shapes cannot be cut over the mesh.
    """
    axes = Axes(**dict(mesh.shape))
    accumulate = run.accumulate or microbatches(run, axes, chip)
    check(run, axes, accumulate)
    check_chip(run, chip)
    on_cpu = chip.platform == "cpu"
    bfloat16 = run.in_bfloat16(chip.platform)
    attention, lacking = kernels.kernel(run, axes, chip)
    if run.attention == attention and lacking:
        raise Refused(f"attention is {attention}, but {lacking}: use auto, blocked or reference.")
    if attention == "cudnn" and not _on_gpus(mesh):  # JAX looks for cuDNN as soon as it is traced
        attention = "blocked"
    compute = nn.Compute(
        layout=run.layout,
        operands="bfloat16" if bfloat16 else "float32",
        rounding=quantized.TYPES.get(run.dtype, ""),
        activations="bfloat16" if bfloat16 and not on_cpu else "float32",
        remat=run.remat.policy,
        offload=run.remat.offload,
        unroll=min(getattr(run.model, "layers", 1), run.unroll or (UNROLLED if on_cpu else 1)),
        microbatches=2 if on_cpu and accumulate >= MANY else 1,
        chunk=chunk(run, axes, accumulate, chip),
        pipeline=run.pipeline,
        attention=attention,
        block=kernels.BLOCK.get(chip.name, kernels.NARROWER),
        apart=chip.platform == "tpu" and chip.name not in flags.TOGETHER,
    )
    tx = transformation(run)
    state_of = functools.partial(steps.init, part=parted(run))
    step = functools.partial(
        steps.train_step, loss=run.loss, tx=tx, sigmas=run.guard.sigmas, point=getattr(run.optimizer, "point", None),
        whole=_whole(run),
    )  # fmt: skip
    if run.local.every:
        state_of = diloco.init
        step = functools.partial(diloco.train_step, loss=run.loss, tx=tx, how=run.local, last=run.steps)
    compiler_options = flags.known(flags.options(chip), mesh) if isinstance(mesh, Mesh) else {}
    flops = run.model.flops_per_token(run.sequence)[0] if hasattr(run.model, "flops_per_token") else None
    if flops and run.lora.rank:
        flops *= 2 / 3  # no gradient of a weight; the adapters' own products are left out
    made = Program(
        run=run,
        mesh=mesh,
        compute=compute,
        accumulate=accumulate,
        init=jax.jit(functools.partial(state_of, weights(run), tx), compiler_options=ONCE if on_cpu else None),
        begin=jax.jit(
            lambda model: state_of(lambda _: stored(run, model), tx, jax.random.key(run.seed)), donate_argnums=0
        ),
        step=jax.jit(step, donate_argnums=0, compiler_options=compiler_options or None),
        evaluate=jax.jit(functools.partial(steps.eval_step, loss=getattr(run.loss, "held_out", run.loss))),
        pass_over=jax.jit(steps.passed_over, donate_argnums=0),
        try_again=jax.jit(steps.ready, donate_argnums=0),
        flops_per_token=flops,
        peak=chip.flops and flops and chip.flops * mesh.size,
        lacking=lacking,
    )
    if run.lora.on:
        made.abstract_state()  # refuses names that no weight has
    return made


def _on_gpus(mesh: Mesh | AbstractMesh) -> bool:
    return isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "gpu"


def bytes_per_device(tree: Any, mesh: Mesh | AbstractMesh) -> int:
    """Bytes that one device holds of a tree of (abstract) arrays, without those in the host's memory."""

    def of(x):
        spec = x.sharding.spec if getattr(x, "sharding", None) is not None else P()
        return math.prod(NamedSharding(mesh, spec).shard_shape(x.shape)) * x.dtype.itemsize

    return sum(
        of(x)
        for x in jax.tree.leaves(tree)
        if hasattr(x, "shape")
        and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        and getattr(x.sharding, "memory_kind", None) != HOST
    )


def weights(run: Run) -> Callable[[jax.Array], nnx.Module]:
    """What makes the model that training begins with from a key, as it is stored."""
    start = getattr(run.optimizer, "start", lambda model: model)
    return lambda key: stored(run, start(run.model.init(key)))


def stored(run: Run, model: nnx.Module) -> nnx.Module:
    """The model with its parameters in the precision that they are kept in between steps."""
    return parameters.stored(model) if run.parameters == "bfloat16" else model


def parted(run: Run) -> steps.Part:
    """What makes (what is trained, what is frozen) of the model that training begins with, and a key."""
    if run.lora.rank:
        return lambda model, key: (adapters.fresh(model, run.lora, jax.random.fold_in(key, 1)), model)
    if hasattr(run.loss, "reference"):
        return lambda model, key: (model, jax.tree.map(jnp.copy, model))
    return lambda model, key: (model, None)


def _whole(run: Run) -> steps.Whole | None:
    return (lambda pairs, model: adapters.attached(model, pairs, run.lora)) if run.lora.rank else None


def transformation(run: Run) -> optax.GradientTransformation:
    """The run's optimizer behind gradient clipping."""
    tx = run.optimizer.build(run.steps)
    tx = optax.chain(optax.clip_by_global_norm(run.clip), tx) if run.clip else tx
    tx = parameters.in_float32(tx) if run.parameters == "bfloat16" else tx
    return on_host(tx) if run.offload_optimizer else tx


def on_host(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same with its arrays in the host's memory between updates."""

    def moved(state, space):
        return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, state)

    def init(params):
        return moved(tx.init(params), jax.memory.Space.Host)

    def update(updates, state, params=None):
        updates, state = tx.update(updates, moved(state, jax.memory.Space.Device), params)
        return updates, moved(state, jax.memory.Space.Host)

    return optax.GradientTransformation(init, update)


def resolve(run: Run, devices: int) -> Axes:
    """The sizes of all axes for this run on so many devices."""
    layout, cluster = run.layout, run.mesh
    return meshes.fill(
        run.axes, devices, used=layout.axes(), rest=layout.rest(), tensor=cluster.tensor, slices=cluster.slices
    )


def fallen_back(run: Run) -> Run:
    """The run on its fall-back mesh: the same global batch, in microbatches of as many rows per device as before.

    Raises:
      Refused: the run names no mesh to fall back to.
    """
    if run.fallback_mesh is None:
        raise Refused("fallback_mesh is none: name the mesh to fall back to with --fallback-mesh.")
    other = dataclasses.replace(run, mesh=run.fallback_mesh, axes=Axes())
    if run.mesh.chips is None or other.mesh.chips is None or run.mesh.chip is None:
        return other
    axes, fewer = resolve(run, run.mesh.chips), resolve(other, other.mesh.chips)
    before = ways(run.layout.inner.get("B"), axes) * (run.accumulate or microbatches(run, axes, run.mesh.chip))
    accumulate = max(1, before // ways(run.layout.inner.get("B"), fewer))
    return dataclasses.replace(other, accumulate=accumulate if run.accumulate or not run.mesh.emulated else 0)


def chunk(run: Run, axes: Axes, accumulate: int, chip: Chip) -> int:
    """Positions of a sequence that the loss takes at once, 0 for all, where the run does not say.

    Shorter pieces than PIECE cost time: for each, the gradient of the whole head is read and written.
    """
    if run.loss_chunk or chip.platform == "cpu" or not hasattr(run.model, "sizes") or hasattr(run.loss, "reference"):
        return run.loss_chunk
    inner, rows = run.layout.inner, run.batch // ways(run.layout.inner.get("B"), axes) // accumulate
    if axes.stage > 1 and run.pipeline.schedule == "1f1b":
        rows //= run.pipeline.parts(rows, axes.stage)
    of_sequence = ways(inner.get("T"), axes)
    logits = rows * run.sequence // of_sequence * run.model.sizes()["V"] // ways(inner.get("V"), axes)
    return max(1, PIECE * of_sequence // rows) if 4 * logits > LARGE else 0


def microbatches(run: Run, axes: Axes, chip: Chip) -> int:
    """How many microbatches a step is cut into when the run does not say.

    Accelerators and pipelines, which cut their own: one. On a CPU activations that stay in cache are worth more than
    long products.
    """
    rows = run.batch // ways(run.layout.inner.get("B"), axes)
    if chip.platform != "cpu" or rows < 1 or axes.stage > 1:
        return 1
    wanted = min(rows, max(1, rows * run.sequence // WARM))
    return next(a for a in range(wanted, 0, -1) if rows % a == 0)
