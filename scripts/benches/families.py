"""Seconds a picture of public families, against their official code and its compiled form, with the same weights.

    UNIGEN_REFERENCE_LLAMAGEN=<LlamaGen> UNIGEN_REFERENCE_VAR=<VAR> python scripts/bench.py families
        [--rows "llamagen-b float32,var-d16 bfloat16"] [--repeat 4] [--no-compile] [--json FILE]

One guided picture, in one process; the contenders take turns, and the best of several runs counts. LlamaGen and Janus
are measured without their image tokenizers, VAR with it. The official code is what the environment variable names, the
row says "absent" without it; of Janus it is transformers' own class, and its compiled form there is the static cache
that this class takes anyway. Official VAR runs in float32 in both of its rows.

"limit" is for codes written one by one what reading the weights once a step allows, at the rate at which a product of
two rows (which is what guidance is) reads matrices too large for the caches; for VAR what its products and convolutions
allow at the rate of a large square product. "same": greedy codes, where both are float32; else the share of codes of
which both say the same is likeliest, all codes before it being the same.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from scripts.benches.decode import bandwidth, best_rates
from unigen.batch import Tokens, Vocabulary
from unigen.document import Document, Segment
from unigen.generators.next_scale import NextScale
from unigen.generators.next_token import NextToken
from unigen.inference.engine import Engine
from unigen.model.template import ClassTemplate, ImageOnlyTemplate
from unigen.model.unified import UnifiedModel
from unigen.models import janus, llamagen, var
from unigen.nn.cpu.linear import pack_linears, packed_linear
from unigen.tokenizers import var_vq
from unigen.utils.argparser import OneLineParser
from unigen.utils.files import write_report
from unigen.utils.option_types import number_argument

DrawFunction = Callable[[], Any]
CLASSES, LABEL = 1001, 207


@dataclass
class Comparison:
    """Our engine and its references draw one picture, in at least `limit` seconds; `same` compares what they draw, and
    is None where there is nothing to compare with."""

    engine: DrawFunction
    limit: float
    rivals: dict[str, DrawFunction] = field(default_factory=dict)
    same: Callable[[], str] | None = None


class NoImageTokenizer(torch.nn.Module):
    """Stands where an image tokenizer would: the codes are what is measured."""

    def __init__(self, side: int, codes: int) -> None:
        super().__init__()
        self.image_size, self.grid, self.codebook_size = side * 16, (side, side), codes
        self.none = torch.nn.Parameter(torch.zeros(0))


def without_decoding(model: UnifiedModel) -> UnifiedModel:
    setattr(model, "decode_images", lambda codes: [None] * len(codes))  # noqa: B010  # mypy lets no method be assigned
    return model.eval()


def engine_runner(model: UnifiedModel, prompt: Any, **options: Any) -> Callable[[], Any]:
    """The engine draws one picture: its codes, where they are the model's."""
    pack_linears(model.backbone)
    engine = Engine(model)

    def run() -> Any:
        request = engine.build_request(prompt, "image", **options)
        list(engine.run_requests([request]))
        return request.document.segments[-1].image

    return run


def weight_read_seconds(weights: int, steps: int, dtype: torch.dtype) -> float:
    """Seconds to read so many weights in each of so many steps."""
    rate = max(bandwidth(product, 2, dtype) for product in (linear, packed_linear))
    return weights * dtype.itemsize * steps / rate


def counted_once(draws: DrawFunction) -> Callable[[], int]:
    """Counts pictures, where `measure` counts codes."""

    def run() -> int:
        draws()
        return 1

    return run


def reference_folder(name: str) -> str | None:
    return os.environ.get(f"UNIGEN_REFERENCE_{name}")


# ---------------------------------------------------------------- LlamaGen-B, 256 codes


