"""A train step as a person can see it: what is computed, one phase after the other, and what travels meanwhile.

From the analytic plan, which knows how much there is of everything and in which phase, but no order within a phase; or
from a compiled program, which knows the order too.
"""

import collections
import dataclasses
from collections.abc import Iterable

from llmjax.mesh import AXES
from llmjax.models.shapes import LAYER
from llmjax.plan.analytic import Sent
from llmjax.plan.compiled import Report
from llmjax.plan.estimate import Estimate
from llmjax.plan.schedule import Moment
from llmjax.plan.work import Again, repeated

COMPUTE, LOOP = "compute", "loop"


@dataclasses.dataclass(frozen=True)
class Span:
    """Something that happens from one second of the step to another."""

    lane: str
    "compute, or the mesh axes that a collective is over, joined with x."
    begin: float
    end: float
    what: str
    kind: str
    "matmul, attention, memory, wait or idle; of a collective its kind."
    waited: bool = False
    "Whether nothing hides it: devices wait for it."


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of the step, such as the forward pass of all layers."""

    name: str
    begin: float
    end: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A step from second 0 to `total`."""

    total: float
    phases: tuple[Phase, ...]
    spans: tuple[Span, ...]
    source: str
    "Where it comes from, as a sentence."

    def lanes(self) -> list[str]:
        """Compute, then the axes, in the order of the mesh."""
        rest = {span.lane for span in self.spans} - {COMPUTE}
        return [COMPUTE, *sorted(rest, key=lambda lane: [AXES.index(axis) for axis in lane.split(" x ")])]


@dataclasses.dataclass
class _Phase:
    """What a phase computes and sends, in seconds."""

    name: str
    computes: list[tuple[str, str, float]] = dataclasses.field(default_factory=list)  # what, kind, seconds
    sends: list[tuple[Sent, float]] = dataclasses.field(default_factory=list)  # a message, and the share of it here


def analytic(found: Estimate) -> Timeline:
    """The timeline of an analytic plan.

    The step is cut into forward, loss, backward and update by the FLOPs and bytes of each; messages of a phase are
    drawn over it, and what of them nothing hides comes as waiting at its end.
    """
    phases = _phases(found)
    spans, told, now = [], [], 0.0
    for phase in phases:
        begin = now
        for what, kind, seconds in phase.computes:
            spans.append(Span(COMPUTE, now, now + seconds, what, kind))
            now += seconds
        for lane, sends in _lanes(phase).items():
            spans += _hidden(lane, sends, begin, now)
        computed = now
        for lane, sends in _lanes(phase).items():
            for sent, share in sends:
                what, end = f"{sent.message.kind} for {sent.message.module}", now + sent.waited * share
                spans.append(Span(lane, now, end, what, sent.message.kind, True))
                now = end
        spans.append(Span(COMPUTE, computed, now, "waiting for the network", "wait"))
        told.append(Phase(phase.name, begin, now))
    for what, seconds in (("pipeline bubble", found.time.bubble), ("host and stragglers", found.time.host)):
        if seconds > 0:
            spans.append(Span(COMPUTE, now, now + seconds, what, "idle"))
            told.append(Phase(what, now, now + seconds))
            now += seconds
    source = (
        "From the analytic plan: the length of everything is what it foresees; of the order within a phase it knows "
        "nothing."
    )
    return Timeline(now, tuple(told), tuple(span for span in spans if span.end > span.begin), source)


def compiled(report: Report) -> Timeline:
    """The timeline of a compiled step, in the order of its program. Its innermost loops are the phases."""
    loops = [moment for moment in report.moments if moment.lane == LOOP]
    inner = [one for one in loops if not any(_within(other, one) for other in loops)]
    spans = [
        Span(m.lane, m.begin, m.end, m.what if m.kind == "wait" or m.lane != COMPUTE else f"{m.what}: {m.kind}",
             m.kind if m.kind != "other" else "memory", m.waited)
        for m in report.moments
        if m.lane not in (LOOP, "?")
    ]  # fmt: skip
    source = (
        "By the TPU compiler's own cycles, in the order of its program; of a loop one turn is drawn, stretched over "
        "all of them."
    )
    phases = tuple(Phase(one.what, one.begin, one.end) for one in inner)
    total = max([report.time.step, *(span.end for span in spans)])
    return Timeline(total, phases, tuple(spans), source)


