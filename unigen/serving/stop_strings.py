"""Texts before which an answer ends, found in a text that comes piece by piece.

    words = StopStringFilter(("END",))
    words.feed("one E"), words.feed("ND two"), words.end()      # "one", "", ""

Does not depend on: engines, jobs, HTTP.
"""

from __future__ import annotations


class _StopStringMatcher:
    """Finds a text in another that comes character by character, in steps as many as characters, however long it is
    (Knuth, Morris and Pratt). begun: how many of its characters the other ends with."""

    def __init__(self, text: str) -> None:
        self.text, self.begun = text, 0
        self._failure_table = [0]  # for each begin of the text, but the empty one: the longest one that it ends with
        for character in text[1:]:
            self._failure_table.append(self._next(self._failure_table[-1], character))

    def feed(self, character: str) -> bool:
        """Is it whole with this character?"""
        if self.begun == len(self.text):
            self.begun = self._failure_table[-1]
        self.begun = self._next(self.begun, character)
        return self.begun == len(self.text)

    def _next(self, begun: int, character: str) -> int:
        while begun and self.text[begun] != character:
            begun = self._failure_table[begun - 1]
        return begun + (self.text[begun] == character)


class StopStringFilter:
    """A text as it is shown: without blanks at its ends, and without what follows a stop.

    What may yet turn out to be the begin of a stop, or blanks at the end, is held back until more is known."""

    def __init__(self, stops: tuple[str, ...] = ()) -> None:
        self.stops = [_StopStringMatcher(stop) for stop in stops]
        self.held, self.shown, self.stopped = "", False, False

    def feed(self, piece: str) -> str:
        """What of the text is sure to be shown now; nothing more after a stop."""
        if self.stopped:
            return ""
        if not self.held and not self.shown:
            piece = piece.lstrip()
        for i, character in enumerate(piece):
            match_lengths = [len(stop.text) for stop in self.stops if stop.feed(character)]
            if match_lengths:
                text = self.held + piece[: i + 1]
                self.held, self.stopped = text[: len(text) - max(match_lengths)], True
                return self.end()
        self.held += piece
        match_length = max((stop.begun for stop in self.stops), default=0)
        said = self.held[: len(self.held) - match_length].rstrip()
        self.held = self.held[len(said) :]
        self.shown |= bool(said)
        return said

    def end(self) -> str:
        """What is left when the text ends."""
        said, self.held, self.shown = self.held.rstrip(), "", False
        for stop in self.stops:
            stop.begun = 0
        return said
