"""What is said of public checkpoints that are near the families here, and that nothing of a repository is fetched
before its small files say that it loads, and each weight once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import unigen
from unigen.commands import main as cli
from unigen.models import resolve_model

JANUS = {"model_type": "multi_modality", "language_config": {"vocab_size": 10, "hidden_size": 2}}
LUMINA = {"model_type": "chameleon", "mask_image_logits": True}
KNOWN: dict[str, tuple[dict[str, Any] | None, tuple[str, ...], str]] = {
    "Emu3-Gen": ({"model_type": "Emu3", "vocab_size": 184622}, (), "that of transformers loads: Emu3-community/"),
    "Emu3-VisionTokenizer": ({"model_type": "Emu3VisionVQ"}, (), "Emu3's image tokenizer alone"),
    "Emu3.5": ({"model_type": "Emu3"}, (), "is Emu3.5, which is not supported"),
    "Emu3-other": ({"model_type": "Emu3", "vocab_size": 282926}, (), "is Emu3.5, which is not supported"),
    "JanusFlow-1.3B": (JANUS | {"vision_gen_enc_config": {}}, (), "is JanusFlow, which draws by rectified flow"),
    "Anole-7b-v0.1": (None, ("params.json",), "in that of transformers is: leloy/Anole-7b-v0.1-hf"),
    "chameleon-7b": (None, ("consolidate_params.json",), "facebook/chameleon-7b answers, leloy/Anole-7b-v0.1-hf draws"),
    "BAGEL-7B-MoT": ({"model_type": "bagel"}, (), "is BAGEL, which draws by rectified flow and is not supported"),
    "show-o2-7B": ({"_class_name": "Showo2Qwen2_5"}, (), "Show-o is: showlab/show-o-512x512"),
    "show-o-w-clip-vit": ({"_class_name": "Showo", "w_clip_vit": True}, (), "reads pictures by CLIP"),
    "Lumina-mGPT-2.0": (LUMINA | {"vocab_size": 171385}, (), "is Lumina-mGPT 2.0"),
    "lumina-two": (LUMINA | {"vocab_size": 171385}, (), "Alpha-VLLM/Lumina-mGPT-7B-768 and -Omni are"),
    "gguf": (None, ("model.gguf",), "holds weights for llama.cpp"),
    "lora": (None, ("adapter_config.json",), r"holds an adapter \(LoRA\), not a model"),
    "qwen": ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, (), "joined to one that draws, by --lmm"),
    "bert": ({"model_type": "bert", "architectures": ["BertModel"]}, (), "is of no family known here"),
    "empty": (None, (), "holds neither unigen.json nor config.json"),
}  # fmt: skip


def made(folder: Path, config: dict[str, Any] | None, files: Sequence[str]) -> Path:
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for file in files:
        (folder / file).write_text("{}")
    return folder


@pytest.mark.parametrize("name", list(KNOWN))
def test_what_is_near(name: str, tmp_path: Path) -> None:
    config, files, reason = KNOWN[name]
    with pytest.raises(ValueError, match=reason) as caught:
        unigen.load(str(made(tmp_path / name, config, files)), "cpu")
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_single_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert cli.main(["info", "--model", str(tmp_path / "model.safetensors"), "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert "is a file: give the folder of a model" in told and len(told.strip().splitlines()) == 1


def test_an_adapter_names_its_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "deepseek-ai/Janus-Pro-1B"}')
    with pytest.raises(ValueError, match=r"an adapter \(LoRA\) of deepseek-ai/Janus-Pro-1B"):
        unigen.load(str(tmp_path), "cpu")


class Hub:
    """A hub of one repository: its files and what they hold. fetched: those that were, in their order."""

    def __init__(self, folder: Path, files: dict[str, str]) -> None:
        self.folder, self.files, self.fetched = folder, files, list[str]()

    def snapshot_download(
        self,
        repo: str,
        revision: Any = None,
        allow_patterns: Sequence[str] = (),
        ignore_patterns: Sequence[str] = (),
    ) -> str:
        for file, text in self.files.items():
            wanted = any(fnmatch(file, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatch(file, pattern) for pattern in ignore_patterns) and file not in self.fetched:
                self.fetched.append(file)
                (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / file).write_text(text)
        return str(self.folder)

    @property
    def weights(self) -> set[str]:
        return {file for file in self.fetched if not file.endswith((".json", ".txt"))}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], Hub]:
    def of(files: dict[str, str]) -> Hub:
        one = Hub(tmp_path / "snapshot", files)
        one.folder.mkdir()
        monkeypatch.setattr(huggingface_hub, "snapshot_download", one.snapshot_download)
        return one

    return of


COPIES = dict.fromkeys(
    ("onnx/model.onnx", "onnx/model.onnx_data", "openvino_model.bin", "pytorch_model.bin", "flax_model.msgpack",
     "model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors", "consolidated.safetensors", "tf_model.h5",
     "original/consolidated.00.pth", "model-q4.gguf"), "",
)  # fmt: skip
INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
CONFIG = json.dumps(JANUS)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.json": CONFIG, "model.safetensors": ""} | COPIES, {"model.safetensors"}),
        (
            {"config.json": CONFIG, "model.safetensors.index.json": json.dumps(INDEX)}
            | dict.fromkeys(INDEX["weight_map"].values(), "") | COPIES,
            set(INDEX["weight_map"].values()),
        ),
        ({"config.json": CONFIG} | COPIES, {"pytorch_model.bin"}),
        ({"config.json": CONFIG} | {k: v for k, v in COPIES.items() if k != "pytorch_model.bin"}, set()),
        ({"var_d16.pth": "", "vae_ch160v4096z32.pth": "", "notes.bin": ""}, {"var_d16.pth", "vae_ch160v4096z32.pth"}),
    ],
    ids=["one file", "shards", "a pickle", "nothing that is read", "files without settings"],
)  # fmt: skip
def test_each_weight_is_fetched_once(files: dict[str, str], expected: set[str], hub: Any) -> None:
    one = hub(files)
    assert resolve_model("someone/something")[0] == one.folder
    assert one.weights == expected


def test_a_pipelines_parts_are_fetched_once(hub: Any) -> None:
    parts = {"model_index.json": "{}", "unet/config.json": "{}", "unet/diffusion_pytorch_model.safetensors": ""}
    twice = ("fp16.safetensors", "fp16-00001-of-00002.safetensors", "bf16.safetensors", "non_ema.safetensors")
    parts |= dict.fromkeys([f"unet/diffusion_pytorch_model.{name}" for name in twice], "")
    parts |= dict.fromkeys(
        ("unet/openvino_model.bin", "unet/model.onnx", "v1-5.safetensors", "unet/flax_model.msgpack"), ""
    )
    one = hub(parts)
    resolve_model("someone/something")
    assert one.weights == {"unet/diffusion_pytorch_model.safetensors"}


def test_a_variant_is_fetched_where_a_part_has_no_other(hub: Any) -> None:
    plain = "diffusion_pytorch_model.safetensors"
    shards = [f"text_encoder/model.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)]
    parts = {"model_index.json": "{}", "unet/config.json": "{}", f"unet/{plain}": "", "text_encoder/config.json": "{}"}
    parts |= dict.fromkeys(("unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.bf16.safetensors"), "")
    parts |= dict.fromkeys([*shards, "text_encoder/model.safetensors.index.fp16.json"], "")
    one = hub(parts)
    resolve_model("someone/something")
    assert one.weights == {f"unet/{plain}", *shards}
    assert "text_encoder/model.safetensors.index.fp16.json" in one.fetched


@pytest.mark.parametrize("name", ["Emu3-Gen", "JanusFlow-1.3B", "show-o-w-clip-vit", "BAGEL-7B-MoT", "qwen", "bert"])
def test_no_weights_of_what_does_not_load(name: str, hub: Any) -> None:
    config, _, reason = KNOWN[name]
    one = hub({"config.json": json.dumps(config), "model.safetensors": ""})
    with pytest.raises(ValueError, match=reason):
        unigen.load("someone/something", "cpu")
    assert one.fetched == ["config.json"]


def test_no_weights_of_a_pipeline_that_cannot_be_used(hub: Any) -> None:
    one = hub({"model_index.json": '{"_class_name": "LTXPipeline"}', "unet/model.safetensors": ""})
    with pytest.raises(ValueError, match="video"):
        unigen.load("someone/something", "cpu")
    assert one.fetched == ["model_index.json"]


def test_a_model_that_reads_may_be_any_of_transformers(hub: Any) -> None:
    one = hub({"config.json": json.dumps(KNOWN["qwen"][0]), "model.safetensors": ""} | COPIES)
    resolve_model("someone/something", allow_language_model=True)
    assert one.weights == {"model.safetensors"}


def test_an_index_that_leads_out_of_its_folder(hub: Any) -> None:
    hub({"config.json": CONFIG, "model.safetensors.index.json": json.dumps({"weight_map": {"a": "../secret"}})})
    with pytest.raises(ValueError, match="which is not in its folder"):
        resolve_model("someone/something")
