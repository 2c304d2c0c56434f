"""Text tokenizers: training with SentencePiece, loading and saving as Hugging Face tokenizers, and building prompts.

    python data_tools/train_tokenizer.py folder --vocab-size 1024

A trained tokenizer has exactly SentencePiece's ids, and decoding returns the text: the model is trained without
normalization and without a dummy prefix, and bytes encode what the pieces lack (sentencepiece, Kudo and Richardson
2018). Prompts keep a template's text apart from a user's. Does not depend on: what a template says, models.
"""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unigen.batch import Tokens
from unigen.hub.resolve import CONFIG, read_json
from unigen.hub.weights import silence_transformers
from unigen.options import DEFAULT_GENERATOR
from unigen.utils.files import save_json
from unigen.utils.text import first_line

if TYPE_CHECKING:
    from unigen.document import SegmentImage

TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"


def train_tokenizer(lines: Iterable[str], folder: str | Path, vocab_size: int, specials: tuple[str, ...]) -> None:
    """Train a unigram model, and write it as a Hugging Face tokenizer.

    Args:
        lines: the text.
        folder: where the files go.
        vocab_size: the most pieces; text with few words gives fewer.
        specials: symbols that are never split and never made of text pieces.

    Raises:
        ValueError: SentencePiece cannot train on this text; in one line.
        Exception: what iterating over `lines` raises.
    """
    import sentencepiece
    from transformers import LlamaTokenizer

    model = io.BytesIO()
    errors: list[Exception] = []

    def checked_lines() -> Iterator[str]:
        try:
            yield from lines
        except Exception as error:
            errors.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=checked_lines(),
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
        if errors:  # raised by `lines`; SentencePiece reports them as its own
            raise errors[0] from None
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"cannot train a text tokenizer of {vocab_size} pieces: {reason}") from error
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "tokenizer.model").write_bytes(model.getvalue())
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = LlamaTokenizer.from_pretrained(scratch, add_prefix_space=False, legacy=False)
    tokenizer.add_special_tokens({"pad_token": PAD, "additional_special_tokens": list(specials)})
    tokenizer.add_bos_token = False
    tokenizer.save_pretrained(folder)


