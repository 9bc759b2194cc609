"""`python -m llmjax.bench.worker`: one contender of a comparison, in a process of its own.

It reads a line of JSON, {"run": …, "kind": ours | eager | compiled}, gets ready and answers with a line; then every
line is a number of steps to take, and every answer the seconds of each. At the end of its input it says what memory
it has had. Where something fails, the answer holds `failed`, or `refused`, and the process ends.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import IO, Any

from llmjax.bench import timing
from llmjax.errors import Refused
from llmjax.processes import Processes
from llmjax.run import Run, from_json

KINDS = ("ours", "eager", "compiled")
Answer = dict[str, Any]


def main() -> None:
    """Speaks by the stdout it was given; what libraries print there goes to stderr."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        asked = json.loads(sys.stdin.readline())
        contend = ours if asked["kind"] == "ours" else theirs
        for answer in contend(from_json(asked["run"]), asked["kind"], sys.stdin):
            print(json.dumps(answer), file=out)
    except Refused as refusal:
        print(json.dumps({"refused": str(refusal)}), file=out)
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"failed": f"{type(error).__name__}: {error}".splitlines()[0]}), file=out)


def ours(run: Run, kind: str, lines: IO[str]) -> Iterator[Answer]:
    """Our train step, on the devices of the run's mesh."""
    program, devices = timing.program(run, Processes())
    if len(devices) > 1 and devices[0].platform != "cpu":
        raise Refused(f"torch runs on one device, and mesh {run.mesh.name} has {len(devices)}: choose one of one.")
    with program.context():
        steps = timing.Steps(program)
        yield dict(
            compile_s=steps.compile_s, devices=[device.device_kind for device in devices], step_bytes=steps.bytes(),
            operands=program.compute.operands, flops_per_token=program.flops_per_token, peak=program.peak,
            accumulate=program.accumulate,
        )  # fmt: skip
        yield from _turns(steps, lines)
        yield dict(
            peak_bytes=timing.peak_bytes(devices), process_bytes=timing.process_bytes(),
            matmul_flops_per_s=timing.matmul_rate(program.compute.operands, devices),
        )  # fmt: skip


def theirs(run: Run, kind: str, lines: IO[str]) -> Iterator[Answer]:
    """PyTorch's train step, on its first GPU or all cores."""
    import torch

    from llmjax.bench import reference

    torch.set_num_threads(timing.cores())  # as many as XLA takes
    step = reference.stepper(run, compiled=kind == "compiled")
    began = time.perf_counter()
    step()
    yield dict(first_step_s=time.perf_counter() - began, torch=torch.__version__)
    yield from _turns(step, lines)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    yield dict(peak_bytes=peak, process_bytes=timing.process_bytes())


def _turns(step: Callable[[], None], lines: IO[str]) -> Iterator[Answer]:
    for line in lines:
        yield dict(seconds=timing.timed(step, int(line)))


if __name__ == "__main__":
    main()
