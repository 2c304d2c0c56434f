"""Every argument of every public method, given what it cannot mean: a right answer or one line, never another error.

Run: pytest tests/test_bad_values.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import unigen
from unigen.document import Document, Segment
from unigen.inference.engine import GENERATE_OPTIONS, Engine
from unigen.options import merge_declared
from unigen.samplers.options import CodeSampling, GuidanceOptions, TextSampling


def takes(name: str, value: object) -> bool:
    """Whether an option of all generators takes a value."""
    _, declared = merge_declared((GuidanceOptions, CodeSampling, TextSampling)).get(name, (None, None))
    try:
        return declared is not None and declared.type.check(name, value) is not None
    except ValueError:
        return False


VALUES: dict[str, Any] = {
    "none": None,
    "empty": "",
    "blank": " \n",
    "text": "nonesuch",
    "long": "x" * 100_000,
    "half": "a \ud83d",
    "zero byte": "a\0b",
    "minus one": -1,
    "huge": 10**5000,
    "true": True,
    "nan": math.nan,
    "infinite": math.inf,
    "half of one": 0.5,
    "bytes": b"x",
    "list": [],
    "list of none": [None],
    "lists": [[]],
    "dict": {},
    "set": {1},
    "object": object(),
    "function": len,
    "path": Path("nonesuch.png"),
    "picture's name": "nonesuch.png",
    "array": np.zeros(3),
    "no pixels": np.zeros((0, 4, 3), np.uint8),
    "tensor": torch.zeros(2),
    "number as a tensor": torch.tensor(1),
}
RIGHT = {
    "none": {  # left to the model
        *(f"generate.{name}" for name in GENERATE_OPTIONS if name not in ("n", "candidates", "seed", "previews")),
        *("generate_batch.seeds", "describe.question", "flow.steps", "flow.solver", "flow.guider", "masked.steps"),
        *("masked.fixed_codes", "inpaint.generator", "joint.text", "joint.image", "Document.size", "load.name"),
        *("stream.max_images", "stream.previews"),
    },
    "empty": {"generate.negative_prompt", "Segment.text", "Segment.image", "Segment.label"},
    "blank": {"Segment.text", "Segment.image", "Segment.label"},
    "text": {
        *("generate.prompt", "stream.prompt", "describe.question", "edit.instruction", "inpaint.prompt", "joint.text"),
        *("hidden_states.prompt", "Document.of", "Segment.text", "Segment.image", "Segment.label"),
    },
    "long": {"Document.of", "Segment.text", "Segment.image", "Segment.label"},
    "half": {"Segment.image", "Segment.label"},
    "minus one": {"Document.of", "Segment.label"},
    "huge": {"Document.of", "Segment.label"},
    "half of one": {f"generate.{name}" for name in GENERATE_OPTIONS if takes(name, 0.5)},
    "bytes": {"Segment.image"},
    "list": {"generate_batch.prompts", "Document.segments"},
    "path": {"Document.of", "Segment.image"},
    "picture's name": {
        *("Segment.text", "Segment.image", "Segment.label", "describe.question", "edit.instruction", "inpaint.prompt"),
        "joint.text",
    },
    "array": {"Document.of", "Segment.image"},
    "no pixels": {"Document.of", "Segment.image"},
    "tensor": {"Segment.image"},
    "number as a tensor": {"Segment.image"},
}
"""Where a value means something; elsewhere it is refused."""
RIGHT["zero byte"] = RIGHT["text"]


def calls(engine: Engine) -> dict[str, Callable[[Any], Any]]:
    picture, mask = Image.new("RGB", (16, 16), "teal"), Image.new("L", (16, 16), 255)
    found: dict[str, Callable[[Any], Any]] = {}

    def add(name: str, method: Callable[..., Any], names: str | tuple[str, ...], **given: Any) -> None:
        for one in names.split() if isinstance(names, str) else names:
            found[f"{name}.{one}"] = lambda value, one=one: method(**given | {one: value})

    add("generate", engine.generate, ("prompt", "output", *GENERATE_OPTIONS), prompt="a dog")
    add("masked", engine.generate, "steps fixed_codes", prompt="a dog", generator="masked")
    add("flow", engine.generate, "steps solver guider", prompt="a dog", generator="flow")
    add("generate_batch", engine.generate_batch, "prompts seeds output candidates", prompts=["a dog"])
    add("stream", engine.stream, "prompt output max_images previews", prompt="a dog")
    add("describe", engine.describe, "image question candidates", image=picture, max_tokens=2)
    add("edit", engine.edit, "image instruction", image=picture, instruction="turn")
    add("inpaint", engine.inpaint, "image prompt mask generator", image=picture, prompt="a dog", mask=mask)
    add("joint", engine.generate_joint, "text image")
    add("hidden_states", engine.hidden_states, "prompt")
    add("Segment", Segment, "text image label")
    add("Segment", Segment, "role", text="a")
    add("Document", Document, "segments")
    found["Document.of"] = Document.of
    found["Document.size"] = lambda size: engine.generate(Document([Segment(text="a dog")], size))
    found["Document.from_json"] = lambda data: Document.from_json(data)
    found["Segment.from_json"] = lambda data: Segment.from_json(data)
    found["Segment.from_json image"] = lambda data: Segment.from_json({"image": data, "text": None})
    found["Segment.from_json png"] = lambda data: Segment.from_json({"image": {"png": data}})
    found["Segment.from_json codes"] = lambda data: Segment.from_json({"image": {"codes": data}})
    found["Guidance.scales"] = lambda scales: unigen.Guidance(scales).combine([torch.zeros(1)] * 2)
    add("Guidance", unigen.Guidance, "guider interval")
    for name in "device dtype quantization lmm image_model connector engine vllm".split():
        found[f"load.{name}"] = lambda value, name=name: unigen.load(**{"name": "./nonesuch", name: value})  # type: ignore[misc]
    found["load.name"] = lambda name: name is None or unigen.load(name)
    return found


@pytest.mark.parametrize("value", VALUES)
def test_an_argument_means_something_or_is_refused_in_one_line(engine: Engine, value: str) -> None:
    wrong = []
    for name, call in calls(engine).items():
        try:
            call(VALUES[value])
            if name not in RIGHT.get(value, ()):
                wrong.append(f"{name} takes it")
        except ValueError as error:
            said = str(error)
            if "\n" in said or "truth value" in said or not 0 < len(said) < 500:
                wrong.append(f"{name}: {len(said)} characters, {said[:80]!r}")
            elif name in RIGHT.get(value, ()):
                wrong.append(f"{name} refuses it: {said[:80]}")
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}"[:200])
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda e, im: e.generate("a dog", gudance=3.0), "generate has no option 'gudance'; did you mean 'guidance'"),
        (lambda e, im: e.generate("a dog", colour="red"), "generate has no option 'colour': it takes n, candidates"),
        (lambda e, im: e.generate("a dog", seeds=[1]), "no option 'seeds'; did you mean 'seed'"),
        (lambda e, im: e.generate_batch(["a dog"], seed=1), "no option 'seed'; did you mean 'seeds'"),
        (lambda e, im: e.stream("a dog", n=2), "stream has no option 'n'"),
        (lambda e, im: e.describe(im, output="image"), "describe has no option 'output'"),
        (lambda e, im: e.edit(im, "turn", prompt="a"), "edit has no option 'prompt'"),
        (lambda e, im: e.generate_joint(output="text"), "generate_joint has no option 'output'"),
        (lambda e, im: e.inpaint(im, "a dog", im, box=1), "inpaint has no option 'box'"),
        (lambda e, im: e.build_request("a dog", "image", n=2), "a request has no option 'n'"),
        (
            lambda e, im: e.generate_batch("a cat"),
            "must be a list, with one answer each, not 'a cat': give",
        ),
        (lambda e, im: e.generate_batch(im), "must be a list, with one answer each, not Image"),
        (lambda e, im: e.generate_batch(["a", "b"], [1]), "2 prompts need as many seeds, not 1"),
        (lambda e, im: e.generate_batch(["a", "b"], "12"), "the seeds must be a list of whole numbers"),
        (lambda e, im: e.generate_batch(["a", "b"], 12), "the seeds must be a list of whole numbers"),
        (lambda e, im: e.generate_batch(["a"] * 1001), "at most 1,000 answers are made at a time, not 1,001"),
        (lambda e, im: e.generate("a", n=100, candidates=64), "at most 1,000 answers are made at a time, not 6,400"),
        (lambda e, im: e.generate("a", n=10**7), "n must be a whole number from 1 to 1,000"),
        (lambda e, im: e.generate(Document([])), "the prompt is empty"),
        (lambda e, im: e.generate(Document([Segment(text=" ")])), "the prompt is empty"),
        (lambda e, im: e.generate("a cat", generator=""), "generator must be a name, not ''"),
        (lambda e, im: e.generate("a cat", guidance=1e300), "guidance must be a number from 0 to 100"),
        (lambda e, im: e.generate("a cat", seed=-1), "seed must be a whole number from 0"),
        (lambda e, im: e.generate("a cat \ud83d"), r"text is not valid Unicode \(U\+D83D at position 6 is half"),
        (lambda e, im: e.describe(im, "what \udce9"), "the question is not valid Unicode"),
        (lambda e, im: e.stream("a dog " * 400, "image"), "shorten it"),
        (lambda e, im: unigen.load(""), "name must name a model or a folder, not ''"),
        (lambda e, im: unigen.load(5), "name must name a model or a folder, not 5"),
    ],
)
def test_what_is_said(engine: Engine, call: Any, said: str) -> None:
    """At the call, also by a stream that nobody reads."""
    with pytest.raises(ValueError, match=said) as caught:
        call(engine, Image.new("RGB", (16, 16), "teal"))
    assert "\n" not in str(caught.value)


def test_several_answers_about_a_picture_are_a_list(engine: Engine) -> None:
    said = engine.describe(Image.new("RGB", (16, 16), "teal"), n=2, candidates=1, max_tokens=4, temperature=1.5)
    assert isinstance(said, list) and len(said) == 2 and all(isinstance(one, str) for one in said)


def test_a_stream_that_nobody_reads_leaves_nothing(engine: Engine) -> None:
    engine.stream("a dog", "image")
    assert engine.generate("a dog", seed=1).tobytes() == engine.generate("a dog", seed=1).tobytes()
