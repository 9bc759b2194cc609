"""Chat templates: a conversation as the one text that a model answers.

A Hugging Face folder keeps its template, a Jinja source, in chat_template.jinja or in tokenizer_config.json. Templates
come from whoever made the model, so they run in Jinja's sandbox, which is the extra `chat`.
"""

import contextlib
import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmjax import reading
from llmjax.data.tokenizer import end_of_text
from llmjax.data.tokenizer import load as load_tokenizer
from llmjax.errors import DATA, USAGE, Refused

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIG, GENERATION, ALONE, OLDER = (
    "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
LARGEST = 2**20  # bytes of a template: far more than any

DEFAULT = """\
{% for message in messages %}<|{{ message.role }}|>
{{ message.content }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""


@dataclasses.dataclass(frozen=True)
class Template:
    """How a conversation is written down."""

    text: str = DEFAULT
    "Jinja source."
    special: Mapping[str, str] = dataclasses.field(default_factory=dict)
    "Texts of special tokens by the names that the source has for them, such as eos_token."
    own: bool = False
    "Whether the folder had it; else it is the plain one that stands in where there is none."


def load(folder: Path) -> Template:
    """The template in a folder with a tokenizer's files or, if it has none, a plain one: turns end by the end of text.

    Raises:
      Refused: a file is not what its name says, or there is neither a template nor a tokenizer (code 65).
    """
    config = _json(folder / CONFIG)
    special = {name: text for name, of in config.items() if name.endswith("_token") and (text := _text(of))}
    found = _source(folder, config)
    if found is not None:
        return Template(found, special, own=True)
    if "eos_token" not in special:
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        special["eos_token"] = tokenizer.id_to_token(end_of_text(tokenizer))
    return Template(special=special)


def write(folder: Path, template: Template) -> None:
    """Puts a template into a folder, for `load` to find.

    Raises:
      OSError: it cannot be written.
    """
    (folder / ALONE).write_text(template.text, encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(dict(template.special), indent=1) + "\n", encoding="utf-8")


def render(template: Template, messages: Sequence[Mapping[str, str]], *, prompt: bool) -> str:
    """The text of a conversation of messages with a `role` and a `content`.

    With `prompt`, it goes on to where the assistant's next message begins.

    Raises:
      Refused: the template cannot be read, or does not take these messages (code 65).
    """
    source = _compiled(template.text)
    try:
        return source.render(
            messages=[dict(message) for message in messages], add_generation_prompt=prompt, tools=None, documents=None,
            **template.special,
        )  # fmt: skip
    except Exception as error:  # a template can fail in any way that a program can
        raise Refused(
            f"the chat template does not take these messages ({error}): give turns of user and assistant as it asks.",
            DATA,
        ) from error


def encode(tokenizer: "Tokenizer", text: str) -> list[int]:
    """Tokens of a rendered text, in which the names of special tokens mean these, and to which none is added."""
    tokenizer.encode_special_tokens, before = False, tokenizer.encode_special_tokens
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    finally:
        tokenizer.encode_special_tokens = before


def ends(folder: Path, tokenizer: "Tokenizer") -> tuple[int, ...]:
    """The tokens at which an answer ends: those that generation_config.json names, the template's, the end of text.

    Raises:
      Refused: the file is not what its name says, or there is no such token (code 65).
    """
    said = _json(folder / GENERATION).get("eos_token_id")
    found = [token for token in (said if isinstance(said, list) else [said]) if isinstance(token, int)]
    text = _text(_json(folder / CONFIG).get("eos_token"))
    if text and (token := tokenizer.token_to_id(text)) is not None:
        found.append(token)
    with contextlib.suppress(*(Refused,) if found else ()):
        found.append(end_of_text(tokenizer))
    return tuple(dict.fromkeys(found))


def _source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The Jinja source; of several, the one named default."""
    if (folder / ALONE).is_file():
        try:
            return reading.content(folder / ALONE, LARGEST, follow=True).decode()
        except (OSError, ValueError) as error:
            raise Refused(f"{folder / ALONE} cannot be read ({error}): download it again.", DATA) from error
    found = _json(folder / OLDER).get("chat_template", config.get("chat_template"))
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    if found is not None and not (isinstance(found, str) and len(found) <= LARGEST):
        raise Refused(f"chat_template in {folder / CONFIG} is no text: download it again.", DATA)
    return found


def _text(of: Any) -> str:
    """The text of a special token, which files give as it is or as an object with its content."""
    of = of.get("content") if isinstance(of, dict) else of
    return of if isinstance(of, str) else ""


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is none."""
    if not path.is_file():
        return {}
    try:
        found = reading.parsed(reading.content(path, reading.RECORD, follow=True))
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read ({error}): download it again.", DATA) from error
    return found if isinstance(found, dict) else {}


@functools.lru_cache(maxsize=8)
def _compiled(text: str):
    try:
        import jinja2
    except ImportError:
        raise Refused("chat templates need jinja2: pip install 'llmjax[chat]'.", USAGE) from None
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what an assistant says, for those who train on it; here its body is all."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def refuse(message):
        raise jinja2.exceptions.TemplateError(message)

    def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    # The settings and functions that templates are written for, as transformers' documentation lists them.
    world = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    world.filters["tojson"] = to_json
    world.globals["raise_exception"] = refuse
    world.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return world.from_string(text)
    except jinja2.exceptions.TemplateError as error:
        raise Refused(f"the chat template is not Jinja ({error}): download it again.", DATA) from error
