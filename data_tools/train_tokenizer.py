"""Train the text tokenizer of a recipe on the recipe's own sentences, or on a text file.

    python data_tools/train_tokenizer.py FOLDER [--vocab-size 1024] [--sentences 20000] [--seed 0] [--text FILE]

Without --text the sentences are the rendered world's captions, questions, edits and stories; no font is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TextIO

from unigen.hub.folders import replacing_folder
from unigen.media.output import one_line_errors
from unigen.model.chat_template import SPECIAL_TOKENS, normalize_text
from unigen.tokenizers import text
from unigen.utils.argparser import OneLineParser
from unigen.utils.disk import check_folder
from unigen.utils.option_types import SEED, number_argument


def read_sentences(path: str | None, count: int, seed: int) -> Iterator[str]:
    """Lines as the model reads them: lower case, each opening with a space."""
    if path is None:
        from unigen.toyworld.stories import text_corpus

        lines: Iterator[str] = text_corpus(count, seed)
    else:
        try:
            file = open(path, encoding="utf-8-sig")
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        lines = _lines(file)
    return map(normalize_text, lines)


def _lines(file: TextIO) -> Iterator[str]:
    """The lines of an open file, one at a time, which is closed after the last."""
    with file:
        try:
            yield from file
        except UnicodeError as error:
            raise ValueError(f"{file.name} is not in UTF-8: convert it, or name another") from error
        except OSError as error:
            raise ValueError(f"cannot read {file.name}: {error.strerror}") from error


@one_line_errors
def main() -> int:
    parser = OneLineParser(description="Train a SentencePiece tokenizer and write it as a Hugging Face one.")
    parser.add_argument("folder")
    parser.add_argument("--vocab-size", type=number_argument(1, 1_000_000), default=1024)
    parser.add_argument("--sentences", type=number_argument(1, 10_000_000), default=20_000)
    parser.add_argument("--seed", type=SEED.parse, default=0)
    parser.add_argument("--text", metavar="FILE", help="one sentence a line, instead of the rendered world's")
    args = parser.parse_args()
    folder = check_folder(args.folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} is there and holds no tokenizer: choose another folder")
    lines = read_sentences(args.text, args.sentences, args.seed)
    with replacing_folder(folder) as scratch:
        text.train_tokenizer(lines, scratch, args.vocab_size, SPECIAL_TOKENS)
    print(f"wrote {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
