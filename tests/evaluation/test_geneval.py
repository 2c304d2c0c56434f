"""GenEval's rules on hand-made detections; every case has a neighbour that must come out the other way."""

from __future__ import annotations

import pytest

from unigen.evaluation.detector import Detection
from unigen.evaluation.geneval import count_surplus_objects, evaluate, group_by_class, relations


def thing(name: str, x: float, y: float, color: str = "natural", score: float = 0.9, side: float = 20) -> Detection:
    return Detection(name, color, score, (x - side / 2, y - side / 2, x + side / 2, y + side / 2))


def verdict(spec: dict, *objects: Detection, threshold: float = 0.3) -> bool:
    return evaluate(spec, group_by_class(objects, threshold)).correct


@pytest.mark.parametrize(
    "dx, dy, expected",
    [
        (-30, 0, {"left of"}),
        (30, 0, {"right of"}),
        (0, -30, {"above"}),  # y grows downwards
        (0, 30, {"below"}),
        (30, 30, {"right of", "below"}),  # GenEval's diagonal: (30-4)/42.4 = 0.61 on both axes
        (-30, -30, {"left of", "above"}),
        (20, 20, {"right of", "below"}),  # (20-4)/28.3 = 0.566
        (12, 12, set()),  # (12-4)/17 = 0.47 on both: no relation at all
        (3, 3, set()),  # inside the slack
        (4, 0, set()),  # exactly the slack
        (30, 14, {"right of"}),  # (14-4)/33.1 = 0.30
        (0, 0, set()),
    ],
)
def test_relations(dx: float, dy: float, expected: set[str]) -> None:
    a, b = thing("a", 50 + dx, 50 + dy), thing("b", 50, 50)
    assert relations(a.box, b.box) == expected


def test_relation_slack_grows_with_the_boxes() -> None:
    small = thing("a", 70, 50, side=10), thing("b", 50, 50, side=10)
    large = thing("a", 70, 50, side=60), thing("b", 50, 50, side=60)
    assert relations(small[0].box, small[1].box) == {"right of"}  # (20-2)/20 = 0.9
    assert relations(large[0].box, large[1].box) == set()  # (20-12)/20 = 0.4


def test_single_object_and_threshold() -> None:
    spec = {"tag": "single_object", "include": [{"class": "cat", "count": 1}]}
    assert verdict(spec, thing("cat", 20, 20))
    assert verdict(spec, thing("cat", 20, 20), thing("dog", 50, 50))  # surplus is allowed by GenEval
    assert not verdict(spec, thing("dog", 20, 20))
    assert not verdict(spec)
    assert not verdict(spec, thing("cat", 20, 20, score=0.3))  # strictly above
    assert verdict(spec, thing("cat", 20, 20, score=0.31))


def test_counting_is_exact_through_exclude_and_uses_its_threshold() -> None:
    spec = {
        "tag": "counting",
        "include": [{"class": "apple", "count": 2}],
        "exclude": [{"class": "apple", "count": 3}],
    }
    apples = [thing("apple", x, 20) for x in (10, 30, 50)]
    assert verdict(spec, *apples[:2])
    assert not verdict(spec, *apples)
    assert not verdict(spec, *apples[:1])
    weak = thing("apple", 50, 50, score=0.5)
    assert not verdict(spec, *apples[:2], weak)
    assert verdict(spec, *apples[:2], weak, threshold=0.6)


def test_two_objects() -> None:
    spec = {"tag": "two_object", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}]}
    assert verdict(spec, thing("cat", 20, 20), thing("dog", 40, 40))
    assert not verdict(spec, thing("cat", 20, 20), thing("cat", 40, 40))


def test_color_reads_the_most_confident_object() -> None:
    spec = {"tag": "colors", "include": [{"class": "horse", "count": 1, "color": "blue"}]}
    assert verdict(spec, thing("horse", 20, 20, "blue"))
    assert not verdict(spec, thing("horse", 20, 20, "red"))
    assert not verdict(spec, thing("horse", 20, 20, "blue", score=0.5), thing("horse", 40, 40, "red", score=0.9))
    assert verdict(spec, thing("horse", 20, 20, "blue", score=0.9), thing("horse", 40, 40, "red", score=0.5))


def test_color_attribution_binds_colors_to_objects() -> None:
    spec = {
        "tag": "color_attr",
        "include": [{"class": "horse", "count": 1, "color": "blue"}, {"class": "dog", "count": 1, "color": "red"}],
    }
    assert verdict(spec, thing("horse", 20, 20, "blue"), thing("dog", 40, 40, "red"))
    assert not verdict(spec, thing("horse", 20, 20, "red"), thing("dog", 40, 40, "blue"))


def test_position_clause_0_is_the_reference() -> None:
    spec = {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "horse", "count": 1, "position": ["left of", 0]}],
    }
    assert verdict(spec, thing("horse", 10, 30), thing("dog", 50, 30))
    assert not verdict(spec, thing("horse", 50, 30), thing("dog", 10, 30))
    assert not verdict(spec, thing("horse", 10, 30))  # no target
    assert verdict(spec, thing("horse", 10, 10), thing("dog", 45, 45))  # diagonal: left of AND above
    found = evaluate(spec, group_by_class([thing("horse", 50, 30), thing("dog", 10, 30)], 0.3))
    assert found.clause_share == 0.5 and "expected horse left of target" in found.reason
    assert "no target" in evaluate(spec, group_by_class([thing("horse", 10, 30)], 0.3)).reason


def test_no_more_than_sixteen_of_a_class() -> None:
    assert len(group_by_class([thing("ant", i, i) for i in range(20)], 0.3)["ant"]) == 16


def test_surplus_counts_every_class() -> None:
    spec = {"include": [{"class": "cat", "count": 1}]}
    assert count_surplus_objects(spec, group_by_class([thing("cat", 20, 20)], 0.3)) == 0
    assert (
        count_surplus_objects(
            spec, group_by_class([thing("cat", 20, 20), thing("cat", 40, 40), thing("dog", 9, 9)], 0.3)
        )
        == 2
    )
