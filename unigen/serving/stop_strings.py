"""Stop strings, texts before which an answer ends, found in a text that is streamed piece by piece.

    words = StopStringFilter(("END",))
    words.feed("one E"), words.feed("ND two"), words.end()      # "one", "", ""

Does not depend on: engines, jobs, HTTP.
"""

from __future__ import annotations


class _StopStringMatcher:
    """Finds a stop string in a stream of characters, in constant time per character (Knuth, Morris and Pratt).

    Args:
        text: the stop string, with at least one character.
    """

    def __init__(self, text: str) -> None:
        self.text, self.begun = text, 0  # `begun`: characters of the stop string with which the stream ends
        self._failure_table = [0]  # for each prefix of the text: length of the longest other prefix that it ends with
        for character in text[1:]:
            self._failure_table.append(self._next(self._failure_table[-1], character))

    def feed(self, character: str) -> bool:
        """Add a character, and return whether the stream ends with the stop string."""
        if self.begun == len(self.text):
            self.begun = self._failure_table[-1]
        self.begun = self._next(self.begun, character)
        return self.begun == len(self.text)

    def _next(self, begun: int, character: str) -> int:
        while begun and self.text[begun] != character:
            begun = self._failure_table[begun - 1]
        return begun + (self.text[begun] == character)


class StopStringFilter:
    """Streams a text without blanks at its ends, and up to a stop string.

    What may be the beginning of a stop string, or blanks at the end, is held back until more text has come.

    Args:
        stops: the stop strings.
    """

    def __init__(self, stops: tuple[str, ...] = ()) -> None:
        self.stops = [_StopStringMatcher(stop) for stop in stops]
        self.pending_text, self.has_output, self.stopped = "", False, False

    def feed(self, piece: str) -> str:
        """Add a piece of text.

        Args:
            piece: of any length.

        Returns:
            The text that can be shown now; "" after a stop string.
        """
        if self.stopped:
            return ""
        if not self.pending_text and not self.has_output:
            piece = piece.lstrip()
        for i, character in enumerate(piece):
            match_lengths = [len(stop.text) for stop in self.stops if stop.feed(character)]
            if match_lengths:
                text = self.pending_text + piece[: i + 1]
                self.pending_text, self.stopped = text[: len(text) - max(match_lengths)], True
                return self.end()
        self.pending_text += piece
        match_length = max((stop.begun for stop in self.stops), default=0)
        text = self.pending_text[: len(self.pending_text) - match_length].rstrip()
        self.pending_text = self.pending_text[len(text) :]
        self.has_output |= bool(text)
        return text

    def end(self) -> str:
        """Return the text that was held back, at the end of a text, and start a new text."""
        text, self.pending_text, self.has_output = self.pending_text.rstrip(), "", False
        for stop in self.stops:
            stop.begun = 0
        return text