def llamagen_b(dtype: str) -> UnifiedModel:
    """The shape of LlamaGen-B, 256 codes, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    codes, side = 16384, 16
    config = LlamaConfig(
        vocab_size=codes,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        rms_norm_eps=1e-5,
        max_position_embeddings=1 + side * side,
        initializer_range=0.05,
    )
    lm = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    backbone = llamagen.ClassBackbone(lm, CLASSES, side).to(getattr(torch, dtype))
    template, tokenizer_stub = ClassTemplate(CLASSES - 1, side * side), NoImageTokenizer(side, codes)
    generators: dict[str, Any] = {"next-token": NextToken((side, side))}
    model = UnifiedModel("llamagen", backbone, Vocabulary(CLASSES, codes), None, tokenizer_stub, template, generators)  # type: ignore[arg-type]
    model.set_default_sampling("next-token", **llamagen.DEFAULT_SAMPLING["c2i"])
    return without_decoding(model)


def compare_llamagen(dtype: str, compiled: bool) -> Comparison:
    model, reference_model, scale = (
        llamagen_b(dtype),
        llamagen_b(dtype),
        4.0,
    )  # the engine changes how its model multiplies
    lm, codes = reference_model.backbone.lm, 256
    run, greedy = (
        engine_runner(model, Segment(label=LABEL), guidance=scale, **options) for options in ({}, {"temperature": 0.0})
    )
    weights = sum(p.numel() for p in lm.parameters()) - lm.get_input_embeddings().weight.numel()
    contest = Comparison(run, weight_read_seconds(weights, codes, getattr(torch, dtype)))
    folder = reference_folder("LLAMAGEN")
    if not folder:
        return contest
    sys.path.insert(0, folder)
    from autoregressive.models import generate as sampler  # type: ignore[import-not-found]
    from autoregressive.models import gpt

    setattr(torch.backends.cuda, "sdp_kernel", lambda **_: nullcontext())  # noqa: B010  # the script sets CUDA's kernels
    state = llamagen.to_public(reference_model.backbone.state_dict(), lm.config.head_dim)

    def official(compile: bool, **options: Any) -> Callable[[], Tensor]:
        net = gpt.GPT_B(vocab_size=lm.config.vocab_size, block_size=codes, num_classes=CLASSES - 1)
        net = net.to(lm.lm_head.weight.dtype).eval()
        net.load_state_dict(state)
        if compile:
            net.forward = torch.compile(net.forward, dynamic=False)
        return lambda: sampler.generate(net, torch.tensor([LABEL]), codes, cfg_scale=scale, **options)

    for name in ("official", "compiled")[: 1 + compiled]:
        contest.rivals[name] = official(name == "compiled", top_k=2000)
    if dtype == "float32":
        official_greedy = official(False, sample_logits=False)
        contest.same = lambda: "equal" if torch.equal(greedy().flatten(), official_greedy()[0]) else "DIFFERENT"
    return contest


# ---------------------------------------------------------------- VAR-d16, 680 codes and its image tokenizer


def var_d16(dtype: str) -> UnifiedModel:
    """The shape of VAR-d16 with random weights, and its image tokenizer, which stays in float32."""
    torch.manual_seed(0)
    tokenizer = var_vq.VARVQ()
    codes = sum(side * side for side in tokenizer.settings.scales)
    lm = var.VARTransformer(CLASSES, 1024, 16, codes, shared=False)
    for name, weight in lm.named_parameters():
        if weight.ndim == 1 and name in ("pos_start", "first_scale_embedding"):
            torch.nn.init.normal_(weight, std=0.5)
    head = NextScale(tokenizer, 1024)
    torch.nn.init.normal_(head.head.weight, std=0.1)  # so that some codes are likelier than others
    lm.first_scale_embedding.data = head.scale_embedding.weight[0] + head.position_embedding.weight[0]
    for part in (lm, head.proj_in, head.scale_embedding, head.position_embedding):
        part.to(getattr(torch, dtype))
    template = ClassTemplate(CLASSES - 1, head.num_positions())
    generators: dict[str, Any] = {"next-scale": head}
    vocabulary = Vocabulary(CLASSES, tokenizer.codebook_size)
    model = UnifiedModel("var", var.VARBackbone(lm), vocabulary, None, tokenizer, template, generators)  # type: ignore[arg-type]
    model.set_default_sampling("next-scale", **var.DEFAULT_SAMPLING)
    return model.eval()


def compare_var(dtype: str, compiled: bool) -> Comparison:
    model, scale = var_d16(dtype), 4.0
    head: Any = model.generators["next-scale"]
    run = engine_runner(model, Segment(label=LABEL), guidance=scale + 1)
    with FlopCounterMode(display=False) as counter:
        run()
    side = 2048
    square = torch.randn(side, side, dtype=getattr(torch, dtype))
    rate = best_rates({"square": lambda: (square @ square, 2 * side**3)[1]}, 5)["square"]
    contest = Comparison(run, counter.get_total_flops() / rate)
    folder = reference_folder("VAR")
    if not folder:
        return contest
    sys.path.insert(0, folder)
    from models import var as official  # type: ignore[import-not-found]
    from models.vqvae import VQVAE  # type: ignore[import-not-found]

    tokenizer: Any = head.tokenizer
    vae = VQVAE(vocab_size=4096, z_channels=32, ch=160, v_patch_nums=tokenizer.settings.scales)
    vae.load_state_dict(vae.state_dict() | var_vq.to_public(tokenizer))
    net = official.VAR(
        vae, num_classes=CLASSES - 1, depth=16, embed_dim=1024, num_heads=16, attn_l2_norm=True,
        patch_nums=tokenizer.settings.scales, flash_if_available=False, fused_if_available=False,
    ).eval()  # fmt: skip
    state = {f"lm.{name}": tensor.float() for name, tensor in model.backbone.lm.state_dict().items()}
    state |= {f"head.{k}": v.float() for k, v in head.state_dict().items() if not k.startswith("tokenizer.")}
    net.load_state_dict(net.state_dict() | var.to_public(state))

    def draws() -> Tensor:
        label = torch.tensor([LABEL])
        return net.autoregressive_infer_cfg(1, label, g_seed=0, cfg=scale, top_k=900, top_p=0.96)  # type: ignore[no-any-return]

    contest.rivals["official"] = draws
    if compiled:
        contest.rivals["compiled"] = Compiled(net, draws)
    contest.same = lambda: f"{argmax_agreement(model, net):.1%}"
    return contest


@dataclass
class Compiled:
    """`draws` with the net's blocks compiled meanwhile, for maps of every side."""

    net: Any
    draws: DrawFunction
    is_compiled: bool = False

    def __call__(self) -> Any:
        reference_model = [block.forward for block in self.net.blocks]
        if not self.is_compiled:
            self.compiled = [torch.compile(forward, dynamic=True) for forward in reference_model]
            self.is_compiled = True
        for block, forward in zip(self.net.blocks, self.compiled, strict=True):
            block.forward = forward
        try:
            return self.draws()
        finally:
            for block, forward in zip(self.net.blocks, reference_model, strict=True):
                block.forward = forward


