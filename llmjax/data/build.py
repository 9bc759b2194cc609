"""`llmjax data build`: sources become a store, in parallel, and a build that was killed goes on where it was.

A unit of work is decided by the sources alone and written to files of its own, so the store has the same bytes with
any number of workers, and after any number of kills. It stands in `OUT.unfinished` until it is whole.
"""

import concurrent.futures.process
import ctypes
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from llmjax import leash, reading, redact
from llmjax.data import encode, shards, sources
from llmjax.data.tokenizer import Bytes, TokenizerFile, end_of_text, vocabulary
from llmjax.errors import DATA, IO, USAGE, Refused

SAMPLE = 20  # bad records that dataset.json names


@dataclasses.dataclass(frozen=True)
class Build:
    """What a store is built from."""

    source: tuple[str, ...] = ()
    "Files and folders of text, .jsonl (.gz, .zst), .parquet, .arrow, or tokens (.bin of nanoGPT, llm.c, Megatron)."
    heldout_source: tuple[str, ...] = ()
    "The same, all of it held out."
    tokenizer: str = "bytes"
    "A tokenizer.json, or `bytes`: one token per byte."
    field: str = "text"
    "Where the text of a record is, in JSONL, Parquet and Arrow."
    only: tuple[str, ...] = ()
    "Of folders, only files whose names end so, such as .py; none: all."
    heldout: float = 0.01
    "Share of the documents of --source that is held out, each drawn by its name; not of token files."
    bad: Literal["fail", "skip"] = "fail"
    "What a record that is no text does: end the build, or be left out, counted and named in dataset.json."
    shard: int = 64
    "MB of source in one shard, about."


def build(asked: Build, out: Path, workers: int, say: Callable[[str], None]) -> shards.Shards:
    """Builds the store `out`, or goes on with it; opens it where it is already there.

    Raises:
      Refused: an option is wrong (code 2); a source or a record is bad, or `out` was built otherwise (code 65); the
        disk is full (code 74). What was built so far stays, and the same command goes on from there.
    """
    _check(asked, workers)
    found = [sources.find(path, asked.only) for path in (*asked.source, *asked.heldout_source)]
    facts = _facts(asked, found)
    if out.exists():
        opened = shards.open_shards(out)
        if opened.record["asked"] != facts:
            raise Refused(f"'{out}' was built of other sources or options: give another folder, or delete it.", DATA)
        say(f"{out} is already built.")
        return opened
    try:
        _build(asked, found, facts, out, workers, say)
    except concurrent.futures.process.BrokenProcessPool:
        raise Refused("a worker was killed, maybe for memory: give fewer --workers, and run it again.", IO) from None
    except OSError as error:
        raise Refused(
            f"'{error.filename or out}' cannot be written or read ({error.strerror or error}): put that right, then "
            "run the same command to go on.",
            IO,
        ) from error
    return shards.open_shards(out)


def _check(asked: Build, workers: int) -> None:
    if not asked.source:
        raise Refused("--source is empty: give at least one file or folder.", USAGE)
    if not 0 <= asked.heldout < 1:
        raise Refused(f"--heldout is {asked.heldout}: give a share of the documents from 0 to below 1.", USAGE)
    for name, value in (("shard", asked.shard), ("workers", workers)):
        if value < 1:
            raise Refused(f"--{name} is {value}: give at least 1.", USAGE)


def _facts(asked: Build, found: list[sources.Source]) -> dict[str, Any]:
    """What decides the store, as far as it can be known without reading the sources."""
    listed = [
        dict(
            path=redact.text(source.path),
            files=len(source.files),
            bytes=sum(path.stat().st_size for _, path in source.files if path.exists()),
            names=_digest([(name, path.stat().st_size if path.exists() else 0) for name, path in source.files]),
        )
        for source in found
    ]
    options = {name: getattr(asked, name) for name in ("field", "heldout", "bad", "shard")}
    known = asked.tokenizer if asked.tokenizer == "bytes" else TokenizerFile(asked.tokenizer).identity()
    cut = len(asked.source)
    return options | dict(only=list(asked.only), tokenizer=known, sources=listed[:cut], heldout_sources=listed[cut:])


