"""The `llmjax` command: parses, calls, prints."""

import dataclasses
import difflib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from llmjax.errors import IO, Refused

if TYPE_CHECKING:
    from llmjax.run import Run

DEFAULT = "stdlib_tiny"

HELP = f"""llmjax: train large language models in JAX, with the same numbers on any mesh.

  llmjax train [EXPERIMENT] [--field value ...]   train, or continue, an experiment (default: {DEFAULT})
  llmjax generate RUN [--prompt TEXT ...]         complete text with a trained run
  llmjax launch --processes N --devices D train … the same command on N processes of this machine
  llmjax bench [--case NAME]                      measure training speed here
  llmjax experiments                              list experiments
  llmjax meshes                                   list meshes

Every command shows its options with --help.
"""

COMMANDS = ("train", "generate", "launch", "bench", "experiments", "meshes")


def main() -> None:
    """Entry point of the `llmjax` command."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("llmjax"))
        return
    _exit(_dispatch, arguments[0], arguments[1:])


def experiment(run: "Run") -> None:
    """`python -m experiments.NAME`: the same as `llmjax train NAME`."""
    module = sys.modules["__main__"]
    name = module.__spec__.name if module.__spec__ else Path(str(module.__file__)).stem
    _exit(_train, dataclasses.replace(run, name=run.name or name.rpartition(".")[2]), sys.argv[1:])


def _exit(call, *arguments) -> None:
    """Ends the process with the code that `call` returns; what a user got wrong is one sentence, no traceback."""
    try:
        code = call(*arguments)
    except Refused as refusal:
        print(f"llmjax: {refusal}", file=sys.stderr)
        code = refusal.code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = IO
    sys.stdout.flush()
    sys.exit(code)


def _dispatch(command: str, arguments: list[str]) -> int:
    match command:
        case "train":
            if arguments and not arguments[0].startswith("-"):
                return _train(load(arguments[0]), arguments[1:])
            return _train(load(DEFAULT), arguments)
        case "generate":
            return _generate(arguments)
        case "launch":
            return _launch(arguments)
        case "bench":
            return _bench(arguments)
        case "experiments" | "meshes":
            return _list(command, arguments)
    near = difflib.get_close_matches(command, COMMANDS, 1)
    raise Refused(f"{command} is not a command: {f'did you mean {near[0]}? ' if near else ''}llmjax --help lists them.")


def load(name: str) -> "Run":
    """The Run of an experiment: a name in `experiments`, a path to a .py file, or a run.json."""
    import json

    from llmjax import names
    from llmjax.run import from_json

    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise Refused(f"{name} is not there: give a run's run.json, or the name of an experiment.")
        return from_json(json.loads(path.read_text()))
    run = names.load_file(name, "run") if name.endswith(".py") else names.load("experiments", name, "run")
    return dataclasses.replace(run, name=run.name or Path(name).stem)


def parse(run: "Run", arguments: list[str], program: str):
    """The run and the process settings with the command line's changes."""
    import tyro

    from llmjax.processes import Processes
    from llmjax.run import Run

    @dataclasses.dataclass(frozen=True)
    class Command:
        run: Annotated[Run, tyro.conf.arg(name="")]
        processes: Processes = Processes()

    with _primitives():
        parsed = tyro.cli(
            Command,
            args=arguments,
            default=Command(run),
            prog=program,
            config=(tyro.conf.AvoidSubcommands,),
            description=f"Train, or continue, {run.name}.",
        )
    return parsed.run, parsed.processes


def _primitives():
    """Meshes and layouts are given by name."""
    import tyro

    from llmjax import layout as layouts
    from llmjax import names
    from llmjax.mesh import Cluster

    registry = tyro.constructors.ConstructorRegistry()

    def named(kind: type, metavar: str, look_up):
        @registry.primitive_rule
        def rule(info: tyro.constructors.PrimitiveTypeInfo):
            if info.type is not kind:
                return None
            return tyro.constructors.PrimitiveConstructorSpec(
                nargs=1,
                metavar=metavar,
                instance_from_str=lambda given: look_up(given[0]),
                is_instance=lambda value: isinstance(value, kind),
                str_from_instance=lambda value: [value.name],
            )

    named(Cluster, "NAME", lambda name: names.load("meshes", name, "cluster"))
    named(layouts.Layout, "{" + ",".join(layouts.PRESETS) + "}", layouts.preset)
    return registry


def _train(run: "Run", arguments: list[str]) -> int:
    run, processes = parse(run, arguments, f"llmjax train {run.name}")
    from llmjax.train.train import train

    return train(run, processes)


def _generate(arguments: list[str]) -> int:
    import tyro

    from llmjax.evaluate.command import Generate, generate

    with _primitives():
        return generate(tyro.cli(Generate, args=arguments, prog="llmjax generate"))


def _launch(arguments: list[str]) -> int:
    import tyro

    from llmjax.processes import launch

    @dataclasses.dataclass(frozen=True)
    class Launch:
        """Runs one llmjax command on several processes of this machine, joined over loopback."""

        command: Annotated[tuple[str, ...], tyro.conf.Positional]
        "The command to run, for example: train stdlib_tiny --layout fsdp"
        processes: int = 2
        "Number of processes."
        devices: int = 4
        "Emulated CPU devices of each process."
        logs: str = "runs/.cache/logs"
        "Folder for the output of every process but the first."

    at = next((i for i, a in enumerate(arguments) if a in COMMANDS), len(arguments))
    asked = tyro.cli(Launch, args=[*arguments[:at], *(arguments[at : at + 1])], prog="llmjax launch")
    return launch(asked.processes, asked.devices, arguments[at:], Path(asked.logs))


def _list(package: str, arguments: list[str]) -> int:
    from llmjax import names

    if arguments:
        print(
            f"llmjax {package}: lists what `--{package[:-2] if package == 'meshes' else 'EXPERIMENT'}` can be; it takes no options."
        )
    found = names.names(package)
    for name, line in found.items():
        print(f"{name:<{max(map(len, found))}}  {line}")
    return 0


def _bench(arguments: list[str]) -> int:
    import tyro

    from llmjax.evaluate.bench import Bench, bench

    return bench(tyro.cli(Bench, args=arguments, prog="llmjax bench"))


if __name__ == "__main__":
    main()
