"""What version 0.1 stored is still read: a run that is resumed, and a model folder of format 1.

Both archives in tests/stored were written by version 0.1 itself. `run-0.1.tar.xz`: two of the four steps of
recipes/digits.py with next-token, masked, random-order and transfusion, of width 8, and the metrics of all four.
`model-0.1.tar.xz`: a model of family "tiny" with every generator, random weights, and what it answered.

Run: pytest tests/test_stored_state.py
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import unigen
from tests.test_fingerprints import processor
from unigen.models import load as load_model
from unigen.tokenizers import save_tokenizer
from unigen.tokenizers.kl import KLConfig, KLTokenizer
from unigen.tokenizers.vq import VQConfig, VQTokenizer
from unigen.training.recipe import run_recipe

STORED = Path(__file__).parent / "stored"


def unpack(name: str, folder: Path) -> Path:
    with tarfile.open(STORED / f"{name}-0.1.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / name


# ---------------------------------------------------------------- a run


OVERRIDES = """
    image_tokenizer=vq kl_tokenizer=kl scale_tokenizer=none generators.next-token=1 generators.next-scale=0
    generators.flow=0 generators.random-order=1 generators.masked=1 generators.transfusion=1 width=8 layers=1 steps=4
    time_limit=none save_every=2 sample_every=0 log_every=1 keep_checkpoints=5 precision=fp32 num_workers=0
    batch_size=1 accumulation_steps=2 ema_decay=0.99 run_dir=run optim.lr=0.01 optim.warmup_steps=2
""".split()


DIGESTS = {"AVX2 AuthenticAMD torch 2.13.0+cpu": "cdb9e5698b7832c8"}
"""Of step 4 since inputs are embedded in one place: gradients of the embedding table are added in another order than in
version 0.1, which moves weights by 4e-9 (one unit in the last place)."""


@pytest.fixture
def stored_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run, in the working directory, beside image tokenizers of its sizes, whose weights the checkpoint has."""
    small: dict[str, Any] = {
        "image_size": 16,
        "codebook_size": 16,
        "code_dim": 4,
        "channels": 16,
        "decoder_channels": 16,
    }
    small |= {"wide_channels": 16, "attention": False, "encoder_blocks": (0, 0), "decoder_blocks": (0, 0)}
    torch.manual_seed(5)
    save_tokenizer(VQTokenizer(VQConfig(**small)), tmp_path / "vq")
    save_tokenizer(KLTokenizer(KLConfig(image_size=16, channels=(16, 16), latent_channels=4)), tmp_path / "kl")
    monkeypatch.chdir(tmp_path)
    return unpack("run", tmp_path)


def metrics(run: Path) -> list[dict[str, float]]:
    """What each step logged, without times."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("seconds", "rows/s", "tokens/s")} for line in lines]


def state_digest(run: Path) -> str:
    """A hash of all tensors of the checkpoint of step 4: weights, averages, optimizers."""
    state = torch.load(run / "checkpoints" / "step-00000004.pt", weights_only=True)
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(value.contiguous().numpy().tobytes())
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            add(part)

    for name in ("model", "optimizers", "ema"):
        add(state[name])
    return found.hexdigest()[:16]


def resume(root: Path, *overrides: str) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # how a sum is split among threads changes its last bits
    try:
        return run_recipe(str(root / "recipes" / "digits.py"), [*OVERRIDES, *overrides])
    finally:
        torch.set_num_threads(threads)


def test_a_stored_run_goes_on_as_it_would_have(
    stored_run: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = metrics(stored_run)
    assert resume(root)["step"] == 4
    out = capsys.readouterr().out
    assert "resuming at step 2" in out and "changed since" not in out
    after = metrics(stored_run)
    assert after[:2] == before[:2] and len(after) == 4
    for line, expected in zip(after[2:], before[2:], strict=True):
        assert line == pytest.approx(expected, rel=1e-4)
    digests = json.loads((stored_run / "digests.json").read_text()) | DIGESTS
    assert digests.get(processor(), state_digest(stored_run)) == state_digest(stored_run)


def test_another_seed_is_another_run(stored_run: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = metrics(stored_run)
    resume(root, "seed=1")
    assert "changed since the run began: seed: 0 -> 1" in capsys.readouterr().out
    assert metrics(stored_run)[3] != pytest.approx(before[3], rel=1e-4)
    digests = json.loads((stored_run / "digests.json").read_text())
    assert state_digest(stored_run) not in digests.values()


# ---------------------------------------------------------------- a model


def differences(folder: Path) -> list[str]:
    """The answers of the model that are no longer what is stored beside it. Pictures may differ in rounding."""
    engine = unigen.load(str(folder), device="cpu")
    expected, found, pictures = folder / "expected", [], []
    texts = json.loads((expected / "texts.json").read_text())
    for path in sorted(expected.glob("*.png")):
        name, _, seed = path.stem.rpartition("-")
        picture = engine.generate("a red dog", seed=int(seed), generator=name, guidance=2.0)
        gap = np.abs(np.asarray(picture, dtype=int) - np.asarray(Image.open(path), dtype=int))
        found += [path.stem] if gap.max() > 2 else []
        pictures += [picture] if name == "transfusion" else []
    greedy: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.5, "max_tokens": 12}
    for seed, question in enumerate(("how many dogs", "a blue horse")):
        answers = {f"describe-{seed}": engine.describe(pictures[seed], **greedy)}
        answers[f"text-{seed}"] = engine.generate(question, "text", **greedy)
        found += [name for name, answer in answers.items() if texts[name] != answer]
    return found


def test_a_model_folder_of_format_1_answers_as_it_did(tmp_path: Path) -> None:
    folder = unpack("model", tmp_path)
    manifest = json.loads((folder / "unigen.json").read_text())
    assert manifest["format"] == 1 and len(list((folder / "expected").glob("*.png"))) == 2 * 8
    assert differences(folder) == []


def test_a_folder_of_format_1_is_saved_in_format_2(tmp_path: Path) -> None:
    folder = unpack("model", tmp_path)
    old = json.loads((folder / "unigen.json").read_text())
    (folder / "unigen.json").write_text(json.dumps(old | {"sampling": {"flow": {"sampler": "heun"}}}))
    load_model(folder).save(tmp_path / "new")
    new = json.loads((tmp_path / "new" / "unigen.json").read_text())
    assert new["format"] == 2 and new["begin_tokens"] == old["begins"] and "begins" not in new
    assert new["sampling"]["flow"] == {"solver": "heun"}
    weights = load_file(tmp_path / "new" / "flow" / "model.safetensors")
    assert any(name.startswith("denoiser.") for name in weights) and not any(n.startswith("head.") for n in weights)
    (tmp_path / "new" / "expected").symlink_to(folder / "expected")
    assert differences(tmp_path / "new") == ["flow-0", "flow-1"]  # which now have another solver


def test_a_folder_of_a_later_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "unigen.json").write_text('{"format": 3, "family": "tiny"}')
    with pytest.raises(
        ValueError, match=r"unigen.json is of format 3, which this version of unigen does not read: install a later one"
    ):
        unigen.load(str(tmp_path), device="cpu")


def test_other_weights_answer_otherwise(tmp_path: Path) -> None:
    folder = unpack("model", tmp_path)
    path = folder / "model.safetensors"
    save_file({name: -tensor if tensor.ndim > 1 else tensor for name, tensor in load_file(path).items()}, path)
    assert len(differences(folder)) > 10
