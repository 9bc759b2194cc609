"""The same few steps on several meshes, and how far their numbers are apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import P
from jax.sharding import Mesh, NamedSharding

from llmjax.checkpoint.checkpoints import named
from llmjax.mesh import Chip
from llmjax.optim.schedules import Constant
from llmjax.run import DiLoCo, Run
from llmjax.train.program import Program, make

SMALL = dict(
    vocab=128, layers=4, width=64, head_dim=16, ff=128, shared_ff=64, experts=8, positions=32, window=8, rotary=8,
    value_dim=12, latent=32, query_latent=32, dense=1, dense_ff=128, groups=4, top_groups=2,
)  # fmt: skip
MOVED = 0.005  # share of a step's choices of experts that rounding may have made
BEGUN = 0.1  # what began at 0 is held to this share of the usual size: its few steps are all it has
FLAT = 1e-3  # a parameter whose gradient is this small beside the largest one has only rounding to compare


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a few steps left behind: a loss and a gradient norm per step, and NumPy arrays by path."""

    losses: np.ndarray
    grad_norms: np.ndarray
    loads: list[np.ndarray]  # tokens that chose each expert, [L, E] per step; empty without experts
    gradients: dict[str, np.ndarray]  # of the first step, before clipping
    parameters: dict[str, np.ndarray]  # after the last step


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Largest relative differences that count as equal in float32."""

    loss: float = 1e-5
    "Of the loss at any step."
    gradient: float = 1e-4
    "Of the gradient's norm at any step, and of the first gradient of any parameter, beside the largest number in it."
    parameter: float = 1e-3
    "Of any parameter after the last step, as a norm; optimizers such as Adam enlarge what rounding left of a gradient."


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Largest relative differences between a trace and the reference."""

    loss: float
    grad_norm: float
    gradient: float
    parameter: float
    rounded: int  # steps compared before rounding chose another expert for some token; 0: it never did
    first: str  # path of the first parameter whose gradient or, failing that, whose last weights differ; "" if none
    passed: bool


