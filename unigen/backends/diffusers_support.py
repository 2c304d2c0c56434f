"""Inputs, outputs and options of a diffusers pipeline, read from its signature, its components and its config.

    kind = pipeline_class({"_class_name": "StableDiffusionPipeline"})
    unsupported_reason(kind)  # None, or the reason why the class cannot draw here
    supported_options(pipe)        # {"steps": "num_inference_steps", "guidance": "guidance_scale", ...}
    compatible_schedulers(pipe)       # {"euler": EulerDiscreteScheduler, ...}

An option that would change nothing is not in `supported_options`. Does not depend on: how pipelines are called.
"""

from __future__ import annotations

import ast
import inspect
import math
import sys
import textwrap
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers.configuration_utils import ConfigMixin
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from diffusers.utils.outputs import BaseOutput

    class Pipeline(DiffusionPipeline):
        """Any pipeline of diffusers: each class has parameters of its own."""

        def __call__(self, **arguments: object) -> BaseOutput:
            """Generate images."""
            ...

    class Scheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
        """Any scheduler of diffusers: each class has parameters of its own."""


SCHEDULERS = {
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
}
"""Names of solvers and their schedulers, for pipelines without flow matching."""
FLOW_SCHEDULERS = {
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
}
ENGINE_INPUTS = {"prompt", "class_labels", "image", "mask_image"}
"""Arguments of a pipeline that the engine sets itself."""
IMAGE_OPTIONAL = {
    "BriaFibo2Pipeline",
    "DreamLiteMobilePipeline",
    "DreamLitePipeline",
    "Flux2KleinKVPipeline",
    "UniDiffuserPipeline",
}
"""Pipelines that generate from words with or without an image, and that diffusers' AutoPipelineForText2Image does not
list."""
INPAINT_CHANNELS = {"KandinskyInpaintCombinedPipeline": 9, "KandinskyV22InpaintCombinedPipeline": 9}
"""Inpainting pipelines whose network takes the mask as input, and its number of input channels then."""
UNSUPPORTED_TASKS = {
    "Upscale": "enlarges pictures",
    "SuperResolution": "enlarges pictures",
    "ShapE": "renders three-dimensional objects",
    "Layered": "takes pictures apart into layers",
}
"""By a part of the class's name: tasks that are not supported and that the signature does not show."""


def pipeline_class(index: Mapping[str, object]) -> type[Pipeline]:
    """The class that a model_index.json names.

    Args:
        index: the parsed file.

    Returns:
        A class of diffusers.

    Raises:
        ValueError: where the installed diffusers has no such class.
    """
    import diffusers

    name = index.get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (inspect.isclass(kind) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise ValueError(
            f"diffusers {diffusers.__version__} has no pipeline {name!r}: update it, or give another model"
        )
    return kind  # type: ignore[return-value]


def unsupported_reason(kind: type[Pipeline]) -> str | None:
    """Why pipelines of a class can neither generate an image of words or a class here, nor edit one.

    Args:
        kind: a pipeline's class.

    Returns:
        The reason; None where they can.
    """
    import diffusers

    call_params, output_fields = call_parameters(kind), _output_fields(kind)
    parts = inspect.signature(kind.__init__).parameters
    if output_fields & {"frames", "video"} or call_params.keys() & {"num_frames", "video_length"}:
        return "it makes video, and only still pictures are drawn here"
    if "audios" in output_fields:
        return "it makes sound, and only pictures are drawn here"
    if output_fields and not output_fields & {"images", "image"}:
        return f"it gives {', '.join(sorted(output_fields))} and no picture: give the whole pipeline that draws"
    if {"controlnet", "adapter"} & parts.keys() or call_params.keys() & {"control_image", "hint"}:
        return "it is steered by a control picture, which cannot be given here"
    for part, task in UNSUPPORTED_TASKS.items():
        if part in kind.__name__:
            return f"it {task}, and only drawing and editing is done here"
    required = [
        name
        for name, parameter in call_params.items()
        if parameter.default is parameter.empty and name not in ENGINE_INPUTS
    ]
    if "mask_image" in call_params and "image" not in call_params:
        required.append("image_latents")
    if required:
        return f"it needs {', '.join(required)}, which cannot be given here: give the whole pipeline that draws"
    if parts.get("vqgan") is not None and not hasattr(diffusers, "PaellaVQModel"):
        return f"diffusers {diffusers.__version__} cannot load its image decoder, PaellaVQModel, from a folder"
    if not call_params.keys() & {"prompt", "class_labels"}:
        return "it takes neither words nor a class, so that it cannot be told what to draw"
    return None


def call_parameters(pipe: Pipeline | type[Pipeline]) -> dict[str, inspect.Parameter]:
    """The named parameters of a pipeline's `__call__`.

    Args:
        pipe: a pipeline or a pipeline's class.

    Returns:
        The parameters by name, without self, *args and **kwargs.
    """
    signature_params = inspect.signature(pipe.__call__).parameters
    named_kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        name: parameter
        for name, parameter in signature_params.items()
        if name != "self" and parameter.kind in named_kinds
    }


