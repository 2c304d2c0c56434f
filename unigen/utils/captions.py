"""Prompts in the form of cleaned web captions, on which text-to-image models were trained.

Does not depend on: tokenizers, models.
"""

from __future__ import annotations

import re
from urllib.parse import unquote_plus

_DOMAIN_SUFFIX = r"(?:[\w-]+\.)*(?:com|co|ru|net|org|edu|gov|it|png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
"""What follows a dot in a web address or the name of a file."""
_PUNCTUATION_RULES = (
    (r"[-\u2010-\u2015]+", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~(){}|\\/*\[\]]+", " "),
    (r"\s+\.\s+", " "),
)
_SPACE_RULES = (
    (r"\b\s+:\s+", ": "),
    (rf"(\D(?:,|\.(?!{_DOMAIN_SUFFIX}\b)))\b", r"\1 "),
    (r"\s+", " "),
)
_EDGE_RULES = (
    (r"^[\"'](.+)[\"']$", r"\1"),
    (r"^['_,:;-]", ""),
    (r"['_,:+-]$", ""),
)
"""Pairs of a pattern and its replacement, applied in the order of the three tables. They are the rules of training for
what occurs in prompts. Between the first two tables, hyphens become spaces where there are more than three."""


def clean_caption(words: str) -> str:
    """A prompt as captions were in training.

    The result is in lower case, typographic marks are plain, other marks are dropped, and plus signs are spaces.
    Training removed more, which stays here with its marks made plain like all others: addresses and names of files and
    people (x.com, a.png, @me), numbers of articles and pages, sizes (3x4), names like r2d2, words of shops (free
    shipping), and Chinese characters. Entities (&amp;) and damaged letters are not repaired.

    Args:
        words: a prompt.
    """
    for _ in range(2):  # training applied the rules twice
        words = unquote_plus(words).strip().lower()
        for pattern, replacement in _PUNCTUATION_RULES:
            words = re.sub(pattern, replacement, words)
        if len(re.findall(r"[-_]", words)) > 3:
            words = re.sub(r"[-_]", " ", words)
        words = words.strip()
        for pattern, replacement in (*_SPACE_RULES, *_EDGE_RULES):
            words = re.sub(pattern, replacement, words)
        words = words.strip()
    return words
