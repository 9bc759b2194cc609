"""The `llmjax` command: parses, calls, prints."""

import contextlib
import dataclasses
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from llmjax import allocator, redact
from llmjax.errors import DONE, INTERRUPTED, IO, PEER_LOST, Refused, TooFewDevices, did_you_mean
from llmjax.notice import Notice

if TYPE_CHECKING:
    from llmjax.mesh import Cluster
    from llmjax.run import Run

Asked = TypeVar("Asked")

HELP = """llmjax: train large language models in JAX, with the same numbers on any mesh.

  llmjax train [EXPERIMENT] [--field value ...]   train, or continue, an experiment (default: stdlib_tiny)
  llmjax train [EXPERIMENT] --from RUN            the same, beginning with a run's weights, or a Hugging Face folder's
  llmjax train [EXPERIMENT] --data.report         what the run would see of its data; trains nothing
  llmjax import FOLDER [--name NAME]              make a run of a Hugging Face checkpoint
  llmjax export RUN FOLDER [--dtype bfloat16]     write a run's weights as a Hugging Face checkpoint
  llmjax generate RUN [--prompt TEXT ...]         complete text with a trained run
  llmjax chat RUN [--system TEXT]                 talk with a trained run, by its tokenizer's chat template
  llmjax evaluate RUN [--data PATH] [--tasks …]   loss on held-out text, or scores in tasks of lm-eval
  llmjax checkpoints RUN [--verify]               list a run's checkpoints; read them back
  llmjax goodput RUN                              where a run's wall time went
  llmjax report RUN [RUN ...]                     a page with the curves, times and config of runs, compared
  llmjax watch RUN [RUN ...]                      the same, live, in the terminal
  llmjax replay RUN --step N                      take a step again and see where it stops being finite
  llmjax launch --processes N --devices D train … the same command on N processes of this machine
  llmjax supervise [--tries N ...] -- train …     the same command, started again when it dies, hangs or is preempted
  llmjax parity [EXPERIMENT] [--layouts …]        show that every layout gives the same numbers (default: stdlib_tiny)
  llmjax plan [EXPERIMENT] [--mesh NAME] ...      foresee memory, messages and speed on any cluster
  llmjax data build OUT --source PATH ...         turn texts, or token files, into a token store to train from
  llmjax data stats OUT, data show OUT --index N  what a store holds; a row of it, decoded
  llmjax bench [EXPERIMENT] [--field value ...]   measure the speed of training here (default: bench_small)
  llmjax show [EXPERIMENT] [--field value ...]    every value of a run and where it came from; its size
  llmjax draw [EXPERIMENT] [--mesh NAME] ...      a page: the mesh, where every array lives, a step in time
  llmjax diff RUN RUN                             how two runs differ: fields, versions, data, loss curves
  llmjax profile RUN                              where the time of traced steps went, operation by operation
  llmjax experiments                              list experiments
  llmjax meshes                                   list meshes
  llmjax completion bash|zsh                      have the shell complete all this: eval "$(llmjax completion bash)"

EXPERIMENT is a name that `llmjax experiments` lists, a Python file that defines `run`, or a run's run.json.
Commands with options show them with --help.
"""

COMMANDS = ("train", "import", "export", "generate", "chat", "evaluate", "checkpoints", "goodput", "report", "watch",
            "replay", "launch", "supervise", "parity", "plan", "data", "bench", "show", "draw", "diff", "profile",
            "experiments", "meshes", "completion")  # fmt: skip
# Commands with options of their own alone: module of llmjax.commands, options, what runs them. Imported when asked for.
OWN = {
    "import": ("imports", "Import", "bring"),
    "export": ("exports", "Export", "export"),
    "generate": ("generate", "Generate", "generate"),
    "chat": ("chat", "Chat", "chat"),
    "evaluate": ("evaluate", "Options", "evaluate"),
    "checkpoints": ("checkpoints", "Options", "checkpoints"),
    "goodput": ("goodput", "Options", "goodput"),
    "report": ("report", "Options", "report"),
    "watch": ("watch", "Options", "watch"),
    "diff": ("diff", "Options", "diff"),
    "profile": ("profile", "Options", "profile"),
}
REPORT = "--data.report"  # of train: what a run will see of its data, and no training
LAUNCHED = ("train", "parity", "bench", "supervise")  # what several processes can do together


def command() -> None:
    """Entry point of the `llmjax` command: `main`, and if it trains, in memory that suits it."""
    if sys.argv[1:2] and sys.argv[1] in (*LAUNCHED, "launch"):
        allocator.start_again()
    main()


