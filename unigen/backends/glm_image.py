"""GLM-Image, whose pipeline has to be told every size. Does not depend on: how pipelines are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image

from unigen.backends.diffusers_engine import DiffusersEngine
from unigen.hub.weights import silence_transformers

if TYPE_CHECKING:
    from unigen.backends.diffusers_support import Pipeline
    from unigen.inference.protocol import OptionValue

GLM_SIZE = (1024, 1024)
"""Width and height in pixels of GLM-Image's images where no size is given."""


GLM_STRIDE = 32
"""Pixels of which the width and the height of GLM-Image's images are multiples."""


class GlmImageEngine(DiffusersEngine):
    """GLM-Image: a language model writes an image's tokens, a DiT generates the image from them. Its pipeline has to
    be given every size, and an image to edit has to be as large as its processor would make it."""

    def __init__(self, pipe: Pipeline) -> None:
        super().__init__(pipe)
        vision_language_model = pipe.vision_language_encoder
        original_get_tokens = type(vision_language_model).get_image_tokens

        def get_image_tokens(
            features: torch.Tensor | list[torch.Tensor], grids: torch.Tensor | None = None
        ) -> torch.Tensor:
            """Takes one image (C, h, w), as diffusers gives it, or a list of images, as transformers takes them."""
            is_single_image = isinstance(features, torch.Tensor) and features.ndim == 3
            return original_get_tokens(vision_language_model, [features] if is_single_image else features, grids)

        vision_language_model.get_image_tokens = get_image_tokens

    def _run_pipeline(
        self,
        pipe: Pipeline,
        given: Sequence[dict[str, object]],
        seeds: Sequence[int],
        options: dict[str, OptionValue],
        auto_size: bool = False,
    ) -> list[Image.Image]:
        devices = [pipe.device] if pipe.device.type == "cuda" else []
        with (
            silence_transformers(),
            torch.random.fork_rng(devices),
        ):  # the pipeline samples tokens from the global generator, and seeds that
            return super()._run_pipeline(
                pipe, given, seeds, options | {"size": options.get("size") or GLM_SIZE}, auto_size
            )

    def _render_sizes(
        self, form: Pipeline, picture: Image.Image, size: tuple[int, int] | None
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        if max(picture.size) > 4 * min(picture.size):
            raise ValueError(f"GLM-Image reads pictures up to four times as long as wide, not {picture.size}: crop it")
        bounds = self.pipe.processor.image_processor.size
        min_side, max_side = bounds["shortest_edge"] ** 0.5, bounds["longest_edge"] ** 0.5
        scale = min(max(1.0, min_side / min(picture.size)), max_side / max(picture.size))
        width, height = (max(GLM_STRIDE, round(side * scale / GLM_STRIDE) * GLM_STRIDE) for side in picture.size)
        return (width, height), size or (width, height)
