"""The loss of a model on held-out data, with an interval: what `llmjax evaluate` measures."""

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

from llmjax.data import corpus
from llmjax.data.batches import place
from llmjax.data.stored import Store
from llmjax.data.tokenizer import end_of_text, load
from llmjax.errors import DATA, Refused
from llmjax.evaluate import interval
from llmjax.train import rows
from llmjax.train.program import Program

if TYPE_CHECKING:
    from tokenizers import Tokenizer


STRETCHES = 20  # of consecutive rows, where documents are too few: text that is far apart is nearly another draw


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """Whole texts as rows of T tokens, all of them held out; each text is preceded by the end of text."""

    tokens: np.ndarray
    "int32, one-dimensional."
    sequence: int
    end: int
    heldout_bytes: int

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.tokens.tobytes() + repr(self.sequence).encode()).hexdigest()[:32]

    @property
    def heldout_tokens(self) -> int:
        """Targets in the rows: every token but the first, once."""
        return len(self.tokens) - 1

    def size(self, split: str) -> int:
        """Number of rows."""
        return -(-self.heldout_tokens // self.sequence) if split == "heldout" else 0

    def examples(self, split: str, rows: np.ndarray) -> dict[str, np.ndarray]:
        """`tokens` and `targets`, int32 [n, T], and `weights`, float32 [n, T]: 0 where there is no target."""
        found = {name: np.zeros((len(rows), self.sequence), np.int32) for name in ("tokens", "targets")}
        found["weights"] = np.zeros((len(rows), self.sequence), np.float32)
        for n, row in enumerate(np.asarray(rows).tolist()):
            window = self.tokens[row * self.sequence : (row + 1) * self.sequence + 1]
            if (count := len(window) - 1) > 0:
                found["tokens"][n, :count], found["targets"][n, :count] = window[:-1], window[1:]
                found["weights"][n, :count] = 1
        return found


def read(path: str, tokenizer: Path, sequence: int, cache: Path) -> Any:
    """A text file, a folder of text files, or a store's held-out part, as the run's tokens.

    Raises:
      Refused: nothing is there, it is not UTF-8 text, or the store has another tokenizer (code 65).
    """
    source = Path(path).expanduser()
    if (source / "dataset.json").is_file():
        return Store(str(source), tokenizer=str(tokenizer)).open(sequence, cache)
    if not source.exists():
        raise Refused(f"data is '{path}', which does not exist: give a text file, a folder of them, or a store.", DATA)
    documents, _ = corpus.read(corpus.files(source))
    return texts([document.text for document in documents], load(tokenizer), sequence)


def texts(documents: list[str], tokenizer: "Tokenizer", sequence: int) -> Texts:
    """Documents as tokens; none of them is held twice in memory."""
    end, parts = end_of_text(tokenizer), []
    for at in range(0, len(documents), 256):
        encoded = tokenizer.encode_batch_fast(documents[at : at + 256], add_special_tokens=False)
        parts += [np.array([end, *one.ids], np.int32) for one in encoded if one.ids]
    size = sum(len(document.encode()) for document in documents)
    return Texts(np.concatenate(parts), sequence, end, size)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Sums of every row over its targets, float64 [N], and which rows belong together."""

    nats_N: np.ndarray
    missed_N: np.ndarray
    weight_N: np.ndarray
    cluster_N: np.ndarray


def measure(program: Program, model: nnx.Module, dataset: Any) -> Measured:
    """Every held-out row of the dataset. Call it in the context of the program."""
    size, batch = dataset.size("heldout"), program.run.batch
    chosen = np.append(np.arange(size), np.full(-size % batch, size))  # rows past the end have weight 0
    found, begun, ends = [], [], []
    for wanted in chosen.reshape(-1, batch):
        arrays = place(dataset, "heldout", wanted, accumulate=program.accumulate, sharding=program.batch_sharding())
        sums = rows.sums(model, arrays)
        if (end := getattr(dataset, "end", None)) is not None:
            tokens_BT = dataset.examples("heldout", wanted)["tokens"]
            begun.append(tokens_BT[:, 0] == end)
            ends.append(np.sum(tokens_BT == end, 1))
        found.append(jax.device_get(sums))  # before the next, so that no two programs' messages meet
    sums = {name: np.concatenate([one[name].ravel() for one in found])[:size].astype(np.float64) for name in found[0]}
    cluster = documents(np.concatenate(begun), np.concatenate(ends))[:size] if ends else np.arange(size)
    return Measured(sums["nats"], sums["missed"], sums["weight"], cluster)


def documents(begun_N: np.ndarray, ends_N: np.ndarray) -> np.ndarray:
    """The document in which each row begins, counted from 0, of a stream cut into rows.

    `begun_N` says whether a row's first token is an end of text, which precedes a document, `ends_N` how many it has.
    """
    return np.cumsum(ends_N) - ends_N + begun_N


def judged(measured: Measured, dataset: Any) -> dict[str, Any]:
    """What the sums say: each number as `value`, `low` and `high`, of a 95 % interval or None; and of how much.

    `loss` in nats per target · `perplexity`, its exponential · `bits_per_byte`, where the bytes of the text are known,
    with tokens per byte taken as they are · `right`: the share of targets that are the model's likeliest token.
    An interval is over documents or, of too few, over `stretches` of consecutive rows.
    """
    count = len(np.unique(measured.cluster_N[measured.weight_N > 0]))
    stretches = count < interval.FEWEST and len(measured.weight_N) >= 2 * STRETCHES
    cluster_N = np.arange(len(measured.weight_N)) * STRETCHES // len(measured.weight_N)
    cluster_N = cluster_N if stretches else measured.cluster_N

    def ratio(total_N):
        low, high = interval.of_ratio(total_N, measured.weight_N, cluster_N) or (None, None)
        return dict(value=float(total_N.sum() / measured.weight_N.sum()), low=low, high=high)

    def mapped(change, numbers):
        return {name: None if x is None else change(x) for name, x in numbers.items()}

    loss = ratio(measured.nats_N)
    facts = dict(loss=loss, perplexity=mapped(lambda x: math.exp(min(x, 700)), loss))
    if dataset.heldout_bytes:
        bits = dataset.heldout_tokens / dataset.heldout_bytes / math.log(2)
        facts["bits_per_byte"] = mapped(lambda x: x * bits, loss)
    facts["right"] = ratio(measured.weight_N - measured.missed_N)
    facts |= dict(targets=float(measured.weight_N.sum()), rows=len(measured.weight_N), documents=count)
    return facts | dict(stretches=STRETCHES if stretches else 0)