def main() -> None:
    """Does what the command line says, in the process as it is, and ends it."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("llmjax"))
        return
    _exit(_dispatch, arguments[0], arguments[1:])


def experiment(run: "Run") -> None:
    """`python -m experiments.NAME`: the same as `llmjax train NAME`."""
    allocator.start_again()
    module = sys.modules["__main__"]
    name = module.__spec__.name if module.__spec__ else Path(str(module.__file__)).stem
    with Notice() as notice:
        _exit(_train, dataclasses.replace(run, name=run.name or name.rpartition(".")[2]), sys.argv[1:], notice)


def _exit(call: Callable[..., int], *arguments) -> None:
    """Ends the process with the code that `call` returns; nothing that is printed meanwhile holds a secret."""
    out, err = redact.Stream(sys.stdout), redact.Stream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = _code(call, *arguments)
    processes = sys.modules.get("llmjax.processes")  # not there where nothing was run
    (processes.leave if processes else sys.exit)(code)


def _code(call: Callable[..., int], *arguments) -> int:
    """The exit code that `call` comes to; what a user got wrong is one sentence, no traceback."""
    try:
        return call(*arguments)
    except Refused as refusal:
        print(f"llmjax: {refusal}", file=sys.stderr)
        return refusal.code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return IO
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> int:
    """A lost peer and a failing disk are named; anything else is a bug and shows its traceback."""
    processes = sys.modules.get("llmjax.processes")
    if processes and processes.lost_peer(error):
        print("llmjax: another process of this run is gone: run the same command to continue.", file=sys.stderr)
        return PEER_LOST
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
        where = f"{error.filename} " if error.filename else "a file "
        print(f"llmjax: {where}cannot be written ({error.strerror}): make room, then run it again.", file=sys.stderr)
        return IO
    traceback.print_exception(error)
    return 1


def _dispatch(command: str, arguments: list[str]) -> int:
    if command in OWN:
        return _own(command, arguments)
    match command:
        case "train":
            with Notice() as notice:  # before the slow imports
                return _train(*_from(*_experiment(arguments, "stdlib_tiny")), notice)
        case "parity":
            return _parity(*_experiment(arguments, "stdlib_tiny"))
        case "plan":
            return _plan(arguments)
        case "show":
            return _show(arguments)
        case "draw":
            return _draw(*_experiment(arguments, "stdlib_tiny"))
        case "bench":
            return _bench(*_experiment(arguments, "bench_small"))
        case "data":
            return _data(arguments)
        case "replay":
            return _replay(arguments)
        case "launch":
            return _launch(arguments)
        case "supervise":
            return _supervise(arguments)
        case "completion":
            from llmjax.commands.completion import completion

            return completion(arguments, COMMANDS, _dispatch)
        case "experiments" | "meshes":
            return _list(command, arguments)
    raise Refused(f"{command} is not a command: {did_you_mean(command, COMMANDS)}`llmjax --help` lists them.")


def _experiment(arguments: list[str], default: str) -> tuple["Run", list[str]]:
    """The experiment that the arguments begin with, or the default one, and the other arguments."""
    if arguments and not arguments[0].startswith("-"):
        run = load(arguments[0])
        if arguments[0].endswith(".json") and "--eval.tasks" not in arguments:
            run = _without_task_files(run, arguments[0])
        return run, arguments[1:]
    return load(default), arguments


def _without_task_files(run: "Run", source: str) -> "Run":
    """The run of a run.json, which may be another's, without what could run code that lies beside a task file."""
    if not any(name.endswith((".yaml", ".yml")) for name in run.eval.tasks):
        return run
    named = " ".join(run.eval.tasks)
    print(
        f"llmjax: {source} names task files, which may run code: add --eval.tasks {named} to ask them.", file=sys.stderr
    )
    return dataclasses.replace(run, eval=type(run.eval)())


def _from(run: "Run", arguments: list[str]) -> tuple["Run", list[str]]:
    """The experiment with the model, tokenizer and weights that `--from` names, and the other arguments."""
    if "--from" not in arguments:
        return run, arguments
    at = arguments.index("--from")
    if at + 1 == len(arguments):
        raise Refused("--from names nothing: give a run, or a folder with a Hugging Face checkpoint.")
    from llmjax.commands.imports import begin_from

    runs = arguments[arguments.index("--runs") + 1] if "--runs" in arguments[:-1] else run.runs
    return begin_from(run, arguments[at + 1], runs), arguments[:at] + arguments[at + 2 :]


def load(name: str) -> "Run":
    """The Run of an experiment; see `llmjax.run.load`."""
    from llmjax.run import load as of

    return of(name)


def parse(default: Asked, arguments: list[str], program: str, description: str | None = None) -> Asked:
    """The value of a dataclass with the command line's changes; ends the process on a usage error, as argparse does."""
    import tyro

    redact.hide(default)
    with _by_name():
        asked = tyro.cli(
            type(default),
            args=arguments,
            default=redact.masked(default) if {"-h", "--help"} & set(arguments) else default,
            prog=f"llmjax {program}",
            description=description,
            config=(tyro.conf.AvoidSubcommands, tyro.conf.SuppressFixed),  # what has no form as text is not shown
        )
    redact.hide(asked)
    return asked


