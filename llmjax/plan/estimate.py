"""The plan of a run that needs no compiler: does it fit, where the time of a step goes, how fast it trains."""

import dataclasses
import math
from pathlib import Path

from llmjax import mesh as meshes
from llmjax.checks import check
from llmjax.errors import Refused
from llmjax.mesh import Axes, Chip
from llmjax.plan import analytic, calibrate, links, memory, work
from llmjax.plan.analytic import Sent, Time
from llmjax.plan.budget import within
from llmjax.plan.memory import Memory
from llmjax.plan.schedule import Row
from llmjax.plan.work import Method, Work
from llmjax.run import Run
from llmjax.train.program import make, microbatches, resolve

ROOM = 0.95  # of a chip's memory: the runtime and what is lost between buffers take the rest


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a run will be on its mesh, by the analytic models of time and memory."""

    run: Run
    sizes: Axes
    accumulate: int
    work: Work
    time: Time
    memory: Memory

    @property
    def chips(self) -> int:
        """JAX devices."""
        return math.prod(self.sizes.sizes())

    @property
    def fits(self) -> bool:
        """Whether a device has the memory. True where its size is not known."""
        return fits(self.memory.total, self.run)

    @property
    def tokens_per_s(self) -> float:
        """Of all devices together."""
        return self.work.tokens / self.time.step

    @property
    def per_chip(self) -> float:
        """Tokens per second and device."""
        return self.tokens_per_s / self.chips

    @property
    def mfu(self) -> tuple[float, float] | None:
        """Model FLOPs per second over the devices' bfloat16 peak, counting attention (causal, full)."""
        return mfu(self.run, self.chips, self.time.step)

    @property
    def hours(self) -> float:
        """Of all the run's steps."""
        return self.run.steps * self.time.step / 3600


def estimate(run: Run, sizes: Axes | None = None, method: Method = Method()) -> Estimate:
    """The analytic plan of a run on its mesh, or on axes of these sizes. Devices are neither used nor needed.

    Raises:
      Refused: the run's shapes cannot be cut so, its model does not say its sizes, or its chip has neither a known
        peak nor a stored measurement.
    """
    plannable(run)
    sizes = sizes or resolve(run, run.mesh.chips)
    accumulate = run.accumulate or microbatches(run, sizes, run.mesh.chip)
    check(run, sizes, accumulate)
    run = within(run, sizes, run.mesh.chip)
    done, time = timed(run, sizes, accumulate, method)
    return Estimate(run, sizes, accumulate, done, time, memory.predict(run, sizes, accumulate))


def timed(run: Run, sizes: Axes, accumulate: int, method: Method = Method()) -> tuple[Work, Time]:
    """(work of one device, time of a step) of a run that is known to be legal."""
    if run.mesh.chip.flops is None:
        done = work.count(run, sizes, accumulate, dataclasses.replace(method, fused=True))
        return done, calibrate.predict(done, calibrate.stored(Path(run.runs), run.mesh.chips), sizes, run)
    done = work.count(run, sizes, accumulate, method)
    return done, analytic.predict(done, run.mesh, sizes)


def sized(run: Run) -> None:
    """Refuses a run whose model does not tell its sizes."""
    if not hasattr(run.model, "matrices"):
        raise Refused(f"{run.name} is no language model: plan one of the others that `llmjax experiments` lists.")
    if "H" not in run.model.sizes():
        raise Refused(
            f"{run.name} has a {type(run.model).__name__}, without heads of attention, which the planner counts with: "
            f"plan one of the others that `llmjax experiments` lists."
        )


def plannable(run: Run) -> None:
    """Refuses a run that says too little of itself to be planned."""
    sized(run)
    if run.lora.rank or hasattr(run.loss, "reference"):
        what = f"lora.rank is {run.lora.rank}" if run.lora.rank else f"loss is {type(run.loss).__name__}"
        raise Refused(
            f"{what}, and the planner does not yet know of weights that are not trained: plan it with --lora.rank 0 "
            f"and a loss of one model, which takes more memory and time."
        )
    if run.mesh.chip is None or run.mesh.chips is None:
        raise Refused(f"mesh is {run.mesh.name}, whose chips are not known: give a mesh that names them, --mesh cpu8.")


def type_check(estimate: Estimate) -> None:
    """Traces the whole train step on the mesh as a type, so that a shape or sharding that cannot be fails here."""
    run = dataclasses.replace(estimate.run, accumulate=estimate.accumulate)
    make(run, meshes.abstract_mesh(estimate.sizes), run.mesh.chip).abstract_step()


def fits(total: float, run: Run) -> bool:
    """Whether so many bytes fit the memory of one of the run's chips."""
    return not run.mesh.chip.memory or total <= ROOM * run.mesh.chip.memory


def mfu(run: Run, chips: int, step: float) -> tuple[float, float] | None:
    """MFU of steps of so many seconds, counting attention (causal, full); None where the chip's peak is not known."""
    if not run.mesh.chip.flops:
        return None
    rate = run.batch * run.sequence / step / (chips * run.mesh.chip.flops)
    causal, full = run.model.flops_per_token(run.sequence)
    return causal * rate, full * rate


def communication(estimate: Estimate) -> list[Row]:
    """The messages of a step by kind, axes and module, the longest first."""
    groups: dict[tuple, list[Sent]] = {}
    for each in estimate.time.sent:
        groups.setdefault((each.message.kind, each.message.axes, each.message.module), []).append(each)
    rows = []
    for (kind, axes, module), sent in groups.items():
        across = links.span(estimate.run.mesh, estimate.sizes, axes).outside > 1
        count, size = sum(x.message.count for x in sent), sum(x.message.count * x.message.bytes for x in sent)
        seconds, waited = sum(x.seconds for x in sent), sum(x.waited for x in sent)
        rows.append(Row(kind, axes, module, "outside" if across else "inside", count, size, seconds, waited))
    return sorted(rows, key=lambda row: -row.seconds)


def network(chip: Chip, where: str) -> str:
    """What the network `inside` a slice or node is called, or the one between them."""
    fast, slow = dict(tpu=("ICI", "DCN"), gpu=("NVLink", "network")).get(chip.platform, ("memory", "memory"))
    return slow if where == "outside" else fast


def trusted(chip: Chip, compiled: bool) -> tuple[str, str]:
    """(which model of time is trusted for this chip: analytic or compiled, why)."""
    if chip.platform == "cpu":
        return "analytic", "as it rests on a measurement of this machine"
    if chip.platform == "gpu":
        return "analytic", "as the compiler, without the GPU, tells memory and messages but no time"
    if not compiled:
        return "analytic", "as nothing was compiled"
    return "compiled", "as the TPU's compiler knows its own schedule"
