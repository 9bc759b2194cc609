"""What is secret, and how to write a text without it.

Secret are the values of environment variables whose names say so, user and password and token in a URL, and what a
dataclass field with `metadata={"secret": True}` holds. Each is written as ***.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from typing import Any

HIDDEN = "***"
_NAMES = re.compile(
    r"TOKEN|SECRET|PASSW(OR)?D|PASSPHRASE|CREDENTIAL|API_?KEY|(^|_)(KEY|AUTH|PASS)S?(_|$)|_PWD$", re.IGNORECASE
)
_USER = re.compile(r"(?<=://)[^/\s'\"@?#]+(?=@)")
_QUERY = re.compile(
    r"(?<=[?&;])((?:[\w.-]*(?:token|secret|password|passwd|credential|signature|api_?key)[\w.-]*|key|auth|sig|pass|pwd)=)"
    r"([^&;#\s'\"]+)",
    re.IGNORECASE,
)
_SHORT_NAMED, _SHORT = 4, 6  # shorter values are words, numbers and flags: without them no text could be read
_known: set[str] = set()  # what `hide` was told in this process


def urls(text: str) -> str:
    """The text without the user, password and tokens of its URLs; it depends on nothing else."""
    return _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(HIDDEN, text))


def text(given: str) -> str:
    """The text without anything secret that this process knows of."""
    given = urls(given)
    known = {form for value in _known | _environment() for form in _forms(value)}
    for value in sorted(known, key=len, reverse=True):
        given = given.replace(value, HIDDEN)
    return given


def tree(value: Any) -> Any:
    """A JSON value whose texts have nothing secret in them."""
    if isinstance(value, dict):
        return {text(name): tree(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [tree(inner) for inner in value]
    return text(value) if isinstance(value, str) else value


def masked(value: Any) -> Any:
    """A dataclass without secrets in its texts, to be shown and not used: in columns `text` finds only whole ones."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {field: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        new = {f.name: HIDDEN if is_secret(f) and isinstance(x, str) and x else masked(x) for f, x in held.items()}
        return dataclasses.replace(value, **new)
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(map(masked, value))
    return text(value) if isinstance(value, str) else value


def hide(value: Any) -> None:
    """From now on nothing that this dataclass holds as a secret is in a `text`."""
    _known.update(found for found in _secrets(value) if len(found) >= _SHORT_NAMED)


def is_secret(field: dataclasses.Field) -> bool:
    """Whether a field is marked so."""
    return bool(field.metadata.get("secret"))


def hidden(value: Any, path: str = "") -> Iterator[str]:
    """Dotted names of the fields that are written as ***, and so are not what they were."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from hidden(getattr(value, field.name), f"{path}.{field.name}" if path else field.name)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from hidden(inner, path)
    elif isinstance(value, str) and re.search(r"^\*{3}$|://\*{3}@|=\*{3}", value):  # *** elsewhere is a text's own
        yield path


class Stream:
    """A text stream whose lines have nothing secret in them; in all else it is the one that it was made of."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, given: str) -> int:
        self.stream.write(text(given))
        return len(given)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _forms(value: str) -> set[str]:
    """A secret as it is, and as Python and JSON show it where it has line ends, quotes or letters beyond ASCII."""
    return {value, repr(value)[1:-1], json.dumps(value)[1:-1]}


def _environment() -> set[str]:
    return {value for name, value in os.environ.items() if len(value) >= _SHORT and _NAMES.search(name)}


def _secrets(value: Any) -> Iterator[str]:
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            held = getattr(value, field.name)
            yield from [str(held)] if is_secret(field) and held is not None else _secrets(held)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _secrets(inner)
    elif isinstance(value, str):
        for user in _USER.findall(value):
            yield user.partition(":")[2]
        yield from (found for _, found in _QUERY.findall(value))
