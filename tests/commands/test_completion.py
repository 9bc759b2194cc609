"""A shell completes commands, options and names."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmjax import cli
from llmjax.commands.completion import completion
from llmjax.errors import Refused


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("completion") / "llmjax.bash"
    path.write_bytes(subprocess.run([sys.executable, "-m", "llmjax.cli", "completion", "bash"], check=True,
                                    capture_output=True).stdout)  # fmt: skip
    return str(path)


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "among"),
    [
        ("llmjax tr", {"train"}),
        ("llmjax train stdlib_", {"stdlib_tiny", "stdlib_moe"}),
        ("llmjax train stdlib_tiny --mesh v5p", {"v5p_64"}),
        ("llmjax train stdlib_tiny --model.wi", {"--model.width"}),
        ("llmjax generate ", {"mine"}),
        ("llmjax supervise --tri", {"--tries"}),
        ("llmjax data build out --so", set()),
    ],
)
def test_bash_completes(script, words, among, tmp_path):
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/run.json").touch()
    given = words.split(" ")
    line = " ".join(word or "''" for word in given)
    ask = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(given) - 1}; _llmjax; "
    done = subprocess.run(["bash", "-c", ask + 'printf "%s\\n" "${COMPREPLY[@]}"'], cwd=tmp_path, capture_output=True,
                          text=True, check=True)  # fmt: skip
    assert done.stderr == "" and among <= set(done.stdout.split())
    assert all(found.startswith(given[-1]) for found in done.stdout.split())


def test_every_command_is_there_and_another_shell_is_refused(script):
    text = Path(script).read_text()
    assert all(command in text for command in cli.COMMANDS)
    with pytest.raises(Refused, match="completion got fish: give bash or zsh"):
        completion(["fish"], cli.COMMANDS, cli._dispatch)
