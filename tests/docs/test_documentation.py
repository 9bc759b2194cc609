"""What the documentation shows is run: every block of Python, file and command of every page."""

import ast
import dataclasses
import functools
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pages
import pytest
import yaml
from pages import Block, blocks, commands, fits

from llmjax import cli
from llmjax import mesh as meshes_of
from llmjax.data.tokenizer import Bytes
from llmjax.run import Run, to_json
from llmjax.train.program import make, resolve
from meshes.chips import CPU

NAMES = pages.names()
TRANSLATED = [name for name in NAMES if name.startswith("zh/") and name.removeprefix("zh/") in NAMES]
ORIGINAL = [name for name in NAMES if name not in TRANSLATED or name == "zh/index.md"]
EVERY = [block for name in ORIGINAL for block in blocks(name)]
PYTHON = [name for name in ORIGINAL if any(b.kind == "python" and not b.title for b in blocks(name))]
SHELL = [block for block in EVERY if block.kind == "sh"]
FILES = sorted(path for path in (pages.DOCS / "files").iterdir())


def run(folder: Path, *words: str) -> str:
    """What a command prints that ends well, with programs from a cache that all tests here share."""
    settings = dict(
        JAX_COMPILATION_CACHE_DIR=str(folder.parent / "compiled"), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.1"
    )
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=os.environ | settings, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout


def python_prints(name: str, folder: Path, slow: bool) -> None:
    flags = ["--slow"] if slow else []
    shown = json.loads(run(folder, str(Path(pages.__file__)), *flags, name).splitlines()[-1])
    ran = [block for block in blocks(name) if block.kind == "python" and not block.title]
    assert len(shown) == len(ran) > 0
    for block, text in zip(ran, shown, strict=True):
        if block.output is not None and (slow or not block.slow):
            assert fits(block.output, text), f"{block} prints\n{text}and the page says\n{block.output}"


@pytest.mark.parametrize("name", PYTHON)
def test_blocks_of_python_run_in_order_and_print_what_their_page_shows(name, tmp_path):
    python_prints(name, tmp_path, slow=False)


def with_files(folder: Path, name: str) -> None:
    """Puts the files that a page shows into a folder, and what a reader has there: texts, and a place for meshes."""
    (folder / "meshes").mkdir()
    shutil.copy(pages.ROOT / "README.md", folder)
    shutil.copytree(pages.PAGES, folder / "texts")
    Bytes().build().save(str(folder / "tokenizer.json"))
    for block in blocks(name):
        if block.title:
            (folder / block.title).write_text(block.code, encoding="utf-8")


def commands_print(name: str, folder: Path, wanted) -> None:
    """Runs these blocks of commands of a page in a folder of their own, in order."""
    with_files(folder, name)
    for block in filter(wanted, blocks(name)):
        if block.before:
            run(folder, "-m", "llmjax.cli", *block.before)
        lines = [words + block.flags if "train" in words else words for words in commands(block.code)]
        shown = "".join(run(folder, "-m", "llmjax.cli", *words) for words in lines)
        if block.output is not None and not block.flags:
            assert fits(block.output, shown), f"{block} prints\n{shown}and the page says\n{block.output}"


def quick(block: Block) -> bool:
    return block.kind == "sh" and block.runs and not block.slow


@pytest.mark.parametrize("name", [name for name in ORIGINAL if any(map(quick, blocks(name)))])
def test_quick_commands_run_and_print_what_their_page_shows(name, tmp_path):
    commands_print(name, tmp_path, quick)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ORIGINAL if any(b.runs and b.slow for b in blocks(name))])
def test_commands_that_take_longer_do_so_too(name, tmp_path):
    commands_print(name, tmp_path, lambda block: block.kind == "sh" and block.runs)


@pytest.fixture
def understood(monkeypatch, tmp_path):
    """understood(words) is what a command line asks for, read by the command line's own parser; nothing is run.

    A run that would be trained is also checked against its mesh, as training would before anything is read.
    """
    asked = []

    def note(*given, **_):
        asked.append(given)
        return 0

    for name, _, call in cli.OWN.values():
        monkeypatch.setattr(importlib.import_module(f"llmjax.commands.{name}"), call, note)
    for command in ("train", "plan", "parity", "bench", "replay", "supervise", "show", "draw"):
        monkeypatch.setattr(importlib.import_module(f"llmjax.commands.{command}"), command, note)
    for call in ("data", "stats", "show"):
        monkeypatch.setattr(importlib.import_module("llmjax.commands.data"), call, note)
    monkeypatch.setattr(importlib.import_module("llmjax.commands.data_report"), "report", note)
    monkeypatch.setattr(importlib.import_module("llmjax.commands.imports"), "begin_from", lambda run, *_: run)
    monkeypatch.setattr("llmjax.launch.launch", note)
    monkeypatch.chdir(tmp_path)
    written = Path("runs/stdlib_tiny/run.json")
    written.parent.mkdir(parents=True)
    written.write_text(json.dumps(to_json(dataclasses.replace(cli.load("stdlib_tiny"), name="stdlib_tiny"))))

    def words(given: list[str]) -> None:
        asked.clear()
        if len(given) == 1 and given[0] in (*cli.COMMANDS, "--help", "--version", "help"):
            return  # a command in prose, named and not given
        if given[-1] == "--help":
            with pytest.raises(SystemExit, match="0"):
                cli._dispatch(given[0], given[1:])
            return
        assert cli._code(cli._dispatch, given[0], given[1:]) == 0 and asked, shlex.join(given)
        for value in asked.pop():
            if isinstance(value, Run) and given[0] == "train":
                axes = resolve(value, value.mesh.chips or 1)
                make(value, meshes_of.abstract_mesh(axes), value.mesh.chip or CPU)
            elif isinstance(value, list) and given[0] in ("launch", "supervise"):
                words(list(value))

    return words


