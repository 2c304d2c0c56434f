"""Networks of a flow at equal FLOPs, and what tells them the words: the architecture table of diffusion decoders.

    unigen train recipes/tiny_vq.py tokenizer_kind=kl run_dir=runs/kl                                (latents, once)
    python recipes/flow_networks.py [--json FILE] [--out FOLDER] [key=value ...]              (80 minutes on one core)

A U-Net, three DiT that take the condition by adaLN-Zero, by cross-attention or in context, and MM-DiT
(`unigen/nn/denoisers.py`), each of the width at which one evaluation costs `gflops`, on the last states of a frozen
backbone; and two of them on a frozen text encoder of the backbone's size instead, a T5 (Raffel et al. 2020, arXiv
1910.10683), which learns the world's language here by span corruption. All see the same pictures, noise and times;
latents and states are computed once, since they cost several times what a network does.
The file knows how a network is sized, trained and scored; loss and sampler are those of `generators/flow.py`.

Shapes: B rows of one document, L positions, M pictures, D width of the states.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from unigen.batch import Batch, Tokens, pack
from unigen.config import OptimConfig, RunConfig, apply_overrides
from unigen.diffusion.denoiser import PromptEmbeds
from unigen.document import Document, Segment
from unigen.evaluation.report import make_folder
from unigen.evaluation.runner import score_all
from unigen.evaluation.tasks.scenes import ScenesTask, summarize_scores
from unigen.generators.base import SegmentSpec
from unigen.generators.flow import Flow, FlowConfig
from unigen.hub.folders import replacing_folder
from unigen.media.output import check_output, image_grid, save_image
from unigen.media.pixels import to_images, to_pixels
from unigen.model import chat_template
from unigen.model.unified import UnifiedModel
from unigen.models import load
from unigen.nn.denoisers import DenoiserKind, build_denoiser
from unigen.samplers.guidance import Guidance
from unigen.samplers.logits import SamplingOptions
from unigen.tokenizers import load_image_tokenizer
from unigen.toyworld.chats import ChatSampler
from unigen.toyworld.stories import text_corpus
from unigen.toyworld.world import SceneRenderer
from unigen.training.train_spec import LossSums, TrainSpec
from unigen.training.trainer import Trainer
from unigen.utils.argparser import OneLineParser
from unigen.utils.disk import check_input
from unigen.utils.files import write_report
from unigen.utils.precision import has_fast_bfloat16

INPUTS = {"kl_tokenizer": "unigen train recipes/tiny_vq.py tokenizer_kind=kl run_dir=runs/kl"}
"""Folders that fields name, and the commands that make them."""

SEQ_LEN = 64  # positions of a document: a prompt up to the begin token
SENTINELS = 16  # ids after the text's, one for each span that is cut out
ENCODE_BATCH_SIZE = 64  # documents
HELD_OUT_SEED = 1_000_000
VARIANTS = (
    ("unet", "backbone"),
    ("dit-adaln", "backbone"),
    ("dit-cross", "backbone"),
    ("dit-context", "backbone"),
    ("mm-dit", "backbone"),
    ("dit-cross", "encoder"),
    ("mm-dit", "encoder"),
)


@dataclass
class NetworksRunConfig(RunConfig):
    """A run of this recipe."""

    RENAMED: ClassVar[dict[str, str]] = {
        "blind": "uncond_prob",
        "examples": "num_examples",
        "prompts": "prompts_per_tag",
    }
    """Keys of version 0.1, and their names now."""

    model: str = "unigen-tiny"
    """The model whose backbone and text tokenizer are used."""
    kl_tokenizer: str = "runs/kl/model"
    """Folder of the KL tokenizer whose latents are drawn."""
    network: DenoiserKind = "mm-dit"
    """The denoiser."""
    condition: Literal["backbone", "encoder"] = "backbone"
    """What reads the text."""
    num_examples: int = 8192
    """Pictures with their words, seen in turn."""
    gflops: float = 0.17
    """Of one evaluation of the denoiser for one picture."""
    layers: int = 4
    """Of the denoiser."""
    encoder: str = "runs/text-encoder"
    """Folder of the text encoder, which is trained into it where it is not there."""
    encoder_steps: int = 600
    """Of that training."""
    uncond_prob: float = 0.1
    """Share of the examples whose text is dropped, for guidance."""
    guidance: float = 3.0
    """With which the table's pictures are drawn."""
    prompts_per_tag: int = 20
    """Of each of the six kinds in the table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            not 0 < self.gflops < 1000
            or min(self.layers, self.encoder_steps, self.prompts_per_tag, self.num_examples) < 1
        ):
            raise ValueError(
                "gflops must be above 0 and below 1000, layers, num_examples, encoder_steps and prompts_per_tag "
                "at least 1"
            )
        if not 0 <= self.uncond_prob <= 1:
            raise ValueError(f"uncond_prob is a share from 0 to 1, not {self.uncond_prob}")
        if self.seed >= HELD_OUT_SEED:
            raise ValueError(f"seed must be below {HELD_OUT_SEED}: seeds from there on are held out for evaluation")
        if self.ema_decay or self.init_from:
            raise ValueError(
                "networks are compared as they were trained, from nothing: leave ema_decay and init_from out"
            )
        Guidance.from_value(self.guidance)


def config() -> NetworksRunConfig:
    return NetworksRunConfig(
        steps=500,
        batch_size=32,
        optim=OptimConfig(lr=2e-3, warmup_steps=50, weight_decay=0.01, min_lr_ratio=0.02, schedule="linear"),
        precision="auto",
        num_workers=0,
        ema_decay=0.0,
        log_every=100,
        save_every=0,
        sample_every=0,
        run_dir="runs/flow-network",
    )


# ---------------------------------------------------------------- equal FLOPs


def count_gflops(network: nn.Module, channels: int, side: int, context: int) -> float:
    """GFLOP of one evaluation for one picture: products, convolutions and attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    x, t, states = torch.zeros(1, channels, side, side), torch.zeros(1), PromptEmbeds(torch.ones(1, SEQ_LEN, context))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(x, t, states)
    return counter.get_total_flops() / 1e9


