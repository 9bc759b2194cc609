"""TensorBoard: files in the run directory, which `tensorboard --logdir runs` shows."""

import dataclasses
import time
from collections.abc import Mapping

from llmjax.tracking import About


@dataclasses.dataclass(frozen=True)
class TensorBoard:
    """Writes `tb/` in the run directory."""

    def ready(self) -> None:
        """It always is."""

    def open(self, about: About) -> "Board":
        """A file of this start's own."""
        return Board(about)


class Board:
    """Writes events itself: the thread of tensorboardX's SummaryWriter dies of a full disk or of a clock that leaps."""

    def __init__(self, about: About):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        (about.folder / "tb").mkdir(exist_ok=True)
        self.writer = EventsWriter(str(about.folder / "tb" / "events"), filename_suffix=f".{about.start}")
        if about.start:  # TensorBoard hides what an earlier start wrote from that step on
            self._write(about.start + 1, session_log=SessionLog(status=SessionLog.START))

    def metrics(self, step: int, numbers: Mapping[str, float]) -> None:
        """One scalar a number."""
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=x) for name, x in numbers.items()]
        self._write(step, summary=Summary(value=values))

    def text(self, step: int, name: str, text: str) -> None:
        """Under the tab of texts."""
        from tensorboardX.summary import text as summary

        self._write(step, summary=summary(name, text))

    def close(self) -> None:
        """Writes what is left in memory."""
        self.writer.close()

    def _write(self, step: int, **what) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self.writer.write_event(Event(step=step, wall_time=time.time(), **what))


tracker = TensorBoard()
