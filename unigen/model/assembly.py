"""Models put together from parts: a language model of transformers, tokenizers and generators.

    model = build_from_config(LlamaConfig(...), text_tokenizer, image_tokenizer)      # random weights
    model = extend_vocabulary(lm, text_tokenizer, image_tokenizer)                    # a pretrained language model
    model = add_generators(model, ["flow"], [head])                                   # further ways of writing pictures

Each has the chat template of `unigen.model.chat_template`, and is saved and loaded as one of the family FAMILY.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unigen.batch import Vocabulary
from unigen.generators.base import BuildContext, Generator
from unigen.generators.build import build_generator
from unigen.generators.next_token import Text
from unigen.model.chat_template import CHAT_TEMPLATE, CONTEXT_GENERATOR, MASK, SPECIAL_TOKENS, ChatTemplate
from unigen.model.generators import GeneratorDict
from unigen.model.unified import UnifiedModel
from unigen.nn.backbone import Backbone
from unigen.tokenizers import ImageTokenizer
from unigen.tokenizers import text as text_tokenizers

FAMILY = "tiny"
"""What unigen.json names: the module of `unigen.models` that loads a saved model of these parts."""


def build_model(
    lm: Any,
    tokenizer: Any,
    image_tokenizer: ImageTokenizer,
    text_size: int,
    generator_names: Sequence[str] = (CONTEXT_GENERATOR,),
    heads: Sequence[Any] = (),
    begin_tokens: Mapping[str, str] | None = None,
    classes: Sequence[str] = (),
    factories: Mapping[str, Callable[[], Any]] | None = None,
) -> UnifiedModel:
    """A model of given parts.

    Args:
        lm: a causal language model. Its table holds `text_size` rows, then one for each image code.
        tokenizer: its text tokenizer, with the special tokens of the chat template.
        image_tokenizer: turns pictures into codes, one code for each place of a grid.
        text_size: rows of the table that are pieces of text.
        generator_names: the generators of pictures that the model has learnt, or shall learn.
        heads: those of them that exist already, because they have weights or an image tokenizer of their own.
        begin_tokens: by generator, the begin tokens that are given to generators already.
        classes: names of the classes that the model draws, where it draws classes and not words.
        factories: by name, what makes generators when they are first used. Their pictures take no positions.

    Raises:
        ValueError: the parts do not fit each other; the message says which.
    """
    vocabulary = Vocabulary(text_size, codebook_size(image_tokenizer))
    _check_sizes(lm, vocabulary, image_tokenizer, heads)
    tokenizer.chat_template = CHAT_TEMPLATE
    context, heads_by_name = build_context(lm, tokenizer, image_tokenizer), {head.name: head for head in heads}
    names, factories = dict.fromkeys([*generator_names, *heads_by_name]), factories or {}
    built: dict[str, Generator] = {
        name: heads_by_name[name] if name in heads_by_name else build_generator(name, context)
        for name in names
        if name not in factories
    }
    image_lengths = {name: built[name].num_positions() if name in built else 0 for name in names}
    text_lengths = {name: generator.text_length for name, generator in built.items() if generator.text_length}
    template = ChatTemplate(tokenizer, image_lengths, begin_tokens, classes, text_lengths)
    text: Generator = Text(sorted({*tokenizer.all_special_ids, *template.special_ids.values()}))
    ordered = GeneratorDict({text.name: text} | {name: built.get(name) for name in names}, factories)
    return UnifiedModel(FAMILY, Backbone(lm), vocabulary, tokenizer, image_tokenizer, template, ordered)


def _check_sizes(lm: Any, vocabulary: Vocabulary, image_tokenizer: ImageTokenizer, heads: Sequence[Any]) -> None:
    """Raise ValueError where the table has other rows than the vocabulary, or a head draws pictures of another size."""
    rows = lm.get_input_embeddings().weight.shape[0]
    if rows != vocabulary.size:
        raise ValueError(
            f"the language model has {rows} rows, but text ({vocabulary.text_size}) and image codes "
            f"({vocabulary.image_size}) need {vocabulary.size}"
        )
    for head in heads:
        if head.tokenizer is not None and head.tokenizer.image_size != image_tokenizer.image_size:
            sizes = f"{head.tokenizer.image_size} pixels, the model's {image_tokenizer.image_size}"
            raise ValueError(f"the tokenizer of {head.name} is for pictures of {sizes}: train one for that size")


def codebook_size(image_tokenizer: Any) -> int:
    """How many codes the tokenizer has by which a model reads pictures.

    Raises:
        ValueError: it has not one code for each place of a picture.
    """
    if not hasattr(image_tokenizer, "codebook_size") or hasattr(getattr(image_tokenizer, "quantizer", None), "scales"):
        raise ValueError("pictures are read by one code a place: image_tokenizer must be of kind vq, of one scale")
    return int(image_tokenizer.codebook_size)


def build_context(lm: Any, tokenizer: Any, image_tokenizer: ImageTokenizer) -> BuildContext:
    """The sizes and ids that generators of a model of these parts are built with."""
    width = int(lm.config.get_text_config().hidden_size)
    known = tokenizer.convert_tokens_to_ids([name for name in SPECIAL_TOKENS if name in tokenizer.get_vocab()])
    special_ids = tuple(sorted({*tokenizer.all_special_ids, *known} - {tokenizer.eos_token_id}))
    return BuildContext(image_tokenizer.grid, tokenizer.convert_tokens_to_ids(MASK), width, special_ids=special_ids)


def build_from_config(
    lm_config: Any,
    tokenizer: Any,
    image_tokenizer: ImageTokenizer,
    generator_names: Sequence[str] = (CONTEXT_GENERATOR,),
    heads: Sequence[Any] = (),
    classes: Sequence[str] = (),
) -> UnifiedModel:
    """A new model with random weights: seed torch first.

    Args:
        lm_config: any decoder-only config of transformers. Its vocabulary and special ids are set here.
        tokenizer: see `build_model`, as are the others.
    """
    from transformers import AutoModelForCausalLM

    lm_config.vocab_size = len(tokenizer) + codebook_size(image_tokenizer)
    lm_config.pad_token_id, lm_config.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    lm_config.eos_token_id = tokenizer.eos_token_id
    lm = AutoModelForCausalLM.from_config(lm_config, attn_implementation="sdpa")
    return build_model(lm, tokenizer, image_tokenizer, len(tokenizer), generator_names, heads, classes=classes)


def add_generators(model: UnifiedModel, generator_names: Sequence[str], heads: Sequence[Any] = ()) -> UnifiedModel:
    """A model of the same parts that has further generators, untrained. Parts are shared, not copied.

    Args:
        model: stays as it is.
        generator_names: those that are added; ones that it has already may be among them.
        heads: those of them that exist already, because they have weights.
    """
    parts = model.backbone.lm, model.text_tokenizer, model.image_tokenizer, model.vocabulary.text_size
    names = [name for name in dict.fromkeys([*model.generators, *generator_names]) if name != Text.name]
    built = dict(model.heads) | {head.name: head for head in heads}
    extended_model = build_model(*parts, names, list(built.values()), model.begin_tokens(), model.template.classes)
    extended_model.default_sampling = dict(model.default_sampling)
    return extended_model


def extend_vocabulary(lm: Any, tokenizer: Any, image_tokenizer: ImageTokenizer) -> UnifiedModel:
    """A pretrained language model and its tokenizer, grown by special tokens and image codes (Liquid's layout).

    New rows start as draws around the mean of the old ones (`mean_resizing`). The language model and the tokenizer
    are changed in place.
    """
    missing = {"bos_token": text_tokenizers.BOS, "eos_token": text_tokenizers.EOS, "pad_token": text_tokenizers.PAD}
    tokenizer.add_special_tokens({k: v for k, v in missing.items() if getattr(tokenizer, k) is None})
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(SPECIAL_TOKENS)}, replace_extra_special_tokens=False
    )
    lm.resize_token_embeddings(len(tokenizer) + image_tokenizer.codebook_size, mean_resizing=True)
    return build_model(lm, tokenizer, image_tokenizer, len(tokenizer))
