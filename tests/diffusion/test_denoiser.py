"""Networks of diffusers as denoisers: pipelines' own pictures, drawn by our loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny_pipelines
from unigen.backends.connector import encode_prompt
from unigen.diffusion.denoiser import (
    DiffusersDenoiser,
    PromptEmbeds,
    pack_latents,
    pipeline_denoiser,
    scheduler_path,
    unpack_latents,
)
from unigen.diffusion.path import LinearPath, VariancePreservingPath
from unigen.diffusion.sampling import predict_branches, sample
from unigen.diffusion.solvers import SchedulerSolver
from unigen.samplers.guidance import Guidance

STEPS = 3


def draw(pipe: Any, noise: Tensor, conditions: list[PromptEmbeds], scale: float, **more: Any) -> Tensor:
    """Latents by our loop, with the pipeline's network and a scheduler of its class, set as the pipeline sets it."""
    denoiser = pipeline_denoiser(pipe)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    if type(pipe).__name__ == "FluxPipeline":
        scheduler.set_timesteps(sigmas=[1 - i / STEPS for i in range(STEPS)])
    else:
        scheduler.set_timesteps(STEPS)
    solver = SchedulerSolver(scheduler, denoiser.prediction_type)  # type: ignore[arg-type]
    kind, path = denoiser.prediction_type, denoiser.path
    predict = predict_branches(denoiser, conditions, **more)
    return sample(predict, noise, solver, Guidance((scale,)), path=path, prediction_type=kind)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline", "AuraFlowPipeline"])
def test_a_pipeline_and_our_loop_draw_the_same(name: str) -> None:
    """With classifier-free guidance, from the same noise; and the control, guidance of another scale."""
    pipe = tiny_pipelines.make_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    channels = pipe.vae.config.latent_channels
    noise = torch.randn(1, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    conditions = [encode_prompt(pipe, "a red dog"), encode_prompt(pipe, "")]
    found = draw(pipe, noise, conditions, 4.0)
    assert (found - draw(pipe, noise, conditions, 3.0)).abs().max() > 1e-3
    size = 16 * pipe.vae_scale_factor
    theirs = pipe(
        "a red dog",
        negative_prompt="",
        latents=noise,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        height=size,
        width=size,
        output_type="latent",
    ).images
    torch.testing.assert_close(found, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-4)


@torch.inference_mode()
def test_a_network_that_reads_guidance() -> None:
    """FLUX.1 [dev]: packed latents, and the scale of guidance as an argument."""
    pipe = tiny_pipelines.make_pipeline("FluxPipeline")
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 1, 8, 12, generator=torch.Generator().manual_seed(0))
    prompt = encode_prompt(pipe, "a red dog")
    found = draw(pipe, noise, [prompt], 1.0, guidance=torch.tensor([3.5]))
    assert (found - draw(pipe, noise, [prompt], 1.0, guidance=torch.tensor([1.0]))).abs().max() > 1e-4
    theirs = pipe(
        "a red dog",
        latents=pack_latents(noise),
        num_inference_steps=STEPS,
        guidance_scale=3.5,
        height=8 * pipe.vae_scale_factor,
        width=12 * pipe.vae_scale_factor,
        output_type="latent",
    ).images
    torch.testing.assert_close(found, unpack_latents(theirs, (8, 12)), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="FluxTransformer2DModel needs a scale of guidance"):
        draw(pipe, noise, [prompt], 1.0)
    with pytest.raises(ValueError, match="FluxTransformer2DModel needs a pooled embedding"):
        draw(pipe, noise, [PromptEmbeds(prompt.embeds_MND)], 1.0, guidance=torch.tensor([3.5]))


@torch.inference_mode()
@pytest.mark.parametrize("name", ["PixArtSigmaPipeline", "SanaPipeline"])
def test_the_mask_of_a_prompt_is_heard(name: str) -> None:
    """Padding changes nothing where it is masked, and something where it is not."""
    pipe = tiny_pipelines.make_pipeline(name)
    denoiser, prompt = pipeline_denoiser(pipe), encode_prompt(pipe, "a red dog")
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([0.6])
    padded = torch.nn.functional.pad(prompt.embeds_MND, (0, 0, 0, 3), value=1.0)
    mask = torch.arange(padded.shape[1])[None] < prompt.embeds_MND.shape[1]
    alone = denoiser(x, t, PromptEmbeds(prompt.embeds_MND, torch.ones_like(mask[:, :-3])))
    assert alone.shape == x.shape
    torch.testing.assert_close(denoiser(x, t, PromptEmbeds(padded, mask)), alone, atol=1e-4, rtol=1e-4)
    assert (denoiser(x, t, PromptEmbeds(padded, torch.ones_like(mask))) - alone).abs().max() > 1e-4


def test_latents_are_packed_as_flux_has_them() -> None:
    from diffusers import FluxPipeline

    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(pack_latents(x), FluxPipeline._pack_latents(x, 2, 3, 4, 6))
    assert torch.equal(unpack_latents(pack_latents(x), (4, 6)), x)


def test_paths_of_schedulers() -> None:
    import diffusers

    def path_of(name: str, **settings: Any) -> tuple[Any, str]:
        return scheduler_path(getattr(diffusers, name)(**settings))

    assert path_of("FlowMatchEulerDiscreteScheduler", shift=3.0) == (LinearPath(3.0), "velocity")
    settings: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 2.0}
    flow = path_of("DPMSolverMultistepScheduler", **settings)
    assert flow == (LinearPath(2.0), "velocity")
    for theirs, ours in (("epsilon", "noise"), ("v_prediction", "velocity"), ("sample", "data")):
        path, kind = path_of("DDIMScheduler", prediction_type=theirs)
        assert kind == ours and isinstance(path, VariancePreservingPath)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (tiny_pipelines.PIPELINES["DiTPipeline"], "DiTTransformer2DModel cannot be called as a denoiser"),
        (tiny_pipelines.PIPELINES["StableDiffusionXLPipeline"], "reads more than a prompt"),
        (tiny_pipelines.PIPELINES["LatentConsistencyModelPipeline"], "reads more than a prompt"),
    ],
)
def test_other_networks_are_refused(make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        pipeline_denoiser(make())


def test_arguments_that_are_not_read_are_refused() -> None:
    denoiser: DiffusersDenoiser = pipeline_denoiser(tiny_pipelines.make_pipeline("StableDiffusionPipeline"))
    x, t, prompt = torch.randn(1, 4, 16, 16), torch.tensor([0.5]), PromptEmbeds(torch.randn(1, 77, 32))
    with pytest.raises(ValueError, match="reads no mask of a region"):
        denoiser(x, t, prompt, torch.ones(1, 1, 16, 16))
    with pytest.raises(ValueError, match="reads no scale of guidance"):
        denoiser(x, t, prompt, guidance=torch.ones(1))
