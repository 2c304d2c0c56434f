"""Denoisers: networks that predict data, noise, score or velocity from noised latents, a time and a condition.

    denoiser = pipeline_denoiser(pipe)                            # the network of a pipeline of diffusers
    prediction_MZhw = denoiser(x_MZhw, t_M, PromptEmbeds(embeds_MND))
    data_MZhw = denoiser.path.convert(prediction_MZhw, x_MZhw, t_M, denoiser.prediction_type, "data")

`Denoiser` is the one contract: the networks of `unigen.nn.denoisers` satisfy it, and `DiffusersDenoiser` gives it to
transformers and U-Nets of diffusers. Does not depend on: solvers, guidance.

Shapes: M samples, Z latent channels, h w grid of latents, N embeddings of a prompt of width D, P width of the pooled
one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unigen.diffusion.path import LinearPath, Path, PredictionType, VariancePreservingPath


@dataclass(frozen=True)
class PromptEmbeds:
    """What a denoiser is conditioned on."""

    embeds_MND: Tensor
    """Embeddings, for attention."""
    mask_MN: Tensor | None = None
    """True where an embedding counts, False where it is padding; None where all count."""
    pooled_MP: Tensor | None = None
    """One vector for the whole prompt, where there is one."""

    def repeat_interleave(self, copies: int) -> PromptEmbeds:
        """Each sample `copies` times, its copies one after the other."""
        parts = (self.embeds_MND, self.mask_MN, self.pooled_MP)
        return PromptEmbeds(*(part if part is None else part.repeat_interleave(copies, 0) for part in parts))  # type: ignore[arg-type]

    @classmethod
    def cat(cls, parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """The samples of several, one after the other. All have as many embeddings, and a mask or a pooled vector where
        one has it."""
        masks = [one.mask_MN for one in parts if one.mask_MN is not None]
        pooled = [one.pooled_MP for one in parts if one.pooled_MP is not None]
        return cls(
            torch.cat([one.embeds_MND for one in parts]),
            torch.cat(masks) if masks else None,
            torch.cat(pooled) if pooled else None,
        )


class Denoiser(Protocol):
    """A network of a path from data (t = 0) to noise (t = 1)."""

    prediction_type: PredictionType
    """What it predicts."""

    def __call__(
        self, x: Tensor, t: Tensor, condition: PromptEmbeds, mask: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        """The prediction (M, Z, h, w).

        Args:
            x: noised latents (M, Z, h, w).
            t: times (M,) in [0, 1].
            condition: of each sample.
            mask: region (M, 1, h, w) that is to be changed, for networks that read one.
            guidance: scale (M,) that a network distilled from guidance reads.

        Raises:
            ValueError: for an argument that the network does not read, or for one that it needs.
        """
        ...


@dataclass(frozen=True)
class NetworkInputs:
    """How a class of diffusers' networks is called."""

    sample: str = "hidden_states"
    """Keyword of the latents."""
    mask: str | None = None
    """Keyword of the mask of the prompt's embeddings (M, N)."""
    pooled: str | None = None
    """Keyword of the pooled embedding (M, P)."""
    guidance: str | None = None
    """Keyword of the scale of guidance (M,)."""
    time_scale: float = 1000.0
    """Its timestep for t = 1."""
    packed: bool = False
    """Does it read latents as tokens of patches of 2 x 2, with ids of their positions (FLUX)?"""
    reads_size: bool = False
    """Does it take a picture's size, which may be None (PixArt)?"""


NETWORK_INPUTS = {
    "AuraFlowTransformer2DModel": NetworkInputs(time_scale=1.0),
    "FluxTransformer2DModel": NetworkInputs(
        pooled="pooled_projections", guidance="guidance", time_scale=1.0, packed=True
    ),
    "PixArtTransformer2DModel": NetworkInputs(mask="encoder_attention_mask", reads_size=True),
    "SD3Transformer2DModel": NetworkInputs(pooled="pooled_projections"),
    "SanaTransformer2DModel": NetworkInputs(mask="encoder_attention_mask", guidance="guidance"),
    "UNet2DConditionModel": NetworkInputs(sample="sample", mask="encoder_attention_mask"),
}
"""By class, which networks of diffusers a `DiffusersDenoiser` calls."""
PREDICTION_TYPES: dict[str, PredictionType] = {
    "epsilon": "noise",
    "sample": "data",
    "v_prediction": "velocity",
    "flow_prediction": "velocity",
}
"""What a scheduler of diffusers calls the kinds of prediction."""


