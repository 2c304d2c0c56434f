"""Models assembled from parts: a language model of transformers, tokenizers and generators.

    model = build_from_config(LlamaConfig(...), text_tokenizer, image_tokenizer)      # random weights
    model = extend_vocabulary(lm, text_tokenizer, image_tokenizer)                    # a pretrained language model
    model = add_generators(model, ["flow"], [head])                                   # further generators of pictures

Each has the chat template of `unigen.model.chat_template`, and is saved and loaded as a model of the family FAMILY.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from unigen.batch import Vocabulary
from unigen.generators.base import BuildContext, Generator
from unigen.generators.build import build_generator
from unigen.generators.next_token import Text
from unigen.model.chat_template import CHAT_TEMPLATE, MASK, SPECIAL_TOKENS, ChatTemplate
from unigen.model.generators import GeneratorDict
from unigen.model.unified import UnifiedModel
from unigen.nn.backbone import Backbone
from unigen.options import DEFAULT_GENERATOR
from unigen.tokenizers import ImageTokenizer
from unigen.tokenizers import text as text_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FAMILY = "tiny"
"""The family in unigen.json: the module of `unigen.models` that loads such a model."""


def build_model(
    lm: Any,
    tokenizer: Any,
    image_tokenizer: ImageTokenizer,
    text_size: int,
    generator_names: Sequence[str] = (DEFAULT_GENERATOR,),
    heads: Sequence[Generator] = (),
    begin_tokens: Mapping[str, str] | None = None,
    classes: Sequence[str] = (),
    factories: Mapping[str, Callable[[], Generator]] | None = None,
) -> UnifiedModel:
    """Build a model from parts.

    Args:
        lm: a causal language model. Its table holds `text_size` rows, then one for each image code.
        tokenizer: its text tokenizer, with the special tokens of the chat template.
        image_tokenizer: turns pictures into codes, one code for each place of a grid.
        text_size: rows of the table that are pieces of text.
        generator_names: the generators of pictures that the model has, trained or to be trained.
        heads: those of the generators that exist already, because they have weights or an image tokenizer of their own.
        begin_tokens: begin tokens that generators have already, by generator.
        classes: names of the classes, where the model generates images by class and not from text.
        factories: by name, functions that build generators when they are first used. The pictures of these generators
            take no positions.

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
    """Raise ValueError where the table does not fit the vocabulary, or a head is for pictures of another size."""
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


def codebook_size(image_tokenizer: ImageTokenizer) -> int:
    """The number of codes of an image tokenizer by which a model reads pictures.

    Raises:
        ValueError: the tokenizer does not give one code for each place of a picture.
    """
    if not hasattr(image_tokenizer, "codebook_size") or hasattr(getattr(image_tokenizer, "quantizer", None), "scales"):
        raise ValueError("pictures are read by one code a place: image_tokenizer must be of kind vq, of one scale")
    return int(image_tokenizer.codebook_size)


def build_context(lm: Any, tokenizer: Any, image_tokenizer: ImageTokenizer) -> BuildContext:
    """The sizes and ids with which the generators of a model are built.

    Args:
        lm: the language model.
        tokenizer: its text tokenizer, with the special tokens of the chat template.
        image_tokenizer: by which the model reads pictures.
    """
    width = int(lm.config.get_text_config().hidden_size)
    special_token_ids = tokenizer.convert_tokens_to_ids(
        [name for name in SPECIAL_TOKENS if name in tokenizer.get_vocab()]
    )
    special_ids = tuple(sorted({*tokenizer.all_special_ids, *special_token_ids} - {tokenizer.eos_token_id}))
    return BuildContext(image_tokenizer.grid, tokenizer.convert_tokens_to_ids(MASK), width, special_ids=special_ids)


def build_from_config(
    lm_config: PreTrainedConfig,
    tokenizer: Any,
    image_tokenizer: ImageTokenizer,
    generator_names: Sequence[str] = (DEFAULT_GENERATOR,),
    heads: Sequence[Generator] = (),
    classes: Sequence[str] = (),
) -> UnifiedModel:
    """Build a new model with random weights. Seed torch first.

    Args:
        lm_config: any decoder-only config of transformers. Its vocabulary and special ids are set here.
        tokenizer: see `build_model`, as for all below.
        image_tokenizer: turns pictures into codes.
        generator_names: the generators of pictures.
        heads: those of them that exist already.
        classes: names of the classes of a class-conditional model.

    Raises:
        ValueError: the parts do not fit each other.
    """
    from transformers import AutoModelForCausalLM

    lm_config.vocab_size = len(tokenizer) + codebook_size(image_tokenizer)
    lm_config.pad_token_id, lm_config.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    lm_config.eos_token_id = tokenizer.eos_token_id
    lm = AutoModelForCausalLM.from_config(lm_config, attn_implementation="sdpa")
    return build_model(lm, tokenizer, image_tokenizer, len(tokenizer), generator_names, heads, classes=classes)


def add_generators(
    model: UnifiedModel, generator_names: Sequence[str], heads: Sequence[Generator] = ()
) -> UnifiedModel:
    """Build a model of the same parts with further, untrained generators. Parts are shared, not copied.

    Args:
        model: is not changed.
        generator_names: generators to add; names that the model has already are ignored.
        heads: those of them that exist already, because they have weights.

    Raises:
        ValueError: the text tokenizer has no begin token left for a generator.
    """
    parts = model.backbone.lm, model.text_tokenizer, model.image_tokenizer, model.vocabulary.text_size
    names = [name for name in dict.fromkeys([*model.generators, *generator_names]) if name != Text.name]
    heads_by_name = dict(model.heads) | {head.name: head for head in heads}
    extended_model = build_model(
        *parts, names, list(heads_by_name.values()), model.begin_tokens(), model.template.classes
    )
    extended_model.default_sampling = dict(model.default_sampling)
    return extended_model


def extend_vocabulary(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, image_tokenizer: ImageTokenizer
) -> UnifiedModel:
    """Build a model from a pretrained language model, whose vocabulary is extended by special tokens and image codes
    (Liquid's layout). New rows are drawn around the mean of the old ones (`mean_resizing`).

    Args:
        lm: a causal language model of transformers, changed in place.
        tokenizer: its text tokenizer, changed in place.
        image_tokenizer: turns pictures into codes.
    """
    default_tokens = {
        "bos_token": text_tokenizers.BOS,
        "eos_token": text_tokenizers.EOS,
        "pad_token": text_tokenizers.PAD,
    }
    tokenizer.add_special_tokens({k: v for k, v in default_tokens.items() if getattr(tokenizer, k) is None})
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(SPECIAL_TOKENS)}, replace_extra_special_tokens=False
    )
    lm.resize_token_embeddings(len(tokenizer) + image_tokenizer.codebook_size, mean_resizing=True)
    return build_model(lm, tokenizer, image_tokenizer, len(tokenizer))