def needs_image(kind: type[Pipeline]) -> bool:
    """Whether pipelines of a class generate only from an image, with or without words.

    Args:
        kind: a pipeline's class.

    Returns:
        True where they take an image, and neither diffusers nor `IMAGE_OPTIONAL` lists them as text-to-image.
    """
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING as TEXT_TO_IMAGE

    return (
        "image" in call_parameters(kind) and kind not in TEXT_TO_IMAGE.values() and kind.__name__ not in IMAGE_OPTIONAL
    )


def supported_options(pipe: Pipeline) -> dict[str, str]:
    """The options that change what a pipeline generates.

    Args:
        pipe: a pipeline.

    Returns:
        The pipeline's argument by the option's name. A size is its height and width; `negative_prompt` has an effect
        only where guidance is above 1.
    """
    call_params, options = call_parameters(pipe), {}
    guidance, negative = _guidance_argument(pipe, call_params)
    if "num_inference_steps" in call_params:
        options["steps"] = "num_inference_steps"
    if guidance is not None:
        options["guidance"] = guidance
    if negative:
        options["negative_prompt"] = "negative_prompt"
    if {"height", "width"} <= call_params.keys():
        options["size"] = "height"
    if "strength" in call_params:
        options["strength"] = "strength"
    return options


def _guidance_argument(pipe: Pipeline, takes: Mapping[str, inspect.Parameter]) -> tuple[str | None, bool]:
    """What the pipeline calls the scale of its guidance, None where it hears none; and does it hear a negative prompt?

    Guidance is classifier-free, of two branches, or a number that a distilled network reads. A class may take both
    (`true_cfg_scale` beside `guidance_scale`), and its network says which of them counts."""
    network = network_config(pipe)
    has_guidance_embedding = bool(network.get("guidance_embeds")) or network.get("time_cond_proj_dim") is not None
    negative, call = "negative_prompt" in takes, inspect.getsource(type(pipe).__call__)
    if pipe.config.get("is_distilled"):
        return None, False
    if "guidance_scale" in takes and "classifier_free" in call:
        return "guidance_scale", negative and not has_guidance_embedding
    if "true_cfg_scale" in takes:
        return (
            ("guidance_scale", False)
            if has_guidance_embedding and "guidance_scale" in takes
            else ("true_cfg_scale", negative)
        )
    if "guidance_scale" in takes:
        if "guidance_embeds" in inspect.getsource(type(pipe)):
            return ("guidance_scale" if has_guidance_embedding else None), False
        return "guidance_scale", negative
    return None, negative


def network_config(pipe: Pipeline) -> Mapping[str, Any]:
    """The config of the network that denoises; empty where none is found.

    Args:
        pipe: a pipeline.

    Returns:
        The config, by key.
    """
    parts = pipe.components
    network = next((parts[name] for name in ("transformer", "unet", "decoder") if parts.get(name) is not None), None)
    return getattr(network, "config", {})