def config_for_flops(
    kind: DenoiserKind, gflops: float, layers: int, channels: int, side: int, context: int
) -> FlowConfig:
    """The network of this kind and depth whose evaluation costs nearest to `gflops`."""

    def cost(head_dim: int) -> float:
        shape = {"layers": layers, "heads": 4, "head_dim": head_dim}
        return count_gflops(
            build_denoiser(kind, channels=channels, sample_size=side, context_dim=context, **shape),
            channels,
            side,
            context,
        )

    step = 4 if kind == "unet" else 2  # its norms want widths that 16 divides
    low, high = 1, 2
    while cost(step * high) < gflops:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(step * middle) < gflops else (low, middle)
    best = min((low, high), key=lambda steps: abs(cost(step * steps) - gflops))
    return FlowConfig(network=kind, layers=layers, heads=4, head_dim=step * best, context_length=SEQ_LEN)


# ---------------------------------------------------------------- what tells the words


class ConditionEncoder(nn.Module):
    """The last states (B, L, D) of rows that hold one document each, of a frozen backbone or text encoder."""

    def __init__(self, cfg: NetworksRunConfig, kind: str) -> None:
        super().__init__()
        self.model = load(cfg.model)
        self.encoder = text_encoder(cfg, self.model) if kind == "encoder" else None
        self.requires_grad_(False).eval()

    @property
    def width(self) -> int:
        return self.model.backbone.width

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        there_BL = batch.segments_BL > 0
        if self.encoder is None:
            return self.model.causal_hidden_states(batch) * there_BL[:, :, None]
        return self.encoder(input_ids=batch.ids_BL, attention_mask=there_BL).last_hidden_state


def template_of(model: UnifiedModel) -> Any:
    """Chats whose pictures are written by a flow after a begin token that the backbone knows."""
    return chat_template.ChatTemplate(model.text_tokenizer, {"flow": 0}, {"flow": chat_template.BOI})


