"""unigen-tiny: one small model that draws, describes, answers, edits and tells stories of the rendered world.

    unigen train recipes/tiny_vq.py run_dir=runs/vq
    unigen train recipes/tiny.py image_tokenizer=runs/vq/model run_dir=runs/tiny

An 8M Llama with random weights reads and writes text and the codes of the image tokenizer (Liquid's layout), on a
mixture of chats that are rendered while it trains and never repeat; 75 minutes on 2 CPU cores. In a tenth of them the
text is dropped, for guidance.

Training goes on from a model by `init_from=FOLDER`, which brings its tokenizers along. Beside the mixture stand
comparisons of the model's own answers (`preferences.answers`), more generators (`generators.NAME=SHARE`), whose heads
may learn beside a frozen backbone (`freeze_backbone`), the predictions of an earlier model as targets (`lwf_teacher`),
and images that a model drew and a judge found right (`self_distill_files`). docs/training.md has the commands of each
stage and what they scored.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

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
    "kl_tokenizer": "unigen train recipes/tiny_vq.py tokenizer_kind=kl run_dir=runs/kl",
    "self_distill_files": "python data_tools/judge_answers.py pictures MODEL runs/judged.jsonl --detector "
    "runs/judge/calibrated",
    "preferences.answers": "python data_tools/judge_answers.py pictures MODEL runs/judged.jsonl "
    "--detector runs/judge/calibrated",
}
"""Files and folders that fields name, and the commands that make them."""
INPUTS_OPTIONAL_WITH = ("init_from", "generators")
"""Keys with which the defaults of INPUTS need not be there."""

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
    """The Llama."""

    hidden: int = 320
    """Width."""
    layers: int = 6
    heads: int = 5
    feed_forward: int = 864
    """Width of the MLP."""
    context: int = 1024
    """Positions."""


@dataclass
class TinyRunConfig(RunConfig):
    """A run of this recipe."""

    RENAMED: ClassVar[dict[str, str]] = {
        "writers": "generators",
        "blind": "uncond_prob",
        "learn_shown": "loss_on_user_images",
        "mistakes": "token_corruption",
        "retain": "lwf_teacher",
        "answers": "self_distill_files",
        "answered": "self_distill_share",
        "freeze": "freeze_backbone",
        "text_pieces": "text_vocab_size",
        "length": "seq_len",
    }
    """Keys of version 0.1, and their names now."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """Of a new model."""
    image_tokenizer: str = "runs/vq/model"
    """Folder of the tokenizer whose codes next-token and masked write, of a new model."""
    scale_tokenizer: str | None = None
    """Folder of a multi-scale tokenizer, for next-scale."""
    kl_tokenizer: str | None = None
    """Folder of a KL tokenizer, for flow, transfusion and token-flow."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    """The head of a new flow."""
    transfusion: TransfusionConfig = field(default_factory=TransfusionConfig)
    """A new transfusion."""
    token_flow: TokenFlowConfig = field(default_factory=TokenFlowConfig)
    """The head of a new token-flow."""
    text_vocab_size: int = 1024
    """Tokens of text, of a new model."""
    seq_len: int = 1024
    """Positions of a packed row; the longest story fits."""
    muon: bool = True
    """Muon for matrices; false: AdamW for all weights."""
    compile: bool = False
    """Faster by torch.compile; on a CPU it needs a C++ compiler."""
    generators: dict[str, float] = field(default_factory=dict)
    """Shares of generators among the documents in which an image is written, next-token's 1 where it is not given. The
    model learns those above 0, also ones that it did not have; where none is given, all that it has, alike."""
    mixture: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_KIND_WEIGHTS))
    """Shares of the kinds of chats."""
    uncond_prob: float = 0.1
    """Share of the documents whose text is dropped, for guidance."""
    loss_on_user_images: bool = True
    """Whether the codes of images that the user shows are targets, too: a caption says little of them."""
    text_weight: float = 1.0
    """Weight of the loss of text."""
    token_corruption: float = 0.0
    """The largest share of an image's codes that next-scale reads as near ones in training, to learn to correct
    them."""
    freeze_backbone: bool = False
    """The backbone stays as it is and only heads learn: far quicker for those of flow."""
    lwf_teacher: str | None = None
    """A model whose predictions are the targets of text and next-token, in place of the data (learning without
    forgetting)."""
    self_distill_files: str | None = None
    """Judged files, apart by commas, whose right images are learnt as well."""
    self_distill_share: float = 0.5
    """Their share among the chats in which one image is drawn."""
    preferences: PreferenceConfig = field(default_factory=PreferenceConfig)
    """Comparisons of answers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= share <= 1 for share in (self.uncond_prob, self.self_distill_share, self.token_corruption)):
            raise ValueError("uncond_prob, self_distill_share and token_corruption are shares from 0 to 1")
        if self.self_distill_files and not (self.self_distill_share and self.mixture.get("draw")):
            raise ValueError(
                "self_distill_files take the place of chats that draw: give self_distill_share and mixture.draw above 0"
            )
        if self.token_corruption and self.preferences.answers:
            raise ValueError(
                "answers are compared as they were drawn: leave token_corruption out, or preferences.answers"
            )
        if self.preferences.answers and not self.init_from:
            raise ValueError("preferences are of a model's own pictures: say whose by init_from=FOLDER")


