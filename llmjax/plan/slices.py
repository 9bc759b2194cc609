"""Clusters that no mesh file describes: so many chips of a kind, in a topology that can be rented."""

import dataclasses
import functools
import importlib
import math
from pathlib import Path

from llmjax.errors import IO, Refused, did_you_mean
from llmjax.mesh import Chip, Cluster
from llmjax.plan import topology

NODES = 8192  # GPUs up to which a cluster is taken to exist


def chips() -> dict[str, Chip]:
    """The chips that are known, by their names on the command line: v5p, h100, ..."""
    known = importlib.import_module("meshes.chips").KNOWN
    return {chip.name.lower().removeprefix("tpu ").replace("7x", "tpu7x"): chip for chip in known if chip.flops}


def cluster(kind: str, count: int, slices: int = 0) -> Cluster:
    """So many chips of a kind: in the fewest slices that can be rented, each as cubic as it can be.

    Raises:
      Refused: there is no such chip, or no topology has so many; the near numbers are named.
    """
    known, name = chips(), kind.lower()
    if name not in known:
        near = did_you_mean(name, known)
        raise Refused(f"there is no chip named '{kind}': {near}give one of {', '.join(known)}.")
    chip = known[name]
    devices = count * chip.devices
    if chip.platform != "tpu":
        if count < 1 or count > NODES or (count % chip.domain if count > chip.domain else chip.domain % count):
            near = _near(count, _nodes(chip.domain))
            raise Refused(f"chips is {count}, but {chip.name}s come in nodes of {chip.domain}: give {near}.")
        return Cluster(f"{name}x{count}", chip, chips=devices, tensor=min(count, chip.domain))
    whole = topologies(chip.name)
    most = max(whole)
    ways = [slices] if slices else range(1, max(1, -(-count // most)) + 4)
    for parts in ways:
        if count % parts == 0 and count // parts in whole:
            title = f"{name}_{count // parts}" + (f"_x{parts}" if parts > 1 else "")
            return Cluster(title, chip, chips=devices, slices=parts, topology=whole[count // parts], tensor=4)
    of = f" in {slices} slices" if slices else ""
    legal = [n * max(1, slices) for n in whole]
    raise Refused(f"chips is {count}, which no {chip.name} topology has{of}: give {_near(count, legal)}.")


@functools.cache
def topologies(name: str) -> dict[int, str]:
    """The topologies of one slice of a TPU by its chips; of several with as many, the most cubic."""
    shapes = sorted(topology.shapes(topology.COMPILER[name]), key=lambda shape: (math.prod(shape), -max(shape)))
    return {math.prod(shape): "x".join(map(str, shape)) for shape in shapes}


def write(path: Path, cluster: Cluster) -> None:
    """Writes a mesh file as those in `meshes/` are.

    Raises:
      Refused: it is no .py file, or cannot be written.
    """
    if path.suffix != ".py":
        raise Refused(f"write is {path}: name a Python file, such as meshes/{cluster.name}.py.")
    if path.exists():
        raise Refused(f"write is {path}, which exists: name another file, or delete it.")
    try:
        path.write_text(text(dataclasses.replace(cluster, name=path.stem)), encoding="utf-8")
    except OSError as error:
        raise Refused(f"write is {path}, which cannot be written ({error.strerror}): name another.", IO) from error


def text(cluster: Cluster) -> str:
    """A cluster as the text of a mesh file."""
    known = vars(importlib.import_module("meshes.chips")).items()
    chip = next(name for name, value in known if value == cluster.chip)
    each = cluster.chips // cluster.slices // cluster.chip.devices
    title = f"{cluster.slices} slices of {each}" if cluster.slices > 1 else f"{each}"
    title += f" {cluster.chip.name} chips" + (f", {cluster.topology}" if cluster.topology else "")
    fields = [f'"{cluster.name}"', chip, f"chips={cluster.chips}"]
    fields += [f"slices={cluster.slices}"] if cluster.slices > 1 else []
    fields += [f'topology="{cluster.topology}"'] if cluster.topology else []
    fields += [f"tensor={cluster.tensor}"] if cluster.tensor > 1 else []
    fields += ["emulated=True"] if cluster.emulated else []
    head = f"from llmjax.mesh import Cluster\nfrom meshes.chips import {chip}"
    return f'"""{title}."""\n\n{head}\n\ncluster = Cluster({", ".join(fields)})\n'


def _nodes(domain: int) -> list[int]:
    return [n for n in range(1, domain) if domain % n == 0] + list(range(domain, NODES + 1, domain))


def _near(count: int, legal) -> str:
    below, above = [n for n in legal if n < count], [n for n in legal if n > count]
    return " or ".join(map(str, (*below[-1:], *above[:1])))
