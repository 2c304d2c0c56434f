"""What the project makes of fixed weights and seeds stays what it was: pictures, texts, losses and gradients, the help
texts and the OpenAPI document.

Pictures of codes hang on the last bits of sums, so that what is stored holds for one kind of processor; elsewhere these
tests are left out. After a change that is meant to change something:

    UPDATE_FINGERPRINTS=1 pytest tests/test_fingerprints.py      # then read the difference
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import unigen
from tests.training.test_objectives import PICTURES, batch_of
from unigen.batch import pack
from unigen.commands.main import COMMANDS, main
from unigen.diffusion.solvers import SOLVERS
from unigen.document import Document, Segment
from unigen.samplers.guiders import GUIDERS
from unigen.training.objectives import MultiGeneratorLoss

FOLDER = Path(__file__).parent / "fingerprints"


def processor() -> str:
    """By which sums are rounded: the instruction set, the maker's name and the version of torch."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    maker = next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "unknown")
    return f"{torch.backends.cpu.get_cpu_capability()} {maker} torch {torch.__version__}"


def digest(value: Any) -> str:
    """A short text for any answer: that of a picture and of a tensor is a hash of all its bytes."""
    if isinstance(value, Image.Image):
        return f"{value.size} {hashlib.sha256(value.convert('RGB').tobytes()).hexdigest()[:16]}"
    if isinstance(value, torch.Tensor):
        data = value.detach().float().contiguous().numpy().tobytes()
        return f"{tuple(value.shape)} {hashlib.sha256(data).hexdigest()[:16]}"
    if isinstance(value, (list, tuple)):
        return " | ".join(digest(part) for part in value)
    return str(value)


def compare(name: str, found: dict[str, str]) -> None:
    """Against what is stored under this name for this processor, or store it."""
    path = FOLDER / f"{name}.json"
    stored: dict[str, dict[str, str]] = json.loads(path.read_text()) if path.exists() else {}
    if os.environ.get("UPDATE_FINGERPRINTS"):
        path.write_text(json.dumps(stored | {processor(): found}, indent=1) + "\n")
    elif processor() not in stored:
        pytest.skip(f"nothing is stored for {processor()}")
    else:
        before = stored[processor()]
        changed = [key for key in before | found if before.get(key) != found.get(key)]
        assert not changed, f"{len(changed)} of {len(before)} changed: {changed[:10]}"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """How a sum is split among threads changes its last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_what_random_weights_answer(engine: Any) -> None:
    """Every generator, with and without guidance; every solver and kind of guidance; every method of an engine."""
    found: dict[str, str] = {}

    for name in engine.info()["generators"]:
        if name == "joint":
            continue
        for seed in range(3):
            for guidance in (1.0, 3.0):
                found[f"{name} {seed} {guidance}"] = digest(
                    engine.generate("a red dog", generator=name, seed=seed, guidance=guidance)
                )
        found[f"{name} batch"] = digest(engine.generate_batch(["a dog", "two apples"], [5, 6], generator=name))
    for kind in GUIDERS:
        for solver in SOLVERS:
            options = {"generator": "flow", "steps": 4, "guidance": 3.0}
            found[f"flow {solver} {kind}"] = digest(engine.generate("a dog", **options, solver=solver, guider=kind))
    for way in ("jacobi", "sjd"):
        found[f"next-token {way}"] = digest(engine.generate("a dog", generator="next-token", accelerate=way, top_k=8))
    found["top_k top_p"] = digest(engine.generate("a dog", generator="next-token", temperature=1.5, top_k=9, top_p=0.7))
    found["steps"] = digest(engine.generate("a dog", generator="masked", steps=2))
    found["candidates"] = digest(engine.generate("a dog", candidates=3))
    picture = Image.fromarray(PICTURES[0])
    half = Image.new("L", picture.size)
    half.paste(255, (0, 0, 8, 16))
    found["describe"] = digest(engine.describe(picture, max_tokens=12))
    found["answer"] = digest(engine.describe(picture, "how many", max_tokens=12, temperature=1.0, top_p=0.9, seed=4))
    found["penalty"] = digest(engine.generate("a", "text", max_tokens=20, repetition_penalty=1.3))
    found["edit"] = digest(engine.edit(picture, "blue background"))
    found["inpaint"] = digest(engine.inpaint(picture, "a dog", half, generator="masked"))
    found["pair"] = digest(engine.generate_joint("a dog"))
    found["pair of a picture"] = digest(engine.generate_joint(image=picture))
    found["story"] = digest(engine.generate("a story", "interleaved", max_tokens=12, max_images=2, seed=1))
    found["parts"] = digest([getattr(p, "image", p) for p in engine.stream("a dog", output="image", previews=2)])
    found["states"] = digest(engine.hidden_states("a dog"))
    compare("random", found)


def test_what_random_weights_lose(engine: Any) -> None:
    """Each loss of a packed batch, and the gradient of each."""
    found: dict[str, str] = {}
    model = copy.deepcopy(engine.model)
    stories = [Document([Segment(text="a story"), Segment(text="a witch", role="assistant")])]
    for name in engine.info()["generators"]:
        if name != "joint":
            drawn = Document([Segment(text="two apples"), Segment(image=PICTURES[0], role="assistant")])
            encoded = [model.template.encode(drawn, generator=name), model.template.encode(stories[0])]
            batch = pack([encoded, [model.template.encode(drawn, uncond=True)]], 96, 16)
            losses = MultiGeneratorLoss(model.generators)(model, batch, torch.Generator().manual_seed(0))
            for loss, (total, count) in losses.items():
                if loss in ("text", name):
                    model.zero_grad()
                    total.backward(retain_graph=True)
                    norms = [float(p.grad.double().norm()) for p in model.parameters() if p.grad is not None]
                    found[f"{name}: {loss}"] = f"{float(total.detach()):.9g} {int(count)} {sum(norms):.7g}"
    found["mixture"] = str(
        {
            name: f"{float(total.detach()):.9g}"
            for name, (total, _) in MultiGeneratorLoss(model.generators)(
                model, batch_of(model), torch.Generator().manual_seed(0)
            ).items()
        }
    )
    compare("losses", found)


def test_what_the_shipped_model_answers() -> None:
    engine = unigen.load("unigen-tiny", device="cpu")
    found: dict[str, str] = {}
    for name in ("flow", "masked", "next-scale", "next-token"):
        for seed in (0, 1):
            picture = engine.generate("two apples on a blue background", generator=name, seed=seed)
            found[f"{name} {seed}"] = digest(picture)
    found["describe"] = engine.describe(picture)
    found["pair"] = digest(engine.generate_joint("three penguins"))
    found["story"] = digest(engine.generate("a story about a witch", "interleaved", seed=0, max_images=2))
    found["edit"] = digest(engine.edit(picture, "a red background"))
    compare("shipped", found)


def test_help_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    texts = []
    for command in ("", *COMMANDS):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main([command, "--help"] if command else ["--help"])
        texts.append(f"$ unigen {command} --help\n{out.getvalue()}")
    same_text("help.txt", "\n".join(texts))


def test_openapi_document() -> None:
    pytest.importorskip("fastapi")
    from tests.serving.test_fuzz import APP

    document = APP.openapi()
    document["info"].pop("version")
    same_text("openapi.json", json.dumps(document, indent=1, sort_keys=True) + "\n")


def same_text(name: str, text: str) -> None:
    if sys.version_info[:2] != (3, 11):
        pytest.skip("argparse of each Python words its help in another way")
    path = FOLDER / name
    if os.environ.get("UPDATE_FINGERPRINTS"):
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text, f"{path} holds another text: read `git diff` after an update"
