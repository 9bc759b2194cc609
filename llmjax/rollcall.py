"""Who is there: every process of a run reports to the first one before they join, so that a missing one has a name.

JAX ends all processes with SIGABRT where one does not come, and says of none which it was. Here the first process
listens at the coordinator's address until all have said their index and count, tells them the outcome, and leaves the
port to JAX.
"""

import contextlib
import json
import selectors
import socket
import time

from llmjax.errors import PEER_LOST, Refused

LONGEST = 4096  # bytes of a line; a stranger's connection ends here
PAUSE = 0.1  # seconds between two tries to connect


def roll_call(address: str, count: int, index: int, seconds: float) -> None:
    """Returns on every process once all `count` of them have come.

    Raises:
      Refused: some did not come in time, two claim one index, or they disagree about their number.
    """
    host, _, port = address.rpartition(":")
    until = time.monotonic() + seconds
    (_collect if index == 0 else _report)((host.strip("[]"), int(port)), count, index, until, seconds)


def _collect(address: tuple[str, int], count: int, _: int, until: float, seconds: float) -> None:
    """The first process's part."""
    loopback = address[0].startswith("127.")
    try:
        listener = socket.create_server(("127.0.0.1", address[1]) if loopback else ("", address[1]), backlog=count)
    except OSError as error:
        raise Refused(
            f"processes.coordinator {address[0]}:{address[1]} cannot be listened on ({error.strerror}): give a port "
            "that is free."
        ) from error
    here: set[int] = set()
    heard: list[socket.socket] = []
    with contextlib.ExitStack() as stack, listener, selectors.DefaultSelector() as waiting:
        waiting.register(listener, selectors.EVENT_READ)
        why, code = None, 2
        while why is None and len(here) < count - 1 and (left := until - time.monotonic()) > 0:
            for key, _ in waiting.select(min(left, 1.0)):
                if key.fileobj is listener:
                    peer, _ = listener.accept()
                    peer.settimeout(5.0)
                    waiting.register(stack.enter_context(peer), selectors.EVENT_READ)
                else:
                    waiting.unregister(key.fileobj)
                    why = why or _admit(key.fileobj, here, heard, count)
        missing = sorted(set(range(1, count)) - here)
        if why is None and missing:
            names = ", ".join(map(str, missing[:16])) + (" and others" if len(missing) > 16 else "")
            why, code = (
                f"process{'es' * (len(missing) > 1)} {names} of {count} did not come within {seconds:g} s "
                f"(--processes.timeout): start {'it' if len(missing) == 1 else 'them'}, or see why "
                f"{'it' if len(missing) == 1 else 'they'} ended.",
                PEER_LOST,
            )
        for peer in heard:
            with contextlib.suppress(OSError):  # gone already: the join will tell
                peer.sendall(_line({"come": count} if why is None else {"refused": why, "code": code}))
        if why is not None:
            raise Refused(why, code)


def _admit(peer: socket.socket, here: set[int], heard: list[socket.socket], count: int) -> str | None:
    """Takes a process in; says why all must be refused. What is no process of ours is not listened to."""
    try:
        said = _read(peer)
        index, its = int(said["index"]), int(said["count"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    heard.append(peer)
    if its != count:
        return (
            f"process {index} says that there are {its} processes and process 0 that there are {count}: give all the "
            "same --processes.count."
        )
    if index in here or not 0 < index < count:
        return f"two processes have index {index}: give each its own --processes.index."
    here.add(index)
    return None


def _report(address: tuple[str, int], count: int, index: int, until: float, seconds: float) -> None:
    """Every other process's part."""
    answer = None
    while answer is None:
        left = until + 5 - time.monotonic()  # a little longer than process 0 waits, so that its reason arrives
        if left <= 0:
            raise Refused(
                f"process 0 did not answer at {address[0]}:{address[1]} within {seconds:g} s (--processes.timeout): "
                "start it, or see why it ended.",
                PEER_LOST,
            )
        try:
            with socket.create_connection(address, timeout=left) as first:
                first.sendall(_line({"index": index, "count": count}))
                answer = _answer(_read(first))
        except (OSError, ValueError):  # not there yet, or another's
            time.sleep(min(PAUSE, max(left, 0)))
    if "refused" in answer:
        raise Refused(str(answer["refused"]), int(answer.get("code", 2)))


def _answer(said: dict) -> dict:
    """What process 0 said; ValueError where it was not process 0.

    A connection to a port of this machine on which nobody listens yet may be one to itself, and gives back what was
    written to it.
    """
    if not {"come", "refused"} & said.keys():
        raise ValueError("no answer")
    return said


def _line(said: dict) -> bytes:
    return json.dumps(said).encode() + b"\n"


def _read(peer: socket.socket) -> dict:
    """One line of JSON; ValueError for anything else."""
    text = b""
    while not text.endswith(b"\n"):
        more = peer.recv(LONGEST)
        text += more
        if not more or len(text) > LONGEST:
            raise ValueError("no line")
    return dict(json.loads(text))