def span_corruption(ids: Sequence[int], first: int, end: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """T5's task: runs of about three ids, 15% of all, become sentinels first, first + 1, ..; and what they were."""
    input_ids: list[int] = []
    target_ids: list[int] = []
    position = num_sentinels = 0
    while position < len(ids):
        if num_sentinels < SENTINELS and rng.random() < 0.05:
            length = int(rng.integers(1, 6))
            input_ids.append(first + num_sentinels)
            target_ids += [first + num_sentinels, *ids[position : position + length]]
            position, num_sentinels = position + length, num_sentinels + 1
        else:
            input_ids.append(ids[position])
            position += 1
    return input_ids, [*target_ids, end]


def text_encoder(cfg: NetworksRunConfig, model: UnifiedModel) -> nn.Module:
    """The encoder of a T5 as wide and deep as the model's backbone, from its folder or trained into it on prompts as
    the template has them. ValueError where the folder holds one of another size."""
    from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

    folder, tokenizer, backbone_config = Path(cfg.encoder), model.text_tokenizer, model.backbone.lm.config
    first = len(tokenizer)
    shape = T5Config(
        vocab_size=first + SENTINELS,
        d_model=backbone_config.hidden_size,
        d_kv=backbone_config.hidden_size // backbone_config.num_attention_heads,
        d_ff=backbone_config.intermediate_size,
        num_layers=backbone_config.num_hidden_layers,
        num_decoder_layers=2,
        num_heads=backbone_config.num_attention_heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    setattr(shape, "decoder_start_token_id", tokenizer.pad_token_id)  # noqa: B010  # a keyword that its types lack
    if not (folder / "config.json").exists():
        torch.manual_seed(cfg.seed)
        rng = np.random.default_rng(cfg.seed)
        template = template_of(model)
        t5 = T5ForConditionalGeneration(shape)
        optimizer = torch.optim.AdamW(t5.parameters(), lr=1e-3)
        lines = text_corpus(32 * cfg.encoder_steps, cfg.seed)
        for step in range(cfg.encoder_steps):
            optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 100) * (1 - step / cfg.encoder_steps)
            chats = [template.prompt(Document([Segment(text=next(lines))])).ids[:SEQ_LEN] for _ in range(32)]
            pairs = [
                span_corruption([*chat, template.begin_ids["flow"]], first, tokenizer.eos_token_id, rng)
                for chat in chats
            ]
            input_ids, target_ids = (
                nn.utils.rnn.pad_sequence([torch.tensor(pair[k]) for pair in pairs], True, fill)
                for k, fill in enumerate((tokenizer.pad_token_id, -100))
            )
            with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16()):
                loss = t5(
                    input_ids=input_ids, attention_mask=input_ids != tokenizer.pad_token_id, labels=target_ids
                ).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(t5.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % 250 == 0:
                print(f"text encoder: step {step + 1}/{cfg.encoder_steps}  loss {float(loss.detach()):.3f}", flush=True)
        with replacing_folder(folder) as scratch:
            t5.save_pretrained(scratch)
    encoder: Any = T5EncoderModel.from_pretrained(folder, local_files_only=True)
    names = ("d_model", "vocab_size", "num_layers", "d_ff", "num_heads")
    if any(getattr(encoder.config, name) != getattr(shape, name) for name in names):
        raise ValueError(f"{folder} holds a text encoder for another model: name another folder by encoder=FOLDER")
    return encoder


# ---------------------------------------------------------------- training


@torch.inference_mode()
def encode_examples(template: Any, tokenizer: Any, seed: int, count: int, uncond_prob: float) -> list[Tokens]:
    """Prompts with their pictures, given as latents; the text of a share of them is dropped."""
    chats, rng = ChatSampler(SceneRenderer(tokenizer.image_size)), np.random.default_rng(seed)
    examples: list[Tokens] = []
    while len(examples) < count:
        document = Document(chats.draw(rng))
        tokens = template.encode(document, uncond=bool(rng.random() < uncond_prob), generator="flow")
        if len(tokens) <= SEQ_LEN:
            examples.append(tokens)
    for start in range(0, count, ENCODE_BATCH_SIZE):
        chunk = examples[start : start + ENCODE_BATCH_SIZE]
        pictures = [picture for tokens in chunk for picture in tokens.images]
        latents_MZhw = tokenizer.encode(to_pixels(pictures, tokenizer.image_size))
        for tokens, latents_Zhw in zip(chunk, latents_MZhw, strict=True):
            tokens.images = [latents_Zhw]
    return examples


@dataclass
class ConditionedBatch:
    """A batch, and the states (B, L, D) of the model that read its words."""

    batch: Batch
    states_BLD: Tensor


class ConditionedDataset:
    """Documents with their states, without end, in an order drawn anew each time round: item i is a function of (seed,
    i)."""

    def __init__(self, documents: Sequence[Tokens], condition: ConditionEncoder, seed: int) -> None:
        self.documents, self.seed = documents, seed
        self.states: list[Tensor] = []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16()):
            for start in range(0, len(documents), ENCODE_BATCH_SIZE):
                chunk = documents[start : start + ENCODE_BATCH_SIZE]
                states_BLD = condition(pack([[tokens] for tokens in chunk], SEQ_LEN, 0)).float()
                self.states += [row[: len(tokens)].clone() for row, tokens in zip(states_BLD, chunk, strict=True)]

    def __getitem__(self, index: int) -> tuple[Tokens, Tensor]:
        epoch, k = divmod(index, len(self.documents))
        k = int(np.random.default_rng([self.seed, epoch]).permutation(len(self.documents))[k])
        return self.documents[k], self.states[k]