def _by_name():
    """Meshes, layouts and trackers are given by name."""
    import tyro

    from llmjax import layout as layouts
    from llmjax import names, tracking
    from llmjax.mesh import Cluster

    registry = tyro.constructors.ConstructorRegistry()

    def named(kind: type, metavar: str, look_up: Callable[[str], Any], told: Callable[[Any], str] = lambda x: x.name):
        @registry.primitive_rule
        def rule(info: tyro.constructors.PrimitiveTypeInfo):
            if info.type not in (kind, kind | None):
                return None
            return tyro.constructors.PrimitiveConstructorSpec(
                nargs=1,
                metavar=metavar,
                instance_from_str=lambda given: look_up(given[0]),
                is_instance=lambda value: value is None or isinstance(value, kind),
                str_from_instance=lambda value: ["none" if value is None else told(value)],
            )

    named(Cluster, "NAME", lambda name: names.load("meshes", name, "cluster"))
    named(layouts.Layout, "{" + ",".join(layouts.KINDS) + "}[_...]", layouts.preset)
    named(tracking.Tracker, "NAME[:FIELD=VALUE,...]", tracking.named, tracking.told)
    return registry


def _train(run: "Run", arguments: list[str], notice: Notice) -> int:
    import tyro

    from llmjax.processes import Processes, Supervised
    from llmjax.run import Run

    @dataclasses.dataclass(frozen=True)
    class Train:
        run: Annotated[Run, tyro.conf.arg(name="")]
        processes: Processes = Processes()
        supervised: Supervised = Supervised()

    words = [word for word in arguments if word != REPORT]
    asked = parse(Train(run), words, f"train {run.name}", f"Trains, or continues, {run.name}.")
    named = dataclasses.replace(asked.run, name=asked.run.name or run.name)
    if REPORT in arguments:
        from llmjax.commands.data_report import report

        return report(named)
    from llmjax.commands.train import train

    try:
        return train(named, asked.processes, asked.supervised, notice)
    except TooFewDevices:  # the exit code is that of any other refusal
        if asked.supervised.heartbeat:
            from llmjax.commands.supervise import TOO_FEW

            Path(asked.supervised.heartbeat).with_suffix(TOO_FEW).touch()
        raise


def _bench(run: "Run", arguments: list[str]) -> int:
    from llmjax.commands.bench import Options, bench

    about = f"Times the train step of {run.name} on random tokens; writes nothing but --json."
    return bench(*_with_options(run, Options(), arguments, "bench", about))


def _plan(arguments: list[str]) -> int:
    from llmjax.commands.plan import Experiment, Options, plan

    word = arguments[0] if arguments and not arguments[0].startswith("-") else "stdlib_tiny"
    run, arguments = _experiment(arguments, word)
    about = f"Foresees whether {run.name} fits a cluster, what it sends, how fast it is, and which mesh is best."
    return plan(Experiment(word, run), *_with_options(run, Options(), arguments, "plan", about))


def _show(arguments: list[str]) -> int:
    from llmjax.commands.show import Options, show

    word = arguments[0] if arguments and not arguments[0].startswith("-") else "stdlib_tiny"
    before, arguments = _experiment(arguments, word)
    about = f"Shows every value of {before.name} and where it came from, and how large the run is."
    return show(word, before, arguments, *_with_options(before, Options(), arguments, "show", about))


def _draw(run: "Run", arguments: list[str]) -> int:
    from llmjax.commands.draw import Options, draw

    about = f"Writes a page that shows {run.name} on its mesh: chips, links, arrays, and a step in time."
    return draw(*_with_options(run, Options(), arguments, "draw", about))


def _parity(run: "Run", arguments: list[str]) -> int:
    from llmjax.commands.parity import Options, parity
    from llmjax.mesh import Axes

    about = f"Trains a few steps of {run.name}, made small, under many layouts and on one device, and compares."
    short = dataclasses.replace(run, steps=5, axes=Axes())
    return parity(*_with_options(short, Options(), arguments, "parity", about))


def _with_options(run: "Run", options: Any, arguments: list[str], command: str, about: str) -> tuple[Any, ...]:
    """(run, processes, options) with the command line's changes, for a command that has options besides the run's."""
    import tyro

    from llmjax.processes import Processes
    from llmjax.run import Run

    kind = type(options)

    @dataclasses.dataclass(frozen=True)
    class Asked:
        run: Annotated[Run, tyro.conf.arg(name="")]
        options: Annotated[kind, tyro.conf.arg(name="")]
        processes: Processes = Processes()

    asked = parse(Asked(run, options), arguments, f"{command} {run.name}", about)
    return asked.run, asked.processes, asked.options