@torch.inference_mode()
def argmax_agreement(model: UnifiedModel, net: Any) -> float:
    """The share of places at which both say that the same code is likeliest after the same codes, random ones."""
    head: Any = model.generators["next-scale"]
    codes_1P = torch.randint(4096, (1, sum(head.lengths)), generator=torch.Generator().manual_seed(0))
    engine_logits: list[Tensor] = []
    write = head._sample_scale

    def write_given_codes(states: Any, logits: Any, k: int) -> None:
        """Note what is likeliest, and write what was given."""
        engine_logits.append(logits[0][0])
        given_N = codes_1P[0].split(head.lengths)[k]
        sure_NV = torch.nn.functional.one_hot(given_N, logits[0].shape[-1]).float()
        write(states, [torch.stack([sure_NV] * len(logits[0]))], k)

    head._sample_scale = write_given_codes
    try:
        engine_runner(model, Segment(label=LABEL), temperature=0.0, guidance=5.0)()
    finally:
        head._sample_scale = write
    maps = head.tokenizer.quantizer.scale_inputs(codes_1P)
    theirs_PV = net(torch.tensor([LABEL]), maps.float())[0]
    return float((torch.cat(engine_logits).argmax(-1) == theirs_PV.argmax(-1)).float().mean())


# ---------------------------------------------------------------- Janus-1B, 576 codes


class FixedPromptTemplate(ImageOnlyTemplate):
    """A prompt of 16 ids without words, and padding for guidance's other branch, as Janus has it."""

    PAD, BEGIN, LENGTH = 2, 102, 16

    def prompt(self, document: Document, *, output: Any, branch: int = 0) -> Tokens:
        return Tokens([0] + [self.PAD if branch else 5] * (self.LENGTH - 2) + [self.BEGIN])


def janus_1b(dtype: str) -> tuple[UnifiedModel, Any]:
    """The shape of Janus-1B's language model with random weights, and transformers' class with the same tensors; its
    vision encoder and image tokenizer, which are not run, are small."""
    from transformers import JanusConfig, JanusForConditionalGeneration, LlamaForCausalLM

    torch.manual_seed(0)
    side, width, codes = 24, 2048, 16384
    text = {
        "model_type": "llama", "vocab_size": 102400, "hidden_size": width, "intermediate_size": 5632,
        "num_hidden_layers": 24, "num_attention_heads": 16, "max_position_embeddings": 16384,
    }  # fmt: skip
    vision = {
        "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "mlp_ratio": 1.0,
        "image_size": 16 * side, "projection_dim": width,
    }  # fmt: skip
    vq = {"num_embeddings": codes, "base_channels": 32, "num_res_blocks": 1, "num_patches": side}
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        config = JanusConfig(text_config=text, vision_config=vision, vq_config=vq)
        reference_model = JanusForConditionalGeneration(config).eval()
        lm = LlamaForCausalLM(copy.deepcopy(config.text_config))
        backbone = janus.JanusBackbone(lm, codes, 8, width)
    finally:
        torch.set_default_dtype(torch.float32)
    core = reference_model.model
    renamed = {
        "lm.model": core.language_model,
        "lm.lm_head": reference_model.lm_head,
        "table": core.generation_embeddings,
        "aligner.0": core.generation_aligner.fc1,
        "aligner.2": core.generation_aligner.hidden_layers[0],
        "head.0": core.generation_head.proj_out,
        "head.2": core.generation_head.vision_head,
    }
    state = {
        f"{engine_logits}.{name}": w for engine_logits, part in renamed.items() for name, w in part.state_dict().items()
    }
    backbone.load_state_dict(state, assign=True)
    template = FixedPromptTemplate(None, side * side)
    generators: dict[str, Any] = {"next-token": NextToken((side, side))}
    vocabulary = Vocabulary(text["vocab_size"], codes)  # type: ignore[arg-type]
    model = UnifiedModel("janus", backbone, vocabulary, None, NoImageTokenizer(side, codes), template, generators)  # type: ignore[arg-type]
    model.set_default_sampling("next-token", **janus.DEFAULT_SAMPLING)
    return without_decoding(model), reference_model