def _within(one: Moment, other: Moment) -> bool:
    return one is not other and other.begin <= one.begin and one.end <= other.end


def _phases(found: Estimate) -> list[_Phase]:
    """Every second of compute and every message of the plan, in the phase where it belongs."""
    work, time, run = found.work, found.time, found.run
    stages = found.sizes.stage
    again = repeated(run, stages)
    layers = f"{run.model.layers // stages} layers"
    forward, loss = _Phase(f"forward, {layers}"), _Phase("loss")
    backward, update = _Phase(f"backward, {layers}"), _Phase("update")
    flops = sum(work.products.values()) or 1.0
    traffic = sum(size for module, size in work.traffic.items() if module != "scores") or 1.0

    def matmul(module: str) -> float:
        return time.matmul * work.products.get(module, 0.0) / flops

    def moved(module: str) -> float:
        return time.memory * work.traffic.get(module, 0.0) / traffic

    for phase, back in ((forward, False), (backward, True)):
        for module in LAYER:
            part = _part(again, module, back)
            phase.computes.append((f"{module}: products", "matmul", part * matmul(module)))
            if module == "attention":
                share = 1 / (3.5 + again.scores)
                phase.computes.append(
                    ("attention itself", "attention", time.attention * (1 - share if back else share))
                )
            phase.computes.append((f"{module}: norms, gates, sums", "memory", part * moved(module)))
    loss.computes += [("head", "matmul", matmul("head")), ("logits and loss", "memory", moved("head"))]
    loss.computes.append(("embedding", "matmul", matmul("embedding")))
    update.computes.append(("optimizer", "memory", moved("optimizer")))
    for sent in time.sent:
        for phase, share in zip((forward, loss, backward, update), _shares(sent), strict=True):
            if share:
                phase.sends.append((sent, share))
    return [forward, loss, backward, update]


def _part(again: Again, module: str, back: bool) -> float:
    """The share of a layer's work that the forward pass, or the backward pass, has."""
    whole = 3 + again.of(module)
    return (whole - 1) / whole if back else 1 / whole


def _shares(sent: Sent) -> tuple[float, float, float, float]:
    """How much of a message belongs to the forward pass, the loss, the backward pass and the update."""
    message = sent.message
    if message.module in ("head", "embedding"):
        return 0, 1, 0, 0
    if message.hidden and message.kind in ("reduce-scatter", "all-reduce"):  # of gradients
        return 0, 0, 1, 0
    return 0.5, 0, 0.5, 0


def _lanes(phase: _Phase) -> dict[str, list[tuple[Sent, float]]]:
    """The messages of a phase by the axes they are over."""
    lanes: dict[str, list[tuple[Sent, float]]] = collections.defaultdict(list)
    for sent, share in phase.sends:
        lanes[" x ".join(sent.message.axes)].append((sent, share))
    return lanes


def _hidden(lane: str, sends: list[tuple[Sent, float]], begin: float, end: float) -> Iterable[Span]:
    """What of the messages travels while a phase computes, one after the other, at equal distances."""
    long = [(sent.seconds - sent.waited) * share for sent, share in sends]
    shrunk = min(1.0, (end - begin) / sum(long)) if sum(long) > 0 else 1.0
    gap = (end - begin - shrunk * sum(long)) / len(sends)
    now = begin
    for (sent, _), seconds in zip(sends, long, strict=True):
        until = now + shrunk * seconds
        yield Span(lane, now, until, f"{sent.message.kind} for {sent.message.module}", sent.message.kind)
        now = until + gap
