"""unigen-tiny: one small model that draws, describes, answers, edits and tells stories of the rendered world.

    COMMAND   unigen train recipes/tiny_vq.py run_dir=runs/vq
              unigen train recipes/tiny.py image_tokenizer=runs/vq/model run_dir=runs/tiny
    HARDWARE  2 CPU cores
    TIME      75 minutes
    MEASURED  an earlier mixture, time_limit=4700 (3,358 steps of 5,120 positions): unigen eval scenes 0.442, captions
              0.163, questions 0.632; from there init_from=unigen-tiny time_limit=7380 seed=1 on a busy machine (3,515
              steps): 0.640, 0.630, 0.829; from there time_limit=8300 seed=2 compile=true optim.lr=1.4e-3 text_weight=3
              (5,242 steps, not all of them so): 0.720, 0.757, 0.924; from there 55 minutes more and rounds of
              comparisons, averaged: 0.876, 0.787 (0.850 as the best of 8), 0.936; four hours of new ways
              beside it (stages in the model card): 0.851, 0.787 as the best of 8, 0.923; five hours more on one
              core: 0.839, 0.810 as the best of 8, 0.935; two and a half more
              and two rounds of comparisons: 0.845, 0.837 as the best of 16, 0.936; one round more and half an hour
              of the mixture, at guidance 3: 0.860, 0.857 as the best of 16, 0.942

An 8M Llama with random weights reads and writes text and the codes of the image tokenizer (Liquid's layout), on a
mixture of chats that are rendered while it trains and never repeat. In a tenth of them the text is dropped, for
guidance. Training goes on from a model by `init_from=FOLDER`, which brings its tokenizers along, and beside the mixture
from comparisons of its own answers:

              python data_tools/judge_answers.py pictures runs/tiny/model runs/judged.jsonl
                  --detector runs/judge/calibrated
              unigen train recipes/tiny.py init_from=runs/tiny/model preferences.judged=runs/judged.jsonl
                  preferences.weight=10 preferences.nll=3 text_weight=10 batch_size=4 steps=130 time_limit=none
                  optim.lr=1e-4 optim.warmup=10 run_dir=runs/preferred

New ways of writing are learnt beside next-token, which stays as it was by `retain`, from true pictures and from
right ones of the model's own; the mean with the model that it began from gives back a part of what is lost yet:

              unigen train recipes/tiny_vq.py init_from=unigen/assets/unigen-tiny/image_tokenizer
                  model.quantizer=multiscale model.code_dim=16 model.scales=1,2,4,6,8 model.coarse=0.5
                  loss.feature=0.5 features=runs/judge/calibrated optim.lr=1e-3 time_limit=3300 run_dir=runs/scales
              unigen train recipes/tiny_vq.py kind=kl kl.channels=48,96 loss.feature=0.5 features=runs/judge/calibrated
                  optim.lr=1.5e-3 time_limit=780 run_dir=runs/kl
              unigen train recipes/tiny.py init_from=runs/tiny/model retain=runs/tiny/model
                  scale_tokenizer=runs/scales/model kl_tokenizer=runs/kl/model flow.layers=5 flow.head_dim=32
                  writers.next-token=0.28 writers.masked=0.25 writers.next-scale=0.25 writers.flow=0.22 mixture.draw=1.5
                  answers=runs/judged.jsonl optim.lr=1.4e-3 time_limit=5400 run_dir=runs/four
              python scripts/average.py runs/mean runs/four/model runs/tiny/model --weights 0.8,0.2

The flow's head then learns on alone, from many more pictures in an hour than beside the others:

              unigen train recipes/tiny.py init_from=runs/mean freeze=true writers.flow=1 writers.next-token=0.01
                  answers=runs/judged.jsonl mixture.draw=8 mixture.describe=0 mixture.ask=0 mixture.chat=0
                  mixture.judge=0 batch_size=1 ema=0.998 optim.lr=2e-3 time_limit=2040 run_dir=runs/flow

Last of all the decoder of next-scale's tokenizer learns from what the model draws (half an hour: 0.681 to 0.802 of all
pictures of `unigen eval scenes --generator next-scale`):

              python data_tools/draw_again.py runs/mean runs/drawn.npz --minutes 20
              unigen train recipes/tiny_vq.py init_from=runs/mean/next-scale/tokenizer freeze_codes=true
                  drawn=runs/drawn.npz model.quantizer=multiscale model.code_dim=16 model.scales=1,2,4,6,8
                  model.coarse=0.5 loss.feature=1 features=runs/judge/calibrated time_limit=1920 run_dir=runs/sharp
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unigen.batch import Tokens
from unigen.config import OptimConfig, RunConfig
from unigen.data.packing import PackCollator, PackedDataset
from unigen.document import Document, Segment
from unigen.generators.flow import FlowConfig
from unigen.generators.token_flow import TokenFlowConfig
from unigen.generators.transfusion import TransfusionConfig
from unigen.inference.engine import Engine
from unigen.media.output import image_grid
from unigen.media.pixels import to_images
from unigen.model import assembly, chat_template
from unigen.model.unified import Template, UnifiedModel
from unigen.models import load
from unigen.tokenizers import load_image_tokenizer
from unigen.toyworld.chats import DEFAULT_KIND_WEIGHTS, ChatSampler
from unigen.toyworld.stories import text_corpus
from unigen.toyworld.world import SceneRenderer
from unigen.training.generator_setup import load_or_train_text_tokenizer, new_generators, normalize_generator_weights
from unigen.training.muon import MuonAdamW
from unigen.training.objectives import MultiGeneratorLoss
from unigen.training.preferences import (
    DPOObjective,
    PreferenceCollator,
    PreferenceConfig,
    PreferenceDataset,
    read_judged_answers,
    read_pairs,
)
from unigen.training.train_spec import TrainSpec

INPUTS = {
    "image_tokenizer": "unigen train recipes/tiny_vq.py run_dir=runs/vq",
    "scale_tokenizer": "unigen train recipes/tiny_vq.py model.quantizer=multiscale model.code_dim=16 "
    "run_dir=runs/scales",
    "kl_tokenizer": "unigen train recipes/tiny_vq.py kind=kl run_dir=runs/kl",
    "answers": "python data_tools/judge_answers.py pictures MODEL runs/judged.jsonl --detector runs/judge/calibrated",
    "preferences.judged": "python data_tools/judge_answers.py pictures MODEL runs/judged.jsonl "
    "--detector runs/judge/calibrated",
}
"""Files and folders that fields name, and the commands that make them."""

SAMPLE_PROMPTS = (
    "a horse",
    "a blue horse and a red dog",
    "two apples on a blue background",
    "three pink rabbits",
    "a witch to the left of a raven",
    "a star above a house",
    "four fish on a white background",
    "a green car",
)


@dataclass
class BackboneConfig:
    hidden: int = 320
    layers: int = 6
    heads: int = 5
    feed_forward: int = 864
    context: int = 1024


@dataclass
class TinyConfig(RunConfig):
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    image_tokenizer: str = "runs/vq/model"
    scale_tokenizer: str | None = None  # folder of a multi-scale tokenizer, for next-scale
    kl_tokenizer: str | None = None  # folder of a KL tokenizer, for flow, transfusion and token-flow
    flow: FlowConfig = field(default_factory=FlowConfig)
    transfusion: TransfusionConfig = field(default_factory=TransfusionConfig)
    token_flow: TokenFlowConfig = field(default_factory=TokenFlowConfig)
    text_pieces: int = 1024
    length: int = 1024  # positions of a packed row; the longest story fits
    muon: bool = True  # false: AdamW for all weights
    compile: bool = False  # faster by torch.compile; on a CPU it needs a C++ compiler
    writers: dict[str, float] = field(default_factory=dict)
    """How pictures are written: the shares of generators among the documents that draw one, next-token's 1 where it is
    not given. A model learns those above 0, also ones that it could not write by before; where none is given, all that
    it writes by, alike."""
    mixture: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_KIND_WEIGHTS))  # shares of kinds of chats
    blind: float = 0.1  # share of documents whose text is dropped
    learn_shown: bool = True  # also the pictures that the user shows: a caption says little of what is in their codes
    text_weight: float = 1.0
    mistakes: float = 0.0  # the most that next-scale reads wrong of a picture's codes in training, to learn to mend it
    freeze: bool = False  # the backbone stays as it is, and only heads beside it learn: far quicker for those of flow
    retain: str | None = None  # a model: text and next-token are learnt from what it says, not from the data
    answers: str | None = None  # judged files, apart by commas, of whose right pictures is learnt as well
    answered: float = 0.5  # their share among the chats in which one picture is drawn
    preferences: PreferenceConfig = field(default_factory=PreferenceConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= share <= 1 for share in (self.blind, self.answered, self.mistakes)):
            raise ValueError("blind, answered and mistakes are shares from 0 to 1")
        if self.answers and not (self.answered and self.mixture.get("draw")):
            raise ValueError("answers take the place of chats that draw: give answered and mixture.draw above 0")
        if self.mistakes and self.preferences.judged:
            raise ValueError("answers are compared as they were drawn: leave mistakes out, or preferences.judged")
        if self.preferences.judged and not self.init_from:
            raise ValueError("preferences are of a model's own pictures: say whose by init_from=FOLDER")


def config() -> TinyConfig:
    return TinyConfig(
        steps=1_000_000,
        time_limit=4500.0,
        batch_size=8,
        optim=OptimConfig(lr=2.5e-3, warmup=100, weight_decay=0.05, min_ratio=0.02, schedule="linear"),
        precision="auto",
        workers=1,
        log_every=20,
        save_every=200,
        sample_every=400,
        run_dir="runs/tiny",
    )


class ChatDocumentSampler:
    """Draws a document and lays it out as ids; made anew in each worker, since a font cannot travel."""

    def __init__(self, template: Template, tokenizer: Any, cfg: TinyConfig, shares: Mapping[str, float]) -> None:
        size = tokenizer.image_size
        ChatSampler(SceneRenderer(size), cfg.mixture)  # a missing font or a wrong mixture is said at once
        self.answers = SelfDistillationSamples(cfg.answers.split(","), tokenizer) if cfg.answers else None
        self.answered = cfg.answered
        self.template, self.size, self.blind, self.learn_shown = template, size, cfg.blind, cfg.learn_shown
        self.mixture = cfg.mixture
        self.writers, self.shares = zip(*shares.items(), strict=True)
        self.chats: ChatSampler | None = None

    def __call__(self, rng: np.random.Generator) -> Tokens:
        self.chats = self.chats or ChatSampler(SceneRenderer(self.size), self.mixture)
        document, kind = self.chats(rng)
        generates_image = any(s.image is not None and s.role == "assistant" for s in document.segments)
        writer = (
            self.writers[int(rng.choice(len(self.shares), p=self.shares))]
            if generates_image
            else self.template.context_generator
        )
        if kind == "draw" and self.answers and rng.random() < self.answered:
            document = self.answers(rng)
        blind = 0.5 if writer in self.template.text_lengths else self.blind  # whose span has the words, too
        tokens = self.template.encode(document, uncond=generates_image and rng.random() < blind, generator=writer)
        for start, stop in tokens.spans if self.learn_shown else ():
            tokens.loss[start:stop] = [True] * (stop - start)
        return tokens


class SelfDistillationSamples:
    """Prompts in words, with pictures that next-token drew and a judge found right: what a teacher draws has fewer ways
    to go than the world has, and is easier to learn for those that write many codes at once (sequence-level
    distillation, Kim and Rush 2016, arXiv 1606.07947; Gu et al. 2018, arXiv 1711.02281). Learnt are the pictures, not
    the codes drawn: read again, some are others."""

    def __init__(self, files: Sequence[str], tokenizer: Any) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)  # which stays on the CPU, where the model may not
        correct_answers = [
            chat.segments
            for file in files
            for record in read_judged_answers(file, tokenizer.grid, tokenizer.codebook_size)
            for chat in record.right
        ]
        image_answers = [
            segments for segments in correct_answers if [s.image is not None for s in segments] == [False, True]
        ]
        if not image_answers:
            raise ValueError("answers hold no right picture: judge pictures (data_tools/judge_answers.py)")
        self.prompts = [segments[:-1] for segments in image_answers]
        self.pictures: list[Any] = [segments[-1].image for segments in image_answers]

    def __call__(self, rng: np.random.Generator) -> Document:
        k = int(rng.integers(len(self.prompts)))
        picture = self.pictures[k]
        if isinstance(picture, torch.Tensor):
            (picture,) = to_images(self.tokenizer.decode(picture[None]))
        return Document([*self.prompts[k], Segment(image=picture, role="assistant")])


def new_model(cfg: TinyConfig) -> UnifiedModel:
    from transformers import LlamaConfig

    image_tokenizer = load_image_tokenizer(cfg.image_tokenizer)
    lines = map(chat_template.normalize_text, text_corpus(20_000, cfg.seed))
    words = load_or_train_text_tokenizer(
        Path(cfg.run_dir) / "text_tokenizer", lines, cfg.text_pieces, chat_template.SPECIAL_TOKENS
    )
    shape = LlamaConfig(
        hidden_size=cfg.backbone.hidden,
        num_hidden_layers=cfg.backbone.layers,
        num_attention_heads=cfg.backbone.heads,
        intermediate_size=cfg.backbone.feed_forward,
        max_position_embeddings=cfg.backbone.context,
        tie_word_embeddings=True,
    )
    torch.manual_seed(cfg.seed)
    return assembly.build_from_config(shape, words, image_tokenizer)


def build(cfg: TinyConfig) -> TrainSpec:
    model = load(cfg.init_from) if cfg.init_from else new_model(cfg)
    shares = normalize_generator_weights(
        {"next-token": 1.0} | (cfg.writers or dict.fromkeys(model.template.begin_ids, 1.0))
    )
    torch.manual_seed(cfg.seed)
    folders = {"multiscale": cfg.scale_tokenizer, "kl": cfg.kl_tokenizer}
    settings = {"flow": cfg.flow, "transfusion": cfg.transfusion, "token-flow": cfg.token_flow}
    model = assembly.add_generators(model, tuple(shares), new_generators(model, shares, folders, settings))
    model.backbone.requires_grad_(not cfg.freeze)
    if cfg.mistakes and "next-scale" not in shares:
        raise ValueError("mistakes are for next-scale to mend: add writers.next-scale=1, or leave them out")
    if "next-scale" in model.heads:
        model.heads["next-scale"].mistakes = cfg.mistakes
    if cfg.freeze and (generators_without_weights := shares.keys() - model.heads.keys() - {"next-token"}):
        raise ValueError(
            f"freeze=true lets heads alone learn, and {', '.join(sorted(generators_without_weights))} has "
            f"none: leave it out"
        )
    if cfg.freeze and (not shares.keys() & model.heads.keys() or cfg.retain):
        raise ValueError("freeze=true is for writers with a head (writers.flow=1), and without retain: all else stays")
    reference = copy.deepcopy(model) if cfg.preferences.judged else None  # copied before it is compiled
    teacher = load(cfg.retain) if cfg.retain else None
    if teacher is not None and not teacher.shares_vocabulary(model):
        raise ValueError(
            f"retain={cfg.retain} has another text or image tokenizer than the model that learns: name one it came from"
        )
    if cfg.compile:
        for frozen_model in filter(None, (model, reference, teacher)):
            frozen_model.backbone.compile_packed()
    size = model.image_tokenizer.image_size
    dataset: Any = PackedDataset(
        ChatDocumentSampler(model.template, model.image_tokenizer, cfg, shares), cfg.length, cfg.seed
    )
    collate: Any = PackCollator(cfg.length, size)
    weights = shares | {"text": cfg.text_weight}
    if cfg.freeze:
        weights = {name: weight for name, weight in weights.items() if name in model.heads}
    objective: Any = MultiGeneratorLoss(model.generators, weights, teacher)
    if cfg.preferences.judged:
        assert reference is not None
        tokenizer: Any = model.image_tokenizer
        files = cfg.preferences.judged.split(",")
        native_codes = {head.name: head.own_shape for head in model.heads.values() if hasattr(head, "own_shape")}
        pairs = read_pairs(files, cfg.seed, tokenizer.grid, tokenizer.codebook_size, native_codes)
        comparable_generators = (
            model.template.begin_ids.keys() - model.template.text_lengths.keys()
        )  # whose costs are of texts, too
        if unsupported_generators := {pair.writer for pair in pairs} - comparable_generators:
            raise ValueError(
                f"pictures by {', '.join(sorted(unsupported_generators))} are not compared: judge those by "
                f"{', '.join(sorted(comparable_generators))}"
            )
        dataset = PreferenceDataset(dataset, pairs, model.template.encode, cfg.length, cfg.preferences.rows)
        collate = PreferenceCollator(collate, cfg.length, size)
        objective = DPOObjective(objective, reference, cfg.preferences)
        epochs_hint = " or ".join(f"{len(rows) / cfg.preferences.rows:.0f}" for rows in dataset.pairs)
        print(f"{len(pairs)} pairs of answers: each is seen once in {epochs_hint} rows of the mixture", flush=True)
    return TrainSpec(
        model=model,
        dataset=dataset,
        collate=collate,
        objective=objective,
        make_optimizer=(lambda model, cfg: MuonAdamW(model, cfg.optim)) if cfg.muon else None,
        write_samples=write_samples,
        save_model=lambda model, folder: model.save(folder),
    )


def write_samples(model: UnifiedModel, step: int, folder: Path) -> None:
    """Guided pictures, one column a prompt, two rows a way of writing; and what the model says of the uppermost row."""
    engine = Engine(model.inference_copy())
    rows = [(name, seed) for name in engine.info()["generators"] for seed in (0, 1)]
    pictures = [
        picture
        for name, seed in rows
        for picture in engine.generate_batch(SAMPLE_PROMPTS, [seed] * len(SAMPLE_PROMPTS), generator=name)
    ]
    count, sheet = len(SAMPLE_PROMPTS), image_grid(pictures, 0, len(SAMPLE_PROMPTS))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(folder / f"{step:06d}.png")
    questions = [[picture, "describe this picture"] for picture in pictures[:count]]
    answers = engine.generate_batch(questions, [0] * count, output="text", max_tokens=60)
    lines = [f"{prompt} -> {answer}" for prompt, answer in zip(SAMPLE_PROMPTS, answers, strict=True)]
    (folder / f"{step:06d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
