"""What a CPU's step frees is there for the next one."""

import os
import subprocess
import sys

import pytest

BLOCK = 2**26
# Bytes that the process still has of its heap when a block has been used and freed (mallinfo2(3), its first field).
KEPT = f"""
import ctypes
import numpy as np
from llmjax import processes
from meshes import local

class Mallinfo2(ctypes.Structure):
    _fields_ = [(f"field{{i}}", ctypes.c_size_t) for i in range(10)]

processes.start(local.cluster)
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo2
before = mallinfo2().field0
np.ones({BLOCK} // 8)
print(mallinfo2().field0 - before)
"""


def kept(**also: str) -> int:
    """Bytes more than before the block."""
    plain = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    ended = subprocess.run([sys.executable, "-c", KEPT], env=plain | also, capture_output=True, text=True, check=True)
    return int(ended.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="keeps memory on Linux alone")
def test_what_a_step_frees_stays_with_the_process():
    assert kept() > BLOCK // 2  # some of it was free before


@pytest.mark.skipif(sys.platform != "linux", reason="keeps memory on Linux alone")
@pytest.mark.parametrize(
    "name, value", [("MALLOC_TOP_PAD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.tcache_count=7")]
)
def test_what_the_environment_says_of_malloc_stands(name, value):
    assert kept(**{name: value}) < BLOCK // 2
