"""GenEval's verdict (Ghosh et al. 2023, arXiv 2310.11513) on detections: six tasks, exact rules, pure Python.

Reads lists of objects with a class, a colour and a box. Checked against hand-made cases in
`tests/evaluation/test_geneval.py`. Does not depend on: pictures, detectors, models.

A specification is {"tag", "include": [clause], "exclude": [clause]}; a clause is {"class", "count"} with optional
"color" and "position": [relation, index of the reference clause]. The picture is correct when every include clause
holds and no exclude clause does. Boxes are (x0, y0, x1, y1) in pixels, y downwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, Protocol, TypedDict

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
POSITION_SLACK = 0.1
MAX_PER_CLASS = 16
RELATIONS = ("left of", "right of", "above", "below")

Box = tuple[float, float, float, float]
Clause = TypedDict(
    "Clause", {"class": str, "count": int, "color": NotRequired[str], "position": NotRequired[Sequence[Any]]}
)
"""Objects of one class. position: the relation, and the index of the reference clause."""


class Specification(TypedDict):
    """The objects that an image is to have, and those that it is not to have."""

    tag: str
    """One of `TAGS`."""
    include: list[Clause]
    """Each class has at least `count` objects."""
    exclude: NotRequired[list[Clause]]
    """Each class has fewer than `count` objects."""


class DetectedObject(Protocol):
    """One detected object."""

    @property
    def name(self) -> str:
        """Class name."""
        ...

    @property
    def color(self) -> str:
        """Colour name."""
        ...

    @property
    def score(self) -> float:
        """Confidence in [0, 1]."""
        ...

    @property
    def box(self) -> Box:
        """(x0, y0, x1, y1) in pixels, y downwards."""
        ...


def relations(box_a: Box, box_b: Box) -> set[str]:
    """Where A lies relative to B: offset of centres, each axis shortened by a tenth of both boxes' sides, divided by
    the length of the full offset; beyond 0.5 on an axis the relation holds.

    Args:
        box_a: box of A, in pixels.
        box_b: box of B, in pixels.

    Returns:
        Names of `RELATIONS`: two for a diagonal offset, none for a small one.
    """
    offset = [(box_a[i] + box_a[i + 2] - box_b[i] - box_b[i + 2]) / 2 for i in (0, 1)]
    sides = [box_a[i + 2] - box_a[i] + box_b[i + 2] - box_b[i] for i in (0, 1)]
    revised = [
        max(abs(o) - POSITION_SLACK * abs(s), 0.0) * (1 if o > 0 else -1) for o, s in zip(offset, sides, strict=True)
    ]
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    if max(abs(r) for r in revised) < 1e-3:
        return set()
    dx, dy = revised[0] / length, revised[1] / length
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, true in holds.items() if true}


def group_by_class(objects: Iterable[DetectedObject], threshold: float) -> dict[str, list[DetectedObject]]:
    """Group detections by class.

    Args:
        objects: detections.
        threshold: score in [0, 1] above which one counts.

    Returns:
        Detections by class name, by falling score, at most `MAX_PER_CLASS` of a class.
    """
    objects_by_class: dict[str, list[DetectedObject]] = {}
    for detected in sorted(objects, key=lambda o: -o.score):
        if detected.score > threshold and len(objects_by_class.setdefault(detected.name, [])) < MAX_PER_CLASS:
            objects_by_class[detected.name].append(detected)
    return objects_by_class


@dataclass(frozen=True)
class GenEvalResult:
    """The verdict on one picture."""

    correct: bool
    """GenEval's score."""
    reason: str
    """What fails; empty where nothing does."""
    clause_share: float
    """The share of the clauses that hold, in [0, 1]: a denser reward."""


def evaluate(spec: Specification, objects_by_class: Mapping[str, list[DetectedObject]]) -> GenEvalResult:
    """GenEval's verdict.

    Args:
        spec: the specification.
        objects_by_class: `group_by_class` at the tag's threshold (counting has a stricter one).

    Returns:
        The verdict.
    """
    reasons: list[str] = []
    groups: list[list[DetectedObject] | None] = []
    for clause in spec["include"]:
        name, count = clause["class"], clause["count"]
        group = objects_by_class.get(name, [])[:count]
        holds = len(group) >= count
        if not holds:
            reasons.append(f"expected {name}>={count}, found {len(group)}")
        else:
            if "color" in clause:
                num_correct = sum(obj.color == clause["color"] for obj in group)
                if num_correct < count:
                    holds = False
                    reasons.append(f"expected {clause['color']} {name}>={count}, found {num_correct}")
            if "position" in clause and holds:
                relation, index = clause["position"]
                target = groups[index]
                if target is None:
                    holds = False
                    reasons.append(f"no target for {name} to be {relation}")
                elif any(relation not in relations(a.box, b.box) for a in group for b in target):
                    holds = False
                    reasons.append(f"expected {name} {relation} target")
        groups.append(group if holds else None)
    num_satisfied = sum(group is not None for group in groups)
    for clause in spec.get("exclude", []):
        num_excluded = len(objects_by_class.get(clause["class"], []))
        if num_excluded >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {num_excluded}")
        else:
            num_satisfied += 1
    return GenEvalResult(not reasons, "; ".join(reasons), num_satisfied / (len(groups) + len(spec.get("exclude", []))))


def count_surplus_objects(spec: Specification, objects_by_class: Mapping[str, list[DetectedObject]]) -> int:
    """Count objects beyond what the include clauses ask for, of any class. The strict score fails an image with any.

    Args:
        spec: the specification.
        objects_by_class: as of `evaluate`.

    Returns:
        The number of objects.
    """
    requested_counts: dict[str, int] = {}
    for clause in spec["include"]:
        requested_counts[clause["class"]] = requested_counts.get(clause["class"], 0) + clause["count"]
    return sum(max(0, len(group) - requested_counts.get(name, 0)) for name, group in objects_by_class.items())