def collate(examples: Sequence[tuple[Tokens, Tensor]]) -> ConditionedBatch:
    states = [nn.functional.pad(states_LD, (0, 0, 0, SEQ_LEN - len(states_LD))) for _, states_LD in examples]
    return ConditionedBatch(pack([[tokens] for tokens, _ in examples], SEQ_LEN, 0), torch.stack(states))


def flow_objective(flow: Flow, batch: ConditionedBatch, rng: torch.Generator) -> LossSums:
    _, targets = flow.prepare(None, batch.batch, rng)  # type: ignore[arg-type]
    costs_M = flow.loss(None, batch.batch, batch.states_BLD, targets)  # type: ignore[arg-type]
    return {"flow": (costs_M.sum(), len(costs_M))}


def new_flow(cfg: NetworksRunConfig, width: int) -> Flow:
    """width: of the states."""
    tokenizer: Any = load_image_tokenizer(cfg.kl_tokenizer)
    shape = tokenizer.latent_channels, tokenizer.grid[0], width
    settings = config_for_flops(cfg.network, cfg.gflops, cfg.layers, *shape)
    torch.manual_seed(cfg.seed)
    return Flow(tokenizer, width, settings)


def build(cfg: NetworksRunConfig) -> TrainSpec:
    condition = ConditionEncoder(cfg, cfg.condition)
    flow = new_flow(cfg, condition.width)
    documents = encode_examples(
        template_of(condition.model), flow.tokenizer, cfg.seed, cfg.num_examples, cfg.uncond_prob
    )
    return make_train_spec(flow, ConditionedDataset(documents, condition, cfg.seed))


def make_train_spec(flow: Flow, examples: ConditionedDataset) -> TrainSpec:
    return TrainSpec(model=flow, dataset=examples, collate=collate, objective=flow_objective)


# ---------------------------------------------------------------- the table


@torch.inference_mode()
def generate_images(
    flow: Flow, condition: ConditionEncoder, prompts: Sequence[str], seeds: Sequence[int], scale: float
) -> list[Any]:
    """A picture for each prompt, by the sampler of the flow."""
    template, size, guidance = template_of(condition.model), flow.tokenizer.image_size, Guidance.from_value(scale)
    blank = np.zeros((size, size, 3), dtype=np.uint8)
    chats = [Document([Segment(text=p), Segment(image=blank, role="assistant")]) for p in prompts]
    states_by_branch = []
    for uncond in (False, True)[: guidance.num_branches]:
        batch = pack([[template.encode(chat, generator="flow", uncond=uncond)] for chat in chats], SEQ_LEN, size)
        context = flow.context_states(batch, condition(batch))
        assert context.mask_MN is not None
        states_by_branch.append([row[mask] for row, mask in zip(context.embeds_MND, context.mask_MN, strict=True)])
    states = [
        flow.start(SegmentSpec(0, SamplingOptions(), guidance, torch.Generator().manual_seed(seed))) for seed in seeds
    ]
    branches = [list(pair) for pair in zip(*states_by_branch, strict=True)]
    while not states[0].finished:
        flow.step(None, states, branches)  # type: ignore[arg-type]
    return to_images(flow.decode(None, states))  # type: ignore[arg-type]


@torch.inference_mode()
def held_out_loss(flow: Flow, examples: ConditionedDataset) -> float:
    """The flow's loss on new pictures, with the same noise and times for every network."""
    total, count = 0.0, len(examples.documents)
    for start in range(0, count, ENCODE_BATCH_SIZE):
        batch = collate([examples[k] for k in range(start, min(count, start + ENCODE_BATCH_SIZE))])
        total += float(flow_objective(flow, batch, torch.Generator().manual_seed(start))["flow"][0])
    return total / count


