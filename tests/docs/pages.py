"""The pages of the documentation as what they hold to run: blocks of code, and what these print.

A fenced block of `python` runs after those before it on its page, in one process. One of `sh` is commands; one with a
`title` is a file of that name. A block of `text` right below is what it prints: `...` stands for anything, alone on a
line for any lines. A comment right above says more: `<!-- run -->` runs a block of commands, `<!-- run with FLAGS -->`
with further flags for its trainings, `<!-- run after "train NAME" -->` once that was run; `<!-- slow -->` or
`<!-- run slow -->` leaves it to slow tests.

    python tests/docs/pages.py PAGE             prints, as JSON, what the blocks of Python print
    python tests/docs/pages.py --write PAGE     puts it into the page
"""

import contextlib
import dataclasses
import io
import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "llmjax" / "docs"
PAGES = DOCS / "pages"
FENCE = re.compile(
    r"(?:^<!-- (?P<says>[^\n]*?) -->\n)?^```(?P<kind>\w+)(?: title=\"(?P<title>[^\"]+)\")?[^\n]*\n(?P<code>.*?)^```$"
    r"(?:\n+^```text\n(?P<output>.*?)^```$)?",
    re.M | re.S,
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code of a page."""

    page: str
    line: int
    kind: str
    "Its language."
    code: str
    title: str
    "The file that it is, or nothing."
    output: str | None
    "What it prints, as the page has it."
    says: tuple[str, ...]
    "Words of the comment above it."

    @property
    def runs(self) -> bool:
        return "run" in self.says

    @property
    def slow(self) -> bool:
        return "slow" in self.says

    @property
    def flags(self) -> list[str]:
        """What a test adds to the commands that train."""
        return list(self.says[self.says.index("with") + 1 :]) if "with" in self.says else []

    @property
    def before(self) -> list[str]:
        """The words of a command that comes first, if there is one."""
        return shlex.split(self.says[self.says.index("after") + 1]) if "after" in self.says else []

    def __str__(self):
        return f"{self.page}:{self.line}"


def names() -> list[str]:
    """Every page, by its path below `pages`."""
    return sorted(path.relative_to(PAGES).as_posix() for path in PAGES.rglob("*.md"))


def blocks(page: str) -> list[Block]:
    """The blocks of a page, in order; blocks that only show text are left out."""
    text = (PAGES / page).read_text(encoding="utf-8")
    found = (
        Block(page, text[: x.start("kind")].count("\n") + 1, x["kind"], x["code"], x["title"] or "", x["output"],
              tuple(shlex.split(x["says"] or "")))
        for x in FENCE.finditer(text)
    )  # fmt: skip
    return [block for block in found if block.kind != "text"]


def commands(code: str) -> list[list[str]]:
    """The words of every `llmjax` command in a block of commands, without what comes before that name."""
    lines = code.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        for at, word in enumerate(words):
            if word == "llmjax":
                found.append(words[at + 1 :])
                break
    return found


def fits(pattern: str, text: str) -> bool:
    """Whether a text is what a page shows of it."""
    parts = (re.escape(line.rstrip()).replace(r"\.\.\.", "[^\n]*") + "\n" for line in pattern.rstrip().split("\n"))
    shown = "\n".join(line.rstrip() for line in text.rstrip().split("\n")) + "\n"
    return re.fullmatch("".join("(?:[^\n]*\n)*?" if part == "[^\n]*\n" else part for part in parts), shown) is not None


def printed(page: str, slow: bool) -> list[str]:
    """What every block of Python of a page prints, run in order here; files are written beside."""
    place, shown = {"__name__": "__main__"}, []
    for block in blocks(page):
        if block.title:
            Path(block.title).write_text(block.code, encoding="utf-8")
        elif block.kind == "python" and (slow or not block.slow):
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(f"{chr(10) * block.line}{block.code}", page, "exec"), place)
            shown.append(out.getvalue())
        elif block.kind == "python":
            shown.append("")
    return shown


def write(page: str) -> None:
    """Puts what the blocks of Python print into the page, where it shows an output."""
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, __file__, "--slow", page]
        out = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    if out.returncode:
        sys.exit(out.stderr)
    shown = iter(json.loads(out.stdout.splitlines()[-1]))

    def filled(found: re.Match) -> str:
        if found["kind"] != "python" or found["title"]:
            return found[0]
        new, old = next(shown), found["output"]
        return (
            found[0] if old is None or fits(old, new) else found[0].replace(f"```text\n{old}```", f"```text\n{new}```")
        )

    path = PAGES / page
    path.write_text(FENCE.sub(filled, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    if "--write" in sys.argv:
        write(sys.argv[-1])
    else:
        print(json.dumps(printed(sys.argv[-1], "--slow" in sys.argv)))
