"""Images whose worth is known, for the same measure beside a model's score.

True images of the same prompts (the detector's own limit), their reconstructions (the tokenizer's limit), the training
images with the nearest captions (memory alone), images under other prompts (chance), noise and blends (what the
detector finds where nothing is). Only what renders scenes (`oracle_images`, `nearest_training_images`) needs the emoji
font, which its renderer has. Does not depend on: how the score is computed, how the model generates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from unigen.evaluation.task import Example
from unigen.media.pixels import to_images, to_pixels
from unigen.tokenizers import ImageTokenizer
from unigen.toyworld.captions import Facts, caption, extract_facts, scene_from_facts
from unigen.toyworld.scenes import SceneRenderer, sample_scene

ImageGroups: TypeAlias = list[list[Image.Image]]
"""Several images of each prompt, in the order of the examples."""


def oracle_images(examples: Sequence[Example], n: int, seed: int, renderer: SceneRenderer) -> ImageGroups:
    """True images of prompts; 30% have a ground plane, as in training.

    Args:
        examples: of the task `scenes`.
        n: images of each.
        seed: of the scenes.
        renderer: draws them.

    Returns:
        n images of each example.
    """
    rng = np.random.default_rng((seed, 1))
    pictures: ImageGroups = []
    for example in examples:
        metadata = example.metadata
        facts = Facts(tuple(tuple(g) for g in metadata["groups"]), metadata["background"], metadata["relation"])
        row = []
        for _ in range(n):
            ground = Facts(facts.groups, facts.background, facts.relation, bool(rng.random() < 0.3))
            row.append(Image.fromarray(renderer.render(scene_from_facts(ground, rng, renderer.size)).image))
        pictures.append(row)
    return pictures


@torch.no_grad()
def reconstruct_images(tokenizer: ImageTokenizer, images: ImageGroups, batch: int = 64) -> ImageGroups:
    """Encode and decode images by an image tokenizer.

    Args:
        tokenizer: the tokenizer.
        images: grouped by prompt.
        batch: how many at a time.

    Returns:
        The reconstructions, grouped as the images are.
    """
    flat = [image for row in images for image in row]
    device = next((p.device for p in tokenizer.parameters()), torch.device("cpu"))
    reconstructions: list[Image.Image] = []
    for i in range(0, len(flat), batch):
        x_BCHW = to_pixels(flat[i : i + batch], tokenizer.image_size).to(device)
        reconstructions += to_images(tokenizer.decode(tokenizer.encode(x_BCHW)))
    remaining = iter(reconstructions)
    return [[next(remaining) for _ in row] for row in images]


def nearest_training_images(
    examples: Sequence[Example], n: int, seed: int, renderer: SceneRenderer, pool: int = 10_000
) -> ImageGroups:
    """The training images whose captions are nearest to each prompt (cosine of word counts weighted by inverse document
    frequency): the score of a model that can only remember.

    Args:
        examples: with prompts in the words of captions.
        n: images of each.
        seed: of the training scenes.
        renderer: draws them.
        pool: how many training scenes there are to choose from.

    Returns:
        n images of each example.
    """
    rng = np.random.default_rng((seed, 2))
    training_scenes = [sample_scene(rng, renderer.size) for _ in range(pool)]
    texts = [caption(extract_facts(scene)) for scene in training_scenes]
    words = Counter(word for text in texts for word in set(text.split()))
    column = {word: k for k, word in enumerate(words)}
    weight = np.log(pool / np.array(list(words.values())))

    def vectors(lines: Sequence[str]) -> np.ndarray:
        rows = np.zeros((len(lines), len(column)), np.float32)
        for i, line in enumerate(lines):
            for word, count in Counter(line.split()).items():
                if word in column:
                    rows[i, column[word]] = count * weight[column[word]]
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)

    likeness = vectors([str(example.prompt) for example in examples]) @ vectors(texts).T
    best = np.argsort(-likeness, axis=1, kind="stable")[:, :n]
    return [[Image.fromarray(renderer.render(training_scenes[k]).image) for k in row] for row in best]


def shuffle_images(examples: Sequence[Example], images: ImageGroups, seed: int) -> ImageGroups:
    """Give each prompt the images of another prompt.

    Args:
        examples: the prompts.
        images: of each prompt.
        seed: of the order.

    Returns:
        The images in the new order.

    Raises:
        ValueError: for fewer than two prompts.
    """
    if len(examples) < 2:
        raise ValueError("pictures cannot be shuffled among fewer than two prompts")
    order = np.random.default_rng((seed, 3)).permutation(len(examples))
    mixed: ImageGroups = [[] for _ in examples]
    for target_index, source_index in zip(order, np.roll(order, 1), strict=True):
        mixed[target_index] = images[source_index]
    return mixed


def noise_images(count: int, size: int, rng: np.random.Generator) -> list[Image.Image]:
    """Images of uniform noise of four coarsenesses, from one pixel to an eighth of the side.

    Args:
        count: how many.
        size: pixels along a side.
        rng: draws the noise.

    Returns:
        The images.
    """
    images = []
    for i in range(count):
        side = max(size >> (i % 4), 8)
        grid = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        images.append(grid.resize((size, size), Image.Resampling.BILINEAR))
    return images


def blend_images(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Even blends of each picture with the next: two ghosts, no object."""
    return [Image.blend(a, b, 0.5) for a, b in zip(pictures, [*pictures[1:], pictures[0]], strict=True)]
