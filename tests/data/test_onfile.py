"""Arrays on file: what is read is what was written, and a file that changes while it is read is refused by name."""

import os

import numpy as np
import pytest

from llmjax.data.onfile import OnFile
from llmjax.errors import DATA, Refused

VALUES = np.random.default_rng(0).integers(1 << 16, size=1000).astype("<u2")


@pytest.fixture
def array(tmp_path):
    path = tmp_path / "tokens.bin"
    path.write_bytes(b"head" + VALUES.tobytes())
    return OnFile(path, VALUES.dtype, len(VALUES), 4, "copy it anew.")


@pytest.mark.parametrize("piece", [slice(None), slice(3, 70), slice(-5, None), slice(990, 2000), slice(7, 7), 0, -1])
def test_any_piece_is_that_of_the_array_in_memory(array, piece):
    assert np.array_equal(array[piece], VALUES[piece]) and array[piece].dtype == VALUES.dtype
    assert len(array) == len(VALUES) and np.array_equal(np.asarray(array, np.int64), VALUES)


def test_a_number_that_is_not_in_it_is_no_index(array):
    for index in (1000, -1001, slice(0, 10, 2)):
        with pytest.raises(IndexError):
            array[index]


@pytest.mark.parametrize("size", [0, 100, 2003, 2005])
def test_a_file_of_another_size_is_refused_whichever_piece_is_asked_for(array, size):
    os.truncate(array.path, size)
    with pytest.raises(Refused, match=f"tokens.bin' has {size} bytes where 2004 were written: copy it anew") as refused:
        array[:10]
    assert refused.value.code == DATA


def test_a_file_that_is_cut_short_between_its_measuring_and_its_reading_is_refused(array, monkeypatch):
    measured = os.fstat

    def then_cut(file):
        found = measured(file)
        os.truncate(array.path, 100)
        return found

    monkeypatch.setattr(os, "fstat", then_cut)
    with pytest.raises(Refused, match=r"tokens.bin' cannot be read .it was cut short.: copy it anew") as refused:
        array[500:600]
    assert refused.value.code == DATA


def test_a_file_that_is_gone_is_refused(array):
    array.path.unlink()
    with pytest.raises(Refused, match=r"tokens.bin' cannot be read .No such file"):
        array[0]
