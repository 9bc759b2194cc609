"""Names on the command line: modules of a package, found without importing them, and the value each one holds."""

import ast
import importlib
import importlib.util
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

from llmjax.errors import Refused, did_you_mean


def names(package: str) -> dict[str, str]:
    """Each public module of a package with the first line of its docstring, in alphabetical order.

    Nothing is imported: listing stays quick however heavy the modules are, and a broken one can still be named.
    `chips` holds facts, not a choice, and is left out.
    """
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = {}
    for module in sorted(pkgutil.iter_modules(folders), key=lambda module: module.name):
        if module.ispkg or module.name.startswith("_") or module.name == "chips":
            continue
        found[module.name] = _first_line(Path(module.module_finder.path) / f"{module.name}.py")
    return found


def load(package: str, name: str, attribute: str) -> Any:
    """The value called `attribute` in the package's module `name`.

    Raises:
      Refused: there is no such module (the nearest name is given), or it does not define `attribute`.
    """
    known = names(package)
    if name not in known:
        noun = package.removesuffix("es") if package.endswith("shes") else package.removesuffix("s")
        raise Refused(
            f"there is no {noun} named '{name}': {did_you_mean(name, known)}`llmjax {package}` lists what there is."
        )
    return _value(importlib.import_module(f"{package}.{name}"), attribute, f"{package}/{name}.py")


def load_file(path: str | Path, attribute: str) -> Any:
    """The value called `attribute` in a Python file.

    Raises:
      Refused: the file does not exist, is not Python, or does not define `attribute`.
    """
    path = Path(path)
    if path.suffix != ".py" or not path.is_file():
        problem = "is not a .py file" if path.exists() else "does not exist"
        raise Refused(f"{path} {problem}: give the path of a Python file that defines `{attribute}`.")
    module_name = f"llmjax_file_{path.stem}"  # a prefix, so that a file named json.py hides nothing
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return _value(module, attribute, str(path))


def check_run(name: str) -> None:
    """Refuses a name of a run that is not, on every system, the name of one folder inside the folder of runs.

    Raises:
      Refused: naming what would do.
    """
    shown = repr(name if len(name) <= 60 else f"{name[:60]}...")
    remedy = "give --name up to 100 letters (a-z), digits, and . _ - between them."
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?", name):
        raise Refused(f"name is {shown}, which cannot be the name of a run's folder: {remedy}")
    if re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name):
        raise Refused(f"name is {shown}, which Windows keeps for a device: {remedy}")


def _first_line(path: Path) -> str:
    try:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    except (SyntaxError, UnicodeDecodeError):
        return ""
    return docstring.splitlines()[0] if docstring else ""


def _value(module: Any, attribute: str, shown: str) -> Any:
    if not hasattr(module, attribute):
        raise Refused(f"{shown} does not define `{attribute}`: add `{attribute} = ...` to it.")
    return getattr(module, attribute)
