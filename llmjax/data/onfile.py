"""Arrays that stay in their files and are read piece by piece.

A memory map of a file that is cut short while it is read ends the process with a bus error, and a check before the read
leaves a moment between the two. A read says how much there was.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np

from llmjax.errors import DATA, Refused

CONTINUE = "bring it back, and run the same command to continue."


@dataclasses.dataclass(frozen=True, eq=False)
class OnFile:
    """A one-dimensional array in a file, read wherever it is indexed with a number or a slice of step 1.

    Raises:
      Refused, on reading: the file is gone or of another size (code 65).
    """

    path: Path
    dtype: np.dtype
    count: int
    offset: int = 0
    "Bytes before the first."
    remedy: str = CONTINUE

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.offset + self.count * self.dtype.itemsize

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int | slice) -> np.ndarray:
        if not isinstance(index, slice):
            return self._read(range(self.count)[index], 1)[0]
        start, stop, step = index.indices(self.count)
        if step != 1:
            raise IndexError(f"{index} of an array on file")
        return self._read(start, max(0, stop - start))

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        if copy is False:
            raise ValueError("an array on file is always copied")
        return self[:].astype(dtype or self.dtype, copy=False)

    def _read(self, start: int, count: int) -> np.ndarray:
        found = np.empty(count, self.dtype)
        try:
            file = os.open(self.path, os.O_RDONLY)
            try:
                _check(self.path, os.fstat(file).st_size, self.size, self.remedy)
                _fill(file, memoryview(found).cast("B"), self.offset + start * self.dtype.itemsize)
            finally:
                os.close(file)
        except (OSError, EOFError) as error:
            why = getattr(error, "strerror", None) or error
            raise Refused(f"'{self.path}' cannot be read ({why}): {self.remedy}", DATA) from None
        return found


def _fill(file: int, into: memoryview, offset: int) -> None:
    while into:
        if not (count := os.preadv(file, [into], offset)):
            raise EOFError("it was cut short")
        into, offset = into[count:], offset + count


def check_file(path: Path, size: int, remedy: str = CONTINUE) -> None:
    """Refuses a file that is gone or of another size (code 65)."""
    try:
        found = path.stat().st_size
    except OSError as error:
        raise Refused(f"'{path}' cannot be read ({error.strerror}): {remedy}", DATA) from None
    _check(path, found, size, remedy)


def _check(path: Path, found: int, size: int, remedy: str) -> None:
    if found != size:
        raise Refused(f"'{path}' has {found} bytes where {size} were written: {remedy}", DATA)
