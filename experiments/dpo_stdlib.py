"""Preferences made of the standard library's docstrings: what a function does, before the same words backwards.

    llmjax train stdlib_tiny
    llmjax train sft_stdlib --from stdlib_tiny
    llmjax train dpo_stdlib --from sft_stdlib

In the end the model favours the right one in 98.9 % of 360 held-out pairs, at a loss of 0.04 where 0.69 knows nothing,
in a minute (two virtual cores of an AMD EPYC, 2026-11-28, Python 3.11, jax 0.10.2).
"""

import dataclasses
import json
from pathlib import Path

from experiments.sft_stdlib import questions
from experiments.sft_stdlib import run as before
from llmjax.data.preferences import Preferences
from llmjax.data.tokenizer import Bytes, TokenizerFile
from llmjax.optim.adamw import AdamW
from llmjax.optim.schedules import Cosine
from llmjax.train.preference import DPO


@dataclasses.dataclass(frozen=True)
class Descriptions:
    """Two answers to a question per function."""

    tokenizer: Bytes | TokenizerFile = Bytes()
    "How text becomes tokens; `--from` takes that of the run."
    template: str = ""
    "Folder with the chat template; empty: that of the tokenizer's file, and a plain template where it has none."

    def open(self, sequence: int, cache: Path, say):
        """Writes them down below `cache`, and opens that as `Preferences` does."""
        cache.mkdir(parents=True, exist_ok=True)
        path = cache / "descriptions.jsonl"
        with path.open("w") as file:
            for call, does in questions():
                prompt, backwards = [dict(role="user", content=f"What does {call} do?")], " ".join(does.split()[::-1])
                if does != backwards:
                    file.write(json.dumps(dict(prompt=prompt, chosen=does, rejected=backwards)) + "\n")
        return Preferences(str(path), self.tokenizer, self.template).open(sequence, cache, say)


run = dataclasses.replace(
    before,
    data=Descriptions(),
    loss=DPO(beta=0.1),
    optimizer=AdamW(lr=1e-4, schedule=Cosine(warmup=0.1, final=0.1)),
    sequence=128,
)

if __name__ == "__main__":
    from llmjax.cli import experiment

    experiment(run)
