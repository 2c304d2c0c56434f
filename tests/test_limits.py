"""One table of limits: Python, the command line and the server refuse the same numbers, each in one line.

Run: pytest tests/test_limits.py
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
import pytest

from unigen.commands import main as cli
from unigen.limits import LIMITS, SERVER_LIMITS, check_limit, limit_argument, parse_limit


@pytest.mark.parametrize("name", LIMITS)
def test_both_ends_of_a_range_are_in_it_and_nothing_beyond(name: str) -> None:
    limit = LIMITS[name]
    step = 1 if limit.whole else 1e-6
    assert check_limit(name, limit.high) == limit.high
    assert check_limit(name, limit.low + (1e-6 if limit.above else 0)) >= limit.low
    beyond: list[Any] = [limit.low - step, limit.high + step, math.nan, math.inf, -math.inf, 10**400, True, "1", None]
    beyond += [b"1", [1], {}, object(), 1j, *([limit.low] if limit.above else []), *([1.5, 1.0] if limit.whole else [])]
    for value in beyond:
        with pytest.raises(ValueError, match=f"^{name} must be a (whole )?number ") as caught:
            check_limit(name, value)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_numbers_of_numpy_are_numbers() -> None:
    assert check_limit("steps", np.int64(3)) == 3 and isinstance(check_limit("steps", np.int64(3)), int)
    assert check_limit("guidance", np.float32(2.5)) == 2.5


def test_texts_are_read_as_numbers_are_written() -> None:
    assert parse_limit("seed", " 18446744073709551615 ") == 2**64 - 1
    assert parse_limit("guidance", "1e1") == 10.0 and parse_limit("top_p", ".5") == 0.5
    for text in ("1_0", "0x10", "", "one", "1.0", "١", "9" * 5000, "1e3", "--1"):
        with pytest.raises(ValueError, match="steps must be"):
            parse_limit("steps", text)
    for text in ("1_0", "nan", "inf", "1e999", "", "a", "1e", "0x1"):
        with pytest.raises(ValueError, match="guidance must be"):
            parse_limit("guidance", text)


def test_the_server_may_ask_for_less_and_never_for_more() -> None:
    for name, limit in SERVER_LIMITS.items():
        assert LIMITS[name].low <= limit.low and limit.high <= LIMITS[name].high


FLAGS = {
    "seed": "--seed",
    "n": "-n",
    "candidates": "--candidates",
    "steps": "--steps",
    "guidance": "--guidance",
    "temperature": "--temperature",
    "top_k": "--top-k",
    "top_p": "--top-p",
}


@pytest.mark.parametrize("name", FLAGS)
def test_the_command_line_has_these_limits(name: str) -> None:
    limit = LIMITS[name]
    parser = cli.build_parser("generate")
    assert getattr(parser.parse_args(["x", FLAGS[name], str(limit.high)]), name) == limit.high
    for value in (limit.high + 1, limit.low - 1):
        with pytest.raises(ValueError, match=f"argument {FLAGS[name]}: '{value}' is not a (whole )?number"):
            parser.parse_args(["x", FLAGS[name], str(value)])
    with pytest.raises(argparse.ArgumentTypeError):
        limit_argument(name)("none")


def test_the_server_has_these_limits() -> None:
    pytest.importorskip("fastapi")
    from pydantic import ValidationError

    from unigen.serving.protocol import ChatRequest

    messages = [{"role": "user", "content": "hello"}]
    names = {"partial_images": "previews"} | {n: n for n in (*FLAGS, "max_tokens", "max_images") if n != "guidance"}
    for field, name in names.items():
        limit, more = SERVER_LIMITS[name], {"stream": True} if name == "previews" else {}
        asked = ChatRequest.model_validate({"model": "m", "messages": messages, field: limit.high, **more})
        assert getattr(asked, field) == limit.high
        for value in (limit.high + 1, limit.low - 2 if name == "top_k" else limit.low - 1):  # top_k -1 asks for nothing
            with pytest.raises(ValidationError) as caught:
                ChatRequest.model_validate({"model": "m", "messages": messages, field: value, **more})
            assert [error["loc"] for error in caught.value.errors()] == [(field,)]
