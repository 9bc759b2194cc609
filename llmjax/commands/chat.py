"""`llmjax chat`: a conversation with a run, turn by turn, in the terminal or through a pipe."""

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import tyro

from llmjax.commands.generate import ends_of, loaded
from llmjax.commands.origin import origin_of
from llmjax.data import chat as templates
from llmjax.data.chat import Template
from llmjax.errors import DONE, Refused
from llmjax.evaluate.conversation import Conversation
from llmjax.evaluate.generate import Sampling, check
from llmjax.evaluate.streaming import pieces, until
from llmjax.train.display import Display

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Messages = list[dict[str, str]]
HELP = "/reset begins anew, /exit ends, Ctrl-C stops an answer."


@dataclasses.dataclass(frozen=True)
class Chat:
    """Talks with a run: each line is a turn; /reset begins anew, /exit ends, Ctrl-C stops an answer."""

    run: tyro.conf.Positional[str]
    "Name of a run, or the path of its directory."
    system: str = ""
    "Message of the system before the first turn."
    stop: tuple[str, ...] = ()
    "Strings before which an answer ends, besides the model's own."
    context: int = 0
    "Most tokens of a conversation; 0: of a sequence that the run trains with."
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling(tokens=512, temperature=0.7, top_p=0.9)
    step: int = -1
    "Checkpoint to use; -1: the newest."
    mesh: str = "local"
    "Where to run: a name that `llmjax meshes` lists."
    runs: str = "runs"
    "Folder that holds run directories."


@dataclasses.dataclass(frozen=True)
class Speaker:
    """What answers."""

    asked: Chat
    template: Template
    tokenizer: "Tokenizer"
    ends: tuple[int, ...]
    display: Display

    def begin(self) -> Messages:
        """The messages before the first turn."""
        return [dict(role="system", content=self.asked.system)] if self.asked.system else []

    def tokens(self, messages: Messages) -> list[int]:
        """The text up to where the answer begins."""
        return templates.encode(self.tokenizer, templates.render(self.template, messages, prompt=True))


def chat(asked: Chat) -> int:
    """Reads turns until the end of input; returns an exit code.

    Raises:
      Refused: the run cannot talk, or its template takes no conversation.
    """
    check(asked.sampling)
    if asked.context < 0 or not all(asked.stop):
        raise Refused(f"context is {asked.context} and stop {asked.stop}: give a positive number, and texts.")
    with loaded(asked.run, asked.runs, asked.step, asked.mesh) as (run, home, tokenizer, model):
        if asked.context > run.model.positions:
            raise Refused(f"context is {asked.context}, and the model has {run.model.positions} positions: give less.")
        origin = origin_of(run, home) or home
        speaker = Speaker(asked, templates.load(origin), tokenizer, ends_of(run, home, tokenizer), Display())
        speaker.tokens([*speaker.begin(), dict(role="user", content="Hello")])  # a template that fails does so now
        positions = asked.context or min(run.sequence, run.model.positions)
        own = "its own" if speaker.template.own else "a plain"
        speaker.display.say(f"{home}, {positions:,} tokens of context, {own} chat template. {HELP}")
        talk(speaker, Conversation(model, positions))
    return DONE


def talk(speaker: Speaker, conversation: Conversation) -> None:
    """Turn after turn."""
    messages = speaker.begin()
    while (line := asked_for(speaker.display)) not in (None, "/exit"):
        if line == "/reset":
            messages = speaker.begin()
            speaker.display.say("The conversation begins anew.")
            continue
        if line.startswith("/"):
            speaker.display.say(f"{line.split()[0]} is no command: {HELP}")
            continue
        if not line.strip():
            continue
        turn = dict(role="user", content=line)
        if (fitting := room_for(speaker, [*messages, turn], conversation.positions)) is None:
            continue
        messages, tokens = fitting
        conversation.read(tokens)
        messages.append(dict(role="assistant", content=answer(speaker, conversation, len(messages))))


def asked_for(display: Display) -> str | None:
    """The next line; None at the end of input."""
    try:
        if sys.stdin.isatty():
            return input("> ")
        line = sys.stdin.readline()
        if line:
            display.say(f"> {line.rstrip()}")
        return line.rstrip("\n") if line else None
    except (EOFError, KeyboardInterrupt):
        display.say()
        return None
    except UnicodeDecodeError as error:
        raise Refused(f"the input is not UTF-8 ({error.reason} at byte {error.start}): give text in UTF-8.") from None


def room_for(speaker: Speaker, messages: Messages, positions: int) -> tuple[Messages, list[int]] | None:
    """(messages, their tokens) that leave room for an answer, without the oldest turns if need be; None: none do."""
    first, dropped = len(speaker.begin()), 0
    enough = positions - min(speaker.asked.sampling.tokens, positions // 4)
    while len(tokens := speaker.tokens(messages)) > enough and len(messages) > first + 1:
        messages = messages[:first] + messages[first + 2 :]  # what was asked, and the answer
        dropped += 1
    if len(tokens) > enough:
        speaker.display.say(
            f"This message makes {len(tokens):,} tokens and leaves no room for an answer in a context of "
            f"{positions:,}: shorten it, or give a larger --context."
        )
        return None
    if dropped:
        turns = "turn is" if dropped == 1 else f"{dropped} turns are"
        speaker.display.say(f"The context is full: the oldest {turns} forgotten.")
    return messages, tokens


def answer(speaker: Speaker, conversation: Conversation, turn: int) -> str:
    """The answer, which appears as it is made."""
    how = dataclasses.replace(speaker.asked.sampling, seed=speaker.asked.sampling.seed + turn)
    said, display = [], speaker.display
    with interruptible() as stopped:
        tokens = conversation.answer(how, speaker.ends)
        display.flow("  ")
        for piece in until(pieces(tokens, speaker.tokenizer.decode), speaker.asked.stop):
            said.append(piece)
            display.flow(piece, style="cyan")
            if stopped:
                display.flow(" (stopped)")
                break
    display.say()
    if len(conversation.tokens) >= conversation.positions:
        display.say("The context is full: the answer ends here.")
    return "".join(said)


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Ctrl-C puts a number into this list, and so stops between two tokens, never inside one."""
    stopped: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: stopped.append(number))
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