def load(folder: str | Path, newlines: bool = True) -> Any:
    """Load a Hugging Face tokenizer.

    tokenizer.json is taken as it stands. The class that tokenizer_config.json names is not built: transformers gives
    that class its own pre-tokenizer and decoder, and public repositories name classes that are not their file's.

    Args:
        folder: has tokenizer.json and tokenizer_config.json, or the files of a tokenizer without the former.
        newlines: whether the tokenizer keeps newlines and runs of spaces; T5's does not.

    Returns:
        The tokenizer, a `PreTrainedTokenizerBase`.

    Raises:
        ValueError: the files are damaged, or decoding does not return a sentence as it was; in one line.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(folder)
    kind = PreTrainedTokenizerFast if (folder / TOKENIZER_FILE).is_file() else AutoTokenizer
    try:
        with silence_transformers():  # it warns of model types in config.json that it does not know
            tokenizer = kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers package raises plain Exception
        raise ValueError(f"the text tokenizer in {folder} cannot be loaded: {first_line(error)}") from error
    check_round_trip(tokenizer, folder, newlines)
    return tokenizer


class InferenceTokenizer:
    """The methods of `PreTrainedTokenizerFast` that inference calls, on the same two files.

    It imports the tokenizers package alone: importing transformers takes longer than generating a picture.
    """

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: has tokenizer.json and tokenizer_config.json.

        Raises:
            ValueError: the files are damaged, or decoding does not return a sentence as it was; in one line.
        """
        import tokenizers

        self.folder = folder
        self.chat_template: str | None = None
        self.settings = read_json(folder / TOKENIZER_CONFIG)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        except Exception as error:  # the tokenizers package raises plain Exception
            raise ValueError(f"the text tokenizer in {folder} cannot be loaded: {first_line(error)}") from error
        special_tokens = {
            name: self.settings.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        special = [token["content"] if isinstance(token, dict) else token for token in special_tokens.values()]
        self.bos_token_id, self.eos_token_id, self.pad_token_id, self.unk_token_id = (
            None if token is None else self._tokenizer.token_to_id(token) for token in special
        )
        extra_tokens = self.settings.get("extra_special_tokens") or self.settings.get("additional_special_tokens") or []
        ids = [
            self._tokenizer.token_to_id(token)
            for token in dict.fromkeys([*special, *extra_tokens])
            if token is not None
        ]
        self.all_special_ids = [id for id in dict.fromkeys(ids) if id is not None]
        check_round_trip(self, folder)

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each token, special tokens included."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Return the id of a token, or the ids of a list of tokens; an unknown token has `unk_token_id`."""
        if isinstance(tokens, str):
            id = self._tokenizer.token_to_id(tokens)
            return self.unk_token_id if id is None else id
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, id: int) -> str | None:
        """Return the token of an id, None where there is none."""
        token: str | None = self._tokenizer.id_to_token(id)
        return token

    def __call__(
        self, text: str, add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> dict[str, list[int]]:
        """Encode a text.

        Args:
            text: to be tokenized.
            add_special_tokens: add those of the start and the end, where the tokenizer has such a rule.
            split_special_tokens: take names of special tokens in the text as plain text.

        Returns:
            {"input_ids": the ids}.
        """
        self._tokenizer.encode_special_tokens = split_special_tokens
        return {"input_ids": self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(
        self, ids: Iterable[int], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """Return the text of ids.

        Args:
            ids: of tokens.
            skip_special_tokens: leave special tokens out.
            clean_up_tokenization_spaces: ignored; spaces are never changed.
        """
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer with its chat template, as transformers does."""
        tokenizer = load(self.folder)
        tokenizer.chat_template = self.chat_template
        tokenizer.save_pretrained(folder)


ROUND_TRIP_SENTENCE = "Say 12 or 345:\n\n  a red apple, two dogs."
"""A text that encoding and decoding have to return."""


def check_round_trip(tokenizer: Any, source: str | Path, newlines: bool = True) -> None:
    """Check that encoding and decoding return a sentence with spaces, newlines and digits.

    Letters, digits and marks that a small vocabulary does not have are left out of the sentence.

    Args:
        tokenizer: a Hugging Face tokenizer, or an `InferenceTokenizer`.
        source: where it is from, for the message.
        newlines: whether the tokenizer keeps newlines and runs of spaces.

    Raises:
        ValueError: the sentence is not returned as it was; in one line.
    """

    def is_known(letter: str) -> bool:
        ids = tokenizer(letter, add_special_tokens=False)["input_ids"]
        return letter.isspace() or tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids

    sentence = "".join(letter for letter in ROUND_TRIP_SENTENCE if is_known(letter))
    sentence = (sentence if newlines else " ".join(sentence.split())).strip()
    ids = tokenizer(sentence, add_special_tokens=False)["input_ids"]
    decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if not sentence or decoded.strip() != sentence:
        raise ValueError(
            f"{source}: the text tokenizer gives {sentence!r} back as {decoded!r}, so prompts would be misread"
        )


def save(tokenizer: Any, folder: str | Path) -> None:
    """Write a tokenizer so that transformers 4 and 5 read tokenizer.json as it stands.

    Args:
        tokenizer: a Hugging Face tokenizer, or an `InferenceTokenizer`.
        folder: where the files go.
    """
    tokenizer.save_pretrained(folder)
    path = Path(folder) / TOKENIZER_CONFIG
    settings = read_json(path)
    if settings.get("tokenizer_class") == "TokenizersBackend":  # a name that transformers 4 does not know
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    dropped_keys = ("is_local", "local_files_only")
    save_json(path, {name: value for name, value in settings.items() if name not in dropped_keys})


def load_from_model(folder: Path, newlines: bool = True) -> Any:
    """Load the tokenizer of a model's folder, as `load` does, after a check of its JSON files.

    With damaged files transformers would raise errors of its own, or make a tokenizer without words.

    Args:
        folder: has config.json, tokenizer.json and tokenizer_config.json.
        newlines: as in `load`.

    Returns:
        The tokenizer.

    Raises:
        ValueError: a file is missing or damaged; in one line.
    """
    for name in (CONFIG, TOKENIZER_FILE, TOKENIZER_CONFIG):
        read_json(folder / name)
    return load(folder, newlines)


class PromptBuilder:
    """Builds the ids of a prompt.

    In a template's text the names of special tokens are these tokens; in a user's text they are plain text. Text
    between two special tokens is tokenized as a whole, also where a template's and a user's text meet.

    Args:
        tokenizer: of the model.
        names: the special tokens that the template uses; None: all that the tokenizer has.
    """

    def __init__(self, tokenizer: Any, names: Iterable[str] | None = None) -> None:
        self.tokenizer = tokenizer
        self._tokens = Tokens()
        self._text, self._loss = "", False
        names = tokenizer.get_added_vocab() if names is None else names
        names = sorted((name for name in names if name.strip()), key=len, reverse=True)
        self._names = set(names)
        self._special = re.compile(f"({'|'.join(map(re.escape, names))})" if names else "(?!)")

    def add_template_text(self, text: str, loss: bool = False) -> PromptBuilder:
        """Add text of the template.

        Args:
            text: in which names of special tokens are these tokens.
            loss: whether the model learns to predict it.

        Returns:
            The builder.
        """
        for number, piece in enumerate(self._special.split(text)):
            if number % 2:
                self.add_ids([self.tokenizer.convert_tokens_to_ids(piece)], loss)
            else:
                self.add_user_text(piece, loss)
        return self

    def add_user_text(self, text: str, loss: bool = False) -> PromptBuilder:
        """Add text of a user.

        Args:
            text: in which names of special tokens are plain text.
            loss: whether the model learns to predict it.

        Returns:
            The builder.
        """
        if text:
            if self._text and self._loss != loss:
                self._flush()
            self._text, self._loss = self._text + text, loss
        return self

    def add_ids(self, ids: list[int], loss: bool = False) -> PromptBuilder:
        """Add ids as they are.

        Args:
            ids: of tokens.
            loss: whether the model learns to predict them.

        Returns:
            The builder.
        """
        self._flush()
        self._tokens.add(ids, loss)
        return self

    def add_image(
        self, image: SegmentImage, length: int, loss: bool = False, handler: str = DEFAULT_GENERATOR
    ) -> PromptBuilder:
        """Add the positions of an image.

        Args:
            image: pixels or codes.
            length: positions that it takes.
            loss: whether the model learns to predict it.
            handler: the generator of the image, or the reader of it.

        Returns:
            The builder.
        """
        self._flush()
        self._tokens.add_image(image, length, loss, handler)
        return self

    def build(self) -> Tokens:
        """Return all that was added."""
        self._flush()
        return self._tokens

    def _flush(self) -> None:
        # The name of a special token that is left in the text is a user's. Split after its first letter it is plain
        # text, also with a tokenizer that would not split it.
        for piece in self._special.sub(lambda match: f"{match[0][0]}\0{match[0][1:]}", self._text).split("\0"):
            if piece:
                piece_ids = self.tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
                self._tokens.add(piece_ids, self._loss)
        self._text = ""


def merge_system_message(messages: list[dict[str, Any]], render: Callable[[Any], str]) -> list[dict[str, Any]]:
    """Put a system message that a chat template has no place for at the beginning of the user's first message.

    Args:
        messages: of which the first may be of the role system; their contents are texts, or lists of parts.
        render: applies the chat template to messages.

    Returns:
        Messages that the chat template takes.
    """
    first, *other_messages = messages
    if first["role"] != "system" or not other_messages:
        return messages
    content = first["content"]
    system_text = content if isinstance(content, str) else content[0]["text"]
    if system_text in (rendered := _render_or_empty(render, messages)) and rendered != _render_or_empty(
        render, [first | {"role": "user"}, *other_messages]
    ):
        return messages
    if other_messages[0]["role"] != "user":
        return [first | {"role": "user"}, *other_messages]
    merged_content = (
        f"{system_text}\n\n{other_messages[0]['content']}"
        if isinstance(content, str)
        else [*content, *other_messages[0]["content"]]
    )
    return [other_messages[0] | {"content": merged_content}, *other_messages[1:]]


def _render_or_empty(render: Callable[[Any], str], messages: list[dict[str, Any]]) -> str:
    """Render messages; "" where the template refuses their roles."""
    from jinja2 import TemplateError

    try:
        return render(messages)
    except TemplateError:
        return ""
