"""A language model joined to a diffusers pipeline by hidden states: a small network maps the states of the one to the
prompt embeddings of the other.

    engine = unigen.load(lmm="Qwen/Qwen3-VL-2B-Instruct", image_model="stable-diffusion-v1-5/stable-diffusion-v1-5",
                         connector="runs/connector/model")
    engine.generate([picture, "the same dog in the snow"])      # the picture is read, and never put into words

Learned queries attend to the last hidden states of the whole document, images included, and their outputs replace the
pipeline's embeddings of a prompt: the mapper of GILL (Koh et al. 2023, arXiv 2305.17216), between such models as Emu2
(arXiv 2312.13286) and Dream Engine join. It has queries instead of a layer on each state, because a document has any
number of states while a pipeline takes its own number of embeddings: there are as many queries (Stable Diffusion: 77).
Where the pipeline takes prompts of any length (with a mask), each query also has a logit of whether it counts, and the
first that does not ends the prompt.
The unconditional branch of guidance is the pipeline's own, of its own text encoder: a connector maps into that
encoder's space, so that networks tuned beside the encoder still work, and `negative_prompt` takes words as ever.
recipes/connector.py trains one.

Shapes: B documents, S states of width D, L embeddings of width W, P width of the pooled one, E width of the connector,
Q queries.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from unigen.backends.diffusers_engine import DiffusersEngine
from unigen.backends.diffusers_support import call_parameters
from unigen.config import from_dict
from unigen.diffusion.denoiser import PromptEmbeds
from unigen.document import Document
from unigen.hub.folders import replacing_folder
from unigen.hub.resolve import CONFIG, read_json
from unigen.hub.weights import load_strict, read_tensors, write_tensors
from unigen.inference.protocol import EngineInfo, InferenceEngine
from unigen.model.template import UnsupportedError
from unigen.utils.files import save_json

if TYPE_CHECKING:
    from unigen.backends.diffusers_support import Pipeline

MASK_ARGUMENTS = ("prompt_attention_mask", "prompt_embeds_mask")
"""Names of the argument that masks prompts of any length."""
POOLED_ARGUMENT = "pooled_prompt_embeds"
ENCODE_PROMPT_ARGUMENTS = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False, "clean_caption": False}
"""Arguments of a pipeline's `encode_prompt` for one prompt without guidance. Others have the defaults of its
`__call__`."""


@dataclass
class ConnectorConfig:
    """Widths and lengths of a connector."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "states": "input_dim",
        "embeds": "output_dim",
        "length": "max_length",
        "pooled": "pooled_dim",
        "free": "variable_length",
    }
    """Keys of version 0.1, and their names now."""

    input_dim: int
    """Width D of the hidden states."""
    output_dim: int
    """Width W of a prompt embedding."""
    max_length: int
    """Embeddings of a prompt; the most of them where `variable_length`."""
    pooled_dim: int = 0
    """Width P of the pooled embedding; 0 where the pipeline has none."""
    variable_length: bool = False
    """Whether a prompt may have fewer embeddings."""
    width: int = 512
    """Width E inside."""
    layers: int = 4
    """Decoder layers."""
    heads: int = 8
    """Attention heads of a layer."""

    def __post_init__(self) -> None:
        sizes = (self.input_dim, self.output_dim, self.max_length, self.width, self.layers, self.heads)
        if min(*sizes, self.pooled_dim + 1) < 1:
            raise ValueError("a connector's widths, length, layers and heads must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"a connector's width ({self.width}) must be a multiple of its heads ({self.heads})")


class Connector(nn.Module):
    """Maps the hidden states of a document to prompt embeddings.

    Args:
        config: its widths and lengths.
    """

    OLD_KEYS: ClassVar[Mapping[str, str]] = {
        "enter": "proj_in",
        "embeds": "proj_out",
        "pooled": "pooled_proj",
        "counts": "length_head",
    }
    """Names of layers in version 0.1, and their names now."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.proj_in = nn.Sequential(nn.LayerNorm(config.input_dim), nn.Linear(config.input_dim, width))
        self.queries = nn.Parameter(torch.randn(config.max_length + bool(config.pooled_dim), width) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(width, config.heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, config.output_dim)
        self.pooled_proj = nn.Linear(width, config.pooled_dim) if config.pooled_dim else None
        self.length_head = nn.Linear(width, 1) if config.variable_length else None

    def forward(self, hidden_BSD: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Map hidden states to prompt embeddings.

        Args:
            hidden_BSD: hidden states.
            mask_BS: bool, False at padding.

        Returns:
            Embeddings (B, L, W); the pooled ones (B, P) or None; logits (B, L) of whether each embedding counts, or
            None.
        """
        hidden_BSE = self.proj_in(hidden_BSD)
        x_BQE = self.queries.expand(len(hidden_BSE), -1, -1)
        for layer in self.layers:
            x_BQE = layer(x_BQE, hidden_BSE, memory_key_padding_mask=~mask_BS)
        x_BQE = self.norm(x_BQE)
        x_BLE = x_BQE[:, : self.config.max_length]
        pooled_BP = None if self.pooled_proj is None else self.pooled_proj(x_BQE[:, -1])
        counts_BL = None if self.length_head is None else self.length_head(x_BLE).squeeze(-1)
        return self.proj_out(x_BLE), pooled_BP, counts_BL

    @torch.no_grad()
    def prompt_embeds(self, hidden_SD: Tensor) -> PromptEmbeds:
        """The prompt embeddings of one document.

        Args:
            hidden_SD: hidden states of the document.

        Returns:
            One sample without padding.
        """
        hidden_1SD = hidden_SD[None].to(self.queries)
        embeds_1LW, pooled_1P, counts_1L = self(hidden_1SD, hidden_1SD.new_ones(hidden_1SD.shape[:2], dtype=torch.bool))
        length = self.config.max_length
        if counts_1L is not None:
            length = max(1, int((counts_1L[0] > 0).long().cumprod(0).sum()))
        return PromptEmbeds(embeds_1LW[:, :length], pooled_MP=pooled_1P)

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors.

        Args:
            folder: where to; it is replaced only when both are written.
        """
        with replacing_folder(folder) as scratch:
            save_json(scratch / CONFIG, asdict(self.config))
            write_tensors(scratch / "model.safetensors", self.state_dict())


def load_connector(folder: str | Path) -> Connector:
    """Load a connector, strictly.

    Args:
        folder: written by `Connector.save`.

    Returns:
        The connector, in eval mode.

    Raises:
        ValueError: in one line, for a folder that is not there, damaged, or not a connector's.
    """
    folder = Path(folder)
    settings = read_json(folder / CONFIG)
    try:
        config = from_dict(ConnectorConfig, settings)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is not a connector's: {error}") from error
    connector = Connector(config)
    load_strict(connector, read_tensors(folder / "model.safetensors"), folder)
    return connector.eval()


class ConnectedDiffusersEngine(DiffusersEngine):
    """A pipeline that draws documents, images among them: a language model reads them, and a connector maps its hidden
    states to prompt embeddings."""

    accepts_images = True

    def __init__(self, pipe: Pipeline, text_engine: InferenceEngine, connector: Connector) -> None:
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
        expected = connector_config(text_engine, pipe, config.max_length)
        requirements = [
            ("reads states of width", config.input_dim, expected.input_dim, "the lmm has"),
            ("makes embeddings of width", config.output_dim, expected.output_dim, "the pipeline takes"),
            ("makes so many of them:", config.max_length, expected.max_length, "the pipeline takes"),
            ("makes a pooled one of width", config.pooled_dim, expected.pooled_dim, "the pipeline takes"),
            ("says how many count:", config.variable_length, expected.variable_length, "for the pipeline it is"),
        ]
        if mismatches := [
            f"it {description} {actual}, {owner} {required}"
            for description, actual, required, owner in requirements
            if actual != required
        ]:
            raise ValueError(f"the connector does not fit these models: {'; '.join(mismatches)}")

    @torch.inference_mode()
    def _prompt_arguments(self, document: Document) -> dict[str, object]:
        prompt = self.connector.prompt_embeds(self.text_engine.hidden_states(document))
        arguments: dict[str, object] = {"prompt_embeds": prompt.embeds_MND.to(self.pipe.dtype)}
        if prompt.pooled_MP is not None:
            arguments[POOLED_ARGUMENT] = prompt.pooled_MP.to(self.pipe.dtype)
        ones_1L = torch.ones(prompt.embeds_MND.shape[:2], dtype=torch.int64, device=prompt.embeds_MND.device)
        return arguments | {name: ones_1L for name in MASK_ARGUMENTS if name in self.call_parameters}

    def info(self) -> EngineInfo:
        """See `InferenceEngine.info`."""
        count, c = sum(p.numel() for p in self.connector.parameters()), self.connector.config
        most = "at most " if c.variable_length else ""
        size = f"{count / 1e6:.1f}M parameters, {most}{c.max_length} embeddings of {c.output_dim}"
        return {**super().info(), "connector": size}


@torch.no_grad()
def encode_prompt(pipe: Pipeline, words: str) -> PromptEmbeds:
    """Encode words by a pipeline's own text encoder.

    Args:
        pipe: a pipeline of diffusers.
        words: the prompt.

    Returns:
        One sample without padding.

    Raises:
        ValueError: for a pipeline that is not conditioned on prompt embeddings alone.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(pipe.__call__).parameters.items()}
    kind = type(pipe).__name__
    extra_arguments = [
        name for name in defaults if name.startswith(("prompt_embeds_", "prior_token")) and name not in MASK_ARGUMENTS
    ]
    if "prompt_embeds" not in defaults or extra_arguments or not hasattr(pipe, "encode_prompt"):
        raise ValueError(f"{kind} does not take prompt embeddings alone: a connector cannot condition it")
    arguments = defaults | ENCODE_PROMPT_ARGUMENTS | {"prompt": [words], "device": pipe.device}
    parameters = inspect.signature(pipe.encode_prompt).parameters
    outputs = pipe.encode_prompt(**{name: value for name, value in arguments.items() if name in parameters})
    embeds, *extras = outputs if isinstance(outputs, tuple) else (outputs,)
    if not isinstance(embeds, Tensor) or embeds.ndim != 3:
        raise ValueError(f"{kind} has prompt embeddings of a kind of its own: a connector cannot condition it")
    matrices = [part for part in extras if isinstance(part, Tensor) and part.ndim == 2]
    pooled = [part for part in matrices if POOLED_ARGUMENT in defaults]
    masks = [
        part[0].bool()
        for part in matrices
        if part.shape == embeds.shape[:2] and not defaults.keys().isdisjoint(MASK_ARGUMENTS)
    ]
    return PromptEmbeds(embeds[:, masks[0]] if masks else embeds, pooled_MP=pooled[0] if pooled else None)