def _own(command: str, arguments: list[str]) -> int:
    import tyro

    name, options, call = OWN[command]
    module = importlib.import_module(f"llmjax.commands.{name}")
    return getattr(module, call)(tyro.cli(getattr(module, options), args=arguments, prog=f"llmjax {command}"))


def _data(arguments: list[str]) -> int:
    import tyro

    from llmjax.commands import data

    kinds = {"build": (data.Options, data.data), "stats": (data.Stats, data.stats), "show": (data.Show, data.show)}
    word = arguments[0] if arguments else "nothing"
    if word not in kinds:
        near = did_you_mean(word, kinds)
        raise Refused(f"data got {word} to do: {near}give build, stats or show, then the folder of a store.")
    options, call = kinds[word]
    return call(tyro.cli(options, args=arguments[1:], prog=f"llmjax data {word}"))


def _replay(arguments: list[str]) -> int:
    from llmjax.commands.replay import Options, replay
    from llmjax.run import read
    from llmjax.rundir import find

    if not arguments or arguments[0].startswith("-"):
        raise Refused("replay needs the name of a run, or its directory, first: llmjax replay RUN --step N.")
    runs = arguments[arguments.index("--runs") + 1] if "--runs" in arguments[:-1] else "runs"
    folder = find(arguments[0], runs)
    run = dataclasses.replace(read(folder / "run.json"), runs=str(folder.parent), name=folder.name)
    about = f"Takes a step of {folder} again, from the checkpoint before it, and looks where it stops being finite."
    run, processes, asked = _with_options(run, Options(), arguments[1:], "replay", about)
    return replay(run, folder, processes, asked)


def _launch(arguments: list[str]) -> int:
    import tyro

    from llmjax.launch import launch

    @dataclasses.dataclass(frozen=True)
    class Launch:
        """Runs `llmjax train`, `parity` or `bench`, with its own options, on several processes of this machine.

        For example: llmjax launch --processes 2 --devices 4 train stdlib_tiny --layout fsdp
        """

        processes: int = 2
        "Number of processes; the first one has the terminal."
        devices: int = 4
        "Emulated CPU devices of each process."
        logs: str = "runs/.cache/logs"
        "Folder for the output of every process but the first."

    at = arguments.index("supervise") if "supervise" in arguments else len(arguments)  # its options are its own
    asked, rest = tyro.cli(Launch, args=arguments[:at], prog="llmjax launch", return_unknown_args=True)
    rest += arguments[at:]
    if not rest or rest[0] not in LAUNCHED:
        known = (*LAUNCHED, *(f"--{field.name}" for field in dataclasses.fields(Launch)))
        given, near = (rest[0], did_you_mean(rest[0], known)) if rest else ("nothing", "")
        raise Refused(f"launch got {given} to run: {near}give train, parity or bench, then options of that command.")
    return launch(asked.processes, asked.devices, rest, Path(asked.logs))


def _supervise(arguments: list[str]) -> int:
    import tyro

    from llmjax.commands.supervise import Options, spare_words, supervise

    at = next((i for i, word in enumerate(arguments) if word in ("--", "train", "launch")), len(arguments))
    asked = tyro.cli(Options, args=arguments[:at], prog="llmjax supervise")
    words = arguments[at + 1 :] if arguments[at : at + 1] == ["--"] else arguments[at:]
    if words[:1] != ["train"] and not (words[:1] == ["launch"] and "train" in words):
        near = did_you_mean(words[0], ("train", "launch")) if words and words[0] != "launch" else ""
        given = " ".join(words[:3]) or "nothing"
        raise Refused(f"supervise got {given} to run: {near}give train, or launch ... train, and their options.")
    spare = asked.fallback or asked.fallback_mesh
    return supervise(asked, words, spare_words(asked, words, _fallback_mesh(asked, words)) if spare else ())


def _fallback_mesh(asked: Any, words: list[str]) -> "Cluster":
    """The mesh that the supervisor's options, the run's own or the experiment name for when devices are lost."""
    from llmjax import names
    from llmjax.commands.supervise import option

    run, options = _experiment(words[words.index("train") + 1 :], "stdlib_tiny")
    if name := asked.fallback_mesh or option(options, "--fallback-mesh"):
        return names.load("meshes", name, "cluster")
    if run.fallback_mesh is None:
        raise Refused(f"{run.name} has no fallback_mesh: name a mesh to fall back to with --fallback-mesh.")
    return run.fallback_mesh


def _list(package: str, arguments: list[str]) -> int:
    from llmjax import names

    if arguments:
        raise Refused(f"`llmjax {package}` takes no arguments: leave out '{' '.join(arguments)}'.")
    found = names.names(package)
    for name, line in found.items():
        print(f"{name:<{max(map(len, found))}}  {line}")
    return DONE


if __name__ == "__main__":
    main()