def small(run: Run) -> Run:
    """The run with its widths, but not its shape, made small: it trains on emulated devices in seconds.

    Everything that a model's config calls by a name in SMALL is capped. Heads keep their ratio, and their divisors as
    far as four key heads allow. The optimizer keeps its kind and takes its peak rate at once.
    """
    model = run.model
    fields = {field.name for field in dataclasses.fields(model)}
    new = {name: min(cap, getattr(model, name)) for name, cap in SMALL.items() if name in fields}
    if "heads" in fields:
        keys = getattr(model, "kv_heads", model.heads)
        factor = max(f for f in range(1, keys + 1) if keys % f == 0 and (f == 1 or keys // f >= 4))
        new["heads"] = model.heads // factor
        if "kv_heads" in fields:
            new["kv_heads"] = keys // factor
    if "every" in fields:  # kinds of layers still take turns
        new["every"] = min(model.every, 2)
    if "top_k" in fields:
        new["top_k"] = min(model.top_k, new["experts"] * new.get("top_groups", 1) // new.get("groups", 1))
    optimizer = dataclasses.replace(run.optimizer, schedule=Constant())
    return dataclasses.replace(
        run, model=dataclasses.replace(model, **new), optimizer=optimizer, batch=16, sequence=32, accumulate=1
    )


@dataclasses.dataclass(frozen=True)
class Kept:
    """An optimizer that keeps the gradients it was last given, before it clips them."""

    optimizer: object
    clip: float

    def build(self, steps: int) -> optax.GradientTransformation:
        tx = self.optimizer.build(steps)
        tx = optax.chain(optax.clip_by_global_norm(self.clip), tx) if self.clip else tx

        def init(model):
            return jax.tree.map(jnp.zeros_like, model), tx.init(model)

        def update(grads, state, model):
            updates, own = tx.update(grads, state[1], model)
            return updates, (grads, own)

        return optax.GradientTransformation(init, update)


def trace(run: Run, mesh: Mesh, chip: Chip, steps: int) -> Trace:
    """Trains a few steps in float32 on batches that depend on the run's seed alone; local SGD is left out."""
    kept = dataclasses.replace(
        run, optimizer=Kept(run.optimizer, run.clip), clip=0.0, dtype="float32", parameters="float32", steps=steps,
        local=DiLoCo(every=0),
    )  # fmt: skip
    program = make(kept, mesh, chip)
    losses, norms, loads, gradients = [], [], [], {}
    with program.context():
        state = program.init(jax.random.key(run.seed))
        if start := getattr(run.optimizer, "start", None):
            state = dataclasses.replace(state, model=jax.jit(start)(state.model))
        for step in range(steps):
            state, metrics = program.step(state, batch(program, step))
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["grad_norm"]))
            loads += [np.asarray(metrics["load_LE"])] if "load_LE" in metrics else []
            if step == 0:
                gradients = _arrays(state.opt[0])
    return Trace(np.array(losses), np.array(norms), loads, gradients, _arrays(state.model))


def stream(random: np.random.Generator, rows: int, length: int, vocab: int) -> np.ndarray:
    """Tokens with something to learn, int32 [rows, length]: nine of ten follow from the one before."""
    tokens = random.integers(0, vocab, (rows, length), np.int32)
    for t in range(1, length):
        tokens[:, t] = np.where(random.random(rows) < 0.1, tokens[:, t], (5 * tokens[:, t - 1] + 3) % vocab)
    return tokens


def batch(program: Program, step: int) -> dict[str, jax.Array]:
    """Tokens with something to learn, some targets masked, and two or three documents in every row."""
    run, random = program.run, np.random.default_rng((program.run.seed, step))
    count = getattr(run.loss, "sequences", 1)
    rows = run.batch * count
    tokens = stream(random, rows, run.sequence + 1, run.model.vocab)
    whole = dict(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=(random.random((rows, run.sequence)) < 0.9).astype(np.float32),
        segments=np.cumsum(random.random((rows, run.sequence)) < 1.5 / run.sequence, 1).astype(np.int32),
    )
    cut = (program.accumulate, run.batch // program.accumulate, *(count,) * (count > 1), run.sequence)
    sharding = program.batch_sharding()
    return {name: jax.make_array_from_callback(cut, sharding, x.reshape(cut).__getitem__) for name, x in whole.items()}


def compare(reference: Trace, other: Trace, tolerance: Tolerance = Tolerance()) -> Verdict:
    """How far `other` is from the reference.

    A parameter's difference is a share of its size, or of a tenth of the usual size where it is smaller than that.
    Parameters whose gradient vanishes, such as biases of keys, are left out where rounding alone decides their step.
    Where a token favours two experts alike, rounding decides between them, and from then on there is nothing to compare
    closely: steps count up to the first at which a few choices (MOVED) are others.
    """
    equal = _steps_of_equal_choices(reference, other)
    rounded = equal if equal < len(reference.losses) else 0
    loss, norm = (
        float(np.max(np.abs(b - a)[:equal] / np.abs(a)[:equal]))
        for a, b in ((reference.losses, other.losses), (reference.grad_norms, other.grad_norms))
    )
    largest = max(np.abs(x).max() for x in reference.gradients.values())
    usual = np.sqrt(np.mean([np.mean(np.square(x)) for x in reference.parameters.values()]))
    gradients, parameters = {}, {}
    for name, expected in reference.gradients.items():
        scale = max(np.abs(expected).max(), FLAT * largest)
        gradients[name] = float(np.abs(other.gradients[name] - expected).max() / scale)
        if np.abs(expected).max() >= FLAT * largest and not rounded:
            weights = reference.parameters[name]
            size = max(np.linalg.norm(weights), BEGUN * usual * weights.size**0.5)
            parameters[name] = float(np.linalg.norm(other.parameters[name] - weights) / size)
    different = [name for name in gradients if not gradients[name] <= tolerance.gradient]
    different += [name for name in parameters if not parameters[name] <= tolerance.parameter]
    passed = loss <= tolerance.loss and norm <= tolerance.gradient and not different
    furthest = max(gradients.values()), max(parameters.values(), default=0.0)
    return Verdict(loss, norm, *furthest, rounded, next(iter(different), ""), bool(passed))


def _steps_of_equal_choices(reference: Trace, other: Trace) -> int:
    """How many steps chose the same experts; all of them where more than a few choices, or the first step's, differ."""
    for step, (a, b) in enumerate(zip(reference.loads, other.loads, strict=True)):
        if np.any(a != b):
            moved = np.abs(a - b).sum() / 2
            return step if step and moved <= MOVED * a.sum() else len(reference.losses)
    return len(reference.losses)


def _arrays(tree) -> dict[str, np.ndarray]:
    """Whole arrays by path, on every process."""
    if jax.process_count() > 1:
        places = jax.tree.map(lambda x: NamedSharding(x.sharding.mesh, P()), tree)
        tree = jax.jit(lambda tree: tree, out_shardings=places)(tree)
    return {name: np.asarray(x) for name, x in named(tree).items()}
