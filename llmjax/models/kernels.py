"""Which way to compute attention a platform can take, and why not another."""

from llmjax.models import splash
from llmjax.models.cudnn import WIDEST

OWN = dict(tpu="splash", gpu="cudnn")  # the kernel that only one platform has
BLOCK = {"TPU v6e": 2048, "TPU 7x": 2048}  # positions in a block of splash: what the kernel's fast memory holds
NARROWER = 1024
LONG = 1024  # positions from which blocks are faster than all scores at once: on a CPU as fast at 256, then 1.6 times


def lacks(
    kernel: str,
    platform: str,
    *,
    positions: int,
    ways: int,
    stages: int,
    head_dim: int,
    bfloat16: bool,
    cap: float,
    sinks: bool,
) -> str:
    """Why the kernel cannot run on such devices, of which each holds so many positions; empty where it can.

    `ways` is into how many parts sequences are cut; `cap` and `sinks` are those of `llmjax.models.scores`.
    """
    for owner, own in OWN.items():
        if kernel == own and platform != owner:
            return f"{kernel} runs on {owner.upper()}s, and this is a {platform.upper()}"
    if kernel in OWN.values() and stages > 1:
        return f"{kernel} has no derivative inside a pipeline's stages, of which there are {stages}"
    if kernel == "splash" and positions % splash.LANES:
        return f"splash takes multiples of {splash.LANES} positions on a device, and there are {positions}"
    if kernel in OWN.values() and sinks:
        return f"{kernel} has no attention sinks, and the model has"
    if kernel == "cudnn" and cap:
        return f"cudnn does not cap scores, and model.cap is {cap:g}"
    if kernel == "cudnn" and not bfloat16:
        return "cudnn takes bfloat16, and products are float32"
    if kernel == "cudnn" and ways > 1:
        return f"cudnn takes whole sequences, and they are cut into {ways} parts"
    if kernel == "cudnn" and (head_dim % 8 or head_dim > WIDEST):
        return f"cudnn takes heads up to {WIDEST} wide, in multiples of 8, and model.head_dim is {head_dim}"
    return ""
