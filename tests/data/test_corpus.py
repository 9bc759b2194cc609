"""Documents are found, read exactly, and split by file."""

import os
import sysconfig
from pathlib import Path

import pytest

from llmjax.data import corpus
from llmjax.data.corpus import Document
from llmjax.errors import Refused


def names(found):
    return [name for name, _ in found]


def test_a_file_that_would_be_most_of_the_heldout_text_is_trained_on():
    documents = [Document(f"{i}.txt", "x" * 100) for i in range(200)]
    _, before = corpus.hold_out(documents, 0.1)
    giant = Document(before[0].name, "x" * 5000)
    train, heldout = corpus.hold_out([giant if d.name == giant.name else d for d in documents], 0.1)
    assert giant in train and {d.name for d in heldout} == {d.name for d in before} - {giant.name}


def test_standard_library_is_every_source_file_but_tests_and_installed_packages():
    found = names(corpus.standard_library())
    assert found == sorted(set(found)) and len(found) > 400
    assert {"os.py", "json/decoder.py", "unittest/mock.py"} <= set(found)
    assert all(name.endswith(".py") for name in found)
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    assert not [name for name in found if left_out & set(name.split("/"))]


def test_standard_library_reads_whole():
    found = corpus.standard_library()
    documents, skipped = corpus.read(found, skip_other_codings=True)
    assert skipped <= 3
    stdlib = Path(sysconfig.get_path("stdlib"))
    assert all(d.text.encode() == (stdlib / d.name).read_bytes() for d in documents[::50])


def test_folder_is_listed_recursively_sorted_without_hidden_files_and_through_links(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for path in ("b/z.txt", "b/a.txt", "a.md", ".hidden", ".git/config"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("x")
    elsewhere.mkdir()
    (elsewhere / "linked.txt").write_text("y")
    (root / "link").symlink_to(elsewhere)
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe")
    assert names(corpus.files(root)) == ["a.md", "b/a.txt", "b/z.txt", "link/linked.txt"]
    assert names(corpus.files(root / "a.md")) == ["a.md"]


def test_reading_translates_nothing_and_leaves_out_empty_files(tmp_path):
    content = "\ufeffone\r\ntwo\rthree\n\x00 ünï 🙂".encode()
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "empty").touch()
    documents, skipped = corpus.read(corpus.files(tmp_path))
    assert [(d.name, d.text.encode()) for d in documents] == [("a", content)] and skipped == 0


@pytest.mark.parametrize("case", ["missing", "empty folder", "empty", "dangling", "latin-1"])
def test_bad_corpus_is_refused_by_name_with_code_65(tmp_path, case):
    path = tmp_path / "bad"
    if case == "empty folder":
        path.mkdir()
    elif case == "empty":
        path.touch()
    elif case == "dangling":
        path.mkdir()
        (path / "bad.txt").symlink_to(tmp_path / "nowhere")
    elif case == "latin-1":
        path.write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(Refused, match="bad") as refused:
        corpus.read(corpus.files(path))
    assert refused.value.code == 65


def test_only_a_declared_coding_is_skipped_and_it_is_counted(tmp_path):
    (tmp_path / "a.py").write_text("print()\n")
    (tmp_path / "declared.py").write_bytes(b"# -*- coding: latin-1 -*-\n# caf\xe9\n")
    found = corpus.files(tmp_path)
    documents, skipped = corpus.read(found, skip_other_codings=True)
    assert [d.name for d in documents] == ["a.py"] and skipped == 1
    with pytest.raises(Refused, match=r"declared\.py"):
        corpus.read(found)
    (tmp_path / "undeclared.py").write_bytes(b"# caf\xe9\n")
    with pytest.raises(Refused, match=r"undeclared\.py"):
        corpus.read(corpus.files(tmp_path), skip_other_codings=True)


def test_split_is_by_name_alone_and_near_the_fraction():
    many = [f"folder/file{i}.py" for i in range(5000)]
    train, heldout = corpus.split(many, 0.1)
    assert sorted(train + heldout) == sorted(many) and 430 < len(heldout) < 570
    assert corpus.split(many[:100], 0.1)[1] == [name for name in heldout if name in many[:100]]
    assert set(heldout) < set(corpus.split(many, 0.2)[1])
    assert corpus.split([f"{i}.txt" for i in range(40)], 0.1)[1] == ["1.txt", "18.txt", "20.txt", "27.txt", "39.txt"]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_fraction_out_of_range_is_refused_with_code_2(fraction):
    with pytest.raises(Refused, match=r"data\.heldout") as refused:
        corpus.split(["a"], fraction)
    assert refused.value.code == 2


def test_whole_files_are_held_out():
    documents = [Document(f"{i}.txt", f"text {i}") for i in range(100)]
    train, heldout = corpus.hold_out(documents, 0.2)
    assert sorted(train + heldout, key=lambda d: d.name) == sorted(documents, key=lambda d: d.name)
    assert [d.name for d in heldout] == corpus.split((d.name for d in documents), 0.2)[1]


def test_single_file_is_cut_at_the_end_of_a_line():
    text = "".join(f"line number {i}\n" for i in range(1000))
    (train,), (heldout,) = corpus.hold_out([Document("one.txt", text)], 0.1)
    assert train.text + heldout.text == text
    assert train.text.endswith("\n") and heldout.text.endswith("\n")
    assert 0.1 <= len(heldout.text) / len(text) < 0.102


@pytest.mark.parametrize("text", ["one line without end", "a\nb", "x" * 50 + "\n" + "y" * 50, "ab"])
def test_a_cut_leaves_neither_side_empty(text):
    train, heldout = corpus.hold_out([Document("one.txt", text)], 0.1)
    assert train[0].text and heldout[0].text and train[0].text + heldout[0].text == text


def test_few_files_that_fall_on_one_side_are_cut_too():
    documents = [Document(name, "line\n" * 10) for name in ("a", "b")]
    assert not all(corpus.split(("a", "b"), 0.1))
    train, heldout = corpus.hold_out(documents, 0.1)
    assert "".join(d.text for d in train + heldout) == "line\n" * 20
    assert [d.name for d in heldout] == ["b"] and heldout[0].text == "line\n" * 2


def test_a_text_too_short_to_cut_is_refused_with_code_65():
    with pytest.raises(Refused, match=r"tiny\.txt") as refused:
        corpus.hold_out([Document("tiny.txt", "x")], 0.1)
    assert refused.value.code == 65
