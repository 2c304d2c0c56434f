"""The text tokenizer: SentencePiece trained on the recipe's own text, used everywhere as a Hugging Face tokenizer.

    python data_tools/train_tokenizer.py folder --vocab-size 1024

Ids are exactly SentencePiece's and decoding gives the text back, because the model is trained without normalisation and
without a dummy prefix, and bytes stand for what the pieces lack (sentencepiece, Kudo and Richardson 2018).
This file refuses to know: images, templates, models.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"


def train(lines: Iterable[str], folder: str | Path, vocab_size: int, specials: tuple[str, ...]) -> None:
    """Train a unigram model of at most `vocab_size` pieces and write it as a Hugging Face tokenizer into `folder`.

    specials: symbols that are never split and never made from text pieces. Text with few words gives fewer pieces.
    Raises ValueError where SentencePiece refuses.
    """
    import sentencepiece
    from transformers import LlamaTokenizer

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            model_type="unigram",
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            character_coverage=1.0,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            user_defined_symbols=list(specials),
            minloglevel=2,
            num_threads=1,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"cannot train a text tokenizer of {vocab_size} pieces: {reason}") from error
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "tokenizer.model").write_bytes(model.getvalue())
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = LlamaTokenizer.from_pretrained(scratch, add_prefix_space=False, legacy=False)
    tokenizer.add_special_tokens({"pad_token": PAD, "additional_special_tokens": list(specials)})
    tokenizer.add_bos_token = False
    tokenizer.save_pretrained(folder)


def load(folder: str | Path) -> Any:
    """The Hugging Face tokenizer in `folder`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
