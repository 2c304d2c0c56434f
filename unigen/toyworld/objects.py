"""The vocabulary of the rendered world: objects, tints, backgrounds, and the records `SceneObject` and `Scene`.

Knows names, glyphs and geometry. Does not depend on: fonts and pixels (`world.py`), how scenes are sampled
(`scenes.py`), sentences (`language.py`). Needs nothing but the standard library, so that prompts and scenes are made on
machines without the font.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# name: (emoji, width / height of the glyph's box in Noto Color Emoji 2.042,
#        tints too close to its natural colour to be told apart from it)
_TABLE: dict[str, tuple[str, float, tuple[str, ...]]] = {
    "horse": ("🐎", 1.11, ()),
    "cat": ("🐱", 1.12, ("yellow",)),
    "dog": ("🐶", 1.28, ()),
    "apple": ("🍎", 0.93, ("red",)),
    "pizza": ("🍕", 0.80, ()),
    "sunflower": ("🌻", 0.77, ("yellow",)),
    "rose": ("🌹", 0.70, ("red",)),
    "house": ("🏠", 1.02, ()),
    "rocket": ("🚀", 0.99, ()),
    "moon": ("🌙", 1.01, ("yellow",)),
    "star": ("⭐", 1.04, ("yellow",)),
    "tree": ("🌳", 0.89, ("green",)),
    "car": ("🚗", 1.58, ("red",)),
    "fish": ("🐟", 1.47, ("blue",)),
    "bird": ("🦜", 0.90, ("green",)),
    "raven": ("🐦‍⬛", 1.19, ()),
    "witch": ("🧙‍♀️", 0.98, ("blue",)),
    "robot": ("🤖", 1.00, ()),
    "elephant": ("🐘", 1.10, ()),
    "penguin": ("🐧", 0.66, ()),
    "umbrella": ("☂️", 1.01, ("blue", "purple")),
    "guitar": ("🎸", 1.00, ("red",)),
    "fireworks": ("🎆", 1.00, ("blue",)),
    "snowman": ("⛄", 0.77, ()),
    "butterfly": ("🦋", 1.23, ()),
    "turtle": ("🐢", 1.26, ("green",)),
    "frog": ("🐸", 1.15, ("green",)),
    "banana": ("🍌", 0.89, ("yellow",)),
    "mushroom": ("🍄", 0.96, ("red",)),
    "cactus": ("🌵", 0.75, ("green",)),
    "cake": ("🎂", 0.80, ()),
    "donut": ("🍩", 1.26, ()),
    "bike": ("🚲", 1.39, ()),
    "boat": ("⛵", 0.91, ("red",)),
    "plane": ("✈️", 1.01, ("blue",)),
    "balloon": ("🎈", 0.70, ("red",)),
    "key": ("🔑", 0.98, ("yellow",)),
    "crown": ("👑", 1.05, ("yellow",)),
    "whale": ("🐳", 1.11, ("blue",)),
    "crab": ("🦀", 1.41, ("red",)),
    "bee": ("🐝", 1.05, ("yellow",)),
    "rabbit": ("🐰", 0.76, ()),
    "ghost": ("👻", 1.02, ()),
    "pumpkin": ("🎃", 1.05, ("yellow",)),
    "castle": ("🏰", 1.03, ()),
    "clock": ("⏰", 0.86, ("red",)),
    "hat": ("🎩", 1.20, ()),
    "cow": ("🐄", 1.17, ()),
    "dragon": ("🐉", 0.86, ("green",)),
    "owl": ("🦉", 0.73, ()),
    "heart": ("❤️", 1.09, ("red",)),
    "bus": ("🚌", 1.47, ("blue",)),
}
OBJECT_EMOJI: dict[str, str] = {name: row[0] for name, row in _TABLE.items()}
ASPECTS: dict[str, float] = {name: row[1] for name, row in _TABLE.items()}

# the middle of each tint's ramp, sRGB 0-255
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 30, 36),
    "yellow": (246, 204, 18),
    "green": (34, 156, 54),
    "blue": (32, 88, 226),
    "purple": (126, 48, 190),
    "pink": (250, 96, 180),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (24, 24, 28),
    "grey": (150, 150, 152),
    "blue": (160, 204, 250),
    "green": (168, 222, 168),
    "yellow": (254, 240, 160),
    "pink": (255, 204, 222),
    "brown": (104, 72, 48),
}
NUMBER_WORDS = ("zero", "one", "two", "three", "four")
MAX_COUNT = 4
HORIZON_HEIGHT = 0.45  # of the picture's height, from the top; the ground is below it

_PLURALS = {
    "fish": "fish",
    "fireworks": "fireworks",
    "snowman": "snowmen",
    "witch": "witches",
    "butterfly": "butterflies",
}
_PLURALS |= {"cactus": "cactuses", "bus": "buses"}


def allowed_colors(name: str) -> tuple[str, ...]:
    """The colours in which this object may be painted: all but those close to its natural colour (a red apple is an
    apple).
    """
    return tuple(color for color in COLORS if color not in _TABLE[name][2])


def singular(name: str) -> str:
    """The noun for one such object."""
    return "firework" if name == "fireworks" else name


def plural(name: str) -> str:
    """The noun for several such objects."""
    return _PLURALS.get(name, name + "s")


PLURALS: dict[str, str] = {name: plural(name) for name in OBJECT_EMOJI}


@dataclass(frozen=True)
class SceneObject:
    """One object: centre (x, y) and longest side `size` of its upright box in pixels, `angle` in degrees
    counter-clockwise; `color` None is natural.
    """

    name: str
    color: str | None
    x: float
    y: float
    size: float
    angle: float

    def extent(self) -> tuple[float, float]:
        """Width and height in pixels of the box around the turned glyph, an upper bound of what is visible."""
        aspect = ASPECTS[self.name]
        w, h = (self.size, self.size / aspect) if aspect >= 1 else (self.size * aspect, self.size)
        c, s = math.cos(math.radians(self.angle)), abs(math.sin(math.radians(self.angle)))
        return w * c + h * s, w * s + h * c

    def box(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) in pixels around the turned glyph."""
        w, h = self.extent()
        return self.x - w / 2, self.y - h / 2, self.x + w / 2, self.y + h / 2


@dataclass(frozen=True)
class Scene:
    """Objects on a background: what a square picture shows."""

    objects: tuple[SceneObject, ...]
    """From back to front."""
    background: str
    """Its name."""
    size: int = 64
    """Pixels a side."""
    ground: bool = False
    """Whether there is a ground plane."""
