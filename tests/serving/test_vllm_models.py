"""Public families on vLLM, with its own classes and with ours, give the same token ids as the local engine, in float32.

Run: scripts/test.sh --serve"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import unigen
from tests.serving.test_vllm import answers, on_vllm
from unigen.backends import vllm_engine
from unigen.document import Document
from unigen.models import convert

pytestmark = pytest.mark.serve
pytest.importorskip("vllm")

SIZES = {"liquid": "GEMMA", "emu3": "TEXT", "chameleon": "LM", "lumina": "LM", "janus": "LANGUAGE"}
"""Where a family's parity case says how large its language model is."""


def exported(family: str, scratch: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[Any, Path, Path]:
    """Its parity case, the public folder, and the folder that is converted from it."""
    case = importlib.import_module(f"tests.parity.{family}")
    size = getattr(case, SIZES[family])
    wide = {"num_attention_heads": 2, "num_key_value_heads": 1}  # vLLM's attention on a CPU has no heads of 16
    wide |= {"head_dim": 32} if "head_dim" in size else {}
    for name, value in (wide | settings).items():
        monkeypatch.setitem(size, name, value)
    (scratch / "public").mkdir()
    case.checkpoint(scratch / "public")
    convert(scratch / "public", scratch / "vllm", "vllm")
    return case, scratch / "public", scratch / "vllm"


def picture(size: tuple[int, int]) -> Image.Image:
    pixels = torch.rand(size[1], size[0], 3, generator=torch.Generator().manual_seed(3))
    return Image.fromarray((pixels * 255).byte().numpy())


def asked(case: Any) -> list[dict[str, Any]]:
    """Images, greedy and at temperature 1, with and without guidance, and a question about one."""
    drawn: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 1.0, "seed": 1},
        {"temperature": 1.0, "seed": 2, "guidance": 1.0},
    ]
    pictures = [{"prompt": case.PROMPT, "output": "image", "size": case.SIZE, **one} for one in drawn]
    return [*pictures, {"prompt": [picture(case.SIZE), "What is it"], "output": "text", "max_tokens": 12}]


def varied(drawn: list[list[Any]]) -> int:
    """The number of different codes of an image at temperature 1."""
    return len({code for row in drawn[1][-1] for code in row})


