"""Which arrays of a Hugging Face checkpoint make up which of our parameters, and the way between them, slice by slice.

Theirs are one per layer, and per expert in some families, with heads and head dim as one side of a matrix. Ours stack
layers and experts and keep heads apart. Both are views of the same numbers: nothing is computed on the way.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from llmjax.errors import DATA, Refused
from llmjax.interop.safetensors import Entry

Index = tuple[slice, ...]
THREADS = 4  # that write at once
FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Weight:
    """One of our parameters in their names."""

    ours: str
    "blocks.query_DHK: its last word names its dims, behind the L of stacked layers."
    theirs: str
    "model.layers.{L}.self_attn.q_proj.weight: the numbers of layer and expert are part of the name."
    dims: str
    "HK,D: the dims of theirs, each of one or more letters; a digit n is a side of n parameters, this one its `part`."
    part: int = 0
    layers: range | None = None
    "The numbers of the layers along L, from 0."
    float32: bool = False
    "Kept in float32 whatever the others are in."

    @property
    def letters(self) -> str:
        """The dims of ours."""
        return ("L" if self.layers is not None else "") + self.ours.rpartition("_")[2]

    @property
    def named(self) -> str:
        """Those of them that are numbers in their names: the first ones."""
        return "".join(d for d in self.letters if "{" + d + "}" in self.theirs)

    def sizes(self, shape: tuple[int, ...]) -> dict[str, int]:
        """The size of every letter, given the shape of ours."""
        return {d: int(d) for d in self.dims if d.isdigit()} | dict(zip(self.letters, shape, strict=True))

    def names(self, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
        """(index into the named dims, their name)."""
        sizes = self.sizes(shape)
        for index in itertools.product(*(range(sizes[d]) for d in self.named)):
            numbers = dict(zip(self.named, index, strict=True))
            if "L" in numbers:
                numbers["L"] = self.layers[numbers["L"]]
            yield index, self.theirs.format(**numbers)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of theirs."""
        sizes = self.sizes(shape)
        return tuple(math.prod(sizes[d] for d in side) for side in self.dims.split(",")) if self.dims else ()

    def view(self, theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Theirs as the rest of ours, without the named dims."""
        sizes, letters = self.sizes(shape), self.dims.replace(",", "")
        whole = theirs.reshape([sizes[d] for d in letters])
        whole = whole[tuple(self.part if d.isdigit() else slice(None) for d in letters)]
        left = [d for d in letters if not d.isdigit()]
        return whole.transpose([left.index(d) for d in self.letters if d not in self.named])


def stacked(name: str, weights: Iterable[Weight], layers: range) -> list[Weight]:
    """Weights of one layer as those of layers with these numbers, stacked under a name."""
    return [dataclasses.replace(weight, ours=f"{name}.{weight.ours}", layers=layers) for weight in weights]


def of_layers(weights: Iterable[Weight], layers: int, kinds: int = 0) -> list[Weight]:
    """Weights of one layer, named without `blocks.`, as those of all layers.

    With `kinds`, so many take turns (an nnx.List), and layers that fit no turn come first.
    """
    ahead, found = layers % (kinds or 1), []
    for weight in weights:
        for i in range(ahead):
            found += stacked(f"first.{i}", [weight], range(i, i + 1))
        for i in range(kinds or 1):
            found += stacked(f"blocks.{i}" if kinds else "blocks", [weight], range(ahead + i, layers, kinds or 1))
    return found


def account(weights: list[Weight], wanted: Mapping[str, Any], found: Mapping[str, Entry], spare: Iterable[str]) -> None:
    """Refuses a checkpoint in which a tensor is missing, unknown, of another shape, or no float.

    `spare` are patterns of names that may be there and are not used.

    Raises:
      Refused: naming the tensors.
    """
    shapes = {theirs: w.shape(wanted[w.ours].shape) for w in weights for _, theirs in w.names(wanted[w.ours].shape)}
    said = {
        "lacks": [name for name in shapes if name not in found],
        "has, and this family has not,": [
            name for name in found if name not in shapes and not any(re.search(one, name) for one in spare)
        ],
        "has in another shape": [
            f"{name} {list(found[name].shape)} in place of {list(shape)}"
            for name, shape in shapes.items()
            if name in found and found[name].shape != shape
        ],
        "has in another type than a float's": [
            f"{name} ({found[name].dtype})" for name in shapes if name in found and found[name].dtype.name not in FLOATS
        ],
    }
    wrong = [f"{how} {_listed(names)}" for how, names in said.items() if names]
    if wrong:
        raise Refused(f"the checkpoint {'; it '.join(wrong)}: give one that its config.json describes.", DATA)


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - 8:,} more" if len(names) > 8 else ""
    return f"{', '.join(names[:8])}{rest}"


def load(weight: Weight, like: Any, found: Mapping[str, Entry]) -> jax.Array:
    """One of our parameters with the shape, type and place of `like`; each device reads its own slices alone."""
    names = dict(weight.names(like.shape))

    def piece(index: Index) -> np.ndarray:
        ranges = [range(*cut.indices(size)) for cut, size in zip(index, like.shape, strict=True)]
        out, count = np.empty([len(each) for each in ranges], like.dtype), len(weight.named)
        for at in itertools.product(*(range(len(each)) for each in ranges[:count])):
            number = tuple(each[i] for each, i in zip(ranges, at, strict=False))
            out[at] = weight.view(found[names[number]].map(), like.shape)[index[count:]]
        return out

    return jax.make_array_from_callback(like.shape, like.sharding, piece)


def store(weight: Weight, value: jax.Array, places: Mapping[str, Entry]) -> None:
    """Writes one of our parameters into files that have room for it, as it lies on this process's devices.

    A piece that several devices hold is written once.
    """
    names = dict(weight.names(value.shape))
    for shard in value.addressable_shards:
        if shard.replica_id:
            continue
        ranges = [range(*cut.indices(size)) for cut, size in zip(shard.index, value.shape, strict=True)]
        data, count = np.asarray(shard.data), len(weight.named)

        def one(at, ranges=ranges, data=data, rest=shard.index[count:]):
            number = tuple(each[i] for each, i in zip(ranges, at, strict=False))
            mapped = places[names[number]].map("r+")
            weight.view(mapped, value.shape)[rest] = data[at]

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(one, itertools.product(*(range(len(each)) for each in ranges[:count]))))
