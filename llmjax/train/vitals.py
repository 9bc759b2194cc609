"""How each process of a run is: how far, in which phase, with how much memory; for whoever watches."""

import contextlib
import json
import os
import platform
import resource
import shutil
import sys
import time
from pathlib import Path

import jax

BETWEEN = 2.0  # seconds, at least, between two signs of life in one phase


class Vitals:
    """Keeps `processes/<index>.json` of the run directory as young as the process's last sign of life.

    A folder that cannot be written, or is not shared between the machines, costs a sign of life and nothing else.
    """

    def __init__(self, folder: Path):
        self.path = folder / "processes" / f"{jax.process_index()}.json"
        self.facts = dict(process=jax.process_index(), host=platform.node(), pid=os.getpid())
        self.said, self.phase = 0.0, ""

    def __call__(self, step: int, phase: str) -> None:
        """After so many steps; at once where the phase is new, else now and then."""
        if phase == self.phase and time.monotonic() - self.said < BETWEEN:
            return
        self.said, self.phase = time.monotonic(), phase
        facts = dict(self.facts, step=step, phase=phase, time=time.time(), **memory())
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(exist_ok=True)
            scratch = self.path.with_suffix(".new")
            scratch.write_text(json.dumps(facts) + "\n", encoding="utf-8")
            scratch.replace(self.path)


def forget(folder: Path) -> None:
    """Takes away what the processes of an earlier start said."""
    shutil.rmtree(folder / "processes", ignore_errors=True)


def memory() -> dict[str, int | None]:
    """Largest number of bytes that this process, and the fullest of its devices, held so far.

    None for devices that do not tell, as CPUs.
    """
    told = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    held = [stats["peak_bytes_in_use"] for stats in told if "peak_bytes_in_use" in stats]
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return dict(host_bytes=host, device_bytes=max(held, default=None))