def config() -> TinyRunConfig:
    return TinyRunConfig(
        steps=1_000_000,
        time_limit=4500.0,
        batch_size=8,
        optim=OptimConfig(lr=2.5e-3, warmup_steps=100, weight_decay=0.05, min_lr_ratio=0.02, schedule="linear"),
        precision="auto",
        num_workers=1,
        log_every=20,
        save_every=200,
        sample_every=400,
        run_dir="runs/tiny",
    )


class ChatDocumentSampler:
    """Draws a document and lays it out as ids; made anew in each worker, since a font cannot travel."""

    def __init__(self, template: Template, tokenizer: Any, cfg: TinyRunConfig, shares: Mapping[str, float]) -> None:
        size = tokenizer.image_size
        ChatSampler(SceneRenderer(size), cfg.mixture)  # a missing font or a wrong mixture is said at once
        self.self_distill = (
            SelfDistillationSamples(cfg.self_distill_files.split(","), tokenizer) if cfg.self_distill_files else None
        )
        self.self_distill_share = cfg.self_distill_share
        self.template, self.size, self.uncond_prob, self.loss_on_user_images = (
            template,
            size,
            cfg.uncond_prob,
            cfg.loss_on_user_images,
        )
        self.mixture = cfg.mixture
        self.generators, self.generator_probs = zip(*shares.items(), strict=True)
        self.chats: ChatSampler | None = None

    def __call__(self, rng: np.random.Generator) -> Tokens:
        self.chats = self.chats or ChatSampler(SceneRenderer(self.size), self.mixture)
        document, kind = self.chats(rng)
        generates_image = any(s.image is not None and s.role == "assistant" for s in document.segments)
        generator = (
            self.generators[int(rng.choice(len(self.generator_probs), p=self.generator_probs))]
            if generates_image
            else self.template.context_generator
        )
        if kind == "draw" and self.self_distill and rng.random() < self.self_distill_share:
            document = self.self_distill(rng)
        # a generator of text and image has the words in its own positions, too
        uncond_prob = 0.5 if generator in self.template.text_lengths else self.uncond_prob
        uncond = generates_image and rng.random() < uncond_prob
        tokens = self.template.encode(document, uncond=uncond, generator=generator)
        for start, stop in tokens.spans if self.loss_on_user_images else ():
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
            for chat in record.correct
        ]
        image_answers = [
            segments for segments in correct_answers if [s.image is not None for s in segments] == [False, True]
        ]
        if not image_answers:
            raise ValueError("self_distill_files hold no right picture: judge pictures (data_tools/judge_answers.py)")
        self.prompts = [segments[:-1] for segments in image_answers]
        self.pictures: list[Any] = [segments[-1].image for segments in image_answers]

    def __call__(self, rng: np.random.Generator) -> Document:
        k = int(rng.integers(len(self.prompts)))
        picture = self.pictures[k]
        if isinstance(picture, torch.Tensor):
            (picture,) = to_images(self.tokenizer.decode(picture[None]))
        return Document([*self.prompts[k], Segment(image=picture, role="assistant")])


