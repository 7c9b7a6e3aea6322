"""Turn a stream of token ids into pieces of text that are safe to show at once.

A piece never ends inside a character whose bytes are spread over several tokens, and never holds
the beginning of a stop string that the next token may finish.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

_BROKEN = "\ufffd"  # what decoders give for bytes that are not, or not yet, a character


class TextDecoder:
    """Decodes token by token; the pieces joined are the text of all tokens.

    Bytes at the very end that are not yet a character are never shown: whoever asks for a few
    tokens wants the characters in them, not the beginning of one more.
    """

    def __init__(self, decode: Decode, context: Sequence[int]) -> None:
        """Decode what follows `context`, the last token or tokens of the prompt.

        Decoders of some tokenizers drop the space at the beginning of their input, so the first
        piece is only right when decoded after what it follows.
        """
        self._decode = decode
        self._window = list(context)
        self._shown = decode(self._window) if self._window else ""

    def push(self, token: int) -> str:
        """Return the text that this token completes; empty while a character is unfinished."""
        self._window.append(token)
        text = self._decode(self._window)
        whole = text.rstrip(_BROKEN)
        piece = whole[len(self._shown) :]
        if piece:
            self._shown = whole
            self._forget(token)
        return piece

    def _forget(self, token: int) -> None:
        # Keeps decoding linear. A token that is no text by itself stays with its neighbours:
        # some decoders judge a run of byte tokens as one.
        alone = self._decode([token])
        if alone and _BROKEN not in alone:
            self._window, self._shown = [token], alone


class StopFilter:
    """Passes text through until the first stop string, which it swallows."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Watch for `stops`; empty ones never match."""
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stop: str | None = None
        """The stop string that has been met; nothing passes any more."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been met."""
        return self.stop is not None

    def push(self, piece: str) -> str:
        """Return the part of the text so far that no stop string can claim."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            # the one that is complete first, so that it does not matter how the text is cut
            _, at, self.stop = min(found)
            self._held = ""
            return text[:at]
        keep = self._claimed(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return what was held back for a stop string that did not come."""
        text, self._held = self._held, ""
        return text

    def _claimed(self, text: str) -> int:
        """Return how many last characters are the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for n in range(min(longest, len(text)), 0, -1):
            tail = text[-n:]
            if any(stop.startswith(tail) for stop in self._stops):
                return n
        return 0


class IndentFilter:
    """Passes text through until a later line begins less far in than a block should."""

    def __init__(self, n_columns: int) -> None:
        """Let pass the first line, and those after it that are indented by `n_columns` at least."""
        self._n_columns = n_columns
        self._held: str | None = None  # white space at the beginning of a line; None: inside one
        self.stopped = False
        """Whether such a line has begun; nothing passes any more."""

    def push(self, piece: str) -> str:
        """Return the part of the text so far that no shallow line can begin with."""
        if self._n_columns <= 0:
            return piece
        passed = []
        for character in piece:
            if self.stopped:
                break
            if self._held is None:
                passed.append(character)
                self._held = "" if character == "\n" else None
            elif character in " \t":
                self._held += character
            elif len(self._held) < self._n_columns:
                self.stopped = True
            else:
                passed.append(self._held + character)
                self._held = "" if character == "\n" else None
        return "".join(passed)

    def finish(self) -> str:
        """Return what was held back for a line that never began."""
        text, self._held = self._held or "", None
        return "" if self.stopped else text
