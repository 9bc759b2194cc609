"""`llmjax import`, `llmjax train --from` and `llmjax export`, as a user calls them."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from loading import FIXTURES

from llmjax import cli
from llmjax.data.tokenizer import Bytes
from llmjax.interop import folder
from llmjax.run import read

SHORT = "--steps 2 --batch 8 --sequence 16 --eval-rows 8 --prompts --mesh cpu8"


@pytest.fixture
def shell(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for i in range(12):
        (tmp_path / "text" / f"{i}.txt").write_text("to be or not to be, that is the question. " * 60 + str(i))

    def command(line: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["llmjax", *line.split()])
        with pytest.raises(SystemExit) as end:
            cli.main()
        shown = capsys.readouterr()
        assert end.value.code == code, shown.out + shown.err
        return shown.out + shown.err

    return command


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A Hugging Face folder, without a tokenizer."""
    return Path(shutil.copytree(FIXTURES / "llama_grouped", tmp_path / "hf"))


def contents(path: Path) -> dict[str, bytes]:
    return {name: np.array(entry.map()).tobytes() for name, entry in folder.read(path).tensors.items()}


def test_in_and_out_again_every_file_says_the_same(shell, checkpoint, tmp_path):
    out = shell("import hf --name it --mesh cpu8 --layout fsdp_tp")
    assert "Llama, 19.6 k parameters" in out
    assert "read back and found the same" in shell("export it out --mesh cpu8")
    assert contents(tmp_path / "out") == contents(checkpoint)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((checkpoint / name).read_text())
    assert "is there already: choose another folder" in shell("export it out", 74)
    assert "is there already: choose another --name" in shell("import hf --name it", 74)


def test_in_shards_and_in_bfloat16_it_is_the_same_checkpoint(shell, checkpoint, tmp_path):
    shell("import hf --name it --mesh cpu8")
    shell("export it out --shard 0.00002 --dtype bfloat16 --mesh cpu8")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 3 and files[0] == "model-00001-of-00003.safetensors"
    for name, entry in folder.read(tmp_path / "out").tensors.items():
        exact = np.array(folder.read(checkpoint).tensors[name].map())  # the fixture's numbers are bfloat16's
        np.testing.assert_array_equal(np.array(entry.map()).astype(np.float32), exact, err_msg=name)


@pytest.mark.parametrize("source", ["hf", "runs/it"])
def test_training_begins_with_the_weights_it_is_given(source, shell, checkpoint, tmp_path):
    """A learning rate of nothing leaves them as they were, bit for bit."""
    bytes_of(checkpoint)
    shell("import hf --name it --mesh cpu8")
    line = f"train stdlib_tiny --from {source} --name tuned --data.path text {SHORT}"
    out = shell(f"{line} --optimizer.lr 0 --layout fsdp")
    assert f"Beginning with the weights of {source}" in out
    assert read(tmp_path / "runs/tuned/run.json").model == folder.read(checkpoint).model
    shell("export tuned out --step 2 --mesh cpu8")
    assert contents(tmp_path / "out") == contents(checkpoint)
    assert (tmp_path / "out/tokenizer.json").is_file()


def bytes_of(checkpoint: Path) -> None:
    """Gives the checkpoint a tokenizer of 63 printable bytes and the end of a text."""
    tokenizer = json.loads(Bytes().build().to_str())
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: i for i, token in enumerate(sorted(vocab, key=vocab.get)[32:95])}
    tokenizer["added_tokens"][0]["id"] = 63
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_a_run_that_was_imported_completes_text(shell, checkpoint):
    bytes_of(checkpoint)
    shell("import hf --name it")
    assert "DEF" in shell("generate it --prompt DEF --tokens 4")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(shell, checkpoint):
    (checkpoint / "tokenizer.json").write_text(Bytes().build().to_str())
    assert "has 257 tokens, more than the 64 rows of the embedding" in shell("import hf", 65)


def test_weights_of_another_family_are_refused(shell, checkpoint):
    out = shell(f"train stdlib_tiny --weights {FIXTURES / 'gpt2'} --name x --data.path text {SHORT}", 2)
    assert f"of a GPT2, and model is a Llama: give --from {FIXTURES / 'gpt2'}" in out


@pytest.mark.parametrize("parameters", ["float32", "bfloat16"])
def test_a_run_that_was_trained_here_goes_out_with_what_others_need(parameters, shell, tmp_path):
    small = "--model.layers 2 --model.width 32 --model.heads 2 --model.kv-heads 1 --model.head-dim 16 --model.ff 48"
    small += f" --parameters {parameters} --data.tokenizer.vocab 300"
    shell(f"train stdlib_tiny --name own --data.path text {SHORT} {small}")
    assert "float32" in shell("export own out --mesh cpu8")
    shell(f"train stdlib_tiny --from out --name again --data.path text {SHORT} --parameters {parameters}")
    found = folder.read(tmp_path / "out")
    assert found.model == read(tmp_path / "runs/own/run.json").model
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("line", "words", "code"),
    [
        ("import nowhere", "nowhere is no folder", 2),
        ("import text", "cannot be read (No such file or directory)", 74),
        ("train stdlib_tiny --from nowhere", "there is no run 'nowhere'", 2),
        ("train stdlib_tiny --from", "--from names nothing", 2),
        ("export nowhere out", "there is no run 'nowhere'", 2),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(line, words, code, shell):
    assert words in shell(line, code)