def compatible_schedulers(pipe: Pipeline, scheduler: Scheduler | None) -> dict[str, type[Scheduler]]:
    """The schedulers that can replace a pipeline's own: those that diffusers calls compatible, and that take all
    arguments with which the pipeline's `__call__` calls its scheduler.

    Args:
        pipe: a pipeline.
        scheduler: its own scheduler; None of a pipeline without one.

    Returns:
        Their classes, by the names of solvers.
    """
    import diffusers

    call = inspect.getsource(type(pipe).__call__)
    scheduler_arguments, flow = _scheduler_arguments(call), type(scheduler).__name__.startswith("FlowMatch")
    if scheduler is None or scheduler_arguments is None:
        return {}
    calls = [node for node in ast.walk(ast.parse(textwrap.dedent(call))) if isinstance(node, ast.Call)]
    steps = [node for node in calls if getattr(node.func, "attr", "") == "step"]
    step_arguments = {keyword.arg for node in steps for keyword in node.keywords if keyword.arg}
    if scheduler.config.get("use_dynamic_shifting") and flow:
        scheduler_arguments.add("mu")
    compatible = {scheduler_class.__name__ for scheduler_class in scheduler.compatibles}
    schedulers = {}
    for name, kind in (FLOW_SCHEDULERS if flow else SCHEDULERS).items():
        scheduler_class = getattr(diffusers, kind)
        if kind == type(scheduler).__name__:
            schedulers[name] = scheduler_class
            continue
        if not flow and kind not in compatible:
            continue
        if not flow and name in ("euler", "heun") and "scale_model_input" not in call:
            continue  # these scale the network's input, and the pipeline does not call their method for it
        has_learned_variance = str(scheduler.config.get("variance_type")).startswith("learned")
        if has_learned_variance and not _accepts(scheduler_class.__init__, "variance_type"):
            continue  # it could not tell which half of the network's output is the variance
        if scheduler.config.get("prediction_type") == "flow_prediction" and not _accepts(
            scheduler_class.__init__, "use_flow_sigmas"
        ):
            continue
        if not all(_accepts(scheduler_class.step, argument) for argument in step_arguments):
            continue
        if all(_accepts(scheduler_class.set_timesteps, argument) for argument in scheduler_arguments):
            schedulers[name] = scheduler_class
    return schedulers


def _accepts(function: Callable[..., object], name: str) -> bool:
    return name in inspect.signature(function).parameters


def _scheduler_arguments(call: str) -> set[str] | None:
    """What a pipeline's call tells its scheduler of the times beside their number: sigmas where it makes its own, mu,
    and others. Timesteps are only what a user gives. None where the call sets no times itself."""
    tree = ast.parse(textwrap.dedent(call))
    assigned = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    scheduler_arguments: set[str] = set()
    has_timesteps = False
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name not in ("retrieve_timesteps", "set_timesteps"):
            continue
        has_timesteps = True
        scheduler_arguments |= {keyword.arg for keyword in node.keywords if keyword.arg}
        if name == "retrieve_timesteps" and len(node.args) > 4:
            scheduler_arguments.add("sigmas")
    scheduler_arguments -= {"num_inference_steps", "device", "timesteps"}
    return scheduler_arguments - ({"sigmas"} - assigned) if has_timesteps else None


def _output_fields(kind: type[Pipeline]) -> set[str]:
    """The fields of what a pipeline's call returns, empty where its code does not say."""
    module = sys.modules[kind.__module__]
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.__call__)))
    except (OSError, TypeError):
        return set()
    return_values = [
        node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and isinstance(node.value, ast.Call)
    ]
    names = [call.func.id for call in return_values if isinstance(call.func, ast.Name)]
    return {field for name in names for field in getattr(getattr(module, name, None), "__dataclass_fields__", {})}


def size_multiple(pipe: Pipeline) -> int:
    """Pixels of which the height and the width of an image have to be multiples.

    Args:
        pipe: a pipeline.

    Returns:
        A multiple of 8.
    """
    processor = getattr(getattr(pipe, "image_processor", None), "config", {})
    factor, patch = getattr(pipe, "vae_scale_factor", 8), network_config(pipe).get("patch_size", 1)
    factors = [n for n in (processor.get("vae_scale_factor", 1), factor * patch if isinstance(patch, int) else factor)]
    return math.lcm(8, *factors)


def native_area(pipe: Pipeline) -> int:
    """About how many pixels the images have that a pipeline generates where no size is given.

    Args:
        pipe: a pipeline.

    Returns:
        Height times width.
    """
    sides = [parameter.default for name, parameter in call_parameters(pipe).items() if name in ("height", "width")]
    if len(sides) == 2 and all(isinstance(side, int) for side in sides):
        return int(math.prod(sides))
    side = network_config(pipe).get("sample_size")
    if not isinstance(side, int):
        side = getattr(pipe, "default_sample_size", 128)
    return (side * getattr(pipe, "vae_scale_factor", 8)) ** 2 if isinstance(side, int) else 1024**2