def compare_janus(dtype: str, compiled: bool) -> Comparison:
    model, reference_model = janus_1b(dtype)
    prompt, codes = "a shiba inu", 576
    ids = model.token_ids(model.template.prompt(Document.of(prompt), output="image"))
    backbone: Any = model.backbone
    run, greedy = (engine_runner(model, prompt, **options) for options in ({}, {"temperature": 0.0}))
    read_parameters = [
        *backbone.lm.get_decoder().layers.parameters(),
        *backbone.head.parameters(),
        *backbone.aligner.parameters(),
    ]
    contest = Comparison(
        run, weight_read_seconds(sum(p.numel() for p in read_parameters), codes, getattr(torch, dtype))
    )
    settings = reference_model.generation_config
    settings.update(bos_token_id=ids[0], pad_token_id=FixedPromptTemplate.PAD, eos_token_id=1)
    settings.generation_kwargs = {"boi_token_id": ids[-1]}

    def draws(**options: Any) -> Tensor:
        input_ids = torch.tensor([ids])
        return reference_model.generate(  # type: ignore[no-any-return]
            input_ids, attention_mask=torch.ones_like(input_ids), generation_mode="image", guidance_scale=5, **options
        )

    contest.rivals["official"] = lambda: draws(do_sample=True)
    if dtype == "float32":
        contest.same = lambda: "equal" if torch.equal(greedy().flatten(), draws(do_sample=False)[0]) else "DIFFERENT"
    return contest


COMPARISONS = {"llamagen-b": compare_llamagen, "var-d16": compare_var, "janus-1b": compare_janus}
ROWS = ("llamagen-b float32", "llamagen-b bfloat16", "var-d16 float32", "var-d16 bfloat16", "janus-1b bfloat16")


def main(args: list[str]) -> int:
    parser = OneLineParser(prog="bench.py families", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", default=",".join(ROWS), help=f"default: {', '.join(ROWS)}")
    parser.add_argument(
        "--repeat", type=number_argument(1, 100_000), default=4, help="runs of each contender; the best counts"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled form out")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(args)
    valid_rows = {f"{name} {dtype}" for name in COMPARISONS for dtype in ("float32", "bfloat16")}
    if set(options.rows.split(",")) - valid_rows:
        raise ValueError(f"--rows takes some of {', '.join(sorted(valid_rows))}")
    started, rows = time.monotonic(), []
    print("row                      ours s  official s  ratio  compiled s  ratio   limit s  share  same")
    for row_name in options.rows.split(","):
        name, dtype = row_name.split()
        contest = COMPARISONS[name](dtype, not options.no_compile)
        references = {"ours": contest.engine, **contest.rivals}
        rates = best_rates({name: counted_once(draws) for name, draws in references.items()}, options.repeat)
        best = {rival: 1 / rate for rival, rate in rates.items()}
        agreement = contest.same() if contest.same else "-" if contest.rivals else "official code absent"
        row: dict[str, Any] = {"name": row_name, "value": best["ours"], "unit": "s", "limit": contest.limit}
        for rival in contest.rivals:
            row |= {rival: best[rival], f"ratio {rival}": best[rival] / best["ours"]}
        nan = float("nan")
        print(
            f"{row_name:<23} {best['ours']:>7.2f} {row.get('official', nan):>11.2f} "
            f"{row.get('ratio official', nan):>6.2f} {row.get('compiled', nan):>11.2f} "
            f"{row.get('ratio compiled', nan):>6.2f} {contest.limit:>9.2f} {contest.limit / best['ours']:>6.0%}  "
            f"{agreement}",
            flush=True,
        )
        rows.append(row | {"ratio": row.get("ratio official"), "same": agreement})
    if options.json:
        command = f"python scripts/bench.py families {' '.join(args)}".strip()
        seconds = time.monotonic() - started
        write_report(options.json, command=command, model=options.rows, rows=rows, seconds=seconds)
    return 0
