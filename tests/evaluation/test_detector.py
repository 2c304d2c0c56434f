"""The detector's decoding, loss and files on made-up maps; no font and no trained weights are needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unigen.evaluation.detector import (
    DetectorConfig,
    DetectorTargets,
    SceneDetector,
    decode_detections,
    detector_losses,
    load_detector,
    save_detector,
)

CONFIG = DetectorConfig(("cat", "dog"), ("natural", "red"), ("white", "blue"), widths=(8, 8, 8))


def maps(*things: tuple[int, int, int, int, float]) -> dict[str, torch.Tensor]:
    """Network outputs of one 64x64 picture holding (class, colour, cell row, cell column, logit), boxes of 16x32."""
    out = {
        "heat": torch.full((1, 2, 16, 16), -8.0),
        "shape": torch.zeros(1, 4, 16, 16),
        "color": torch.zeros(1, 2, 16, 16),
        "background": torch.tensor([[0.0, 5.0]]),
    }
    out["shape"][:, 1] = torch.log(torch.tensor(2.0))
    for k, color, row, column, logit in things:
        out["heat"][0, k, row, column] = logit
        out["color"][0, color, row, column] = 4
    return out


def test_decode_reads_name_color_box_and_background() -> None:
    reading = decode_detections(maps((1, 1, 4, 10, 3.0)), CONFIG, 0.3)[0]
    (found,) = reading.objects
    assert (found.name, found.color) == ("dog", "red")
    assert found.box == pytest.approx((42 - 8, 18 - 16, 42 + 8, 18 + 16))
    assert reading.background == "blue" and reading.background_score > 0.9


def test_decode_drops_weak_peaks_and_doubles() -> None:
    things = ((0, 0, 4, 4, 3.0), (1, 0, 4, 4, 2.0), (0, 0, 12, 12, -2.0))  # a double at the same cell, a weak one
    assert [o.name for o in decode_detections(maps(*things), CONFIG, 0.3)[0].objects] == ["cat"]
    assert len(decode_detections(maps(*things), CONFIG, 0.05)[0].objects) == 2
    apart = ((0, 0, 4, 4, 3.0), (1, 0, 4, 9, 2.0))
    assert [o.name for o in decode_detections(maps(*apart), CONFIG, 0.3)[0].objects] == ["cat", "dog"]


def test_loss_is_small_for_the_truth_and_large_for_a_lie() -> None:
    truth = DetectorTargets(
        torch.tensor([[1, -1]]),
        torch.tensor([[1, 0]]),
        torch.tensor([[[34.0, 2.0, 50.0, 34.0], [0.0, 0.0, 0.0, 0.0]]]),
        torch.tensor([1]),
    )

    def total(out: dict[str, torch.Tensor], target: DetectorTargets) -> dict[str, float]:
        return {k: float(a) / max(float(b), 1) for k, (a, b) in detector_losses(out, target).items()}

    right, wrong = total(maps((1, 1, 4, 10, 8.0)), truth), total(maps((0, 0, 12, 3, 8.0)), truth)
    assert all(right[k] < 0.1 for k in right), right
    assert wrong["heat"] > 10 and wrong["color"] > 0.5
    empty = DetectorTargets(torch.full((1, 2), -1), truth.colors, truth.boxes, torch.tensor([-1]))
    nothing = total(maps(), empty)
    assert all(value < 0.01 for value in nothing.values()), nothing
    assert total(maps((1, 1, 4, 10, 8.0)), empty)["heat"] > 5  # hallucination is punished


def test_a_small_network_learns_one_batch() -> None:
    torch.manual_seed(0)
    model = SceneDetector(CONFIG)
    x = torch.zeros(2, 3, 32, 32)
    x[0, 0, 8:24, 8:24] = 1
    x[1, 2, 8:24, 8:24] = 1
    box = torch.tensor([8.0, 8.0, 24.0, 24.0]).expand(2, 1, 4)
    target = DetectorTargets(torch.tensor([[0], [1]]), torch.tensor([[1], [0]]), box, torch.tensor([0, 1]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        terms = detector_losses(model(x), target)
        optimizer.zero_grad()
        torch.stack([a / b for a, b in terms.values()]).sum().backward()
        optimizer.step()
    readings = model.eval().detect(x, 0.3)
    assert [[(o.name, o.color) for o in r.objects] for r in readings] == [[("cat", "red")], [("dog", "natural")]]
    assert readings[0].objects[0].box == pytest.approx((8, 8, 24, 24), abs=3)
    assert [r.background for r in readings] == ["white", "blue"]


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SceneDetector(CONFIG)
    save_detector(model, tmp_path / "one")
    again = load_detector(tmp_path / "one")
    x = torch.randn(1, 3, 64, 64)
    assert again.config == CONFIG
    assert [f.shape[-1] for f in again.features(x)] == [16, 8, 4]
    assert torch.allclose(again(x)["heat"], model(x)["heat"], atol=0.05)  # bf16 on disk
    save_detector(model, tmp_path / "other")
    weights = tmp_path / "other" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        load_detector(tmp_path / "other")
    with pytest.raises(ValueError, match="missing"):
        load_detector(tmp_path / "nowhere")
