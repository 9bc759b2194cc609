"""`llmjax show`: every value with its source, and the size of the run, with no device and nothing written."""

import json
import sys
from pathlib import Path

import pytest

from llmjax import cli
from llmjax.run import load, to_json

NAMES = sorted(
    path.stem
    for path in Path(cli.__file__).parents[1].joinpath("experiments").glob("*.py")
    if "\nrun = " in path.read_text()
)


def shown(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["llmjax", "show", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


def test_each_value_says_where_it_came_from(monkeypatch, capsys, tmp_path):
    file, words = tmp_path / "show.json", ["--steps", "4000", "--remat.policy", "full", "--clip", "1.0"]
    code, out, err = shown(monkeypatch, capsys, "llama3_8b_v5p_64", *words, "--json", str(file))
    found = json.loads(file.read_text())
    fields = {field["field"]: (field["value"], field["source"]) for field in found["fields"]}
    assert (code, err) == (0, "")
    assert fields["steps"] == (4000, "command line") and fields["remat.policy"] == ("full", "command line")
    assert fields["clip"] == (1.0, "command line")  # given, though it is what it was
    assert fields["model.ff"] == (14336, "experiment") and fields["model"] == ("Llama", "experiment")
    assert fields["seed"] == (0, "default") and fields["model.epsilon"] == (1e-5, "default")
    assert fields["mesh.chip"] == ("TPU v5p", "mesh v5p_64")
    assert fields["axes.fsdp"] == (32, "experiment")
    assert fields["axes.tensor"] == (1, "derived from layout fsdp on 64 devices")
    assert fields["attention"][0] == "splash" and fields["attention"][1].startswith("derived from ")
    assert fields["dtype"] == ("bfloat16", "derived from TPU v5p")
    assert found["parameters"] == 8_030_261_248
    assert found["tokens_per_parameter"] == pytest.approx(4000 * 256 * 8192 / 8.03e9, rel=1e-3)
    assert found["flops"] == found["flops_per_token"] * found["tokens"]
    assert "8.03 B (8,030,261,248), 7.5 B multiply a token" in out and "1.04 per parameter" in out


def test_a_run_json_is_named_as_the_source_and_another_mesh_is_the_command_line_s(monkeypatch, capsys, tmp_path):
    path, file = tmp_path / "run.json", tmp_path / "show.json"
    path.write_text(json.dumps(to_json(load("stdlib_tiny"))))
    assert shown(monkeypatch, capsys, str(path), "--mesh", "cpu8", "--layout", "fsdp", "--json", str(file))[0] == 0
    fields = {field["field"]: field for field in json.loads(file.read_text())["fields"]}
    assert fields["steps"]["source"] == "run.json"
    assert fields["mesh"]["source"] == fields["layout"]["source"] == "command line"
    assert fields["axes.fsdp"]["value"] == 8 and fields["mesh.chips"]["source"] == "mesh cpu8"


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_is_shown(monkeypatch, capsys, name):
    rows = ["--batch", "32"] if load(name).mesh.chips is None else []  # here they lie on eight devices
    code, out, err = shown(monkeypatch, capsys, name, *rows)
    assert (code, err) == (0, "") and f"llmjax show {name}\n" in out and "\nSize\n" in out
    assert f"llmjax train {name}" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["stdlib_tinny"], "there is no experiment named 'stdlib_tinny': did you mean stdlib_tiny?"),
        (["--mesh", "cpu8", "--batch", "12"], "batch is 12"),
        (["llama3_8b_v5p_64", "--layout", "fsdp_tp", "--axes.tensor", "3"], "axes multiply to 192"),
        (["--json", "no/such/folder/x.json"], "is no folder: make it, or choose another file"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(monkeypatch, capsys, words, sentence):
    code, _, err = shown(monkeypatch, capsys, *words)
    assert code in (2, 74) and sentence in err and err.count("\n") == 1