def connector_config(text_engine: InferenceEngine, pipe: Pipeline, length: int) -> ConnectorConfig:
    """The widths and lengths that the two models require of a connector.

    Args:
        text_engine: gives the hidden states.
        pipe: takes the prompt embeddings.
        length: embeddings of a prompt, at most, where the pipeline takes any number.

    Returns:
        The config.

    Raises:
        ValueError: for models that no connector can join.
    """
    reference = encode_prompt(pipe, "a")
    try:
        input_dim = text_engine.hidden_states("a").shape[1]
    except UnsupportedError as error:
        raise ValueError("this model cannot be the lmm of a connector: it reads no words without a picture") from error
    variable_length = any(name in call_parameters(pipe) for name in MASK_ARGUMENTS)
    return ConnectorConfig(
        input_dim=input_dim,
        output_dim=reference.embeds_MND.shape[2],
        max_length=length if variable_length else reference.embeds_MND.shape[1],
        pooled_dim=0 if reference.pooled_MP is None else reference.pooled_MP.shape[1],
        variable_length=variable_length,
    )


def require_pipeline(engine: InferenceEngine) -> Pipeline:
    """The pipeline that a connector conditions.

    Args:
        engine: an engine of a pipeline.

    Returns:
        Its pipeline.

    Raises:
        ValueError: for an engine without one.
    """
    if engine.pipeline is None:
        raise ValueError("a connector conditions a diffusers pipeline: give one as image_model, or no connector")
    return engine.pipeline  # type: ignore[return-value]
