"""Two results of `llmjax bench`, one beside the other."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from llmjax.errors import DATA, Refused
from llmjax.run import differences
from llmjax.train.display import memory

Result = dict[str, Any]

SAME = ("model", "batch", "sequence", "loss", "optimizer")  # what decides how much there is to compute
NUMBERS = ("tokens_per_s", "step_ms", "compile_s")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The second result against the first."""

    rows: list[list[str]]
    "Name, first, second, ratio."
    faster: float
    "How many times as many tokens per second the second one reached."
    clear: bool
    "The middle halves of their steps' times do not overlap."
    differs: list[str]
    "What else is not the same: fields of the run, versions, devices."


def read(path: str) -> Result:
    """What `--json` wrote.

    Raises:
      Refused: there is no such file, or it holds something else.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused(f"compare names {path}, which cannot be read ({error.strerror}): give files of --json.") from None
    except ValueError as error:
        raise Refused(f"compare names {path}, which is not JSON ({error}): give files of --json.", DATA) from None
    whole = (
        isinstance(found, dict) and isinstance(found.get("run"), dict) and isinstance(found.get("quartiles_ms"), list)
    )
    if not whole or not all(isinstance(found.get(name), (int, float)) for name in NUMBERS):
        raise Refused(f"compare names {path}, which no `llmjax bench --json` wrote: measure it again.", DATA)
    return found


def compare(first: Result, second: Result) -> Comparison:
    """
    Raises:
      Refused: they measured models or batches that differ, so that no ratio says anything.
    """
    fields = differences(first["run"], second["run"])
    other = [field for field in fields if field.split(".")[0] in SAME]
    if other:
        raise Refused(
            f"compare names results whose {', '.join(other[:3])} differ{'' if other[1:] else 's'}: "
            f"measure the same model and batch in both."
        )
    around = [name for name in ("jax", "python", "machine", "devices") if first.get(name) != second.get(name)]
    rows = [_row(*row) for row in _numbers(first, second) if None not in row]
    low, high = sorted((first["quartiles_ms"], second["quartiles_ms"]))
    faster = second["tokens_per_s"] / first["tokens_per_s"]
    words = list(dict.fromkeys(field.split(".")[0] for field in fields))
    return Comparison(rows, faster, low[1] < high[0], [word for word in words if word not in ("name", "runs")] + around)


def _numbers(first: Result, second: Result) -> list[tuple]:
    def pair(name: str) -> tuple:
        return first.get(name), second.get(name)

    def share(number: float) -> str:
        return f"{100 * number:.1f} %"

    beside = [
        (f"times PyTorch, {kind}", *(result.get("torch", {}).get(kind, {}).get("ratio") for result in (first, second)))
        for kind in ("eager", "compiled")
    ]
    return [
        ("tokens/s", *pair("tokens_per_s"), "{:,.0f}".format),
        ("ms/step", *pair("step_ms"), "{:.1f}".format),
        ("of the matrix product", *pair("share_of_matmul"), share),
        ("mfu", *pair("mfu"), share),
        ("compile, s", *pair("compile_s"), "{:.1f}".format),
        ("memory", *pair("memory_bytes"), memory),
        *((*row, "{:.2f}".format) for row in beside),
    ]


def _row(name: str, first: float, second: float, shown: Any) -> list[str]:
    return [name, shown(first), shown(second), f"{second / first:.3f}" if first else "-"]
