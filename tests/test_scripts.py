"""The programs in scripts/ that are not shell."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import average, bench, quickstart, results, ship
from unigen.model import assembly
from unigen.models import load
from unigen.utils.files import write_report


def test_the_table_of_benches(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {"batch", "decode", "generate"} <= set(bench.find_benchmarks()) and all(bench.find_benchmarks().values())
    assert bench.main(["--help"]) == 0 and "decode" in capsys.readouterr().out
    assert bench.main(["nothing"]) == 2
    assert capsys.readouterr().err.strip().splitlines() == [
        f"bench: error: no bench 'nothing'; there are: {', '.join(bench.find_benchmarks())}"
    ]
    assert bench.main(["decode", "--models", "huge"]) == 2
    capsys.readouterr()
    for given in (["decode", "--repeat", "0"], ["batch", "--count", "1_0"], ["train", "--rows", "x"]):
        assert bench.main(given) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"bench: error: argument {given[1]}: ") and said.count("\n") == 1
    assert bench.main(["generate", "--writers", "flow"]) == 2
    assert "--writers is called --generators now" in capsys.readouterr().err


def test_figures_of_variants_stand_in_a_line_each() -> None:
    rows = [
        {"name": f"{v}: {k}", "value": x}
        for v, k, x in (("vq", "psnr", 1.0), ("vq", "usage", 0.5), ("fsq", "psnr", 2.0))
    ]
    run = {"command": "c", "model": "m", "hardware": "h", "date": "d", "tasks": {"vq: psnr": 1.0}, "rows": rows}
    lines = results.section("t", run)
    assert lines[-5:-1] == [
        "| name | psnr | usage |",
        "| --- | --- | --- |",
        "| vq | 1.000 | 0.500 |",
        "| fsq | 2.000 |  |",
    ]
    assert "vq: psnr" not in "".join(lines)


def test_results_are_written_from_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "RUNS_FOLDER", tmp_path / "runs")
    monkeypatch.setattr(results, "RESULTS_PAGE", tmp_path / "results.md")
    assert results.main() == 2
    (tmp_path / "runs").mkdir()
    rows = [
        {"name": "tiny guided", "value": 301.25, "unit": "tokens/s", "baseline": 100.0, "ratio": 3.0125, "batch": 1}
    ]
    write_report(
        tmp_path / "runs" / "decode.json", command="bench", model="m", overall=0.5, tasks={"a": 0.25}, rows=rows
    )
    (tmp_path / "runs" / "decode.png").touch()
    assert results.main() == 0
    page = (tmp_path / "results.md").read_text()
    assert page.endswith("![decode](runs/decode.png)\n")
    assert "Overall **0.500**" in page and "| 0.250 |" in page
    assert "| tiny guided | 301.2 | tokens/s | 100.0 | 3.013 | 1 |" in page


def test_ship_refuses_what_is_no_model(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(root / "scripts" / "ship.py"), str(tmp_path / "none"), "unigen-x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 2 and done.stderr.startswith("ship: error: no folder")


def test_ship_leaves_out_what_is_not_good_enough(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ship, "ASSETS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["ship", str(tiny_folder), "some", "--without", "flow", "--without", "next-scale"])
    assert ship.main() == 0
    shipped, whole = load(tmp_path / "some"), load(tiny_folder)
    assert whole.generators.keys() - shipped.generators.keys() == {"flow", "next-scale"}
    assert not (tmp_path / "some" / "flow").exists() and "flow" not in shipped.template.begin_ids
    monkeypatch.setattr(sys, "argv", ["ship", str(tmp_path / "some"), "other", "--without", "flow"])
    assert ship.main() == 2
    assert "--without flow" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_average_is_the_mean_of_weights(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(tiny_folder)
    first = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "tokenizer." not in name:
                p += 1.0
    model.save(tmp_path / "other")
    monkeypatch.setattr(sys, "argv", ["average", str(tmp_path / "out"), str(tiny_folder), str(tmp_path / "other")])
    assert average.main() == 0
    for name, p in load(tmp_path / "out").named_parameters():
        frozen = "tokenizer." in name  # those are the first one's
        torch.testing.assert_close(p, first[name] if frozen else first[name] + 0.5, msg=name)
    both = [str(tiny_folder), str(tmp_path / "other")]
    monkeypatch.setattr(sys, "argv", ["average", str(tmp_path / "out"), *both, "--weights", "3,1"])
    assert average.main() == 0
    lm = "backbone.lm.model.norm.weight"
    torch.testing.assert_close(dict(load(tmp_path / "out").named_parameters())[lm], first[lm] + 0.25)
    monkeypatch.setattr(sys, "argv", ["average", str(tmp_path / "out"), *both, "--weights=-0.5,1.5"])
    assert average.main() == 0
    torch.testing.assert_close(dict(load(tmp_path / "out").named_parameters())[lm], first[lm] + 1.5)
    fewer = assembly.build_model(
        model.backbone.lm, model.text_tokenizer, model.image_tokenizer, model.vocabulary.text_size
    )
    fewer.save(tmp_path / "fewer")
    monkeypatch.setattr(sys, "argv", ["average", str(tmp_path / "out"), str(tiny_folder), str(tmp_path / "fewer")])
    assert average.main() == 0
    mean = dict(load(tmp_path / "out").named_parameters())
    torch.testing.assert_close(mean[lm], first[lm] + 0.5)
    kept = "heads.flow.norm.weight"  # which the other does not have
    torch.testing.assert_close(mean[kept], first[kept])
    monkeypatch.setattr(sys, "argv", ["average", str(tmp_path / "out"), *both, str(tmp_path / "fewer")])
    assert average.main() == 0
    torch.testing.assert_close(dict(load(tmp_path / "out").named_parameters())[kept], first[kept] + 0.5)
    with torch.no_grad():
        next(model.heads["flow"].tokenizer.parameters()).add_(1.0)
    model.save(tmp_path / "foreign")
    with torch.no_grad():
        next(model.image_tokenizer.encoder.parameters()).add_(1.0)  # type: ignore[attr-defined]
    model.save(tmp_path / "reader")
    for wrong, message in (
        ([str(tiny_folder)], "at least two"),
        ([str(tiny_folder), "unigen-tiny"], "other weights"),
        ([str(tmp_path / "fewer"), str(tiny_folder)], "other weights"),
        ([str(tiny_folder), str(tmp_path / "foreign")], "another tokenizer"),
        ([str(tiny_folder), str(tmp_path / "reader")], "another text or image tokenizer"),
        ([*both, "--weights", "1,x"], "2 numbers whose sum"),
        ([*both, "--weights=-1,1"], "2 numbers whose sum"),
        ([*both, "--weights", "1,nan"], "2 numbers whose sum"),
        ([*both, str(tmp_path / "fewer"), "--weights=-0.6,0.6,1"], "that have flow sum to 0"),
    ):
        monkeypatch.setattr(sys, "argv", ["average", str(tmp_path / "no"), *wrong])
        assert average.main() == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_the_footer_of_the_quickstart_is_made_of_sentences() -> None:
    info = {
        "family": "tiny",
        "backbone": "llama, 8.0M parameters",
        "image_size": 64,
        "device": "cpu",
        "candidates": True,
    }
    args = argparse.Namespace(model="a<b", seed=7)
    foot = quickstart.footer(args, info)
    assert (
        foot.startswith("<footer>a&lt;b (llama, 8.0M parameters) draws pictures of 64x64 pixels on cpu: ")
        and foot.count(".<br>") == 1
    )
    assert "seed 7." in foot and "unigen --help" in foot and "candidates" not in foot
    assert "<footer>x (diffusion pipeline) ran on cpu: " in quickstart.footer(
        argparse.Namespace(model="x", seed=0), {"family": "diffusion pipeline"}
    )
