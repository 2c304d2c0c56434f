"""A model that reads joined to a diffusers pipeline by hidden states: a small network takes what the one has read to
what the other is told by, its prompt embeddings.

    engine = unigen.load(lmm="Qwen/Qwen3-VL-2B-Instruct", generator="stable-diffusion-v1-5/stable-diffusion-v1-5",
                         adapter="runs/adapter/model")
    engine.generate([picture, "the same dog in the snow"])      # the picture is read, and never put into words

Learned queries attend to the last hidden states of the whole document, pictures included, and their outputs stand in
for the pipeline's embeddings of a prompt: the mapper of GILL (Koh et al. 2023, arXiv 2305.17216), between such models
as Emu2 (arXiv 2312.13286) and Dream Engine join. Queries, and not a layer on each state, because a document has any
number of states while a pipeline wants its own number: as many queries as that give it (Stable Diffusion: 77). Where
that number is the prompt's own (pipelines that take a mask), each query also says whether it counts, and the first of
those that do not ends the prompt.
Guidance's other branch is the pipeline's own, of its own text encoder: an adapter writes in that encoder's space, so
that what was tuned to stand beside it still does, and `negative_prompt` takes words as ever.
recipes/connector.py trains one.

Shapes: B documents, S states of width D, L embeddings of width W, P width of the pooled one.
"""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unigen.backends.diffusers_engine import DiffusersEngine
from unigen.backends.diffusers_support import call_parameters
from unigen.config import from_dict, save_json
from unigen.diffusion.denoiser import PromptEmbeds
from unigen.document import Document
from unigen.hub.folders import replacing_folder
from unigen.hub.resolve import CONFIG, read_json
from unigen.hub.weights import load_strict, read_tensors, write_tensors
from unigen.inference.protocol import EngineInfo, InferenceEngine
from unigen.model.template import UnsupportedError

MASK_ARGUMENTS = ("prompt_attention_mask", "prompt_embeds_mask")
"""What pipelines call the mask of prompts of any length."""
POOLED_ARGUMENT = "pooled_prompt_embeds"
ENCODE_PROMPT_ARGUMENTS = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False, "clean_caption": False}
"""Of a pipeline's `encode_prompt`: one prompt as it is, without guidance. What else it takes is as its `__call__` has
it."""