@pytest.mark.parametrize("family", SIZES)
def test_public_families(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Gemma with tied embeddings, a Llama whose images have end-of-row tokens, and our own classes."""
    case, public, folder = exported(family, tmp_path, monkeypatch)
    wanted = answers(unigen.load(str(public), "cpu", "float32"), asked(case))
    with on_vllm(folder) as engine:
        assert answers(engine, asked(case)) == wanted
        assert engine.info()["family"] == family
    assert varied(wanted) >= 32
    if family != "liquid":
        with pytest.raises(ValueError, match="not laid out for vLLM"), on_vllm(public):
            pass


@pytest.mark.parametrize("family", ["chameleon", "janus"])
def test_compiled(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With compilation, which is the default of vLLM; the other tests save the minute that it takes."""
    case, public, folder = exported(family, tmp_path, monkeypatch)
    wanted = answers(unigen.load(str(public), "cpu", "float32"), asked(case))
    with on_vllm(folder, enforce_eager=False) as engine:
        assert answers(engine, asked(case)) == wanted


@pytest.mark.parametrize("norm", ["before", "after"])
def test_chameleon(norm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three guidance branches with an image in the prompt, and an interleaved answer, with the layers of 7B and of 34B.
    Negative control: heads without norms."""
    from unigen.backends.vllm_models import HeadNorm

    case, public, folder = exported("chameleon", tmp_path, monkeypatch, swin_norm=norm == "after")
    drawn: dict[str, Any] = {"prompt": [picture((44, 20)), case.WORDS], "output": "image", "seed": 3}
    told = {"prompt": "a story about a witch", "output": "interleaved", "max_tokens": 20, "max_images": 2, "seed": 4}
    options = [
        drawn | {"guidance": case.SCALES, "temperature": 0.0},
        drawn | {"guidance": case.SCALES, "temperature": 1.0},
        drawn | {"guidance": (3.0, 1.0), "temperature": 1.0},
        told,
    ]
    wanted = answers(unigen.load(str(public), "cpu", "float32"), options)
    with on_vllm(folder) as engine:
        assert answers(engine, options) == wanted
    assert varied(wanted) >= 32
    monkeypatch.setattr(HeadNorm, "forward", lambda self, x_LD: x_LD)
    with on_vllm(folder) as engine:
        assert not any(one == other for one, other in zip(answers(engine, options), wanted, strict=True))


@pytest.mark.parametrize("tied", [False, True])
def test_janus(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Input images come as features: one or two of them, in parts, and two that differ in their pixels only. Negative
    control:
    features of another image. In the layout of transformers, with a head of its own or with tied embeddings."""
    case = importlib.import_module("tests.parity.janus")
    for name, value in {"num_attention_heads": 2, "num_key_value_heads": 1}.items():
        monkeypatch.setitem(case.LANGUAGE, name, value)
    (tmp_path / "public").mkdir()
    case.transformers_checkpoint(tmp_path / "public", tied)
    convert(tmp_path / "public", tmp_path / "vllm", "vllm")
    one, other = picture((44, 20)), Image.new("RGB", (32, 32), "teal")
    shown: list[Any] = [[one, "What is it"], [other, "What is it"], [one, "What is it"], ["two dogs", one, other]]
    said = [{"prompt": prompt, "output": "text", "max_tokens": 40} for prompt in shown]
    drawn: list[dict[str, Any]] = [
        {"prompt": case.PROMPT, "output": "image", "seed": n, "temperature": float(n)} for n in range(2)
    ]
    wanted = answers(unigen.load(str(tmp_path / "public"), "cpu", "float32"), said + drawn)
    assert wanted[0] != wanted[1] and len({code for row in wanted[-1][-1] for code in row}) >= 32
    tight = {"max_model_len": 256, "num_gpu_blocks_override": 14, "max_num_seqs": 8, "max_num_batched_tokens": 100}
    with on_vllm(tmp_path / "vllm", **tight) as engine:
        assert answers(engine, said + drawn) == wanted
        assert answers(engine, said) == wanted[: len(said)]  # found in the prefix cache
        encode = engine.model.vision_encoder.encode
        monkeypatch.setattr(engine.model.vision_encoder, "encode", lambda pixels_NCHW: encode(pixels_NCHW.flip(-1)))
        assert answers(engine, said[:1]) != wanted[:1]


@pytest.mark.parametrize(
    ("family", "file", "gone", "more", "line"),
    [
        ("chameleon", ".", "model.layers.1.self_attn.q_proj.weight", None, "lacks model.layers.1.self_attn.q_proj.w"),
        ("chameleon", ".", "model.layers.0.self_attn.k_norm.bias", None, "k_norm.bias"),
        ("chameleon", ".", None, "model.layers.0.self_attn.sinks", "sinks"),
        ("janus", "backbone", "aligner.2.bias", None, "lacks aligner.2.bias"),
        ("janus", "backbone", "head.2.weight", None, "lacks head.2.weight"),
        ("janus", "backbone", None, "aligner.4.bias", "aligner"),
    ],
)
def test_incomplete_folder_is_rejected(
    family: str,
    file: str,
    gone: str | None,
    more: str | None,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the class itself, which is all that `vllm serve` uses; our engine checks earlier."""
    _, _, folder = exported(family, tmp_path, monkeypatch)
    path = folder / file / "model.safetensors"
    state = {name: tensor for name, tensor in load_file(path).items() if name != gone}
    save_file(state | ({more: torch.zeros(2)} if more else {}), path, {"format": "pt"})
    with pytest.raises(ValueError, match=line):
        vllm_engine.create_llm_engine(folder, torch.float32, 512, {"enforce_eager": True})


PLUGIN = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, skip_tokenizer_init=True)
    greedy = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, detokenize=False)
    (made,) = llm.generate([{"prompt_token_ids": json.loads(sys.argv[2])}], greedy, use_tqdm=False)
    print(json.dumps(list(made.outputs[0].token_ids)))
"""


def environment(scratch: Path, root: Path, points: dict[str, dict[str, str]]) -> dict[str, str]:
    """The environment of a process in which the package is installed with these entry points; vLLM is in others."""
    info = scratch / "unigen-0.dist-info"  # found before what is installed
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: unigen\nVersion: 0\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in held.items()) for group, held in points.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    vllm_engine.set_environment()
    return os.environ | {"PYTHONPATH": f"{scratch}:{root}", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def entry_points(root: Path) -> dict[str, dict[str, str]]:
    given: dict[str, dict[str, str]] = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]
    return given


@pytest.mark.timeout(600)
def test_vllm_finds_the_plugin_classes(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a plugin of the installed package, in its own processes. Negative control: a package without the plugin."""
    _, public, folder = exported("chameleon", tmp_path, monkeypatch)
    model = unigen.load(str(public), "cpu", "float32").model
    ids = model.token_ids(model.template.prompt(Document.of("a red apple"), output="image"))
    with torch.no_grad():
        lm, wanted_1L = model.backbone.lm, torch.tensor([ids])
        for _ in range(32):
            last_1V = lm.lm_head(lm.model(wanted_1L).last_hidden_state[:, -1])
            wanted_1L = torch.cat((wanted_1L, last_1V.argmax(-1)[None]), 1)
    (tmp_path / "plugin.py").write_text(PLUGIN)
    command = [sys.executable, str(tmp_path / "plugin.py"), str(folder), json.dumps(ids)]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 300, "cwd": tmp_path}
    done = subprocess.run(command, env=environment(tmp_path / "with", root, entry_points(root)), **options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == wanted_1L[0, len(ids) :].tolist()
    assert len(set(wanted_1L[0, len(ids) :].tolist())) > 4
    done = subprocess.run(command, env=environment(tmp_path / "without", root, {}), **options)
    assert done.returncode != 0 and "UnigenChameleonForCausalLM" in done.stderr


@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", ["chameleon", "janus"])
def test_tensor_parallel_in_two_processes(
    family: str, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a shard of every layer."""
    case, public, folder = exported(family, tmp_path, monkeypatch, num_key_value_heads=2)
    core = min(os.sched_getaffinity(0))
    given = environment(tmp_path / "with", root, entry_points(root)) | {"VLLM_CPU_OMP_THREADS_BIND": f"{core}|{core}"}
    vllm = ["--engine", "vllm", "--vllm", "enforce_eager=true", "--vllm", "tensor_parallel_size=2"]
    drawn = ["--temperature", "1", "--seed", "3", "-o", str(tmp_path / "out.png")]
    line = ["generate", case.PROMPT, "--model", str(folder), "--device", "cpu", "--dtype", "float32", *drawn, *vllm]
    done = subprocess.run(
        [sys.executable, "-m", "unigen", *line], env=given, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    local = unigen.load(str(public), "cpu", "float32")
    assert Image.open(tmp_path / "out.png").tobytes() == local.generate(case.PROMPT, temperature=1.0, seed=3).tobytes()