class DiffusersDenoiser:
    """A transformer or U-Net of diffusers as a `Denoiser`."""

    def __init__(self, network: nn.Module, path: Path, prediction_type: PredictionType) -> None:
        """
        Args:
            network: of a class in `NETWORK_INPUTS`.
            path: on which it was trained.
            prediction_type: what it predicts.

        Raises:
            ValueError: for a network of another class, or one with conditions beside the prompt.
        """
        name = type(network).__name__
        if name not in NETWORK_INPUTS:
            raise ValueError(f"{name} cannot be called as a denoiser: only {', '.join(NETWORK_INPUTS)} can")
        self.network, self.path = network, path
        self.prediction_type: PredictionType = prediction_type
        self._inputs, self._config = NETWORK_INPUTS[name], getattr(network, "config", {})
        for key in ("addition_embed_type", "encoder_hid_dim_type", "class_embed_type", "time_cond_proj_dim"):
            if self._config.get(key) is not None:
                raise ValueError(f"this {name} reads more than a prompt ({key}={self._config[key]}): not supported")

    def __call__(
        self, x: Tensor, t: Tensor, condition: PromptEmbeds, mask: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        """As `Denoiser.__call__`."""
        if mask is not None:
            raise ValueError(f"{type(self.network).__name__} reads no mask of a region")
        if guidance is not None and not self.reads_guidance:
            raise ValueError(f"this {type(self.network).__name__} reads no scale of guidance")
        inputs, packed = self._inputs, self._inputs.packed
        arguments: dict[str, Any] = {
            inputs.sample: pack_latents(x) if packed else x,
            "timestep": t * (inputs.time_scale * float(self._config.get("timestep_scale") or 1.0)),
            "encoder_hidden_states": condition.embeds_MND,
            "return_dict": False,
        }
        if inputs.mask is not None and condition.mask_MN is not None:
            arguments[inputs.mask] = condition.mask_MN
        if inputs.pooled is not None:
            arguments[inputs.pooled] = self._needed(condition.pooled_MP, "a pooled embedding")
        if inputs.guidance is not None and self.reads_guidance:
            arguments[inputs.guidance] = self._needed(guidance, "a scale of guidance")
        if packed:
            arguments["img_ids"] = patch_positions(x)
            arguments["txt_ids"] = x.new_zeros(condition.embeds_MND.shape[1], 3)
        if inputs.reads_size:
            arguments["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        prediction = self.network(**arguments)[0]
        if packed:
            return unpack_latents(prediction, (x.shape[-2], x.shape[-1]))
        return prediction[:, : x.shape[1]]  # the other channels are a variance

    @property
    def reads_guidance(self) -> bool:
        """Does the network read a scale of guidance?"""
        return self._inputs.guidance is not None and bool(self._config.get("guidance_embeds"))

    def _needed(self, value: Tensor | None, description: str) -> Tensor:
        if value is None:
            raise ValueError(f"{type(self.network).__name__} needs {description}")
        return value


def pack_latents(x: Tensor) -> Tensor:
    """Latents (M, Z, h, w) as tokens (M, h w / 4, 4 Z) of patches of 2 x 2, row by row."""
    return nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpack_latents(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Latents (M, Z, h, w), the inverse of `pack_latents`; grid: h and w."""
    return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (grid[0] // 2, grid[1] // 2)), 2)


def patch_positions(x: Tensor) -> Tensor:
    """0, row and column of the patches of 2 x 2 of latents (M, Z, h, w), row by row: (h w / 4, 3)."""
    rows, columns = (torch.arange(length // 2, dtype=x.dtype, device=x.device) for length in x.shape[-2:])
    return torch.cartesian_prod(x.new_zeros(1), rows, columns)


class Pipeline(Protocol):
    """What is read of a pipeline of diffusers."""

    @property
    def components(self) -> dict[str, Any]:
        """Networks, tokenizers and schedulers by name."""
        ...


def pipeline_denoiser(pipe: Pipeline) -> DiffusersDenoiser:
    """The network of a pipeline of diffusers, with the path and the kind of prediction of its scheduler.

    Raises:
        ValueError: for a network that a `DiffusersDenoiser` does not call, or a scheduler without a path.
    """
    parts = pipe.components
    network = next((parts[name] for name in ("transformer", "unet") if parts.get(name) is not None), None)
    if network is None:
        raise ValueError(f"{type(pipe).__name__} has neither a transformer nor a U-Net")
    path, prediction_type = scheduler_path(parts["scheduler"])
    return DiffusersDenoiser(network, path, prediction_type)


def scheduler_path(scheduler: Any) -> tuple[Path, PredictionType]:
    """The path on which a scheduler of diffusers goes, and the kind of prediction that it takes.

    Raises:
        ValueError: for a scheduler that is neither of a flow nor of a table of variances.
    """
    name = type(scheduler).__name__
    prediction_type = PREDICTION_TYPES.get(scheduler.config.get("prediction_type", "flow_prediction"))
    if name.startswith("FlowMatch") or scheduler.config.get("use_flow_sigmas"):
        return LinearPath(float(scheduler.config.get("shift") or scheduler.config.get("flow_shift") or 1.0)), "velocity"
    if prediction_type is None or not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
        raise ValueError(f"{name} has no path that is known here: it is neither of a flow nor variance preserving")
    return VariancePreservingPath(scheduler.alphas_cumprod), prediction_type