@dataclass
class ConnectorConfig:
    """states: width of what is read; embeds, length: width and number of a prompt's embeddings, at most so many where
    `free`; pooled: width of the one for the whole prompt, 0 where the pipeline has none."""

    states: int
    embeds: int
    length: int
    pooled: int = 0
    free: bool = False
    width: int = 512
    layers: int = 4
    heads: int = 8

    def __post_init__(self) -> None:
        if min(self.states, self.embeds, self.length, self.width, self.layers, self.heads, self.pooled + 1) < 1:
            raise ValueError("an adapter's widths, length, layers and heads must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"an adapter's width ({self.width}) must be a multiple of its heads ({self.heads})")


class Connector(nn.Module):
    """States of a document to prompt embeddings."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.enter = nn.Sequential(nn.LayerNorm(config.states), nn.Linear(config.states, width))
        self.queries = nn.Parameter(torch.randn(config.length + bool(config.pooled), width) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(width, config.heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.embeds = nn.Linear(width, config.embeds)
        self.pooled = nn.Linear(width, config.pooled) if config.pooled else None
        self.counts = nn.Linear(width, 1) if config.free else None

    def forward(self, states_BSD: Tensor, seen_BS: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Embeddings (B, L, W), the pooled ones (B, P), logits of whether each counts (B, L). seen: bool, False where
        states are padding."""
        states_BSE = self.enter(states_BSD)
        x_BQE = self.queries.expand(len(states_BSE), -1, -1)
        for layer in self.layers:
            x_BQE = layer(x_BQE, states_BSE, memory_key_padding_mask=~seen_BS)
        x_BQE = self.norm(x_BQE)
        x_BLE = x_BQE[:, : self.config.length]
        pooled_BP = None if self.pooled is None else self.pooled(x_BQE[:, -1])
        counts_BL = None if self.counts is None else self.counts(x_BLE).squeeze(-1)
        return self.embeds(x_BLE), pooled_BP, counts_BL

    @torch.no_grad()
    def prompt_embeds(self, states_SD: Tensor) -> PromptEmbeds:
        """What one document tells the pipeline: one sample without padding."""
        states_1SD = states_SD[None].to(self.queries)
        embeds_1LW, pooled_1P, counts_1L = self(states_1SD, states_1SD.new_ones(states_1SD.shape[:2], dtype=torch.bool))
        length = self.config.length
        if counts_1L is not None:
            length = max(1, int((counts_1L[0] > 0).long().cumprod(0).sum()))
        return PromptEmbeds(embeds_1LW[:, :length], pooled_MP=pooled_1P)

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors."""
        with replacing_folder(folder) as scratch:
            save_json(scratch / CONFIG, asdict(self.config))
            write_tensors(scratch / "model.safetensors", self.state_dict())


def load_connector(folder: str | Path) -> Connector:
    """The adapter in a folder, strictly. Raises ValueError in one line."""
    folder = Path(folder)
    settings = read_json(folder / CONFIG)
    try:
        config = from_dict(ConnectorConfig, settings)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is not an adapter's: {error}") from error
    adapter = Connector(config)
    load_strict(adapter, read_tensors(folder / "model.safetensors"), folder)
    return adapter.eval()


class ConnectedDiffusersEngine(DiffusersEngine):
    """Draws documents, pictures among them, as an LMM reads them and an adapter tells the pipeline."""

    accepts_images = True

    def __init__(self, pipe: Any, text_engine: InferenceEngine, connector: Connector) -> None:
        """An engine of a pipeline that a connector conditions.

        Args:
            pipe: a pipeline that takes prompt embeddings.
            text_engine: reads the prompts and gives its hidden states.
            connector: maps these states to prompt embeddings.
        Raises:
            ValueError: where the connector's widths are not those of the two models.
        """
        super().__init__(pipe)
        self.text_engine, self.connector = text_engine, connector.to(pipe.device)
        config = connector.config
        expected = connector_config(text_engine, pipe, config.length)
        requirements = [
            ("reads states of width", config.states, expected.states, "the lmm has"),
            ("makes embeddings of width", config.embeds, expected.embeds, "the pipeline takes"),
            ("makes so many of them:", config.length, expected.length, "the pipeline takes"),
            ("makes a pooled one of width", config.pooled, expected.pooled, "the pipeline takes"),
            ("says how many count:", config.free, expected.free, "for the pipeline it is"),
        ]
        if mismatches := [
            f"it {description} {actual}, {owner} {required}"
            for description, actual, required, owner in requirements
            if actual != required
        ]:
            raise ValueError(f"the adapter does not fit these models: {'; '.join(mismatches)}")

    @torch.inference_mode()
    def _prompt_arguments(self, document: Document) -> dict[str, Any]:
        prompt = self.connector.prompt_embeds(self.text_engine.hidden_states(document))
        arguments: dict[str, Any] = {"prompt_embeds": prompt.embeds_MND.to(self.pipe.dtype)}
        if prompt.pooled_MP is not None:
            arguments[POOLED_ARGUMENT] = prompt.pooled_MP.to(self.pipe.dtype)
        ones_1L = torch.ones(prompt.embeds_MND.shape[:2], dtype=torch.int64, device=prompt.embeds_MND.device)
        return arguments | {name: ones_1L for name in MASK_ARGUMENTS if name in self.call_parameters}

    def info(self) -> EngineInfo:
        """See `InferenceEngine.info`."""
        count, c = sum(p.numel() for p in self.connector.parameters()), self.connector.config
        most = "at most " if c.free else ""
        size = f"{count / 1e6:.1f}M parameters, {most}{c.length} embeddings of {c.embeds}"
        return {**super().info(), "adapter": size}


@torch.no_grad()
def encode_prompt(pipe: Any, words: str) -> PromptEmbeds:
    """Words as a pipeline's own text encoder gives them: one sample without padding. Raises ValueError for a pipeline
    that is told otherwise."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(pipe.__call__).parameters.items()}
    kind = type(pipe).__name__
    extra_arguments = [
        name for name in defaults if name.startswith(("prompt_embeds_", "prior_token")) and name not in MASK_ARGUMENTS
    ]
    if "prompt_embeds" not in defaults or extra_arguments or not hasattr(pipe, "encode_prompt"):
        raise ValueError(f"{kind} is not told by prompt embeddings alone: an adapter cannot tell it what to draw")
    arguments = defaults | ENCODE_PROMPT_ARGUMENTS | {"prompt": [words], "device": pipe.device}
    accepted = inspect.signature(pipe.encode_prompt).parameters
    outputs = pipe.encode_prompt(**{name: value for name, value in arguments.items() if name in accepted})
    embeds, *extras = outputs if isinstance(outputs, tuple) else (outputs,)
    if not isinstance(embeds, Tensor) or embeds.ndim != 3:
        raise ValueError(f"{kind} has prompt embeddings of a kind of its own: an adapter cannot tell it what to draw")
    pooled_outputs = [part for part in extras if isinstance(part, Tensor) and part.ndim == 2]
    pooled = [part for part in pooled_outputs if POOLED_ARGUMENT in defaults]
    masks = [
        part[0].bool()
        for part in pooled_outputs
        if part.shape == embeds.shape[:2] and not defaults.keys().isdisjoint(MASK_ARGUMENTS)
    ]
    return PromptEmbeds(embeds[:, masks[0]] if masks else embeds, pooled_MP=pooled[0] if pooled else None)


def connector_config(text_engine: InferenceEngine, pipe: Any, length: int) -> ConnectorConfig:
    """An adapter's figures that the two models set. length: of a prompt at most, where the pipeline takes any. Raises
    ValueError for models that none can join."""
    reference = encode_prompt(pipe, "a")
    try:
        states = text_engine.hidden_states("a").shape[1]
    except UnsupportedError as error:
        raise ValueError("this model cannot be the lmm of an adapter: it reads no words without a picture") from error
    free = any(name in call_parameters(pipe) for name in MASK_ARGUMENTS)
    return ConnectorConfig(
        states=states,
        embeds=reference.embeds_MND.shape[2],
        length=length if free else reference.embeds_MND.shape[1],
        pooled=0 if reference.pooled_MP is None else reference.pooled_MP.shape[1],
        free=free,
    )


def require_pipeline(engine: InferenceEngine) -> Any:
    """The pipeline that a connector conditions. Raises ValueError for an engine without one."""
    if engine.pipeline is None:
        raise ValueError("an adapter tells a diffusers pipeline what to draw: give one as generator, or no adapter")
    return engine.pipeline
