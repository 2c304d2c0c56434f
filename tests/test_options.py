"""One table of options: Python, the command line and the server take the same values, and refuse others in one line.

Run: pytest tests/test_options.py
"""

from __future__ import annotations

import argparse
import inspect
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from unigen.commands import main as cli
from unigen.diffusion.options import FlowOptions
from unigen.generators.options.masked import MaskedOptions
from unigen.inference.options import AnswerCount, RequestOptions
from unigen.option_groups import collect
from unigen.options import (
    RENAMED,
    GroupType,
    Option,
    OptionGroup,
    OptionSet,
    add_arguments,
    given_arguments,
    merge_declared,
    option,
    option_names,
    resolve,
)
from unigen.samplers.options import CodeSampling
from unigen.utils.argparser import OneLineParser
from unigen.utils.option_types import SEED, FloatRange, IntRange, Name, Size

TABLE = {name: declared for name, (_, declared) in merge_declared(collect()).items()}
RANGES = {name: one.type for name, one in TABLE.items() if isinstance(one.type, (IntRange, FloatRange))}


@pytest.mark.parametrize("name", RANGES)
def test_both_ends_of_a_range_are_in_it_and_nothing_beyond(name: str) -> None:
    kind = RANGES[name]
    above = isinstance(kind, FloatRange) and kind.above
    step = 1 if isinstance(kind, IntRange) else 1e-6
    assert kind.check(name, kind.high) == kind.high
    assert kind.check(name, kind.low + (1e-6 if above else 0)) >= kind.low
    beyond: list[Any] = [kind.low - step, kind.high + step, math.nan, math.inf, -math.inf, 10**400, True, "1", None]
    beyond += [b"1", [1], {}, object(), 1j, *([kind.low] if above else [])]
    beyond += [1.5, 1.0] if isinstance(kind, IntRange) else []
    for value in beyond:
        with pytest.raises(ValueError, match=f"^{name} must be a (whole )?number ") as caught:
            kind.check(name, value)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_numbers_of_numpy_are_numbers() -> None:
    steps = IntRange(1, 250).check("steps", np.int64(3))
    assert steps == 3 and type(steps) is int
    assert FloatRange(0, 100).check("guidance", np.float32(2.5)) == 2.5


def test_texts_are_read_as_numbers_are_written() -> None:
    assert SEED.parse(" 18446744073709551615 ") == 2**64 - 1
    assert FloatRange(0, 100).parse("1e1") == 10.0 and FloatRange(0, 1).parse(".5") == 0.5
    for text in ("1_0", "0x10", "", "one", "1.0", "١", "9" * 5000, "1e3", "--1"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number from 1 to 250"):
            IntRange(1, 250).parse(text)
    for text in ("1_0", "nan", "inf", "1e999", "", "a", "1e", "0x1"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a number from 0 to 100"):
            FloatRange(0, 100).parse(text)


def test_a_group_checks_what_is_given_and_leaves_the_rest_to_the_model() -> None:
    assert FlowOptions(solver="heun").to_dict() == {"solver": "heun"}
    for given, said in (
        ({"steps": 0}, "steps must be a whole number from 1 to 250, not 0"),
        ({"steps": 300}, "steps must be a whole number from 1 to 250, not 300"),
        ({"solver": "rk9"}, "unknown solver 'rk9': one of euler"),
        ({"solver": 3}, "solver must be a name, not 3"),
        ({"steps": 1, "guider": "cfg-zero"}, "cfg-zero needs at least 2 steps, not 1"),
    ):
        with pytest.raises(ValueError, match=said):
            FlowOptions(**given)
    assert MaskedOptions(steps=300).steps == 300


def test_what_comes_first_counts() -> None:
    found = resolve(FlowOptions, {"steps": None, "top_k": 3}, {"steps": 5}, {"steps": 7, "solver": "heun"})
    assert found == FlowOptions(steps=5, solver="heun", guider="cfg")
    groups = OptionSet([found])
    assert groups[FlowOptions] is found and FlowOptions in groups and CodeSampling not in groups
    assert groups[CodeSampling] == resolve(CodeSampling, {}) and groups[CodeSampling].temperature == 0.8


def unlike(groups: list[GroupType]) -> list[str]:
    """Options that groups declare by one name and not alike."""

    def face(one: Option) -> tuple[Any, ...]:
        return one.help, one.flag(""), one.http, type(one.type)

    found = []
    for name in option_names(groups):
        declared = [group.options()[name] for group in groups if name in group.options()]
        if len({face(one) for one in declared}) > 1:
            found.append(name)
    return found


def test_one_name_means_one_thing() -> None:
    @dataclass(frozen=True)
    class Other(OptionGroup):
        steps: float = option(0.5, "length of a step", FloatRange(0, 1))

    assert unlike(list(collect())) == []
    assert unlike([*collect(), Other]) == ["steps"]
    assert not set(RENAMED) & set(option_names(collect())) and set(RENAMED.values()) <= set(option_names(collect()))


FLAGS = {name: one.flag(name) for name, one in TABLE.items() if name in RANGES and name != "variation"}


@pytest.mark.parametrize("name", [name for name in FLAGS if FLAGS[name]])
def test_the_command_line_has_these_ranges(name: str) -> None:
    kind, parser = RANGES[name], OneLineParser()
    add_arguments(parser, collect())
    given = given_arguments(parser.parse_args([FLAGS[name], str(kind.high)]), collect())
    assert given == {name: kind.high}
    for value in (kind.high + 1, kind.low - 1):
        with pytest.raises(ValueError, match=f"argument {FLAGS[name]}: '{value}' is not a (whole )?number"):
            parser.parse_args([f"{FLAGS[name]}={value}"])


@pytest.mark.parametrize("name", ["n", "seed", "steps", "top_p", "solver", "guider", "size", "negative_prompt"])
def test_generate_takes_them(name: str) -> None:
    assert f" {TABLE[name].flag(name)} " in cli.build_parser("generate").format_help()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--sampler euler", "--sampler is called --solver now"),
        ("--sampler=euler", "--sampler is called --solver now"),
        ("--guidance-kind", "--guidance-kind is called --guider now"),
        ("--solvr euler", "did you mean '--solver'"),
    ],
)
def test_an_old_flag_says_the_new_one(line: str, said: str) -> None:
    for command in ("generate", "edit", "inpaint", "story", "chat"):
        rest = {"generate": ["x"], "edit": ["x", "y"], "inpaint": ["x", "y", "--vary", "1"], "story": ["x"]}
        with pytest.raises(ValueError, match=said):
            cli.build_parser(command).parse_args([*rest.get(command, []), *line.split()])
    assert "--sampler" not in cli.build_parser("generate").format_help()


