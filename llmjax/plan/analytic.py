"""Seconds of a train step from the work of one device and a few constants of its chip, with no compiler."""

import dataclasses
import math

from llmjax.mesh import AXES, Axes, Cluster
from llmjax.plan import links
from llmjax.plan.work import Message, Work


@dataclasses.dataclass(frozen=True)
class Sent:
    """A message, with the seconds of all its runs in a step."""

    message: Message
    seconds: float
    waited: float
    "Those that nothing hides."


@dataclasses.dataclass(frozen=True)
class Time:
    """Where the time of a step goes, in seconds."""

    matmul: float
    attention: float
    memory: float
    "Norms, gates, the loss, the optimizer: what waits for memory."
    sent: tuple[Sent, ...]
    "Communication."
    bubble: float
    "Waiting of pipeline stages."
    host: float
    "What is left over: starting, waiting for the slowest of many."

    @property
    def exposed(self) -> dict[str, float]:
        """Communication that nothing hides, by mesh axes joined with x."""
        sums: dict[str, float] = {}
        for each in self.sent:
            axes = " x ".join(each.message.axes)
            sums[axes] = sums.get(axes, 0.0) + each.waited
        return sums

    @property
    def step(self) -> float:
        waited = sum(each.waited for each in self.sent)
        return self.matmul + self.attention + self.memory + waited + self.bubble + self.host


def seconds(message: Message, cluster: Cluster, sizes: Axes) -> float:
    """Time of all runs of a message in a step."""
    where = links.span(cluster, sizes, message.axes)
    return message.count * links.seconds(message.kind, message.bytes, where, cluster)


def predict(work: Work, cluster: Cluster, sizes: Axes) -> Time:
    """The time of a step whose work is this.

    Messages of weights and gradients may travel while anything is computed: what exceeds that is waited for in full.
    Of all others, and of those of activations, compute hides the share that is the chip's `overlap`.
    """
    chip, best = cluster.chip, cluster.chip.efficiency
    reads = work.weights / (chip.bandwidth * best.memory)
    matmul = max(sum(work.products.values()) / (chip.flops * best.matmul), reads)
    waits = {module: size / (chip.bandwidth * best.memory) for module, size in work.traffic.items()}
    attention = work.attention / (chip.flops * best.attention) + waits.pop("scores", 0)
    memory = sum(waits.values())
    compute = matmul + attention + memory

    times = [(message, seconds(message, cluster, sizes)) for message in work.messages]
    hideable = sum(time for message, time in times if message.hidden)
    beyond = max(0.0, hideable - compute) + (1 - best.overlap) * min(hideable, compute)
    shares = {True: beyond / (hideable or 1), False: 1 - best.overlap}
    sent = tuple(Sent(message, time, time * shares[message.hidden]) for message, time in times)
    busy = compute + sum(each.waited for each in sent)
    bubble = busy * work.bubble
    return Time(matmul, attention, memory, sent, bubble, (busy + bubble) * lost(cluster, sizes))


def lost(cluster: Cluster, sizes: Axes) -> float:
    """The share of a step that is lost because many parts of a cluster wait for each other."""
    parts = links.span(cluster, sizes, AXES).outside
    return cluster.chip.efficiency.doubling * math.log2(parts)
