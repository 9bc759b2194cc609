"""What accelerators this machine has, by the files in which Linux shows them: known before JAX is asked."""

from pathlib import Path

GPUS = "nvidiactl", "kfd"
TPUS = "accel*", "vfio"


def has(*files: str) -> bool:
    """Whether one of these lies in /dev."""
    return any(any(Path("/dev").glob(file)) for file in files)
