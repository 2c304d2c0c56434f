"""Rendering: a `Scene` becomes a `RenderedScene` (pixels, visible masks, boxes, depth) drawn with the system's Noto
Color Emoji.

Does not depend on: how scenes are sampled, language, torch. The font is never part of this project: it is found by
fontconfig, or named by the environment variable UNIGEN_EMOJI_FONT. A `SceneRenderer` caches every glyph in a pyramid of
sizes and every tint it has met; one affine transform per object turns, scales and places it.
"""

from __future__ import annotations

import math
import os
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, features

from unigen.toyworld.objects import BACKGROUNDS, COLORS, HORIZON_HEIGHT, OBJECT_EMOJI, Scene

_FONT_FAMILY = "Noto Color Emoji"
_FONT_PATHS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
    "/usr/local/share/fonts/NotoColorEmoji.ttf",
)
_BITMAP_SIZE = 109  # the only bitmap size in the font, in pixels per em
_PYRAMID = (128, 96, 64, 48, 32, 24)  # longest side in pixels of the cached glyphs
_FONT_HELP = "install it (apt-get install fonts-noto-color-emoji) or name its file (UNIGEN_EMOJI_FONT=path)"


@dataclass(frozen=True)
class RenderedScene:
    """A rendered scene with n items and H = W = scene.size.

    image uint8 (H, W, 3); masks bool (n, H, W), the visible pixels of each item; boxes float32 (n, 4), x0 y0 x1 y1 in
    pixels around the visible pixels (exclusive end); depth float32 (H, W) in [0, 1], 1 = far.
    """

    image: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    boxes: NDArray[np.float32]
    depth: NDArray[np.float32]
    scene: Scene


def find_font(font: str | None = None) -> Path:
    """The file of Noto Color Emoji: `font`, else $UNIGEN_EMOJI_FONT, else fontconfig, else known places. ValueError
    when missing.
    """
    font_path = font or os.environ.get("UNIGEN_EMOJI_FONT")
    if font_path:
        if not Path(font_path).is_file():
            raise ValueError(f"emoji font not found: {font_path}; {_FONT_HELP}")
        return Path(font_path)
    try:
        command = ["fc-match", "--format=%{family}\n%{file}", _FONT_FAMILY]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        family, _, file = answer.partition("\n")
        if _FONT_FAMILY in family and Path(file).is_file():
            return Path(file)
    except (OSError, subprocess.SubprocessError):
        pass
    for path in _FONT_PATHS:
        if Path(path).is_file():
            return Path(path)
    raise ValueError(f"the font {_FONT_FAMILY} is missing; {_FONT_HELP}")


