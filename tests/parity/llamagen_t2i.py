"""LlamaGen's models that draw words against their official code, padding and all: its T5 embedder, its left padding,
its Transformer and `generate`, its VQ-16; and T5's encoder written out.

The goldens are made from `checkpoint` by the official code. Its cleaning of captions imports ftfy and bs4, of which
nothing is needed by these prompts: where they are not there, what changes nothing stands in for them.
    UNIGEN_REFERENCE_LLAMAGEN_T2I=<LlamaGen> python scripts/parity.py llamagen_t2i --goldens
"""

from __future__ import annotations

import importlib.util
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import gelu

import unigen
from tests.parity import common
from tests.parity.common import ParityRow, max_error, mismatch_share
from tests.parity.llamagen import (
    CODES,
    LAYERS,
    SEED,
    SIDE,
    TOP_K,
    TOP_P,
    WIDTH,
    image_tokenizer_tensors,
    official_pixels,
    tensors,
    with_wrong_rotary,
)
from unigen.document import Document
from unigen.generators import next_token
from unigen.hub.resolve import CONFIG
from unigen.hub.weights import read_tensors, write_tensors
from unigen.models import llamagen
from unigen.utils.files import save_json

SIZE, PROMPT = (SIDE, SIDE), "a red apple"
CLI_ARGUMENTS = [PROMPT]
PROMPTS = ("A blue Porsche,parked [in] front", "“two dogs” — one cat.", "an apple")
MOST, PIECES, FEATURES = 120, 64, 48
T5: dict[str, Any] = {
    "vocab_size": PIECES, "d_model": FEATURES, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
    "tie_word_embeddings": False, "model_type": "t5",
}  # fmt: skip
SCALE = 7.5
GOLDEN = common.GOLDENS / "llamagen_t2i.safetensors"


def text_tensors() -> dict[str, Tensor]:
    """Of T5 as its repository has them, random, with some of its decoder's."""
    from transformers import T5Config, T5ForConditionalGeneration

    state = T5ForConditionalGeneration(T5Config(**T5)).state_dict()
    kept_files = {k: v for k, v in state.items() if not k.startswith("decoder.block.") and "embed_tokens" not in k}
    kept_files |= {"lm_head.weight": state["shared.weight"]}
    outputs = common.randomize_state(kept_files, seed=3)
    outputs["shared.weight"] *= FEATURES**0.5  # as T5's own: its attention is not scaled
    return outputs


