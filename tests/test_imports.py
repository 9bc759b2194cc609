"""Imports point one way, as the house is drawn."""

import ast
import functools
import graphlib
from pathlib import Path

import llmjax

ROOT = Path(llmjax.__path__[0])

# A file imports from rooms above its own line and from its own room, never from beside or below.
ORDER = (
    ("errors", "hardware", "leash", "redact", "reading"),
    ("allocator", "names", "notice", "launch", "mesh", "rollcall", "rundir"),
    ("layout", "tracking"),
    ("trackers",),
    ("run", "processes"),
    ("checks", "changes"),
    ("models", "optim", "data", "checkpoint"),
    ("interop",),
    ("train",),
    ("plan",),
    ("bench", "evaluate", "report"),
    ("commands",),  # each puts the rooms above together
    ("cli",),
)
LINE = {room: line for line, rooms in enumerate(ORDER) for room in rooms}


def files() -> dict[str, Path]:
    """Every module below llmjax, by its dotted name without the "llmjax."."""
    found = (path for path in ROOT.rglob("*.py") if path.name != "__init__.py")
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in found}


def imported(path: Path) -> set[str]:
    """Dotted names of all that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by relative name"
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


@functools.cache
def edges() -> dict[str, set[str]]:
    """For every module of llmjax, the modules of llmjax that it imports."""
    modules = files()
    words = {name: {word.removeprefix("llmjax.") for word in imported(path)} for name, path in modules.items()}
    return {name: found & set(modules) for name, found in words.items()}


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_file_has_a_room():
    assert {room(module) for module in files()} <= set(LINE)


def test_no_import_points_back():
    back = [
        f"{module} imports {other}"
        for module, others in edges().items()
        for other in others
        if room(module) != room(other) and LINE[room(module)] <= LINE[room(other)]
    ]
    assert not back


def test_no_two_files_import_each_other():
    order = list(graphlib.TopologicalSorter(edges()).static_order())  # raises CycleError and names the cycle
    assert order.index("errors") < order.index("train.loop") < order.index("cli")


def test_the_library_imports_no_experiment_and_no_mesh():
    for path in ROOT.rglob("*.py"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"experiments", "meshes"}, path


def test_models_know_nothing_of_training():
    for module, others in edges().items():
        if module.startswith("models."):
            assert {room(other) for other in others} <= {"models", "layout", "errors"}, module
