"""`llmjax chat` with an imported run, through a pipe."""

import io
import json
import shutil
import signal
import sys

import pytest
from loading import FIXTURES
from test_import_export import bytes_of

from llmjax import cli
from llmjax.commands.chat import interruptible

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] | upper }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
GREEDY = "--temperature 0 --top-p 1"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an imported run, whose tokenizer has a template."""
    path = tmp_path_factory.mktemp("talk")
    shutil.copytree(FIXTURES / "llama_grouped", path / "hf")
    bytes_of(path / "hf")
    (path / "hf" / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture
def shell(monkeypatch, capsys, place):
    monkeypatch.chdir(place)

    def command(line: str, said: str = "", code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["llmjax", *line.split()])
        monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        with pytest.raises(SystemExit) as end:
            cli.main()
        shown = capsys.readouterr()
        assert end.value.code == code, shown.out + shown.err
        return shown.out + shown.err

    if not (place / "runs").exists():
        command("import hf --name it")
    return command


def answers(shown: str) -> list[str]:
    """What stands between one question and the next, without what is no answer."""
    return [part.partition("\n")[2].strip() for part in shown.split("\n> ")[1:]]


def test_an_answer_is_what_the_model_makes_of_the_template_s_text(shell):
    shown = shell(f"chat it --tokens 6 {GREEDY} --system BE", "HELLO\n/reset\n\n/NO\nHELLO\n/exit\nNOT READ\n")
    assert "its own chat template" in shown and "begins anew" in shown and "/NO is no command" in shown
    assert "NOT READ" not in shown
    first, *_, last, _ = answers(shown)
    completed = shell("generate it --tokens 6 --prompt S:BE;U:HELLO;A:").strip().removeprefix("S:BE;U:HELLO;A:")
    assert first == last == completed != ""


def test_a_full_context_forgets_the_oldest_turns_and_refuses_what_never_fits(shell):
    shown = shell(f"chat it --tokens 4 {GREEDY} --context 32", f"{'A' * 40}\nONE\nTWO\nTHREE\n")
    assert "This message makes 45 tokens and leaves no room" in shown and "larger --context" in shown
    assert "the oldest turn is forgotten" in shown


def test_what_chat_cannot_do_is_refused(shell, place):
    assert "context is 4096, and the model has" in shell("chat it --context 4096", code=2)
    assert "there is no run 'that'" in shell("chat that", code=2)
    kept = place / "runs" / "it" / "imported" / "chat_template.jinja"
    kept.write_text("{{ raise_exception('NO') }}")
    try:
        assert "does not take these messages (NO)" in shell("chat it", "HELLO\n", code=65)
    finally:
        kept.write_text(TEMPLATE)


def test_generate_stops_before_a_string_and_says_the_same_alone_and_beside_others(shell):
    whole = shell("generate it --tokens 12 --prompt HELLO").strip()
    stop = whole[len("HELLO") + 3 : len("HELLO") + 5]
    for prompts in ("HELLO", "HELLO OTHER"):
        shown = shell(f"generate it --tokens 12 --prompt {prompts} --stop {stop}")
        assert shown.split("\n")[0].strip() == whole[: whole.index(stop, 5)].strip()
    assert "positions: shorten the prompt or lower --tokens" in shell(f"generate it --prompt {'A' * 200}", code=2)


def test_ctrl_c_stops_an_answer_and_only_that():
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as stopped:
        assert not stopped
        signal.raise_signal(signal.SIGINT)
        assert stopped
    assert signal.getsignal(signal.SIGINT) is before


def test_import_keeps_what_a_conversation_needs(shell, place):
    kept = place / "runs" / "it" / "imported"
    assert (kept / "chat_template.jinja").read_text() == TEMPLATE
    assert json.loads((kept / "generation_config.json").read_text())