def compare_networks(overrides: Sequence[str], out: str | None) -> list[dict[str, Any]]:
    """Trains and scores every row; the first is the baseline of all."""
    rows: list[dict[str, Any]] = []
    first: dict[str, float] = {}
    units = {"gflops": "GFLOP", "parameters": "M", "loss": "", "scenes": "share", "seconds": "s a step"}
    shared = apply_overrides(config(), overrides)
    tokenizer: Any = load_image_tokenizer(shared.kl_tokenizer)
    # What is wrong with either is said before anything is rendered.
    conditions = {
        condition_kind: ConditionEncoder(shared, condition_kind)
        for condition_kind in dict.fromkeys(condition_kind for _, condition_kind in VARIANTS)
    }
    template = template_of(next(iter(conditions.values())).model)
    documents = encode_examples(template, tokenizer, shared.seed, shared.num_examples, shared.uncond_prob)
    new = encode_examples(template, tokenizer, HELD_OUT_SEED, min(512, shared.num_examples), 0.0)
    datasets_by_condition: dict[str, tuple[ConditionedDataset, ConditionedDataset]] = {}
    for network, condition_kind in VARIANTS:
        condition = conditions[condition_kind]
        datasets_by_condition[condition_kind] = datasets_by_condition.get(condition_kind) or (
            ConditionedDataset(documents, condition, shared.seed),
            ConditionedDataset(new, condition, 0),
        )
        with tempfile.TemporaryDirectory() as folder:
            row_overrides = [f"network={network}", f"condition={condition_kind}", f"run_dir={folder}/run"]
            cfg = apply_overrides(config(), [*overrides, *row_overrides])
            flow = new_flow(cfg, condition.width)
            run_result = Trainer(cfg, make_train_spec(flow, datasets_by_condition[condition_kind][0])).run()
            if not run_result["finished"]:
                raise ValueError("stopped by a signal: trainings that are cut short do not make a table")
        flow = flow.cpu().eval()
        figures = {"seconds": run_result["seconds"] / run_result["step"]}
        figures["gflops"] = count_gflops(
            flow.denoiser, flow.tokenizer.latent_channels, flow.tokenizer.grid[0], condition.width
        )
        figures["parameters"] = sum(p.numel() for p in flow.denoiser.parameters()) / 1e6
        figures["loss"] = held_out_loss(flow, datasets_by_condition[condition_kind][1])
        task = ScenesTask(cfg.prompts_per_tag, cfg.seed)
        examples = task.examples()
        pictures: list[Any] = []
        for k in range(0, len(examples), 30):
            prompts = [str(example.prompt) for example in examples[k : k + 30]]
            pictures += generate_images(flow, condition, prompts, range(k, k + len(prompts)), cfg.guidance)
        scores = score_all(task, examples, [[picture] for picture in pictures])
        figures["scenes"] = summarize_scores(examples, scores, cfg.seed).overall.overall
        first = first or figures
        name = f"{network}, {condition_kind}"
        print(f"{name:22}" + "".join(f"  {key} {figures[key]:.4g}" for key in units), flush=True)
        rows += [{"name": f"{name}: {k}", "value": figures[k], "unit": units[k], "baseline": first[k]} for k in units]
        if out:
            save_image(Path(out) / f"{network}-{condition_kind}.png", image_grid(pictures[::5], 0, 8))
    return rows


def main() -> int:
    parser = OneLineParser(description="Networks of a flow at equal FLOPs, trained alike and compared.")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--out", metavar="FOLDER", help="also write pictures of each")
    parser.add_argument("override", nargs="*", metavar="key=value", help="of the recipe, for all rows")
    start = time.monotonic()
    try:
        options = parser.parse_args()
        if options.json:
            check_output(options.json, {".json": "JSON"})
        if options.out:
            make_folder(options.out)
        if row_overrides := [
            override for override in options.override if override.startswith(("network=", "condition=", "run_dir="))
        ]:
            raise ValueError(f"leave out {', '.join(row_overrides)}: every row has its own")
        check_input(apply_overrides(config(), options.override).kl_tokenizer, INPUTS["kl_tokenizer"], "kl_tokenizer=")
        rows = compare_networks(options.override, options.out)
        if options.json:
            write_report(
                options.json,
                command=shlex.join(["python", *sys.argv]),
                model="recipes/flow_networks.py",
                seconds=time.monotonic() - start,
                tasks={row["name"]: row["value"] for row in rows},
                rows=rows,
            )
    except ValueError as error:
        print(f"unigen: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
