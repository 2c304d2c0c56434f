"""Configurations: strict overrides, dict and JSON round trips, reports.

Run: pytest tests/test_config.py
"""

import dataclasses
import importlib
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from unigen.config import OptimConfig, RunConfig, apply_overrides, from_dict, rename_stored_keys, renamed_keys, to_dict
from unigen.utils import files
from unigen.utils.files import load_json, save_json, write_report


@dataclass
class Inner:
    sizes: tuple[int, ...] = (1, 2)
    kind: Literal["a", "b"] = "a"
    low: int = 1
    high: int = 2

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError("low is above high")


@dataclass
class Outer(RunConfig):
    inner: Inner = field(default_factory=Inner)
    shares: dict[str, float] = field(default_factory=lambda: {"a": 1.0})
    flag: bool = False
    folder: Path = Path("x")
    either: int | str | None = None


def test_overrides_are_read_by_type() -> None:
    before = Outer()
    texts = ["optim.lr=1e-5", "optim.betas=(0.8,0.9)", "steps=1_000", "flag=true", "inner.sizes=3,4,5", "inner.kind=b"]
    texts += ["shares.b-c=0.5"]
    cfg = apply_overrides(before, [*texts, "time_limit=90", "init_from=None", "folder=a/b", "either=7", "run_dir=a=b"])
    assert (cfg.optim.lr, cfg.optim.betas, cfg.steps, cfg.flag) == (1e-5, (0.8, 0.9), 1000, True)
    assert (cfg.inner.sizes, cfg.inner.kind, cfg.time_limit) == ((3, 4, 5), "b", 90.0)
    assert cfg.shares == {"a": 1.0, "b-c": 0.5}
    assert (cfg.init_from, cfg.folder, cfg.either, cfg.run_dir) == (None, Path("a/b"), 7, "a=b")
    assert apply_overrides(cfg, ["either=seven"]).either == "seven"
    assert before == Outer(), "the original is not changed"
    assert apply_overrides(before, ["inner.low=5", "inner.high=3", "inner.high=6"]).inner.low == 5, "valid as a whole"
    with pytest.raises(ValueError, match="low is above high"):
        apply_overrides(before, ["inner.low=5"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "unknown key 'optim.lrr'; did you mean optim.lr?"),
        ("stps=1", "unknown key 'stps'; did you mean steps"),
        ("zzz=1", "valid keys: steps, batch_size"),
        ("lr=abc", "unknown key 'lr'; did you mean optim.lr?"),
        ("steps=1e3", "steps expects int, not '1e3'"),
        ("steps=-1", "steps must be 1 or more"),
        ("steps=", "steps has no value: give one (int)"),
        ("init_from= ", "init_from has no value: give one (str or none), such as none"),
        ("run_dir=", "run_dir has no value"),
        ("inner.sizes=", "inner.sizes has no value"),
        ("seed=18446744073709551616", "seed must be 0 or more, and at most 18446744073709551615"),
        ("num_workers=100000", "num_workers must be 0 or more, and at most 256"),
        ("batch_size=0", "batch_size must be 1 or more"),
        ("time_limit=1e999", "time_limit expects float or none"),
        ("=5", "not of the form key=value"),
        ("steps=1.5", "steps expects int, not '1.5'"),
        ("steps=true", "steps expects int"),
        ("steps.x=1", "'steps' has no parts"),
        ("flag=1", "flag expects bool"),
        ("optim.lr=nan", "optim.lr expects float, not 'nan'"),
        ("optim.betas=1,2,3", "optim.betas expects"),
        ("precision=fp8", "precision expects one of auto, fp32, bf16, not 'fp8'"),
        ("shares=1", "shares is a table: set an entry, as shares.NAME=value"),
        ("shares.b=x", "shares.b expects float"),
        ("optim=1", "optim is a group: set one of optim.lr"),
        ("steps", "not of the form key=value"),
        ("steps=0", "steps must be 1 or more"),
        ("optim.lr=-1", "optim.lr must be above 0"),
        ("ema_decay=1.5", "ema_decay must lie in"),
        ("time_limit=0", "time_limit must be above 0"),
    ],
)
def test_a_wrong_override_says_what_is_wrong(override: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        apply_overrides(Outer(), [override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_dict_and_json_round_trip(tmp_path: Path) -> None:
    cfg = apply_overrides(Outer(), ["optim.betas=0.5,0.6", "inner.sizes=9", "time_limit=5"])
    save_json(tmp_path / "deep" / "cfg.json", to_dict(cfg))
    assert from_dict(Outer, load_json(tmp_path / "deep" / "cfg.json")) == cfg
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "cfg.json"], "no temporary file is left"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": {"lrr": 1}}, "unknown key 'optim.lrr'; did you mean optim.lr?"),
        ({"steps": "5"}, "steps expects int"),
        ({"steps": True}, "steps expects int"),
        ({"optim": 3}, "optim must be a table"),
        ({"inner": {"kind": "c"}}, "inner.kind expects one of a, b"),
    ],
)
def test_from_dict_is_strict(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        from_dict(Outer, values)


def test_json_is_strict_and_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    save_json(path, {"nan": float("nan"), "inf": [float("inf")], "path": tmp_path, "optim": OptimConfig()})
    assert json.loads(path.read_text())["nan"] is None and json.loads(path.read_text())["inf"] == [None]
    before = path.read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(ValueError, match="No space left"):
        save_json(path, {"new": 1})
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


def test_load_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    for name in ("bad.json", "none.json"):
        with pytest.raises(ValueError, match=name):
            load_json(tmp_path / name)


def test_report_has_every_field(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    rows = [{"name": "a", "value": 1.0, "unit": "s"}]
    write_report(path, command="c", model="m", overall=0.5, tasks={"t": float("nan")}, rows=rows, seconds=2.0, note="n")
    report = json.loads(path.read_text())
    keys = {"command", "model", "hardware", "date", "seconds", "overall", "tasks", "rows", "note"}
    assert set(report) == keys
    assert report["tasks"] == {"t": None} and set(report["rows"][0]) == {
        "name", "value", "unit", "baseline", "ratio", "batch",
    }  # fmt: skip
    assert report["hardware"] and report["date"].startswith("20")


@pytest.mark.parametrize(
    ("override", "new"),
    [("accumulate=2", "accumulation_steps"), ("optim.warmup=5", "optim.warmup_steps"), ("ema=0", "ema_decay")],
)
def test_a_key_of_version_0_1_says_its_new_name(override: str, new: str) -> None:
    with pytest.raises(ValueError, match=f"unknown key .*; it is called {new} now"):
        apply_overrides(Outer(), [override])
    with pytest.raises(ValueError, match="unknown key 'acumulate'; did you mean"):
        apply_overrides(Outer(), ["acumulate=2"])


def test_a_configuration_of_version_0_1_is_read() -> None:
    stored = {"keep": 5, "optim": {"clip": 2.0, "lr": 0.1}, "flag": True, "unknown": 1}
    expected = {"keep_checkpoints": 5, "optim": {"grad_clip": 2.0, "lr": 0.1}, "flag": True, "unknown": 1}
    assert rename_stored_keys(Outer, stored) == expected
    assert from_dict(OptimConfig, {"clip": 2.0}) == OptimConfig(grad_clip=2.0)


@pytest.mark.parametrize("name", ["tiny", "tiny_vq", "digits", "flow_networks", "connector", "scene_detector"])
def test_renamed_keys_name_fields(name: str) -> None:
    """A new name is a field, and an old one is not."""
    cls = type(importlib.import_module(f"recipes.{name}").config())
    names = {f.name for f in dataclasses.fields(cls)}
    renamed = renamed_keys(cls)
    assert {"keep", "ema"} <= renamed.keys() and set(renamed.values()) <= names and not renamed.keys() & names


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, unigen.config, unigen.training; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False"] * 2
