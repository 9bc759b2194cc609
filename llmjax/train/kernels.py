"""Which way attention is computed on a platform, and why not another."""

from llmjax.layout import ways
from llmjax.mesh import Axes, Chip
from llmjax.models import splash
from llmjax.models.cudnn import WIDEST
from llmjax.run import Run

OWN = dict(tpu="splash", gpu="cudnn")  # the kernel that only one platform has
BLOCK = {"TPU v6e": 2048, "TPU 7x": 2048}  # positions in a block of splash: what the kernel's fast memory holds
NARROWER = 1024
LONG = 1024  # positions from which blocks are faster than all scores at once: on a CPU as fast at 256, then 1.6 times


def kernel(run: Run, axes: Axes, chip: Chip) -> tuple[str, str]:
    """(how attention is computed, why not in the kernel that is asked for or is the platform's own).

    Without a kernel, long sequences go in blocks.
    """
    if not _head_dim(run):  # there is no attention
        return "reference", ""
    if ways(run.layout.inner.get("S"), axes) > 1:
        return "ring", ""
    if run.attention != "auto":
        return run.attention, lacks(run.attention, run, axes, chip)
    own = OWN.get(chip.platform)
    why = lacks(own, run, axes, chip) if own else ""
    if own and not why:
        return own, ""
    return "blocked" if run.sequence >= LONG else "reference", why


def lacks(kernel: str, run: Run, axes: Axes, chip: Chip) -> str:
    """Why the kernel cannot run this on such chips; empty where it can, and for those that run anywhere."""
    if kernel not in OWN.values():
        return ""
    for owner, own in OWN.items():
        if kernel == own and chip.platform != owner:
            return f"{kernel} runs on {owner.upper()}s, and this is a {chip.platform.upper()}"
    if (stages := ways(run.layout.params.get("L"), axes)) > 1:
        return f"{kernel} has no derivative inside a pipeline's stages, of which there are {stages}"
    if getattr(run.model, "sinks", False):
        return f"{kernel} has no attention sinks, and the model has"
    return _splash_lacks(run, axes) if kernel == "splash" else _cudnn_lacks(run, axes, chip)


def _splash_lacks(run: Run, axes: Axes) -> str:
    positions = run.sequence // ways(run.layout.inner.get("T"), axes)
    if positions % splash.LANES:
        return f"splash takes multiples of {splash.LANES} positions on a device, and there are {positions}"
    return ""


def _cudnn_lacks(run: Run, axes: Axes, chip: Chip) -> str:
    parts, head_dim = ways(run.layout.inner.get("T"), axes), _head_dim(run)
    if cap := getattr(run.model, "cap", 0.0):
        return f"cudnn does not cap scores, and model.cap is {cap:g}"
    if not run.in_bfloat16(chip.platform):
        return "cudnn takes bfloat16, and products are float32"
    if parts > 1:
        return f"cudnn takes whole sequences, and they are cut into {parts} parts"
    if head_dim % 8 or head_dim > WIDEST:
        return f"cudnn takes heads up to {WIDEST} wide, in multiples of 8, and model.head_dim is {head_dim}"
    return ""


def _head_dim(run: Run) -> int:
    """Width of a head; 0: there is none."""
    return run.model.sizes().get("K", 0) if hasattr(run.model, "sizes") else 0