def inline(name: str) -> list[list[str]]:
    """The words of commands in the prose of a page."""
    prose = re.sub(r"^```.*?^```$", "", (pages.PAGES / name).read_text(encoding="utf-8"), flags=re.M | re.S)
    return [shlex.split(code)[1:] for code in re.findall(r"`(llmjax [a-z][^`]*)`", prose)]


@functools.cache
def lines(name: str) -> list[list[str]]:
    shown = [words for block in blocks(name) if block.kind in ("sh", "bash", "yaml") for words in commands(block.code)]
    return shown + [words for words in inline(name) if not re.search(r"[A-Z]{2,}|…|\.\.\.", shlex.join(words))]


@pytest.mark.parametrize("name", [name for name in NAMES if lines(name)])
def test_commands_are_understood_and_ask_for_what_can_be_done(name, understood):
    with_files(Path(), name)
    for words in lines(name):
        understood(words)


def test_a_command_that_does_not_exist_is_not_understood(understood):
    for wrong in ("train stdlib_tiny --stepz 3", "train stdlib_tinny", "frobnicate", "train --mesh cpu8 --batch 12"):
        with pytest.raises((AssertionError, SystemExit, Exception)):
            understood(wrong.split())


@pytest.mark.parametrize("name", TRANSLATED)
def test_a_translated_page_has_the_code_and_the_numbers_of_the_original(name):
    if name == "zh/index.md":
        return
    here, there = ([(b.kind, b.title, b.code, b.output, b.says) for b in blocks(n)] for n in (name, name[3:]))
    assert here == there and here


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_to_start_from_are_well_formed_and_their_commands_understood(path, understood):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        parts = list(yaml.safe_load_all(text))
        assert {part["kind"] for part in parts} == {"Service", "Job"}
        pod = parts[-1]["spec"]["template"]["spec"]
        text = "\n".join(line for container in pod["containers"] for line in container["args"])
    else:
        subprocess.run(["bash", "-n", str(path)], check=True)
    found = commands(re.sub(r"\$\{?\w+\}?", "1", text).replace('"', ""))
    assert found
    for words in found:
        understood(words)


def test_the_pages_build_without_a_warning_and_load_nothing_from_elsewhere(tmp_path):
    shutil.copytree(pages.ROOT / "llmjax", tmp_path / "llmjax", ignore=shutil.ignore_patterns("site", ".cache"))
    run(tmp_path, "-m", "zensical", "build", "-f", "llmjax/docs/mkdocs.yml", "--strict")
    site = tmp_path / "llmjax" / "docs" / "site"
    for name in NAMES:
        page = (site / name).with_suffix(".html").read_text(encoding="utf-8")
        assert not re.findall(r'(?:src|href)="(?:https?:)?//[^"]*\.(?:js|css|woff2?)"', page), name
    assert "llmjax.train.loss" in (site / "api.html").read_text() and "SBATCH" in (site / "clusters.html").read_text()


def test_every_kind_of_block_is_one_that_a_test_looks_at():
    kinds = {block.kind for name in NAMES for block in blocks(name)}
    assert kinds <= {"python", "sh", "bash", "yaml"}
    for block in EVERY:
        if block.kind == "python":
            ast.parse(block.code)
        if block.output is not None:
            assert block.kind == "python" or block.runs or not block.output.strip("?\n"), f"{block}: nobody compares it"


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        ("a\n...\nb\n", "a\nb\n", True),
        ("a\n...\nb\n", "a\nx\ny\nb\n", True),
        ("a ... c\n", "a b c\n", True),
        ("a ... c\n", "a b d\n", False),
        ("a\n", "a\nb\n", False),
        ("a.c\n", "abc\n", False),
    ],
)
def test_an_output_fits_only_what_the_page_shows_of_it(pattern, text, expected):
    assert fits(pattern, text) is expected
