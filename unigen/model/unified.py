"""The parts of a unified model, and what they do together: ids and pictures in, hidden states and logits out. No loops.

A model folder is a plain `transformers` causal language model (`AutoModelForCausalLM.from_pretrained(folder)` loads it,
the image codes being further rows of its vocabulary), with `image_tokenizer/`, a folder for each generator that has
weights of its own, and `unigen.json` beside it.
Does not depend on: how a segment is written (generators), how a chat is laid out (the family's template).

Shapes: B rows, L positions, D width, N images, h x w codes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unigen.batch import Batch, Tokens, Vocabulary
from unigen.document import Document, Segment
from unigen.generators import find_generator
from unigen.generators.base import SAMPLING_OPTION_NAMES, Generator
from unigen.hub.folders import replacing_folder
from unigen.hub.resolve import MANIFEST
from unigen.hub.weights import silence_transformers, write_tensors
from unigen.media.pixels import to_images, to_pixels
from unigen.model.template import Template
from unigen.nn import quantized
from unigen.nn.backbone import Backbone, SlotCache
from unigen.nn.cpu.linear import packed_copy
from unigen.samplers.guidance import Guidance
from unigen.samplers.logits import SamplingOptions
from unigen.tokenizers import ImageTokenizer, save_tokenizer, text
from unigen.tokenizers.quantize import check_codes, check_finite


class VisionEncoder(nn.Module):
    """Pictures as vectors that the backbone reads in place of embeddings, where it does not read their codes."""

    positions: int
    """How many stand for a picture."""

    def features(self, x_BCHW: Tensor) -> Tensor:
        """Pixels in [-1, 1] (B, 3, H, W) -> (B, positions, D)."""
        raise TypeError("a sight defines features()")

    def config(self) -> dict[str, Any]:
        """What builds it again."""
        return {}


class GeneratorDict(dict[str, Any]):
    """Generators by name. Some may be made when they are first asked for, so that what only they import is imported for
    them alone.

    Args:
        generators: by name, in order; None for one that is made later.
        factories: what makes those.
    """

    def __init__(
        self, generators: Mapping[str, Generator | None], later: Mapping[str, Callable[[], Generator]] | None = None
    ) -> None:
        super().__init__(generators)
        self.factories = dict(later or {})
        self.on_build: Callable[[str, Generator], None] = lambda name, generator: None

    def __getitem__(self, name: str) -> Generator:
        if name in self.factories:
            generator = self.factories.pop(name)()
            self[name] = generator
            self.on_build(name, generator)
        generator = super().__getitem__(name)
        return generator  # type: ignore[no-any-return]

    def takes(self, name: str) -> tuple[str, ...]:
        """The options that a generator heeds, without making it."""
        options: tuple[str, ...] = (find_generator(name) if name in self.factories else self[name]).takes
        return options

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default

    def values(self) -> Any:
        return [self[name] for name in self]

    def items(self) -> Any:
        return [(name, self[name]) for name in self]


class UnifiedModel(nn.Module):
    """A backbone over one vocabulary of text and image codes, the two tokenizers, and the generators by name. sight: by
    what pictures are read, where that is not their codes."""

    def __init__(
        self,
        family: str,
        backbone: Backbone,
        vocabulary: Vocabulary,
        text_tokenizer: Any,
        image_tokenizer: ImageTokenizer,
        template: Template,
        generators: dict[str, Generator],
        sight: VisionEncoder | None = None,
    ) -> None:
        super().__init__()
        self.family = family
        self.backbone = backbone
        self.vocabulary = vocabulary
        self.text_tokenizer = text_tokenizer
        self.image_tokenizer = image_tokenizer
        self.template = template
        self.generators = generators if isinstance(generators, GeneratorDict) else GeneratorDict(generators)
        self.generators.on_build = self._register_generator
        self.default_sampling: dict[str, dict[str, Any]] = {}
        self.quantization: str | None = None
        built = [name for name in self.generators if name not in self.generators.factories]
        heads = {name: head for name in built if isinstance(head := self.generators[name], nn.Module)}
        self._modules["heads"] = nn.ModuleDict(heads)
        self.sight = sight
        image_tokenizer.requires_grad_(False)

    @property
    def heads(self) -> Any:
        """The generators that have weights, a `ModuleDict`."""
        self.generators.values()
        return self._modules["heads"]

    def _register_generator(self, name: str, generator: Generator) -> None:
        """Take a generator that was made now among the modules: as trained or not, where and as the backbone is."""
        if isinstance(generator, nn.Module):
            weight = next(self.backbone.parameters())
            heads: Any = self._modules["heads"]
            heads[name] = generator.to(weight.device, weight.dtype).train(self.training)

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        """All of them: those that are not made yet are made for this, and so for `parameters`."""
        self.generators.values()
        return super().named_modules(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.generators.values()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.generators.values()
        return super().load_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> UnifiedModel:
        """The image tokenizer is frozen, whatever the mode."""
        super().train(mode)
        self.image_tokenizer.eval()
        return self

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the language model's tables."""
        return next(self.backbone.parameters()).dtype

    def decode_autocast(self) -> torch.autocast:
        """Pictures are decoded in bfloat16 inside, where the language model's tables are; codes are read in float32.
        float16 is too small for what some decoders add up."""
        is_bfloat16 = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_bfloat16)

    @property
    def max_length(self) -> int:
        """The most positions a sequence may have."""
        return int(self.backbone.lm.config.get_text_config().max_position_embeddings)

    def shares_vocabulary(self, other: UnifiedModel) -> bool:
        """Do ids mean the same to both, pieces of text and codes of pictures? How codes look may differ."""
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
        """Say how this generator's pictures are drawn where nothing else is asked for: guidance, temperature, top_k,
        top_p; or how text is: these but guidance, and repetition_penalty. `save` writes it to unigen.json, where it may
        be changed. Raises ValueError for what it does not take."""
        if generator not in self.generators:
            raise ValueError(f"the model has no generator {generator!r}")
        takes = ("guidance", *(name for name in SAMPLING_OPTION_NAMES if name in self.generators.takes(generator)))
        takes = self.generators.takes(generator) if generator == "text" else takes
        if unknown_options := [name for name in options if name not in takes]:
            raise ValueError(f"{generator} does not take {', '.join(unknown_options)}: it takes {', '.join(takes)}")
        scales = Guidance.of(options.get("guidance", [1.0] * self.template.num_guidance_scales)).scales
        if len(scales) != self.template.num_guidance_scales:
            raise ValueError(
                f"{generator} takes {self.template.num_guidance_scales} scales of guidance, not {len(scales)}"
            )
        SamplingOptions(**{name: value for name, value in options.items() if name != "guidance"})  # type: ignore[arg-type]
        self.default_sampling[generator] = dict(options)

    def quantize(self, kind: str, device: str | torch.device) -> None:
        """Keep the weights of the language model's blocks in "8bit" or "4bit", on the device (`unigen.nn.quantized`).
        Tables, heads, generators and tokenizers stay as they are. For inference; such a model is not saved."""
        quantized.quantize(self.backbone.lm.get_decoder(), kind, device)
        self.quantization = kind

    def inference_copy(self) -> UnifiedModel:
        """The model as an engine wants it, for samples during training: its backbone is a copy with packed linear maps
        and the same tensors (`unigen.nn.cpu.linear.packed_copy`); all else is shared. Training goes on unchanged."""
        twin = copy.copy(self)
        twin._modules = self._modules | {"backbone": packed_copy(self.backbone)}
        return twin

    def embed(self, ids: Tensor) -> Tensor:
        return self.backbone.embed(ids)

    def hidden_states(self, batch: Batch, embeds_BLD: Tensor | None = None) -> Tensor:
        """Hidden states (B, L, D) of packed rows whose ids are all known (see `fill`). embeds_BLD: what is read, where
        it is not the ids themselves."""
        embeds_BLD = self.embed(batch.ids_BL) if embeds_BLD is None else embeds_BLD
        return self.backbone.packed(embeds_BLD, batch.positions_BL, batch.segments_BL, self.attend_until(batch))

    def causal_hidden_states(self, batch: Batch) -> Tensor:
        """Hidden states (B, L, D) of packed ids, each position seeing what is before it, whoever wrote the pictures."""
        return self.backbone.packed(self.embed(batch.ids_BL), batch.positions_BL, batch.segments_BL)

    def attend_until(self, batch: Batch) -> Tensor | None:
        """The last position of its row that each position sees (B, L); None where all are causal."""
        attend_until_BL = None
        for name in sorted(set(batch.writers)):
            offsets = self.generators[name].attend_until()
            if offsets is None:
                continue
            if attend_until_BL is None:
                attend_until_BL = torch.arange(batch.ids_BL.shape[1], device=batch.ids_BL.device).repeat(len(batch), 1)
            rows_M1, positions_MP = batch.places(batch.images_of(name))
            margin = (len(offsets) - positions_MP.shape[1]) // 2
            positions_ML = positions_MP[:, :1] + torch.arange(
                -margin, positions_MP.shape[1] + margin, device=positions_MP.device
            )
            attend_until_BL[rows_M1, positions_ML] = positions_MP[:, :1] + torch.tensor(
                offsets, device=positions_MP.device
            )
        return attend_until_BL

    def cached_hidden_states(self, embeds_BLD: Tensor, positions_BL: Tensor, mask: Tensor, cache: SlotCache) -> Tensor:
        """Hidden states (B, L, D) of what each cached row reads now."""
        return self.backbone.hidden(embeds_BLD, positions_BL, mask, cache)

    def logits(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        return self.backbone.logits(hidden, start, stop)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Codes (N, h, w) of pixels (N, 3, H, W); codes are returned as they are."""
        if not images.is_floating_point():
            return images.to(self.device)
        weight = next(self.image_tokenizer.parameters())
        return self.image_tokenizer.encode(images.to(weight.device, weight.dtype))

    def insert_image_ids(self, batch: Batch) -> Batch:
        """The batch with the codes of its images put where they belong, for those that are written as codes."""
        images_M = torch.tensor([n for n, generator in enumerate(batch.writers) if self.generators[generator].codes])
        if batch.images is None or not len(images_M):
            return batch
        ids_Mhw = self.vocabulary.image_ids(self.encode_images(batch.images[images_M.to(batch.images.device)]))
        row_end = torch.tensor(self.template.layout((ids_Mhw.shape[1], ids_Mhw.shape[2])).row_end, dtype=ids_Mhw.dtype)
        ends = row_end.to(ids_Mhw.device).expand(*ids_Mhw.shape[:2], -1)
        ids_MP = torch.cat((ids_Mhw, ends), 2).flatten(1)
        spans_M3 = batch.spans_N3[images_M.to(batch.spans_N3.device)]
        from_end_P = torch.arange(ids_MP.shape[1], 0, -1, device=spans_M3.device)
        ids_BL = batch.ids_BL.clone()
        ids_BL[spans_M3[:, :1], spans_M3[:, 2:] - from_end_P] = ids_MP  # a span may hold text before its codes
        return replace(batch, ids_BL=ids_BL)

    def encode_document(self, document: Document) -> Document:
        """The document with its pictures as codes, or as features where they are read as such; all of them at once
        where they are of one size."""
        images = [s.image for s in document.segments if s.image is not None and not isinstance(s.image, Tensor)]
        if not images:
            return document
        if self.sight is not None:
            codes = iter(check_finite(self.sight.features(self.preprocess_images(images))))
        elif self.template.variable_size:
            codes = iter([self.encode_images(self.preprocess_images([image]))[0] for image in images])
        else:
            codes = iter(self.encode_images(self.preprocess_images(images)))
        return Document(
            [
                s if s.image is None or isinstance(s.image, Tensor) else Segment(image=next(codes), role=s.role)
                for s in document.segments
            ],
            document.size,
        )

    def preprocess_images(self, images: Sequence[Any]) -> Tensor:
        """Pictures, all that `read_image` takes, as the model reads them: float32 (N, 3, H, W) in [-1, 1]."""
        return to_pixels(images, self.image_tokenizer.image_size, self.template.preprocess)

    def token_ids(self, tokens: Tokens) -> list[int]:
        """The ids of one document that has been read. A feature of a picture has an id beyond the vocabulary: its
        number among the document's `features`."""
        ids, next_feature_id = list(tokens.ids), self.vocabulary.size
        for (start, stop), codes_hw in zip(tokens.spans, tokens.images, strict=True):
            if codes_hw.is_floating_point():
                ids[start:stop] = range(next_feature_id, next_feature_id := next_feature_id + len(codes_hw))
                continue
            layout = self.template.layout((codes_hw.shape[0], codes_hw.shape[1]))
            if layout.rows != stop - start:
                raise ValueError(f"a picture of {tuple(codes_hw.shape)} codes is of another size than this model reads")
            check_codes(codes_hw, self.vocabulary.image_size)
            ids[start:stop] = layout.to_ids(self.vocabulary.image_ids(codes_hw))
        return ids

    @staticmethod
    def image_features(document: Document) -> Tensor | None:
        """The features (P, D) of all pictures of a document that are read as such, in its order."""
        images = [s.image for s in document.segments if isinstance(s.image, Tensor) and s.image.is_floating_point()]
        return torch.cat(images) if images else None

    @torch.no_grad()
    def decode_images(self, codes_Nhw: Tensor) -> list[Any]:
        """PIL images of codes (N, h, w)."""
        return to_images(self.image_tokenizer.decode(codes_Nhw.to(self.device)))

    def begin_tokens(self) -> dict[str, str]:
        """The begin token of each way of writing pictures."""
        return {name: self.text_tokenizer.convert_ids_to_tokens(id) for name, id in self.template.begin_ids.items()}

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the model folder; the old one, if any, is replaced only when the new one is whole."""
        if self.quantization is not None:
            raise ValueError(f"{self.quantization} weights are not saved: load the model without quantization")
        from unigen.config import save_json

        with replacing_folder(folder) as scratch:
            lm = self.backbone.lm
            if dtype is not None:
                lm = copy.deepcopy(lm).to(dtype)
            with silence_transformers():
                lm.save_pretrained(scratch)
            if self.text_tokenizer is not None:
                text.save(self.text_tokenizer, scratch)
            save_tokenizer(self.image_tokenizer, scratch / "image_tokenizer", dtype=dtype)
            extra_state = {k: v for k, v in self.backbone.state_dict().items() if not k.startswith("lm.")}
            if extra_state:
                (scratch / "backbone").mkdir()
                write_tensors(scratch / "backbone" / "model.safetensors", extra_state, dtype)
            if self.sight is not None:
                (scratch / "sight").mkdir()
                write_tensors(scratch / "sight" / "model.safetensors", self.sight.state_dict(), dtype)
                save_json(scratch / "sight" / "config.json", self.sight.config())
            for name, head in self.heads.items():
                (scratch / name).mkdir()
                if head.tokenizer is not None and head.tokenizer is not self.image_tokenizer:
                    save_tokenizer(head.tokenizer, scratch / name / "tokenizer", dtype=dtype)
                head_state = {k: v for k, v in head.state_dict().items() if not k.startswith("tokenizer.")}
                write_tensors(scratch / name / "model.safetensors", head_state, dtype)
                save_json(scratch / name / "config.json", head.config())
            save_json(
                scratch / MANIFEST,
                {
                    "format": 1,
                    "family": self.family,
                    "text_size": self.vocabulary.text_size,
                    "image_size": self.vocabulary.image_size,
                    "generators": sorted(self.generators),
                    "begins": self.begin_tokens(),
                    "classes": list(self.template.classes),
                    "sampling": self.default_sampling,
                    **({"template": self.template.settings} if self.template.settings else {}),
                },
            )
