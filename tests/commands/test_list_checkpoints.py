"""`llmjax checkpoints` shows what is there, and what of it can be trusted."""

import io

import jax.numpy as jnp
import pytest
from rich.console import Console

from llmjax import cli
from llmjax.checkpoint.checkpoints import Checkpoints
from llmjax.commands import checkpoints as command
from llmjax.commands.generate import choose_step
from llmjax.errors import Refused
from llmjax.train.display import Display


@pytest.fixture
def listed(tmp_path, monkeypatch, capsys):
    """Runs `llmjax checkpoints` beside a run with checkpoints 4 and 8: (exit code, output)."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "mine"
    with Checkpoints(folder / "checkpoints") as checkpoints:
        for step in (4, 8):
            checkpoints.save(step, {"x": jnp.arange(100.0)}, dict(step=step, tokens=1000 * step))
    (folder / "run.json").write_text("{}")

    def command(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["llmjax", "checkpoints", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        shown = capsys.readouterr()
        return end.value.code, shown.out + shown.err

    return command


def test_steps_are_listed_with_size_age_tokens_and_when_they_were_read_back(listed, tmp_path):
    (tmp_path / "runs" / "mine" / "checkpoints" / "8" / "VERIFIED").unlink()
    for name in ("mine", "runs/mine"):
        code, out = listed(name)
        lines = [line.split() for line in out.splitlines()]
        assert code == 0 and lines[0] == ["step", "size", "age", "tokens", "read", "back"]
        assert lines[1][0] == "4" and lines[1][4] == "4,000" and lines[1][-1] == "ago"
        assert lines[2][0] == "8" and lines[2][4] == "8,000" and lines[2][-2:] == ["not", "yet"]
    code, out = listed("mine", "--verify")
    assert code == 0 and out.count("ago") == 2 and "not yet" not in out


def test_a_checkpoint_that_is_not_what_was_written_is_shown_and_the_code_says_so(listed, tmp_path):
    path = tmp_path / "runs" / "mine" / "checkpoints" / "8" / "commit_success.txt"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert listed("mine")[0] == 0  # names and sizes are right
    code, out = listed("mine", "--verify")
    assert code == 65 and "no: commit_success.txt holds other bytes than were written" in out
    assert "1 of 2 not verified; training continues from the newest other." in out
    path.unlink()
    assert listed("mine")[0] == 65
    (tmp_path / "runs" / "mine" / "checkpoints" / "4" / "MANIFEST.json").unlink()
    assert "2 of 2 not verified; training refuses to continue." in listed("mine")[1]


def test_a_terminal_shows_what_is_read_while_it_is_and_a_file_of_the_output_does_not(listed):
    shown = {}
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=80, highlight=False)
        assert command.checkpoints(command.Options("mine", verify=True), Display(console=console)) == 0
        shown[terminal] = console.file.getvalue()
    assert "reading checkpoint 4" in shown[True] and "reading checkpoint 8" in shown[True]
    assert "reading" not in shown[False] and "4,000" in shown[False] and "4,000" in shown[True]


def test_a_checkpoint_without_a_manifest_is_taken_when_asked_to(listed, tmp_path):
    (tmp_path / "runs" / "mine" / "checkpoints" / "8" / "MANIFEST.json").unlink()
    assert "no: it has no MANIFEST.json" in listed("mine")[1]
    code, out = listed("mine", "--trust", "8")
    assert code == 0 and "8,000" in out
    assert listed("mine", "--trust", "8") == (65, "llmjax: " + refusal(tmp_path))
    assert "has no checkpoint of step 9 to trust: it has 4, 8." in listed("mine", "--trust", "9")[1]


def refusal(tmp_path):
    return f"checkpoint {tmp_path}/runs/mine/checkpoints/8 has a manifest: --trust is for those that have none.\n"


def test_what_else_is_there_is_named_and_a_run_that_is_not_there_is_refused(listed, tmp_path):
    (tmp_path / "runs" / "mine" / "checkpoints" / "99").mkdir()
    assert "99: an empty folder." in listed("mine")[1]
    code, out = listed("mien")
    assert code == 2 and "there is no run 'mien' in runs: did you mean mine?" in out


def test_text_is_completed_from_no_checkpoint_that_is_not_what_was_written(listed, tmp_path):
    folder = tmp_path / "runs" / "mine"
    said: list[str] = []
    checkpoints = Checkpoints(folder / "checkpoints", say=said.append)
    assert choose_step(checkpoints, -1, folder) == 8 and choose_step(checkpoints, 4, folder) == 4
    (folder / "checkpoints" / "8" / "commit_success.txt").write_text("harmed")
    assert choose_step(checkpoints, -1, folder) == 4 and len(said) == 1 and "Passed over" in said[0]
    with pytest.raises(
        Refused, match=r"checkpoint 8 of .* is not what was written .* choose another --step"
    ) as refused:
        choose_step(checkpoints, 8, folder)
    assert refused.value.code == 65
