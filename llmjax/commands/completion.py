"""`llmjax completion SHELL`: a script with which a shell completes commands, options and names."""

import contextlib
import io
import re
from collections.abc import Callable, Sequence

from llmjax import names
from llmjax.errors import DONE, Refused

SHELLS = ("bash", "zsh")
EXPERIMENTS = ("train", "plan", "parity", "bench", "show", "draw")  # commands that take an experiment first
RUNS = (
    "export", "generate", "chat", "evaluate", "checkpoints", "goodput", "report", "watch", "replay", "diff", "profile",
)  # fmt: skip
MESHES = ("--mesh", "--fallback-mesh")  # options that take the name of a mesh
SCRIPT = """# llmjax completion SHELL
_llmjax() {
  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} command=${COMP_WORDS[1]} found=
  case $before in
    @MESHES@) COMPREPLY=($(compgen -W "@MESH_NAMES@" -- "$word")); return ;;
  esac
  if [[ $COMP_CWORD == 1 ]]; then found="@COMMANDS@"
  elif [[ $word == -* ]]; then
    case $command in
@OPTIONS@
    esac
  else
    case $command in
      @EXPERIMENTS@) found="@EXPERIMENT_NAMES@" ;;
      @RUNS@) found=$(ls -d runs/*/run.json 2>/dev/null | cut -d/ -f2) ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$found" -- "$word") $([[ $word == -* ]] || compgen -f -- "$word"))
}
complete -o filenames -F _llmjax llmjax
"""


def completion(arguments: Sequence[str], commands: Sequence[str], run: Callable[[str, list[str]], int]) -> int:
    """Prints the script for a shell; `run(command, arguments)` runs a command, which is asked for its help.

    Raises:
      Refused: no shell, or another one, is named.
    """
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        given = " ".join(arguments) or "nothing"
        raise Refused(f'completion got {given}: give bash or zsh, as in eval "$(llmjax completion bash)".')
    options = {command: told for command in commands if (told := options_of(command, run))}
    script = SCRIPT.replace("SHELL", arguments[0], 1)
    for name, text in {
        "MESHES": "|".join(MESHES),
        "MESH_NAMES": " ".join(names.names("meshes")),
        "COMMANDS": " ".join(commands),
        "OPTIONS": "\n".join(f'      {command}) found="{" ".join(told)}" ;;' for command, told in options.items()),
        "EXPERIMENTS": "|".join(EXPERIMENTS),
        "EXPERIMENT_NAMES": " ".join(names.names("experiments")),
        "RUNS": "|".join(RUNS),
    }.items():
        script = script.replace(f"@{name}@", text)
    if arguments[0] == "zsh":
        script = script.replace("\n", "\nautoload -U +X bashcompinit && bashcompinit\n", 1)
    print(script, end="")
    return DONE


def options_of(command: str, run: Callable[[str, list[str]], int]) -> list[str]:
    """The options that a command's help names, in its order."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit, Refused):
        run(command, ["--help"])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue())
    return list(dict.fromkeys(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", plain)))
