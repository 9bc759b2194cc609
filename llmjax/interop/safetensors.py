"""Safetensors files: a JSON header that says where each array lies, then their bytes, little endian, without gaps.

Arrays are mapped into memory and not read, so whoever takes a slice reads that slice, and a file is made before what
goes into it is known: the package `safetensors` (0.8) writes only what is all in memory. A header is believed only
where all of it fits the file: https://github.com/huggingface/safetensors#format.
"""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llmjax.errors import DATA, IO, Refused

LARGEST = 10**8  # bytes of a header, the format's own limit
DTYPES = dict(F64=np.float64, F32=np.float32, F16=np.float16, BF16=ml_dtypes.bfloat16, F8_E4M3=ml_dtypes.float8_e4m3fn,
              F8_E5M2=ml_dtypes.float8_e5m2, I64=np.int64, I32=np.int32, I16=np.int16, I8=np.int8, U64=np.uint64,
              U32=np.uint32, U16=np.uint16, U8=np.uint8, BOOL=np.bool_)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array in a file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    "Bytes of the file before it."

    def map(self, mode: str = "r") -> np.ndarray:
        """The array in the file: taking a slice of it reads that slice; with mode "r+" setting one writes it."""
        if not math.prod(self.shape):
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, mode, self.start, self.shape)


def header(path: Path) -> dict[str, Entry]:
    """The arrays of a file by name.

    Raises:
      Refused: it cannot be read, or is no whole safetensors file.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else 0
            if not 2 <= length <= min(LARGEST, size - 8):
                raise ValueError(f"its first 8 bytes give its header {length:,} bytes, and the file has {size:,}")
            found = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
        return _entries(path, found, 8 + length, size)
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}): give a folder with all files.", IO) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Refused(f"{path} is no whole safetensors file ({error}): download it again.", DATA) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("its header names something twice")
    return found


def _entries(path: Path, found: Any, begin: int, size: int) -> dict[str, Entry]:
    if not isinstance(found, dict) or not isinstance(found.pop("__metadata__", {}), dict):
        raise ValueError("its header is no object")
    entries, ends = {}, []
    for name, said in found.items():
        if said["dtype"] not in DTYPES:
            raise ValueError(f"{name} has dtype {said['dtype']!r:.40}, which is none")
        shape, (start, end) = said["shape"], said["data_offsets"]
        numbers = (*shape, start, end)
        if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"{name} has a shape or place that is no count")
        dtype = np.dtype(DTYPES[said["dtype"]])
        if end - start != math.prod(shape) * dtype.itemsize or begin + end > size:
            raise ValueError(f"{name} lies at bytes {start:,} to {end:,}, which its shape or the file's end denies")
        entries[name] = Entry(path, dtype, tuple(shape), begin + start)
        ends.append((start, end, name))
    last = 0
    for start, end, name in sorted(ends):
        if start != last:
            raise ValueError(f"{name} {'overlaps' if start < last else 'leaves a gap to'} what lies before it")
        last = end
    if begin + last != size:
        raise ValueError(f"it has {size - begin - last:,} bytes that belong to no array")
    return entries


def create(path: Path, arrays: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> dict[str, Entry]:
    """Makes a file with room for these arrays (name -> dtype, shape), to be written through `Entry.map("r+")`."""
    codes = {np.dtype(kind): code for code, kind in DTYPES.items()}
    said: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers looks for it
    places, last = {}, 0
    for name, (dtype, shape) in arrays.items():
        end = last + math.prod(shape) * np.dtype(dtype).itemsize
        said[name] = dict(dtype=codes[np.dtype(dtype)], shape=list(shape), data_offsets=[last, end])
        places[name], last = (np.dtype(dtype), tuple(shape), last), end
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + last)
    begin = 8 + len(text)
    return {name: Entry(path, dtype, shape, begin + start) for name, (dtype, shape, start) in places.items()}
