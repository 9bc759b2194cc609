"""Text of tokens as they come."""

from collections.abc import Callable, Iterable, Iterator, Sequence

TORN = "\ufffd"  # what bytes that are no whole character are decoded to
BYTES = 3  # most of them that a character still waits for


def pieces(tokens: Iterable[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """The text of tokens piece by piece; a character whose bytes are not all there waits for them.

    All pieces together are the text of all tokens.
    """
    window, text, shown = [], "", 0  # tokens are decoded with the one before them, as some decoders drop a first blank
    for token in tokens:
        window.append(token)
        text = decode(window)
        torn = len(text) - len(text.rstrip(TORN))
        whole = len(text) - min(torn, BYTES)
        if whole > shown:
            yield text[shown:whole]
            shown = whole
        if not torn and text:
            window, text = [token], decode([token])
            shown = len(text)
    if text[shown:]:
        yield text[shown:]


def before(text: str, stop: Sequence[str]) -> str | None:
    """The text before the first of the strings that end it; None where there is none."""
    found = [at for one in stop if (at := text.find(one)) >= 0]
    return text[: min(found)] if found else None


def until(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """The pieces up to the first of the strings that end them; what may be its beginning waits."""
    held = ""
    for piece in pieces:
        held += piece
        if (last := before(held, stop)) is not None:
            if last:
                yield last
            return
        whole = len(held) - _begun(held, stop)
        if whole:
            yield held[:whole]
        held = held[whole:]
    if held:
        yield held


def _begun(text: str, stop: Sequence[str]) -> int:
    """How much of the text's end begins one of the strings."""
    return max((n for one in stop for n in range(1, min(len(one), len(text) + 1)) if text.endswith(one[:n])), default=0)
