"""What a user gets wrong is one sentence with the remedy, an exit code, no traceback, and nothing is lost."""

import dataclasses
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import llmjax
from llmjax import cli
from llmjax.commands.train import claim
from llmjax.run import Run, read

# two seconds to compile
TINY = """--model.vocab 64 --model.layers 1 --model.width 32 --model.heads 2 --model.kv-heads 2 --model.head-dim 16
    --model.ff 64 --batch 8 --sequence 16"""


@dataclasses.dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str
    compiled: bool


@pytest.fixture
def shell(monkeypatch, capsys, caplog, tmp_path):
    """Runs one command line in this interpreter, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def command(*words: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["llmjax", *words])
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING), pytest.raises(SystemExit) as end:
            cli.main()
            sys.exit(0)  # a command that only prints returns
        shown = capsys.readouterr()
        return Ended(end.value.code, shown.out, shown.err, "XLA compilation" in caplog.text)

    return command


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(ended: Ended, code: int, *words: str) -> str:
    """Checks how a refusal looks, and returns its sentence."""
    sentence = ended.err.removeprefix("llmjax: ").removesuffix("\n")
    assert ended.err == f"llmjax: {sentence}\n" and "Traceback" not in ended.err
    assert re.fullmatch(r"[^\n]+: [^\n]+\.", sentence) and not re.search(r"\. [A-Z]", sentence)
    assert [word for word in words if word not in sentence] == [], sentence
    assert ended.code == code and not ended.compiled
    return sentence


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("trian", "trian is not a command: did you mean train? `llmjax --help` lists them."),
        ("train stdlib_tinny", "there is no experiment named 'stdlib_tinny': did you mean stdlib_tiny?"),
        ("train --mesh cpu9", "there is no mesh named 'cpu9': did you mean cpu8? `llmjax meshes` lists"),
        ("train --layout fdsp", "there is no layout named 'fdsp': did you mean fsdp? join any of dp, fsdp, tp"),
        ("bench bench_smal", "there is no experiment named 'bench_smal': did you mean bench_small?"),
        ("train mine.py", "mine.py does not exist: give the path of a Python file that defines `run`"),
        ("train runs/x/run.json", "runs/x/run.json cannot be read (No such file or directory): give the run.json"),
        ("generate mine", "there is no run 'mine' in runs: train one with llmjax train, or name its folder"),
        ("experiments all", "`llmjax experiments` takes no arguments: leave out 'all'."),
        ("launch", "launch got nothing to run: give train, parity or bench, then options of that command"),
        ("launch --processes 2 trian", "launch got trian to run: did you mean train?"),
        ("launch --proceses 2 train", "launch got --proceses to run: did you mean --processes?"),
        ("launch train --processes 0", "launch got 0 processes of 4 devices: give at least one of each"),
        ("bench tutorial_mlp", "tutorial_mlp is no language model: bench one of the others"),
        ("bench --repeats 0", "warmup is 3 and repeats 0: give at least 0 and 1"),
        ("plan llama3_8b_v5p_6", "there is no experiment named 'llama3_8b_v5p_6': did you mean llama3_8b_v5p_64?"),
        ("plan tutorial_mlp", "tutorial_mlp is no language model: plan one of the others"),
        ("plan --chips 63 --chip v5p", "chips is 63, which no TPU v5p topology has: give 32 or 64."),
        ("plan --chips 12 --chip h100", "chips is 12, but H100s come in nodes of 8: give 8 or 16."),
        ("plan --chips 64 --chip v7", "there is no chip named 'v7'"),
        ("plan --chips 64", "chip is '' and chips 64: give both, as in --chips 64 --chip v5p."),
        ("plan --tolerance -1", "tolerance is -1.0: give at least 0"),
        ("plan --mesh v5p_64 --layout fsdp --axes.fsdp 3", "axes multiply to 3 (fsdp 3), but there are 64 devices"),
        ("plan --mesh v5p_64 --search --batch 7 --sequence 255", "no mesh of 64 chips can be cut for stdlib_tiny"),
        (
            "plan --mesh v5p_64 --batch 64 --analytic --measure",
            "mesh v5p_64 needs 64 devices and this machine has 8 cpu",
        ),
        ("plan llama3_8b_v5p_64 --scale 63", "chips is 63, which no TPU v5p topology has: give 32 or 64."),
        ("plan --mesh cpu8 --scale 16", "mesh is cpu8, of which there are no larger ones"),
        ("plan --mesh v5p_64 --analytic --write mine.txt", "write is mine.txt: name a Python file, such as meshes"),
        # impossible shapes, each before the tokenizer is trained
        ("train --mesh cpu8 --layout fsdp --axes.fsdp 3", "axes multiply to 3 (fsdp 3), but there are 8 devices"),
        ("train --mesh cpu8 --axes.tensor 2", "but the layout cuts nothing over 'tensor': set it to 1"),
        ("train --mesh cpu8 --batch 12 --accumulate 1", "batch is 12, which data 8 does not divide: use batch 16"),
        ("train --mesh cpu8 --layout tp --model.heads 3", "model.heads is 3, which axis tensor 2 does not divide"),
        ("train --mesh cpu8 --layout tp --model.kv-heads 1", "model.kv_heads is 1, which axis tensor 2 does not"),
        ("train --mesh cpu8 --layout tp --model.ff 703", "model.ff is 703, which axis tensor 2 does not divide"),
        ("train --mesh cpu8 --layout tp --model.vocab 2047", "model.vocab is 2047, which axis tensor 2 does not"),
        (
            "train --sequence 512 --model.positions 256",
            "sequence is 512, longer than the model's 256 positions: lower --sequence or raise",
        ),
        ("train --model.head-dim 63", "model.head_dim is 63: rotary positions turn pairs of numbers"),
        ("train --clip -1", "clip is -1.0: give at least 0"),
        ("train --mesh h100x8", "mesh h100x8 is of H100 chips and this machine has cpu"),
        ("train llama31_405b_v5p_512", "or emulate eight CPU devices with --mesh cpu8"),
        ("train --mesh cpu8 --processes.devices 4", "mesh cpu8 has 8 devices, which 1 processes of 4"),
        ("train --data.tokenizer.vocab 100", "data.tokenizer.vocab is 100: give at least 257"),
        ("train --data.heldout 1", "data.heldout is 1.0: give a fraction of the files above 0 and below 1"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_remedy_and_leaves_no_trace(shell, tmp_path, line, words):
    refused(shell(*line.split()), 2, words)
    assert not list(tmp_path.iterdir())


def test_a_mistyped_field_is_answered_with_the_field_that_was_meant(shell, tmp_path):
    for line in ("train --stpes 3", "bench --stpes 3", "train stdlib_tiny --model.layer 3"):
        ended = shell(*line.split())
        assert ended.code == 2 and ended.out == "" and "Traceback" not in ended.err
        assert line.split()[-2] in ended.err and ("--steps INT" in ended.err or "--model.layers INT" in ended.err)
    assert not list(tmp_path.iterdir())


def test_a_value_of_the_wrong_kind_is_answered_with_the_field_and_what_it_takes(shell):
    ended = shell("train", "--steps", "three")
    assert ended.code == 2 and "--steps" in ended.err and "'three'" in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "data.path 'corpus' does not exist: give a text file or a folder of text files"),
        ({}, "data.path 'corpus' is a folder without files: put text files (UTF-8) into it"),
        ({"a.txt": b"", "b.txt": b""}, "the corpus is empty"),
        ({"a.txt": b"plain", "b.txt": b"caf\xe9"}, "b.txt' is not UTF-8 (byte 3): convert it to UTF-8 or take it out"),
        ({"a.txt": b"the words of a short text\n" * 9}, "fewer than one batch of 16: give more text, a smaller batch"),
    ],
)
def test_a_corpus_that_cannot_be_used_is_refused_and_no_run_directory_is_made(shell, tmp_path, content, words):
    for name, text in (content or {}).items():
        (tmp_path / "corpus").mkdir(exist_ok=True)
        (tmp_path / "corpus" / name).write_bytes(text)
    if content == {}:
        (tmp_path / "corpus").mkdir()
    refused(shell("train", "--data.path", "corpus", "--batch", "16"), 65, words)
    assert not (tmp_path / "runs" / "stdlib_tiny").exists()


def test_a_tokenizer_larger_than_the_model_is_refused_with_both_remedies(shell, tmp_path):
    (tmp_path / "text").write_text("".join(f"word{i} and {i * i}\n" for i in range(4000)))
    ended = shell("train", "--data.path", "text", "--model.vocab", "256", "--data.tokenizer.vocab", "300")
    refused(ended, 65, "the tokenizer has 300 tokens, more than model.vocab 256", "raise --model.vocab")
    assert not (tmp_path / "runs" / "stdlib_tiny").exists()


def test_a_folder_that_cannot_take_the_run_is_refused_before_the_data_is_read(shell, tmp_path):
    (tmp_path / "runs").write_text("mine")
    refused(shell("train"), 2, "stdlib_tiny cannot be written", "runs is a file", "choose another folder, --runs")
    refused(shell("launch", "train"), 74, "runs/.cache/logs cannot take the logs", "choose another folder, --logs")
    refused(shell("bench", "--json", "no/such.json"), 74, "json is no/such.json", "make it, or choose another file")
    refused(shell("plan", "--json", "no/such.json"), 74, "json is no/such.json", "make it, or choose another file")
    refused(shell("plan", "--write-contract", "no/x.json"), 74, "write_contract is no/x.json", "make it, or choose")
    assert everything_in(tmp_path) == {"runs": b"mine"}


def held_by(folder: Path, **fields) -> Run:
    """A run directory that belongs to the default experiment with other values."""
    run = dataclasses.replace(cli.load("stdlib_tiny"), runs=str(folder), **fields)
    claim(run.folder(), run)
    return run


def test_a_run_directory_of_another_config_is_named_with_the_fields_that_differ_and_stays_as_it_is(shell, tmp_path):
    held_by(tmp_path / "runs", seed=7, batch=64)
    before = everything_in(tmp_path)
    words = "runs/stdlib_tiny holds a run of another config, which differs in batch, seed: give the same values"
    refused(shell("train"), 2, words, "or another --name to start afresh")
    refused(shell("train", "--seed", "7", "--model.layers", "99"), 2, "differs in model.layers, batch: give")
    assert everything_in(tmp_path) == before


def test_a_run_may_go_on_elsewhere_and_otherwise_recorded(shell, tmp_path):
    run = held_by(tmp_path / "runs")
    (run.folder() / "events.jsonl").write_text(json.dumps(dict(kind="finish", step=run.steps)) + "\n")
    ended = shell("train", "--mesh", "cpu8", "--layout", "fsdp_tp", "--save-every", "7", "--keep", "1")
    assert ended.code == 0 and f"is finished: {run.steps:,} steps" in ended.out


def test_a_damaged_run_json_is_refused_and_kept(shell, tmp_path):
    run = held_by(tmp_path / "runs")
    (run.folder() / "run.json").write_text('{"is": "llm')
    before = everything_in(tmp_path)
    refused(shell("train"), 65, "run.json is not JSON", "restore it or start afresh with another --name")
    refused(shell("train", str(run.folder() / "run.json")), 65, "run.json is not JSON", "restore the file")
    refused(shell("generate", "stdlib_tiny"), 65, "run.json is not JSON", "restore the file")
    assert everything_in(tmp_path) == before


def test_a_file_whose_run_is_no_run_is_refused(shell, tmp_path):
    (tmp_path / "mine.py").write_text("run = 3\n")
    refused(shell("train", "mine.py"), 2, "`run` in mine.py is 3: make it a llmjax.run.Run")
    (tmp_path / "mine.py").write_text("pass\n")
    refused(shell("train", "mine.py"), 2, "mine.py does not define `run`: add `run = ...` to it")


def test_a_bug_shows_its_traceback_and_is_no_success(shell, tmp_path):
    (tmp_path / "mine.py").write_text("import no_such_package\n")
    ended = shell("train", "mine.py")
    assert ended.code == 1 and "Traceback" in ended.err and "no_such_package" in ended.err


def test_help_tells_every_command_and_version_the_version(shell):
    for words in ((), ("--help",), ("-h",), ("help",)):
        ended = shell(*words)
        assert ended.code == 0 and all(f"llmjax {command} " in ended.out for command in cli.COMMANDS)
    assert shell("--version").out == f"{llmjax.__version__}\n"


def test_help_is_quick_as_it_loads_nothing_heavy():
    code = "import sys; from llmjax import cli; cli.main(); print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert {"jax", "jaxlib", "flax", "optax", "orbax", "numpy", "rich", "tyro"}.isdisjoint(ended.stdout.split())


@pytest.mark.parametrize("command", ["train", "bench", "plan"])
def test_help_of_every_experiment_is_for_people(shell, command):
    for name in ("stdlib_tiny", "gpt2_124m_h200", "llama31_405b_v5p_512", "tutorial_mlp"):
        ended = shell(command, name, "--help")
        assert ended.code == 0 and f"usage: llmjax {command} {name}" in ended.out
        for field in dataclasses.fields(Run):
            if field.name not in ("loss", "name"):  # a loss may be a function, which has no form as text
                assert f"--{field.name.replace('_', '-')}" in ended.out
        for python in (" object at ", "<function", "Cluster(", "Layout(", "Axes("):
            assert python not in ended.out


def test_help_of_launch_and_generate_says_what_they_take(shell):
    assert "--processes INT" in shell("launch", "--help").out
    assert "--prompt" in shell("generate", "--help").out


def test_meshes_are_listed_one_line_each(shell):
    lines = shell("meshes").out.splitlines()
    names = [line.split()[0] for line in lines]
    assert names == sorted(names) and {"local", "cpu8", "h100x8", "v5p_512"} <= set(names) and "chips" not in names
    assert all(line.endswith(".") for line in lines)


def test_bench_takes_an_experiment_its_fields_axes_and_a_layout_and_writes_what_it_shows(shell, tmp_path):
    line = f"bench bench_small {TINY} --mesh cpu8 --layout fsdp_tp --axes.fsdp 4 --axes.tensor 2"
    ended = shell(*f"{line} --warmup 1 --repeats 2 --json out.json".split())
    assert (ended.code, ended.err) == (0, "")
    assert ended.compiled  # the way in which the refusals above are seen to compile nothing does see a compilation
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["run"]["axes"] == {
        "is": "llmjax.mesh:Axes", "data": 0, "stage": 0, "fsdp": 4, "expert": 0, "context": 0, "tensor": 2,
    }  # fmt: skip
    assert written["run"]["layout"]["name"] == "fsdp_tp" and written["run"]["model"]["width"] == 32
    assert written["fastest_ms"] <= written["step_ms"] <= written["slowest_ms"]
    assert f"{written['tokens_per_s']:,.0f} tokens/s" in ended.out
    assert list(tmp_path.iterdir()) == [tmp_path / "out.json"]


def test_a_full_disk_is_one_sentence_with_the_remedy(shell):
    ended = shell(*f"bench bench_small {TINY} --mesh cpu8 --warmup 0 --repeats 1 --json /dev/full".split())
    assert ended.code == 74 and ended.err.count("\n") == 1
    assert "cannot be written (No space left on device): make room, then run it again." in ended.err


def test_an_experiment_is_a_program_of_its_own(tmp_path):
    """`python -m experiments.NAME` is `llmjax train NAME`, and its run.json names what can be imported again."""
    line = [sys.executable, "-m", "experiments.tutorial_mlp", "--steps", "2", "--seed", "3"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    expected = dataclasses.replace(cli.load("tutorial_mlp"), steps=2, seed=3)
    assert read(tmp_path / "runs" / "tutorial_mlp" / "run.json") == expected