def test_an_old_name_says_the_new_one_in_python(engine: Any) -> None:
    for old, new in (("sampler", "solver"), ("fixed", "fixed_codes"), ("negative", "negative_prompt")):
        with pytest.raises(ValueError, match=f"the option '{old}' is called '{new}' now"):
            engine.generate("a dog", **{old: "x"})


def test_groups_are_the_same_as_their_options_by_name(engine: Any) -> None:
    """Negative control: other steps are another image."""
    options: dict[str, Any] = {"generator": "flow", "seed": 3}
    by_name = engine.generate("a dog", steps=4, **options)
    assert engine.generate("a dog", options=[FlowOptions(steps=4)], **options).tobytes() == by_name.tobytes()
    assert engine.generate_batch(["a dog"], [3], generator="flow", options=FlowOptions(steps=4))[0] == by_name
    assert engine.generate("a dog", options=[FlowOptions(steps=3)], **options).tobytes() != by_name.tobytes()
    assert "options" in inspect.signature(engine.generate).parameters
    for group, message in (
        (RequestOptions(seed=5), "give the seed by its name, seed=5"),
        (AnswerCount(n=2), "options cannot hold AnswerCount: it takes .*FlowOptions"),
        (MaskedOptions(steps=4), "flow does not take steps"),
        ({"steps": 4}, "must be a list of groups"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.generate("a dog", generator="flow", options=[group])


def test_the_server_has_these_ranges() -> None:
    pytest.importorskip("fastapi")
    from pydantic import ValidationError

    from unigen.serving.protocol import ChatRequest

    messages = [{"role": "user", "content": "hello"}]
    for name, declared in TABLE.items():
        kind, field = declared.served or declared.type, declared.field_name(name)
        if not isinstance(kind, (IntRange, FloatRange)) or field not in ChatRequest.model_fields or not field:
            continue
        more = {"stream": True} if name == "previews" else {}
        asked = ChatRequest.model_validate({"model": "m", "messages": messages, field: kind.high, **more})
        assert getattr(asked, field) == kind.high
        for value in (kind.high + 1, kind.low - 2 if name == "top_k" else kind.low - 1):  # top_k -1 asks for nothing
            with pytest.raises(ValidationError) as caught:
                ChatRequest.model_validate({"model": "m", "messages": messages, field: value, **more})
            assert [error["loc"] for error in caught.value.errors()] == [(field,)]


def test_the_server_may_ask_for_less_and_never_for_more() -> None:
    limited = {name: one for name, one in TABLE.items() if one.served is not None}
    assert {"n", "candidates", "previews"} <= set(limited)
    for declared in limited.values():
        assert isinstance(declared.served, IntRange) and isinstance(declared.type, IntRange)
        assert declared.type.low <= declared.served.low and declared.served.high <= declared.type.high


def test_the_server_reads_old_names_and_not_both() -> None:
    pytest.importorskip("fastapi")
    from pydantic import ValidationError

    from unigen.serving.protocol import GenerationRequest, VariationRequest

    asked = GenerationRequest.model_validate({"prompt": "a", "sampler": "heun", "guidance_kind": "apg", "size": "8x16"})
    assert asked.options() == {"solver": "heun", "guider": "apg", "size": (8, 16)}
    assert VariationRequest.model_validate({"vary": 0.25}).variation == 0.25
    with pytest.raises(ValidationError, match="sampler is called solver now: give one"):
        GenerationRequest.model_validate({"prompt": "a", "sampler": "heun", "solver": "heun"})


def test_names_and_sizes() -> None:
    assert Name(lambda: ["a", "b"]).check("way", "b") == "b" and Size().parse("8x16") == (8, 16)
    with pytest.raises(ValueError, match="unknown way 'c': one of a, b"):
        Name(lambda: ["a", "b"]).check("way", "c")
    with pytest.raises(argparse.ArgumentTypeError, match="not a size like 512x768"):
        Size().parse("8")
    assert Size().from_json("auto") is None and Size().from_json("8x16") == (8, 16)
    assert AnswerCount.argument("n")("3") == 3 and RequestOptions(size=[8, 16]).size == (8, 16)  # type: ignore[arg-type]
