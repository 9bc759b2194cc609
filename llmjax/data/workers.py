"""Calls a function for each of many jobs, in processes of their own; the first that fails ends all."""

import concurrent.futures
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from llmjax import leash


def told(done: Iterator[None], before: int, total: int, what: str, say: Callable[[str], None]) -> None:
    """Goes through `done` and says now and then how many of `total` there are, with those from before."""
    began, last = time.monotonic(), 0.0
    if before:
        say(f"{before} of {total} {what} are there from before.")
    for count, _ in enumerate(done, before + 1):
        if (now := time.monotonic() - began) - last > 10 or count == total:
            last = now
            say(f"{count} of {total} {what} after {now:.0f} s.")


def each(call: Callable[..., None], jobs: Sequence[tuple], workers: int) -> Iterator[None]:
    """Yields once for every job that is done. Few are waiting at a time."""
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield call(*job)
        return
    context, waiting = multiprocessing.get_context("spawn"), iter(jobs)
    pool = concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), context, _begin, (os.getpid(),))
    try:
        running = set()
        while True:
            for job in waiting:
                running.add(pool.submit(call, *job))
                if len(running) >= 2 * workers:
                    break
            if not running:
                break
            over, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in over:
                yield future.result()
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(parent: int) -> None:
    """A worker ends with its parent, leaves Ctrl-C to it, and keeps to one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(leash.WHEN_THE_PARENT_DIES, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
