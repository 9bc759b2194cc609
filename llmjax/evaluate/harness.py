"""Tasks of lm-eval (EleutherAI's Language Model Evaluation Harness), asked of a model here.

Importing this needs the extra `evaluate`, and takes lm-eval's own three seconds.
"""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from flax import nnx

from llmjax.errors import DATA, Refused, did_you_mean
from llmjax.evaluate.generate import Sampling
from llmjax.evaluate.likelihood import Judge, Stopped
from llmjax.train.program import Program
from llmjax.train.records import TASK

try:
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise Refused(
        f"tasks need lm-eval ({error}): run pip install 'llmjax[evaluate]' (uv sync --extra evaluate in a clone)."
    ) from None

SEED = 1234  # of the examples that go before a question, which lm-eval draws
DRAWS = 1000  # of a bootstrap, where lm-eval knows no formula for a standard error
Loaded = dict[str, Any]  # lm-eval's tasks and groups
Scores = dict[str, dict[str, tuple[float, float | None]]]  # of each task, each metric's value and standard error


class Model(LM):
    """The `LM` that lm-eval asks. While it answers, what is printed goes where it went when this was made."""

    def __init__(self, judge: Judge):
        super().__init__()
        self.judge = judge
        self.streams = sys.stdout, sys.stderr

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        with _printing_to(*self.streams):
            return self.judge.log_likelihoods([request.args for request in requests])

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        with _printing_to(*self.streams):
            return self.judge.rolling([request.args[0] for request in requests])

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Requests of equal options are answered together."""
        kinds: dict[tuple[Sampling, tuple[str, ...]], list[int]] = {}
        for n, request in enumerate(requests):
            kinds.setdefault(asked(request.args[1]), []).append(n)
        written = [""] * len(requests)
        for (how, stop), chosen in kinds.items():
            with _printing_to(*self.streams):
                texts = self.judge.continuations([requests[n].args[0] for n in chosen], how, stop)
            for n, text in zip(chosen, texts, strict=True):
                written[n] = text
        return written


def asked(options: dict[str, Any]) -> tuple[Sampling, tuple[str, ...]]:
    """lm-eval's options of a continuation: how it is written, and the words that it ends before."""
    until = options.get("until") or ()
    sampled = options.get("do_sample", True) and float(options.get("temperature") or 0) > 0
    how = Sampling(
        tokens=int(options.get("max_gen_toks") or options.get("max_tokens") or 256),
        temperature=float(options["temperature"]) if sampled else 0.0,
        top_k=int(options.get("top_k") or 0) if sampled else 0,
        top_p=float(options.get("top_p") or 1.0) if sampled else 1.0,
    )
    return how, (until,) if isinstance(until, str) else tuple(until)


def load(names: Sequence[str]) -> Loaded:
    """Tasks by lm-eval's names or as task files (.yaml), with their data.

    What a task file names lies where lm-eval looks: from the folder of the command on. Tasks of lm-eval's own fetch
    their data, if it is not there, through `datasets`. A task file may run code that lies beside it.

    Raises:
      Refused: a task is not known, its file is malformed, or its data cannot be had (code 65).
    """
    with _quiet():
        known = TaskManager(include_defaults=not all(_is_file(name) and _alone(name) for name in names))
    tasks: Loaded = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        found = _load(known, name)
        if twice := sorted(set(tasks["tasks"]) & set(found["tasks"])):
            raise Refused(f"tasks has {twice[0]} twice: leave out one of those that hold it.")
        for kind, of_it in tasks.items():
            of_it |= found.get(kind, {})
    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return tasks


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _alone(name: str) -> bool:
    """Whether a task file names no other tasks; one that cannot be read is said later on."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        lines = Path(name).read_text(encoding="utf-8").splitlines()
        return not any(line.startswith(("group:", "include:", "task_list:")) for line in lines)
    return True


def _load(known: TaskManager, name: str) -> Loaded:
    if _is_file(name) and not Path(name).is_file():
        raise Refused(f"tasks has {name}, which is no file: give a task file of lm-eval.", DATA)
    if not _is_file(name) and name not in known.all_tasks:
        near = did_you_mean(name, known.all_tasks)
        raise Refused(f"lm-eval has no task named '{name}': {near}give one that it has, or a task file (.yaml).")
    try:
        with _quiet():
            found = known.load([name])
    except Exception as error:  # yaml, datasets and lm-eval each have their own
        raise Refused(
            f"tasks has {name}, which cannot be loaded ({_why(error)}): put its file right, or bring its data here.",
            DATA,
        ) from error
    return found


def scores(tasks: Loaded, judge: Judge, limit: int = 0) -> Scores | None:
    """What lm-eval makes of the model's answers, by task and metric; None where `judge.stop` said so.

    Groups come as tasks do. Call it in the context of the judge's program, alike on every process.

    Raises:
      Refused: lm-eval cannot make its requests of the data, or asks what the model cannot answer.
    """
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=SEED)  # the same questions each time
    model = Model(judge)
    try:
        with _quiet(), _without_forks():
            found = evaluate(model, tasks, limit=limit or None, bootstrap_iters=DRAWS, log_samples=False)
    except Stopped:
        return None
    except Refused:
        raise
    except Exception as error:  # of a template, of a task's own code, of lm-eval
        if not _theirs(error):
            raise
        raise Refused(
            f"lm-eval cannot ask {', '.join(tasks['tasks'])} ({_why(error)}): put the task file, or its data, right.",
            DATA,
        ) from error
    return {name: _metrics(values) for name, values in found["results"].items()}


def _metrics(values: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """lm-eval's "metric,filter" and "metric_stderr,filter" as metric, or metric/filter, with both numbers."""
    found = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            error = values.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else f"{metric}/{kind}"
            found[name] = float(value), float(error) if isinstance(error, (int, float)) else None
    return found


def ask(
    program: Program, tokenizer: Any, tasks: Loaded, limit: int, model: nnx.Module, stop: Callable[[], bool]
) -> dict[str, float] | None:
    """`scores` as a run's records have them: task/NAME/METRIC, and its standard error as METRIC_stderr."""
    found = scores(tasks, Judge(program, model, tokenizer, stop), limit)
    if found is None:
        return None
    lines = {}
    for task, metrics in found.items():
        for metric, (value, error) in metrics.items():
            lines[f"{TASK}{task}/{metric}"] = value
            if error is not None:
                lines[f"{TASK}{task}/{metric}_stderr"] = error
    return lines


def _theirs(error: BaseException) -> bool:
    """Whether an error was raised in a task's own code or lm-eval's, and not while the model answered."""
    frames, trace = [], error.__traceback__
    while trace:
        frames.append(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    return not any(name.startswith(("llmjax.evaluate.likelihood", "llmjax.evaluate.generate")) for name in frames)


def _why(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps lm-eval's bars and notes, and those of `datasets`, from the terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with _printing_to(io.StringIO(), io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _printing_to(out: TextIO, err: TextIO) -> Iterator[None]:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


@contextlib.contextmanager
def _without_forks() -> Iterator[None]:
    """lm-eval would bootstrap in forks of this process, in which a lock of JAX's threads may stay closed for ever."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})