class SceneRenderer:
    """Draws scenes. `size` is only the default side of `sample`s made for it; each scene carries its own."""

    def __init__(self, size: int = 64, font: str | None = None):
        """Loads the font; ValueError when it is missing or is not a colour emoji font."""
        self.size = size
        path = find_font(font)
        layout = ImageFont.Layout.RAQM if features.check("raqm") else ImageFont.Layout.BASIC
        try:
            self._font = ImageFont.truetype(str(path), _BITMAP_SIZE, layout_engine=layout)
        except OSError as error:
            raise ValueError(f"cannot read the emoji font {path} ({error}); {_FONT_HELP}") from None
        self._glyphs: dict[tuple[str, str | None], list[Image.Image]] = {}

    def _pyramid(self, name: str, color: str | None) -> list[Image.Image]:
        key = (name, color)
        if key not in self._glyphs:
            glyph = self._draw(OBJECT_EMOJI[name])
            if color is not None:
                glyph = _tint(glyph, COLORS[color])
            levels = []
            for side in _PYRAMID:
                scale = side / max(glyph.size)
                shape = (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale)))
                levels.append(glyph.resize(shape, Image.Resampling.LANCZOS).convert("RGBa"))
            self._glyphs[key] = levels
        return self._glyphs[key]

    def _draw(self, emoji: str) -> Image.Image:
        canvas = Image.new("RGBA", (4 * _BITMAP_SIZE, 2 * _BITMAP_SIZE))
        ImageDraw.Draw(canvas).text((20, 20), emoji, font=self._font, embedded_color=True)
        box = canvas.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox()
        if box is None:
            raise ValueError(f"the font does not draw {emoji}; {_FONT_HELP}")
        return canvas.crop(box)

    def render(self, scene: Scene) -> RenderedScene:
        """Picture of the scene: antialiased, deterministic."""
        size, n = scene.size, len(scene.objects)
        backdrop, far = _backdrop(scene.background, size, scene.ground)
        canvas, depth = backdrop.copy(), far.copy()
        masks = np.zeros((n, size, size), dtype=bool)
        boxes = np.zeros((n, 4), dtype=np.float32)
        for i, item in enumerate(scene.objects):
            x0, y0, x1, y1 = item.box()
            left, top = max(0, math.floor(x0) - 1), max(0, math.floor(y0) - 1)
            right, bottom = min(size, math.ceil(x1) + 1), min(size, math.ceil(y1) + 1)
            if left >= right or top >= bottom:
                continue
            levels = self._pyramid(item.name, item.color)
            glyph = next((g for g in reversed(levels) if max(g.size) >= item.size), levels[0])
            scale = max(glyph.size) / item.size
            c = scale * math.cos(math.radians(item.angle))
            s = scale * math.sin(math.radians(item.angle))
            dx, dy = left - item.x, top - item.y
            matrix = (c, -s, c * dx - s * dy + glyph.width / 2, s, c, s * dx + c * dy + glyph.height / 2)
            shape = (right - left, bottom - top)
            layer = glyph.transform(shape, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
            rgba = np.asarray(layer).astype(np.uint16)
            alpha = rgba[..., 3:]
            region = canvas[top:bottom, left:right]
            region[...] = rgba[..., :3] + (region * (255 - alpha) + 127) // 255
            solid = alpha[..., 0] > 127
            masks[:i, top:bottom, left:right] &= ~solid
            masks[i, top:bottom, left:right] = solid
            depth[top:bottom, left:right][solid] = _depth(scene, i)
        for i in range(n):
            columns, rows = np.flatnonzero(masks[i].any(0)), np.flatnonzero(masks[i].any(1))
            if len(columns):
                boxes[i] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        return RenderedScene(np.minimum(canvas, 255).astype(np.uint8), masks, boxes, depth, scene)


def ground_depth(y: float, size: int) -> float:
    """Depth in [0, 0.9] of the point of the ground plane seen at height y (pixels from the top)."""
    return 0.9 * min(1.0, max(0.0, (size - y) / (size * (1 - HORIZON_HEIGHT))))


def _depth(scene: Scene, i: int) -> float:
    if scene.ground:
        return ground_depth(scene.objects[i].box()[3], scene.size)
    return 0.75 - 0.5 * (i + 1) / (len(scene.objects) + 1)


@lru_cache(maxsize=64)
def _backdrop(background: str, size: int, ground: bool) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """Pixels uint16 (size, size, 3) and depth float32 (size, size) without any item."""
    color = np.array(BACKGROUNDS[background], dtype=np.float32)
    rows = (np.arange(size, dtype=np.float32) + 0.5) / size
    shade = 1.0 - 0.06 * rows
    depth = np.ones(size, dtype=np.float32)
    if ground:
        below = rows > HORIZON_HEIGHT
        shade = np.where(below, 0.80 - 0.08 * (rows - HORIZON_HEIGHT), shade).astype(np.float32)
        depth = np.where(below, [ground_depth(float(r) * size, size) for r in rows], depth).astype(np.float32)
    pixels = np.broadcast_to((color * shade[:, None])[:, None], (size, size, 3))
    return np.rint(pixels).astype(np.uint16), np.ascontiguousarray(np.broadcast_to(depth[:, None], (size, size)))


def _tint(glyph: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """The glyph in one colour: its stretched luminance (median at the middle) runs along dark -> colour -> light;
    alpha is kept.
    """
    pixels = np.asarray(glyph).astype(np.float32)
    alpha = pixels[..., 3]
    grey = pixels[..., :3] @ np.array([0.299, 0.587, 0.114], dtype=np.float32) / 255
    low, middle, high = np.percentile(grey[alpha > 127], [2, 50, 98])
    spread = np.where(grey < middle, max(middle - low, 0.15), max(high - middle, 0.15))
    tone = (0.5 + 0.5 * (grey - middle) / spread).clip(0, 1)[..., None]
    mid = np.array(color, dtype=np.float32)
    dark, light = 0.32 * mid, mid + 0.55 * (255 - mid)
    ramp = np.where(tone < 0.5, dark + 2 * tone * (mid - dark), mid + (2 * tone - 1) * (light - mid))
    out = np.concatenate([ramp, alpha[..., None]], axis=-1)
    return Image.fromarray(np.rint(out).astype(np.uint8), "RGBA")
