"""The table of pipelines in docs/models.md, row by row, on random weights: what each class draws, edits and inpaints,
that each option it offers changes the picture, and that it draws what diffusers does.

To print the table: PYTHONPATH=. python tests/test_pipeline_classes.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.tiny_pipelines import PIPELINES, flux_schnell, make_pipeline
from unigen.backends.diffusers_engine import DiffusersEngine, resize_to
from unigen.backends.diffusers_support import call_parameters, compatible_schedulers, needs_image, supported_options

FEW = {"DiTPipeline", "FluxPipeline", "StableDiffusionInpaintPipeline"}
"""Rows of the default suite."""
NAMES = [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in PIPELINES]
SIZE = (64, 96)
OTHER = {"steps": 8, "guidance": 2.5, "negative_prompt": "a hill", "strength": 0.5}
HEAD = "| class | draws | edits | inpaints | options |\n| --- | --- | --- | --- | --- |"


def row(engine: DiffusersEngine) -> str:
    """A class's row of the table."""
    facts = engine.info()
    draws = "no" if facts["prompt_type"].startswith("no") else facts["prompt_type"]
    solvers = f" ({', '.join(facts['solvers'])})" if facts["solvers"] else ""
    edits, inpaints = ("no" if facts[name] == "no" else "yes" for name in ("edit_pipeline", "inpaint_pipeline"))
    return f"| {facts['pipeline']} | {draws} | {edits} | {inpaints} | {', '.join(facts['takes'])}{solvers} |"


def words_of(engine: DiffusersEngine) -> Any:
    return 3 if "class_labels" in engine.call_parameters else "a red dog"


@pytest.mark.parametrize("name", NAMES)
def test_a_class_does_what_its_row_says(name: str, root: Path) -> None:
    engine = DiffusersEngine(make_pipeline(name))
    assert row(engine) in (root / "docs" / "models.md").read_text().splitlines()
    facts = engine.info()
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    picture, mask = Image.fromarray(noise), np.zeros_like(noise)
    mask[:, 35:] = 255
    tasks: list[tuple[str, Any]] = []
    if not facts["prompt_type"].startswith("no"):
        tasks.append(("text", lambda **more: engine.generate(words_of(engine), seed=3, **more)))
        drawn = engine.generate(words_of(engine), seed=3, **base(engine, "text"))
        assert drawn.tobytes() == diffusers_draws(engine).tobytes()
    if facts["edit_pipeline"] != "no":
        tasks.append(("edit", lambda **more: engine.edit(picture, "a hill", seed=3, **more)))
    if facts["inpaint_pipeline"] != "no":
        tasks.append(("inpaint", lambda **more: engine.inpaint(picture, "a hill", mask, seed=3, **more)))
    assert tasks
    for task, ask in tasks:
        form = engine._as_variant(task)
        given = base(engine, task)
        drawn = ask(**given)
        if task == "inpaint":
            made = np.asarray(drawn)
            assert (made[mask == 0] == noise[mask == 0]).all() and (made != noise).any()
        if task != "text" or "size" in given:
            assert drawn.size == (SIZE if task == "text" else picture.size)
        for option in supported_options(form):
            value = (96, 64) if option == "size" else OTHER[option]
            if option == "strength" and engine.default_values(form)[option] != 1:
                value = 1.0  # of all steps: a share that is nearer to the usual one may be as many
            more = {"guidance": 5.0} if option == "negative_prompt" else {}
            changed, usual = ask(**given | more | {option: value}), ask(**given | more) if more else drawn
            assert changed.tobytes() != usual.tobytes(), f"{option} of {task} changes nothing"
        for solver in compatible_schedulers(form, engine.default_scheduler):
            same = (
                type(engine.default_scheduler).__name__
                == compatible_schedulers(form, engine.default_scheduler)[solver].__name__
            )
            assert same or ask(**given | {"solver": solver}).tobytes() != drawn.tobytes(), solver


def base(engine: DiffusersEngine, task: str) -> dict[str, Any]:
    own = supported_options(engine._as_variant(task))
    few: dict[str, Any] = {"steps": 2 if task == "text" else 5, "size": SIZE}
    if task != "text":
        few.pop("size")
    if task == "inpaint" and "strength" not in own:
        few["size"] = SIZE  # else it is drawn at the size of the class's usual pictures
    few = {name: value for name, value in few.items() if name in own}
    more = {"prior_num_inference_steps": 2, "max_area": SIZE[0] * SIZE[1], "_auto_resize": False}
    more["use_resolution_binning"] = False  # which would draw sizes of real models
    takes = call_parameters(engine._as_variant(task))
    return few | {name: value for name, value in more.items() if name in takes}


def diffusers_draws(engine: DiffusersEngine) -> Image.Image:
    """What the pipeline itself draws of the same words."""
    import torch

    name = type(engine.pipe).__name__
    pipe = engine._as_variant("text") if needs_image(type(engine.pipe)) else make_pipeline(name)
    own, given = supported_options(pipe), base(engine, "text")
    named = {own.get(key, key): value for key, value in given.items() if key != "size"}
    if "size" in given:
        named |= {"width": given["size"][0], "height": given["size"][1]}
    if own.get("guidance") == "true_cfg_scale":
        named["negative_prompt"] = " "
    asked = words_of(engine)
    named |= {"class_labels": [asked]} if isinstance(asked, int) else {"prompt": asked}
    result = pipe(**named, generator=[torch.Generator().manual_seed(3)])
    return resize_to(result.images[0], SIZE) if "size" in given else result.images[0]


def test_an_option_that_does_nothing_is_refused() -> None:
    """Its opposite stands above: each option that is offered does something."""
    schnell, dev, qwen = (
        DiffusersEngine(pipe)
        for pipe in (flux_schnell(), make_pipeline("FluxPipeline"), make_pipeline("QwenImagePipeline"))
    )
    few: dict[str, Any] = {"steps": 1, "size": (32, 32)}
    with pytest.raises(ValueError, match="FluxPipeline does not take negative_prompt"):
        dev.generate("a", negative_prompt="b", **few)
    with pytest.raises(ValueError, match="hears negative_prompt only with guidance above 1, and it is 1"):
        schnell.generate("a", negative_prompt="b", **few)
    assert schnell.generate("a", guidance=4.0, **few).tobytes() != schnell.generate("a", **few).tobytes()
    assert qwen.sampling["guidance"] == 4.0
    usual, off = qwen.generate("a", **few), qwen.generate("a", guidance=1.0, **few)
    assert usual.tobytes() != off.tobytes() and usual.tobytes() == qwen.generate("a", guidance=4.0, **few).tobytes()
    with pytest.raises(ValueError, match="unknown solver 'heun' for this pipeline: one of euler"):
        dev.generate("a", solver="heun", **few)


if __name__ == "__main__":
    print(HEAD)
    for name in PIPELINES:
        print(row(DiffusersEngine(make_pipeline(name))))
