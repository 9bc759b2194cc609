"""Traces a few steps of a run for XProf, without touching what they compute or how long the others are said to take."""

from typing import Any

import jax

from llmjax.run import Profile, Run
from llmjax.train.ledger import Ledger

WARM = 2  # steps of this process before a trace whose start nobody named: the first one compiles


class Tracer:
    """A resource, to be closed: starts and stops the trace between steps. Only the first process traces.

    A trace that cannot be written is said and recorded, and training goes on.
    """

    def __init__(self, run: Run, start: int, ledger: Ledger):
        self.folder, self.ledger, self.on = run.folder() / "profile", ledger, False
        self.begin, self.end = window(run.profile, start)
        self.last = 0  # step in the trace
        self.wanted = bool(run.profile.steps) and ledger.records is not None
        if self.wanted and self.begin <= start:
            ledger.display.say(f"No trace: profile.start is {self.begin}, and {start} steps are done.")

    def begins(self, step: int) -> bool:
        """Whether step number `step`, counted from 1, is the first to be traced."""
        return self.wanted and step == self.begin

    def ends(self, step: int) -> bool:
        """Whether it is the last."""
        return self.on and step + 1 >= self.end

    def start(self) -> None:
        """Starts the trace; nothing may be pending."""
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of Python would slow the steps that are looked at
        self._try(lambda: jax.profiler.start_trace(self.folder, profiler_options=options))
        self.on = self.wanted
        self.ledger.spent.mark("other")

    def stop(self) -> None:
        """Writes the trace; what was traced must be done."""
        if not self.on:
            return
        self.on = self.wanted = False
        if self._try(jax.profiler.stop_trace):
            self.ledger.event("profile", first=self.begin, last=self.last)
            told = f"`llmjax profile {self.folder.parent}` shows what they were spent on"
            self.ledger.display.say(f"Traced steps {self.begin} to {self.last}: {told}.")
        self.ledger.spent.mark("other")

    def close(self) -> None:
        """Ends a trace that a run which ends early leaves open."""
        self.stop()

    def step(self, number: int) -> jax.profiler.StepTraceAnnotation:
        """The context in which a step is dispatched, so that the trace knows its number."""
        self.last = number
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def _try(self, call: Any) -> bool:
        try:
            call()
        except (OSError, RuntimeError) as error:
            self.wanted = self.on = False
            reason = " ".join(str(error).split())[:200]
            self.ledger.display.say(f"Training goes on without a trace: {reason}")
            self.ledger.event("profile_failed", reason=reason)
            return False
        return True


def window(profile: Profile, start: int) -> tuple[int, int]:
    """(first step to be traced, the one after the last), counted from 1, where `start` steps are done."""
    first = profile.start or start + 1 + WARM
    return first, first + profile.steps