def _build(asked: Build, found: list[sources.Source], facts: dict, out: Path, workers: int, say) -> None:
    unfinished = out.with_name(f"{out.name}.unfinished")
    parts = unfinished / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    (unfinished / "tokens").mkdir(exist_ok=True)
    lock = os.open(unfinished, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(f"'{unfinished}' is being built by another process: wait for it.", IO) from None
        _same(parts / "plan", facts, found)
        how = _how(asked, unfinished)
        cut = len(asked.source)
        units = [
            unit
            for number, source in enumerate(found)
            for unit in sources.units(
                number, source, asked.field, how.vocab, asked.shard * 1_000_000, "heldout" if number >= cut else ""
            )
        ]
        _work(units, how, unfinished, workers, say)
        _finish(len(units), facts, how, unfinished)
        unfinished.rename(out)
    finally:
        os.close(lock)


def _same(plan: Path, facts: dict, found: list[sources.Source]) -> None:
    """Refuses to go on with a build of anything else; the times of files tell whether they have changed meanwhile."""
    times = [path.stat().st_mtime_ns if path.exists() else 0 for source in found for _, path in source.files]
    key = _digest([facts | dict(bad=""), times]).encode()  # after a bad record one may go on with --bad skip
    if not plan.exists():
        for left in plan.parent.glob("*.json"):  # of a build that was clearing up when it was killed
            left.unlink()
    elif plan.read_bytes() != key:
        raise Refused(
            f"'{plan.parent.parent}' is half of a build with other sources or options: give the same, or delete it.",
            DATA,
        )
    shards.write(plan, key)


def _how(asked: Build, unfinished: Path) -> encode.How:
    """Puts the tokenizer into the store, from where it is used."""
    path = unfinished / "tokenizer.json"
    if asked.tokenizer == "bytes":
        built, content = Bytes().build(), Bytes().build().to_str(pretty=True).encode()
    else:
        built = TokenizerFile(asked.tokenizer).build()
        content = reading.content(Path(asked.tokenizer).expanduser(), reading.TOKENIZER, follow=True)
    shards.write(path, content)
    return encode.How(str(path), vocabulary(built), end_of_text(built), asked.heldout, asked.bad)


def _work(units: list[sources.Unit], how: encode.How, unfinished: Path, workers: int, say) -> None:
    """Does the units that are not done yet. Few are waiting at a time, and the first that is refused ends all."""
    todo = [n for n in range(len(units)) if not _there(unfinished / "parts" / f"{n:06}.json", how.bad)]
    done, began, told = len(units) - len(todo), time.monotonic(), 0.0
    if done:
        say(f"{done} of {len(units)} shards are there from before.")
    for _ in _done(units, todo, how, unfinished, workers):
        done += 1
        if (now := time.monotonic() - began) - told > 10 or done == len(units):
            told = now
            say(f"{done} of {len(units)} shards after {now:.0f} s.")


def _there(part: Path, bad: str) -> bool:
    """Whether a unit was done, and as it would be now."""
    return part.exists() and (bad == "skip" or not json.loads(part.read_bytes())["bad"])


def _done(
    units: list[sources.Unit], todo: list[int], how: encode.How, unfinished: Path, workers: int
) -> Iterator[None]:
    if workers == 1 or len(todo) < 2:
        for n in todo:
            yield _one(n, units[n], how, unfinished)
        return
    context, waiting = multiprocessing.get_context("spawn"), iter(todo)
    pool = concurrent.futures.ProcessPoolExecutor(min(workers, len(todo)), context, _begin, (os.getpid(),))
    try:
        running = set()
        while True:
            for n in waiting:
                running.add(pool.submit(_one, n, units[n], how, unfinished))
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


def _one(number: int, unit: sources.Unit, how: encode.How, unfinished: Path) -> None:
    """Does a unit and, when its shards are on the disk, notes that."""
    facts = encode.unit(number, unit, how, unfinished)
    shards.write(unfinished / "parts" / f"{number:06}.json", json.dumps(facts).encode())


def _finish(count: int, asked: dict, how: encode.How, unfinished: Path) -> None:
    """Writes the index and dataset.json, and clears away what was for going on."""
    done = [json.loads((unfinished / "parts" / f"{n:06}.json").read_bytes()) for n in range(count)]
    lines = [(n, split, part["shards"][split]) for n, part in enumerate(done) for split in part["shards"]]
    if not any(split == "train" for _, split, _ in lines):
        raise Refused("the sources hold no text to train on: give more, or a smaller --heldout.", DATA)
    index = b"".join(shards.entry(*line).tobytes() for line in lines)
    shards.write(unfinished / "index.bin", index)
    record = _record(asked, how, done, lines, index) | {
        "tokenizer": hashlib.sha256((unfinished / "tokenizer.json").read_bytes()).hexdigest()
    }
    record["fingerprint"] = _digest(
        [record["tokenizer"], [(s, f["width"], f["sha256"], f["idx"]) for _, s, f in lines]]
    )
    shards.write(unfinished / "dataset.json", shards.record_text(record))
    names = {f"{shards.stem(unfinished, n, split).name}.{kind}" for n, split, _ in lines for kind in ("bin", "idx")}
    for path in (unfinished / "tokens").iterdir():
        if path.name not in names:  # what a killed worker left
            path.unlink()
    shutil.rmtree(unfinished / "parts")


def _record(asked: dict, how: encode.How, done: list[dict], lines: list, index: bytes) -> dict[str, Any]:
    bad: Counter = Counter()
    for part in done:
        bad.update(part["bad"])
    counts = {
        split: {name: sum(f[name] for _, s, f in lines if s == split) for name in ("documents", "bytes", "tokens")}
        for split in shards.SPLITS
    }
    in_place = {f"{n:06}-{split}": facts["path"] for n, split, facts in lines if "path" in facts}
    return {
        "format": shards.FORMAT,
        "fingerprint": "",
        "asked": asked,
        "tokenizer": "",
        "vocab": how.vocab,
        "end_of_text": how.end,
        **counts,
        "shards": len(lines),
        "documents_of_sources": [
            sum(part["documents"] for part in done if part["source"] == n)
            for n in range(len(asked["sources"]) + len(asked["heldout_sources"]))
        ],
        "empty": sum(part["empty"] for part in done),
        "bad": dict(sorted(bad.items())),
        "bad_sample": [line for part in done for line in part["sample"]][:SAMPLE],
        "in_place": in_place,
        "index": hashlib.sha256(index).hexdigest(),
        "versions": {name: metadata.version(name) for name in ("llmjax", "tokenizers", "numpy")}
        | {"python": platform.python_version()},
    }


def summary(record: dict[str, Any]) -> str:
    """A store in one line."""
    parts = [
        f"{record[split]['tokens']:,} tokens of {record[split]['documents']:,} documents {what}"
        for split, what in (("train", "to train on"), ("heldout", "held out"))
    ]
    left = sum(record["bad"].values())
    said = f", {left:,} bad records left out" if left else ""
    return f"{', '.join(parts)}{said}, {record['shards']} shards, fingerprint {record['fingerprint'][:16]}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8", "surrogateescape")).hexdigest()
