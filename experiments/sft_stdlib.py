"""Finetuning on conversations made of the standard library's docstrings: "What does NAME(...) do?", and what it does.

    llmjax train stdlib_tiny
    llmjax train sft_stdlib --from stdlib_tiny

The loss is of the answers' tokens alone: 5.1 nats per token at the first step, 3.58 held out after the last, in 45 s
(two virtual cores of an AMD EPYC, 2026-11-28, Python 3.11, jax 0.10.2).
"""

import ast
import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from experiments.stdlib_tiny import run as before
from llmjax.data import corpus
from llmjax.data.conversations import Chat
from llmjax.data.tokenizer import Bytes, TokenizerFile
from llmjax.optim.adamw import AdamW
from llmjax.optim.schedules import Cosine
from llmjax.run import Run
from llmjax.train.loss import NextToken
from meshes import local


def questions() -> Iterator[tuple[str, str]]:
    """(how a function is called, the first paragraph of its docstring) of every function that has one."""
    for _, path in corpus.standard_library():
        with contextlib.suppress(SyntaxError, UnicodeDecodeError):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef) and (said := ast.get_docstring(node)):
                    yield f"{node.name}({ast.unparse(node.args)})", " ".join(said.split("\n\n")[0].split())


@dataclasses.dataclass(frozen=True)
class Docstrings:
    """A question and an answer per function."""

    tokenizer: Bytes | TokenizerFile = Bytes()
    "How text becomes tokens; `--from` takes that of the run."
    template: str = ""
    "Folder with the chat template; empty: that of the tokenizer's file, and a plain template where it has none."

    def open(self, sequence: int, cache: Path, say):
        """Writes them down below `cache`, and opens that as `Chat` does."""
        cache.mkdir(parents=True, exist_ok=True)
        path = cache / "docstrings.jsonl"
        with path.open("w") as file:
            for call, does in questions():
                said = (("user", f"What does {call} do?"), ("assistant", does))
                file.write(json.dumps(dict(messages=[dict(role=role, content=text) for role, text in said])) + "\n")
        return Chat(str(path), self.tokenizer, self.template).open(sequence, cache, say)


run = Run(
    model=before.model,
    data=Docstrings(),
    optimizer=AdamW(lr=5e-4, schedule=Cosine(warmup=0.1, final=0.1)),
    loss=NextToken(),
    mesh=local.cluster,
    steps=200,
    batch=8,
    sequence=256,
    dtype="bfloat16",
    eval_every=50,
    prompts=("What does get_name(self) do?", "What does read_lines(file, count) do?"),
)

if __name__ == "__main__":
    from llmjax.cli import experiment

    experiment(run)
