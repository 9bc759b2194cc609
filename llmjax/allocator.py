"""The memory in which a CPU trains: what glibc's malloc is told, which reads it only when a process begins."""

import contextlib
import os
import sys
from collections.abc import Mapping

from llmjax.hardware import GPUS, TPUS, has

NAME = "GLIBC_TUNABLES"
# XLA allocates a step's temporaries anew each time. glibc gives blocks of that size back to the kernel, which clears
# every page of them for the next step. With high thresholds they stay; and where the kernel leaves it to programs, they
# lie on large pages, of which a core remembers more. (The manual of glibc, "Memory Allocation Tunables"; before 2.35 it
# does not know the first.)
TUNABLES = {"hugetlb": 1, "mmap_threshold": 2**32, "trim_threshold": 2**33}
SETTINGS = ":".join(f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items())


def start_again() -> None:
    """Starts this process once more with these settings: the same program, arguments and process id.

    It returns where that would bring nothing: another C library than glibc, an accelerator, the settings are there; or
    where the environment says how malloc is to work. Call it before anything else was begun.
    """
    asked = NAME in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if not asked and sys.executable and glibc() and not has(*GPUS, *TPUS):
        with contextlib.suppress(OSError):
            os.execve(sys.executable, sys.orig_argv, os.environ | {NAME: SETTINGS})


def without(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment as it was before `start_again`."""
    return {name: value for name, value in environment.items() if (name, value) != (NAME, SETTINGS)}


def glibc() -> bool:
    """Whether that is the C library."""
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, OSError, ValueError):  # no Linux; another C library
        return False