def new_model(cfg: TinyRunConfig) -> UnifiedModel:
    from transformers import LlamaConfig

    image_tokenizer = load_image_tokenizer(cfg.image_tokenizer)
    lines = map(chat_template.normalize_text, text_corpus(20_000, cfg.seed))
    words = load_or_train_text_tokenizer(
        Path(cfg.run_dir) / "text_tokenizer", lines, cfg.text_vocab_size, chat_template.SPECIAL_TOKENS
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


def build(cfg: TinyRunConfig) -> TrainSpec:
    model = load(cfg.init_from) if cfg.init_from else new_model(cfg)
    shares = normalize_generator_weights(
        {"next-token": 1.0} | (cfg.generators or dict.fromkeys(model.template.begin_ids, 1.0))
    )
    torch.manual_seed(cfg.seed)
    folders = {"multiscale": cfg.scale_tokenizer, "kl": cfg.kl_tokenizer}
    settings = {"flow": cfg.flow, "transfusion": cfg.transfusion, "token-flow": cfg.token_flow}
    model = assembly.add_generators(model, tuple(shares), new_generators(model, shares, folders, settings))
    model.backbone.requires_grad_(not cfg.freeze_backbone)
    if cfg.token_corruption and "next-scale" not in shares:
        raise ValueError("token_corruption is for next-scale to correct: add generators.next-scale=1, or leave it out")
    if "next-scale" in model.heads:
        model.heads["next-scale"].token_corruption = cfg.token_corruption
    if cfg.freeze_backbone and (generators_without_weights := shares.keys() - model.heads.keys() - {"next-token"}):
        raise ValueError(
            f"freeze_backbone=true lets heads alone learn, and {', '.join(sorted(generators_without_weights))} has "
            f"none: leave it out"
        )
    if cfg.freeze_backbone and (not shares.keys() & model.heads.keys() or cfg.lwf_teacher):
        raise ValueError(
            "freeze_backbone=true is for generators with a head (generators.flow=1), and without lwf_teacher: "
            "all else stays"
        )
    reference = copy.deepcopy(model) if cfg.preferences.answers else None  # copied before it is compiled
    teacher = load(cfg.lwf_teacher) if cfg.lwf_teacher else None
    if teacher is not None and not teacher.shares_vocabulary(model):
        raise ValueError(
            f"lwf_teacher={cfg.lwf_teacher} has another text or image tokenizer than the model that learns: "
            f"name one it came from"
        )
    if cfg.compile:
        for frozen_model in filter(None, (model, reference, teacher)):
            frozen_model.backbone.compile_packed()
    size = model.image_tokenizer.image_size
    dataset: Any = PackedDataset(
        ChatDocumentSampler(model.template, model.image_tokenizer, cfg, shares), cfg.seq_len, cfg.seed
    )
    collate: Any = PackCollator(cfg.seq_len, size)
    weights = shares | {"text": cfg.text_weight}
    if cfg.freeze_backbone:
        weights = {name: weight for name, weight in weights.items() if name in model.heads}
    objective: Any = MultiGeneratorLoss(model.generators, weights, teacher)
    if cfg.preferences.answers:
        assert reference is not None
        tokenizer: Any = model.image_tokenizer
        files = cfg.preferences.answers.split(",")
        native_codes = {head.name: head.code_shape for head in model.heads.values() if hasattr(head, "code_shape")}
        pairs = read_pairs(files, cfg.seed, tokenizer.grid, tokenizer.codebook_size, native_codes)
        comparable_generators = (
            model.template.begin_ids.keys() - model.template.text_lengths.keys()
        )  # whose costs are of texts, too
        if unsupported_generators := {pair.generator for pair in pairs} - comparable_generators:
            raise ValueError(
                f"pictures by {', '.join(sorted(unsupported_generators))} are not compared: judge those by "
                f"{', '.join(sorted(comparable_generators))}"
            )
        dataset = PreferenceDataset(dataset, pairs, model.template.encode, cfg.seq_len, cfg.preferences.rows_per_sample)
        collate = PreferenceCollator(collate, cfg.seq_len, size)
        objective = DPOObjective(objective, reference, cfg.preferences)
        epochs_hint = " or ".join(f"{len(rows) / cfg.preferences.rows_per_sample:.0f}" for rows in dataset.pair_rows)
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
    questions: list[list[Image.Image | str]] = [[picture, "describe this picture"] for picture in pictures[:count]]
    answers = engine.generate_batch(questions, [0] * count, output="text", max_tokens=60)
    lines = [f"{prompt} -> {answer}" for prompt, answer in zip(SAMPLE_PROMPTS, answers, strict=True)]
    (folder / f"{step:06d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
