"""The unified model: its parts, and their passes from ids and pictures to hidden states and logits. No sampling loops.

Does not depend on: how a segment is generated (generators), how a chat is laid out (the family's template).

Shapes: B rows, L positions, D width, N images, h x w codes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from unigen.batch import Batch, InputSpan, Tokens, Vocabulary
from unigen.document import Document, Segment
from unigen.generators.base import Generator
from unigen.hub.resolve import MANIFEST_FORMAT
from unigen.hub.weights import rename_old_keys
from unigen.media.pixels import to_images, to_pixels
from unigen.model.generators import GeneratorDict
from unigen.model.inputs import ModelInputs, PromptIds, attention_span, build_inputs, place_image_ids, prompt_ids
from unigen.model.readers import CodeReader, ImageReader, VisionEncoder
from unigen.model.saving import ModelParts, save_parts
from unigen.model.template import Template
from unigen.nn import quantized
from unigen.nn.backbone import Backbone
from unigen.nn.cache import SlotCache
from unigen.nn.cpu.linear import packed_copy
from unigen.options import resolve
from unigen.samplers.guidance import Guidance
from unigen.tokenizers import ImageTokenizer
from unigen.tokenizers.quantize import check_finite

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.nn.modules.module import _IncompatibleKeys

    from unigen.media.images import ImageSource


class UnifiedModel(nn.Module):
    """A backbone over one vocabulary of text and image codes, with tokenizers, readers and generators."""

    OLD_KEYS: ClassVar[Mapping[str, str]] = {"sight": "vision_encoder"}
    """Names of parts in version 0.1, and their names now."""

    def __init__(
        self,
        family: str,
        backbone: Backbone,
        vocabulary: Vocabulary,
        text_tokenizer: Any,
        image_tokenizer: ImageTokenizer,
        template: Template,
        generators: Mapping[str, Generator],
        vision_encoder: VisionEncoder | None = None,
    ) -> None:
        """
        Args:
            family: the module of `unigen.models` that loads a saved model.
            backbone: the language model; its embeddings hold the rows of `vocabulary`.
            vocabulary: the ids of pieces of text and image codes.
            text_tokenizer: of transformers; None for models that read no words.
            image_tokenizer: encodes pictures as codes, and decodes them; frozen.
            template: lays documents out as ids.
            generators: by name, with "text" where the model generates text.
            vision_encoder: encodes the pictures of prompts; None: their codes are read.
        """
        super().__init__()
        self.family = family
        self.backbone = backbone
        self.vocabulary = vocabulary
        self.text_tokenizer = text_tokenizer
        self.image_tokenizer = image_tokenizer
        self.template = template
        self.generators = generators if isinstance(generators, GeneratorDict) else GeneratorDict(generators)
        self.generators.on_build = self._register_generator
        self.default_sampling: dict[str, dict[str, object]] = {}
        """Options of generators that hold where a request sets no others, by generator."""
        self.quantization: str | None = None
        """The kind of quantized weights, "8bit" or "4bit"; None where they are not quantized."""
        self.vllm_support = ""
        """Whether vLLM can serve the model, in words, as its loader set it."""
        built = [name for name in self.generators if name not in self.generators.factories]
        heads = {name: head for name in built if isinstance(head := self.generators[name], nn.Module)}
        self._modules["heads"] = nn.ModuleDict(heads)
        self.vision_encoder = vision_encoder
        image_tokenizer.requires_grad_(False)

    @property
    def heads(self) -> Any:
        """The generators that have weights, a `ModuleDict` by name."""
        self.generators.build_all()
        return self._modules["heads"]

    def _register_generator(self, name: str, generator: Generator) -> None:
        """Add a generator that was built now to the modules, with the device, dtype and mode of the backbone."""
        if isinstance(generator, nn.Module):
            weight = next(self.backbone.parameters())
            heads: Any = self._modules["heads"]
            heads[name] = generator.to(weight.device, weight.dtype).train(self.training)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As of any module, with all generators. Those not built yet are built for it, and so for `parameters`."""
        self.generators.build_all()
        return super().named_modules(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module, with all generators."""
        self.generators.build_all()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> _IncompatibleKeys:
        """As of any module. Keys of version 0.1 are accepted."""
        self.generators.build_all()
        return super().load_state_dict(rename_old_keys(self, state_dict), *args, **kwargs)

    def train(self, mode: bool = True) -> UnifiedModel:
        """Set the mode of all but the image tokenizer, which stays in evaluation mode."""
        super().train(mode)
        self.image_tokenizer.eval()
        return self

    @property
    def device(self) -> torch.device:
        """The device of the backbone."""
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the language model's embeddings."""
        return next(self.backbone.parameters()).dtype

    def decode_autocast(self) -> torch.autocast:
        """The autocast in which pictures are decoded: bfloat16 where the language model's embeddings are in bfloat16.

        Encoding stays in float32. float16 is not used, since activations of some decoders exceed its range.
        """
        is_bfloat16 = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_bfloat16)

    @property
    def max_length(self) -> int:
        """The most positions of a sequence."""
        return int(self.backbone.lm.config.get_text_config().max_position_embeddings)

    def shares_vocabulary(self, other: UnifiedModel) -> bool:
        """Whether ids of text and codes mean the same in another model. Decoders of pictures may differ."""
        own_state, other_state = (
            {name: tensor for name, tensor in model.image_tokenizer.state_dict().items() if "decoder." not in name}
            for model in (self, other)
        )
        return (
            self.vocabulary == other.vocabulary
            and self.text_tokenizer.get_vocab() == other.text_tokenizer.get_vocab()
            and own_state.keys() == other_state.keys()
            and all(torch.equal(tensor, other_state[name]) for name, tensor in own_state.items())
        )

    def set_default_sampling(self, generator: str, **options: Any) -> None:
        """Set options of a generator's pictures, or of text, that hold where a request sets no others.

        `save` writes them to unigen.json, where they may be edited.

        Args:
            generator: its name.
            **options: by name, as in a request.

        Raises:
            ValueError: the generator does not take an option, or a value is out of range.
        """
        if generator not in self.generators:
            raise ValueError(f"the model has no generator {generator!r}")
        groups = self.generators.options(generator)
        option_names = [name for group in groups for name, declared in group.options().items() if declared.reported]
        if unknown_options := [name for name in options if name not in option_names]:
            raise ValueError(
                f"{generator} does not take {', '.join(unknown_options)}: it takes {', '.join(option_names)}"
            )
        scales = Guidance.from_value(options.get("guidance", [1.0] * self.template.num_guidance_scales)).scales
        if len(scales) != self.template.num_guidance_scales:
            raise ValueError(
                f"{generator} takes {self.template.num_guidance_scales} scales of guidance, not {len(scales)}"
            )
        for group in groups:
            resolve(group, options)
        self.default_sampling[generator] = dict(options)

    def quantize(self, kind: str, device: str | torch.device) -> None:
        """Quantize the weights of the language model's blocks for inference (`unigen.nn.quantized`).

        Embeddings, heads, generators and tokenizers keep their weights. A quantized model cannot be saved.

        Args:
            kind: "8bit" or "4bit".
            device: where the quantized weights are put.
        """
        quantized.quantize(self.backbone.lm.get_decoder(), kind, device)
        self.quantization = kind

    def inference_copy(self) -> UnifiedModel:
        """A copy for an engine that draws samples during training, which goes on unchanged.

        Its backbone is a copy with packed linear maps and the same tensors (`unigen.nn.cpu.linear.packed_copy`). All
        other parts are shared.
        """
        twin = copy.copy(self)
        twin._modules = self._modules | {"backbone": packed_copy(self.backbone)}
        return twin

    def embed(self, ids: Tensor) -> Tensor:
        """Ids (B, L) -> embeddings (B, L, D)."""
        return self.backbone.embed(ids)

    # ---------------------------------------------------------------- passes of the backbone

    def hidden_states(self, batch: Batch, spans: Sequence[InputSpan] = ()) -> Tensor:
        """The forward pass of packed rows.

        Args:
            batch: packed rows whose ids are known (`insert_image_ids`).
            spans: vectors that generators read where they write (`Generator.prepare`).

        Returns:
            Hidden states (B, L, D) after the last norm.
        """
        inputs = self.batch_inputs(batch, spans)
        return self.backbone.forward_packed(
            inputs.embeds_BLD, batch.positions_BL, batch.segments_BL, inputs.attend_until_BL
        )

    def batch_inputs(self, batch: Batch, spans: Sequence[InputSpan] = ()) -> ModelInputs:
        """The inputs of the backbone for packed rows.

        Args:
            batch: packed rows whose ids are known.
            spans: vectors that generators read where they write.
        """
        return build_inputs(self, batch.ids_BL, [*self._reader_spans(batch), *spans, *self._attention_spans(batch)])

    def causal_hidden_states(self, batch: Batch) -> Tensor:
        """`hidden_states` with causal attention and ids at all positions, whichever generator wrote the pictures."""
        inputs = build_inputs(self, batch.ids_BL, self._reader_spans(batch))
        return self.backbone.forward_packed(inputs.embeds_BLD, batch.positions_BL, batch.segments_BL)

    def _reader_spans(self, batch: Batch) -> list[InputSpan]:
        """Features of the batch's pictures that are laid out for a reader. Gradients flow into trainable readers."""
        spans = []
        for name, reader in self.readers.items():
            images_M = batch.images_of(name)
            if len(images_M):
                assert batch.images is not None and batch.images.is_floating_point()
                embeds_MPD = reader.embed(reader.encode(batch.images[images_M.to(batch.images.device)]))
                spans.append(InputSpan(*batch.span_positions(images_M), embeds=embeds_MPD))
        return spans

    def _attention_spans(self, batch: Batch) -> list[InputSpan]:
        """How far positions attend in the batch's pictures of generators that are not causal."""
        names = sorted({*batch.handlers} & {*self.generators})
        spans = [attention_span(batch, self.generators[name]) for name in names]
        return [span for span in spans if span is not None]

    def cached_hidden_states(self, embeds_BLD: Tensor, positions_BL: Tensor, mask: Tensor, cache: SlotCache) -> Tensor:
        """The forward pass of one step with a cache.

        Args:
            embeds_BLD: embeddings of the step.
            positions_BL: each position in its document, from 0.
            mask: bool (B, 1, L, K), True where a key may be seen.
            cache: keys and values of what was read before.

        Returns:
            Hidden states (B, L, D) after the last norm.
        """
        return self.backbone.forward_cached(embeds_BLD, positions_BL, mask, cache)

    def logits(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Hidden states (..., D) -> scores of the ids from `start` up to `stop`."""
        return self.backbone.logits(hidden, start, stop)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) in [-1, 1] -> codes, int64 (N, h, w). Codes are returned as they are."""
        return self.readers["codes"].encode(images) if images.is_floating_point() else images.to(self.device)

    def insert_image_ids(self, batch: Batch) -> Batch:
        """The batch with the ids of codes in the places of the images that are laid out as codes."""
        as_codes = {
            name for name in batch.handlers if name in self.generators and self.generators[name].trains_on_codes
        }
        images_M = torch.tensor([number for number, name in enumerate(batch.handlers) if name in as_codes])
        if batch.images is None or not len(images_M):
            return batch
        ids_Mhw = self.vocabulary.image_ids(self.encode_images(batch.images[images_M.to(batch.images.device)]))
        row_end = self.template.layout((ids_Mhw.shape[1], ids_Mhw.shape[2])).row_end_ids
        return place_image_ids(batch, images_M, ids_Mhw, row_end)

    @property
    def readers(self) -> dict[str, ImageReader]:
        """The image readers by name."""
        readers: dict[str, ImageReader] = {"codes": CodeReader(self.image_tokenizer, self.vocabulary, self.embed)}
        return readers if self.vision_encoder is None else readers | {self.vision_encoder.name: self.vision_encoder}

    @property
    def context_reader(self) -> ImageReader:
        """The reader for the pictures of prompts."""
        return self.readers["codes"] if self.vision_encoder is None else self.vision_encoder

    @torch.no_grad()
    def encode_document(self, document: Document) -> Document:
        """Encode the pictures of a document: as codes (h, w), or as features (P, D) of the vision encoder.

        Pictures of one size are encoded together.

        Args:
            document: pictures that are tensors already stay as they are.

        Raises:
            ValueError: features are not finite.
        """
        images = [s.image for s in document.segments if s.image is not None and not isinstance(s.image, Tensor)]
        if not images:
            return document
        batches = [[image] for image in images] if self.template.variable_size else [images]
        encoded = [self.context_reader.encode(self.preprocess_images(batch)) for batch in batches]
        rows = iter([row for part in encoded for row in (check_finite(part) if part.is_floating_point() else part)])
        segments = [
            s if s.image is None or isinstance(s.image, Tensor) else Segment(image=next(rows), role=s.role)
            for s in document.segments
        ]
        return replace(document, segments=segments)

    def preprocess_images(self, images: Sequence[ImageSource]) -> Tensor:
        """Pictures as the model reads them.

        Args:
            images: all that `unigen.media.images.read_image` takes.

        Returns:
            float32 (N, 3, H, W) in [-1, 1].
        """
        return to_pixels(images, self.image_tokenizer.image_size, self.template.preprocess)

    def token_ids(self, tokens: Tokens) -> list[int]:
        """The ids of one document whose pictures are encoded; 0 where features of a picture are read."""
        return self.prompt_ids(tokens).ids

    def prompt_ids(self, tokens: Tokens) -> PromptIds:
        """The ids of one document whose pictures are encoded, and the spans of features of pictures."""
        return prompt_ids(tokens, self.vocabulary, self.template)

    @torch.no_grad()
    def decode_images(self, codes_Nhw: Tensor) -> list[Image.Image]:
        """Codes (N, h, w) -> PIL images."""
        return to_images(self.image_tokenizer.decode(codes_Nhw.to(self.device)))

    def begin_tokens(self) -> dict[str, str]:
        """The begin token of each generator of pictures, by name."""
        return {name: self.text_tokenizer.convert_ids_to_tokens(id) for name, id in self.template.begin_ids.items()}

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the model folder. The old one, if any, is replaced only when the new one is whole.

        Args:
            folder: where to write.
            dtype: of the weights; None: as they are.

        Raises:
            ValueError: the model is quantized.
        """
        if self.quantization is not None:
            raise ValueError(f"{self.quantization} weights are not saved: load the model without quantization")
        manifest = {
            "format": MANIFEST_FORMAT,
            "family": self.family,
            "text_size": self.vocabulary.text_size,
            "image_size": self.vocabulary.image_size,
            "generators": sorted(self.generators),
            "begin_tokens": self.begin_tokens(),
            "classes": list(self.template.classes),
            "sampling": self.default_sampling,
            **({"template": self.template.settings} if self.template.settings else {}),
        }
        parts = ModelParts(
            self.backbone, self.text_tokenizer, self.image_tokenizer, self.vision_encoder, self.heads, manifest
        )
        save_parts(folder, parts, dtype)
