"""Train the text tokenizer of a recipe on the recipe's own sentences, or on a text file.

    python data_tools/train_tokenizer.py FOLDER [--vocab-size 1024] [--sentences 20000] [--seed 0] [--text FILE]

Without --text the sentences are the rendered world's captions, questions, edits and stories; no font is needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from unigen.models.tiny import SPECIALS, spelt
from unigen.output import one_line_errors
from unigen.tokenizers import text


def sentences(path: str | None, count: int, seed: int) -> Iterator[str]:
    """Lines as the model reads them: lower case, each opening with a space."""
    if path is None:
        from unigen.data.stories import text_corpus

        lines: Iterator[str] = text_corpus(count, seed)
    else:
        try:
            lines = iter(open(path, encoding="utf-8"))  # noqa: SIM115  (read once, to its end)
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
    return map(spelt, lines)


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description="Train a SentencePiece tokenizer and write it as a Hugging Face one.")
    parser.add_argument("folder")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--sentences", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", metavar="FILE", help="one sentence a line, instead of the rendered world's")
    args = parser.parse_args()
    text.train(sentences(args.text, args.sentences, args.seed), args.folder, args.vocab_size, SPECIALS)
    print(f"wrote {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