def checkpoint(folder: Path) -> None:
    """The files of the public layout, and T5's folder beside them, with random weights."""
    from transformers import T5Tokenizer

    mlp = {"cls_embedding.cap_proj.fc1.weight": (WIDTH, FEATURES), "cls_embedding.cap_proj.fc2.weight": (WIDTH, WIDTH)}
    state = tensors({"cls_embedding.uncond_embedding": (MOST, FEATURES), **mlp})
    torch.save({"model": state}, folder / f"t2i_T_stage1_{SIDE}.pt")
    torch.save({"model": image_tokenizer_tensors()}, folder / llamagen.TOKENIZERS["t2i"])
    save_json(folder / "config.json", {"n_head": WIDTH // 64})  # no published model is so narrow
    letters = [*"▁abcdefghijklmnopqrstuvwxyzABP.,-'\"", "▁a", "▁one", "▁red", "apple", "dog", "ar"]
    pieces = [*((name, 0.0) for name in ("<pad>", "</s>", "<unk>")), *((name, -2.0 * len(name)) for name in letters)]
    tokenizer = T5Tokenizer(pieces, extra_ids=0)  # a tokenizer that is trained is another every time
    words = folder / llamagen.TEXT_FOLDER
    tokenizer.save_pretrained(words)
    save_json(words / CONFIG, T5)
    write_tensors(words / "model.safetensors", text_tensors())


@contextmanager
def cleaning() -> Iterator[None]:
    """What the official cleaning imports."""
    ftfy, bs4 = ModuleType("ftfy"), ModuleType("bs4")
    ftfy.fix_text = lambda words: words  # type: ignore[attr-defined]
    bs4.BeautifulSoup = lambda words, features: SimpleNamespace(text=words)  # type: ignore[attr-defined]
    absent = {char.__name__: char for char in (ftfy, bs4) if importlib.util.find_spec(char.__name__) is None}
    sys.modules.update(absent)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def make_goldens(folder: Path) -> None:
    """Ids, features, codes and guided logits of each prompt by the official code, and pixels by the official VQ."""
    with common.importable(folder), tempfile.TemporaryDirectory() as scratch:
        from autoregressive.models import generate as sampler  # type: ignore[import-not-found]
        from autoregressive.models import gpt

        checkpoint(Path(scratch))
        with cleaning():
            from language.t5 import T5Embedder  # type: ignore[import-not-found]
        embedder = T5Embedder(
            "cpu", llamagen.TEXT_FOLDER, local_cache=True, cache_dir=scratch, model_max_length=MOST,
            t5_model_kwargs={"dtype": torch.float32},
        )  # fmt: skip
        state = read_tensors(Path(scratch) / f"t2i_T_stage1_{SIDE}.pt")
    document: list[Tensor] = []
    embedder.model.register_forward_pre_hook(lambda _, args, text: document.append(text["input_ids"]), with_kwargs=True)
    grid = SIDE // 4
    args = gpt.ModelArgs(
        dim=WIDTH, n_layer=LAYERS, n_head=WIDTH // 64, vocab_size=CODES, block_size=grid * grid, model_type="t2i",
        cls_token_num=MOST, caption_dim=FEATURES,
    )  # fmt: skip
    model = gpt.Transformer(args).eval()
    model.load_state_dict(state)
    outputs: dict[str, Tensor] = {}
    torch.backends.cuda.sdp_kernel = lambda **_: nullcontext()  # the script sets CUDA's kernels
    sample, decoded_text = sampler.sample, []

    def watched(logits: Tensor, **options: Any) -> Any:
        decoded_text.append(logits[0, -1].clone())
        return sample(logits, **options)

    sampler.sample = watched
    for number, prompt in enumerate(PROMPTS):
        features_1LF, mask_1L = embedder.get_text_embeddings([prompt])
        count = int(mask_1L.sum())
        outputs[f"ids.{number}"], outputs[f"features.{number}"] = (
            document[-1][0, :count],
            features_1LF[0, :count].contiguous(),
        )
        given_1LF = torch.cat((features_1LF[:, count:], features_1LF[:, :count]), 1)  # padding on the left
        mask_1L = mask_1L.flip(-1)
        for name, options in (("greedy", {"sample_logits": False}), ("sampled", {"top_k": TOP_K, "top_p": TOP_P})):
            torch.manual_seed(SEED * 1_000_003 + 1)
            decoded_text.clear()
            codes = sampler.generate(
                model, given_1LF * mask_1L[..., None], grid * grid, mask_1L, cfg_scale=SCALE, **options
            )
            outputs[f"{name}.{number}"] = codes[0].long()
            if name == "greedy":
                outputs[f"logits.{number}"] = torch.stack(decoded_text)
    outputs["pixels"] = official_pixels(folder, outputs["sampled.0"])
    save_file(outputs, GOLDEN)


def t5(state: dict[str, Tensor], ids: Tensor, heard: Tensor) -> Tensor:
    """T5's encoder (Raffel et al. 2020, arXiv 1910.10683; gated as in 1.1), of padded ids (L,). heard (L,): which are
    no padding."""

    def norm(x_LF: Tensor, name: str) -> Tensor:
        return x_LF * (x_LF.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * state[f"encoder.{name}.weight"]

    x_LF = state["shared.weight"][ids]
    at_L, buckets = torch.arange(len(ids)), T5["relative_attention_num_buckets"] // 2
    away_LL = at_L - at_L[:, None]
    near = buckets // 2
    far = math.log(T5["relative_attention_max_distance"] / near)
    logs_LL = (away_LL.abs().clamp(min=1) / near).log() / far * (buckets - near)
    bucket_LL = torch.where(away_LL.abs() < near, away_LL.abs(), (near + logs_LL.long()).clamp(max=buckets - 1))
    bucket_LL = bucket_LL + buckets * (away_LL > 0)
    bias_HLL = state["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"][bucket_LL].permute(2, 0, 1)
    for block in range(T5["num_layers"]):
        native_tokenizer, wide = f"block.{block}.layer.0", f"block.{block}.layer.1"
        y_LF = norm(x_LF, f"{native_tokenizer}.layer_norm")
        q, k, v = (
            (y_LF @ state[f"encoder.{native_tokenizer}.SelfAttention.{part}.weight"].T).unflatten(
                1, (T5["num_heads"], -1)
            )
            for part in "qkv"
        )
        scores_HLL = torch.einsum("ihe,jhe->hij", q, k) + bias_HLL
        shares_HLL = scores_HLL.masked_fill(~heard, -torch.inf).softmax(-1)
        mixed_LF = torch.einsum("hij,jhe->ihe", shares_HLL, v).flatten(1)
        x_LF = x_LF + mixed_LF @ state[f"encoder.{native_tokenizer}.SelfAttention.o.weight"].T
        y_LF = norm(x_LF, f"{wide}.layer_norm")
        up, gate, down = (state[f"encoder.{wide}.DenseReluDense.{part}.weight"].T for part in ("wi_1", "wi_0", "wo"))
        x_LF = x_LF + (gelu(y_LF @ gate, approximate="tanh") * (y_LF @ up)) @ down
    return norm(x_LF, "final_layer_norm")


def rows(folder: Path) -> Iterator[ParityRow]:
    engine, golden = unigen.load(str(folder), device="cpu"), load_file(GOLDEN)
    model, grid = engine.model, SIDE // 4
    backbone = model.backbone
    assert isinstance(backbone, llamagen.TextBackbone)
    official = "the official embedder, Transformer and generate, padded (goldens)"

    branches: dict[str, list[int]] = {"ours": [], "right": [], "wrong": []}
    raw = model.text_tokenizer
    for number, prompt in enumerate(PROMPTS):
        expected_ids = golden[f"ids.{number}"].tolist()
        blind = list(range(PIECES + MOST - len(expected_ids), PIECES + MOST))  # what the padding leaves to be seen
        for branch in (0, 1):
            branches["ours"] += model.template.prompt(Document.of(prompt), output="image", branch=branch).ids
        branches["right"] += expected_ids + blind
        typed = raw(prompt).input_ids
        branches["wrong"] += (typed + [0] * len(expected_ids))[: len(expected_ids)] + blind
    outputs, control = (mismatch_share(branches[name], branches["right"]) for name in ("ours", "wrong"))
    yield ParityRow("llamagen_t2i prompt ids", outputs, control, "words as they were typed", official)

    state = text_tensors()
    parts: list[list[Tensor]] = [[], [], []]
    for number in range(len(PROMPTS)):
        ids = golden[f"ids.{number}"]
        padded_ids, prompt_mask = torch.zeros(MOST, dtype=torch.int64), torch.arange(MOST) < len(ids)
        padded_ids[: len(ids)] = ids
        with torch.no_grad():
            parts[0].append(backbone.encoder(input_ids=ids[None]).last_hidden_state[0])
        parts[1].append(t5(state, padded_ids, prompt_mask)[: len(ids)])
        parts[2].append(t5(state, padded_ids, torch.ones_like(prompt_mask))[: len(ids)])
    engine_output, written, unmasked = (torch.cat(part) for part in parts)
    yield ParityRow(
        "llamagen_t2i text features", max_error(engine_output, written), max_error(unmasked, written),
        "T5 sees its padding",
        "T5's encoder written out, padded",
    )  # fmt: skip
    reference_values = torch.cat([golden[f"features.{number}"] for number in range(len(PROMPTS))])
    yield ParityRow(
        "llamagen_t2i padded features",
        max_error(engine_output, reference_values),
        max_error(unmasked, reference_values),
        "T5 sees its padding",
        official,
    )

    places = [0, 1, grid - 1, grid * grid - 1]
    logits: dict[str, Tensor] = {}
    sampled_ids: dict[tuple[str, str], list[int]] = {}
    kinds = {"greedy": {"temperature": 0.0}, "sampled": {"top_k": TOP_K, "top_p": TOP_P}}
    prompts = [Document.of(prompt) for prompt in PROMPTS]
    for case, wrongly in (
        ("ours", nullcontext()),
        ("turned", with_wrong_rotary(model, True)),
        ("first", first_vectors(model)),
    ):
        with wrongly:
            for kind, options in kinds.items():
                with common.record_logits(next_token) as steps:
                    logits_stack = [
                        engine.build_request(p, "image", seed=SEED, guidance=SCALE, **options) for p in prompts
                    ]
                    list(engine.run_requests(logits_stack))  # prompts of several lengths
                if kind == "greedy":
                    logits[case] = torch.stack([steps[position] for position in places], 1)
                sampled_ids[case, kind] = [
                    int(code)
                    for request in logits_stack
                    for code in request.document.segments[-1].image.flatten()  # type: ignore[union-attr]
                ]
    reference_values = torch.stack([golden[f"logits.{number}"][places] for number in range(len(PROMPTS))])
    mistake = "of the vectors of no words the first"
    yield ParityRow(
        "llamagen_t2i logits",
        max_error(logits["ours"], reference_values),
        max_error(logits["first"], reference_values),
        mistake,
        official,
    )
    mistake = "the condition turned like a code"
    for kind in kinds:
        expected_ids = [int(code) for number in range(len(PROMPTS)) for code in golden[f"{kind}.{number}"]]
        assert len(set(expected_ids)) >= 32, f"too few different codes: {len(set(expected_ids))}"
        outputs, control = (mismatch_share(sampled_ids[case, kind], expected_ids) for case in ("ours", "turned"))
        yield ParityRow(f"llamagen_t2i {kind} ids", outputs, control, mistake, official)
    codes_1hw = golden["sampled.0"].reshape(1, grid, grid)
    made_BCHW, wrong_BCHW = (model.image_tokenizer.decode(codes) for codes in (codes_1hw, codes_1hw.transpose(1, 2)))
    reference_values = golden["pixels"].clamp(-1, 1)
    yield ParityRow(
        "llamagen_t2i codes to pixels", max_error(made_BCHW, reference_values), max_error(wrong_BCHW, reference_values),
        "columns for rows",
        "the official VQ-16 (goldens)",
    )  # fmt: skip


@contextmanager
def first_vectors(model: Any) -> Iterator[None]:
    """The mistake of the control: guidance's other branch reads the first vectors of no words, not
    those that padding would leave."""
    prompt = model.template.prompt

    def wrong(document: Document, *, output: Any, branch: int = 0) -> Any:
        tokens = prompt(document, output=output, branch=branch)
        if branch:
            tokens.ids = list(range(PIECES, PIECES + len(tokens)))
        return tokens

    model.template.prompt = wrong
    try:
        yield
    finally:
        del model.template.prompt
