"""What a CPU's step frees is there for the next one."""

import os
import subprocess
import sys

import pytest

from llmjax import allocator, hardware

BLOCK = 2**26
# Bytes that the process has of its heap beside what it had before a block was used and freed (mallinfo2(3)).
SCRIPT = f"""
import ctypes
import os
import sys
from pathlib import Path

from llmjax import allocator

with Path(sys.argv[1]).open("a") as starts:
    print(os.getpid(), file=starts)
allocator.has = lambda *_: False
allocator.start_again()

class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ["arena", *map(str, range(9))]]

glibc = ctypes.CDLL(None)
glibc.mallinfo2.restype, glibc.malloc.restype, glibc.free.argtypes = Mallinfo2, ctypes.c_void_p, [ctypes.c_void_p]
before = glibc.mallinfo2().arena
glibc.free(glibc.malloc({BLOCK}))
print(glibc.mallinfo2().arena - before)
"""
with_glibc = pytest.mark.skipif(not allocator.glibc(), reason="the C library is not glibc")
on_cpus = pytest.mark.skipif(hardware.has(*hardware.GPUS, *hardware.TPUS), reason="this machine has an accelerator")


def plain() -> dict[str, str]:
    """The environment, without what it says of malloc."""
    return {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != allocator.NAME}


def started(folder, **also: str) -> tuple[list[str], int]:
    """(the process of each start, the bytes that the last one kept)."""
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, folder / "script.py", folder / "starts"]
    ended = subprocess.run(command, env=plain() | also, capture_output=True, text=True, check=True)
    return (folder / "starts").read_text().split(), int(ended.stdout)


@with_glibc
def test_a_process_starts_once_more_as_itself_and_keeps_what_is_freed(tmp_path):
    processes, kept = started(tmp_path)
    assert len(processes) == 2 and len(set(processes)) == 1
    assert kept >= BLOCK


@with_glibc
@pytest.mark.parametrize(
    "name, value", [("MALLOC_TOP_PAD_", "131072"), (allocator.NAME, "glibc.malloc.tcache_count=7")]
)
def test_what_the_environment_says_of_malloc_stands(tmp_path, name, value):
    processes, kept = started(tmp_path, **{name: value})
    assert len(processes) == 1 and kept < BLOCK


@with_glibc
@on_cpus
@pytest.mark.parametrize("command, kept", [("train", True), ("bench", True), ("show", False)])
def test_commands_that_train_do_so_in_such_a_process(tmp_path, command, kept):
    """An experiment sees the environment of the process that it is read in."""
    (tmp_path / "told.py").write_text(
        f"import os\nfrom experiments.bench_tiny import run\nprint('told', os.environ.get('{allocator.NAME}'))\n"
    )
    line = [sys.executable, "-c", "from llmjax import cli; cli.command()", command, "told.py", "--help"]
    env = plain() | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert f"told {allocator.SETTINGS if kept else None}\n" in ended.stdout


def test_another_program_is_given_the_environment_as_it_was():
    asked = {allocator.NAME: "glibc.malloc.tcache_count=7", "HOME": "/"}
    assert allocator.without({allocator.NAME: allocator.SETTINGS, "HOME": "/"}) == {"HOME": "/"}
    assert allocator.without(asked) == asked
