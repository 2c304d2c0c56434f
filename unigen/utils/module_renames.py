"""Old names of modules: the error of an import names the new one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

MODULE_RENAMES = {
    "adapters": "backends.connector",
    "arguments": "utils.argparser",
    "chat": "commands.chat_session",
    "cli": "commands.main",
    "data.captions": "toyworld.captions",
    "data.chats": "toyworld.chats",
    "data.language": "toyworld.language",
    "data.objects": "toyworld.objects",
    "data.scenes": "toyworld.scenes",
    "data.stories": "toyworld.stories",
    "data.world": "toyworld.world",
    "disk": "utils.disk",
    "display": "media.display",
    "engine": "inference.engine",
    "evaluation.ladder": "evaluation.baselines",
    "evaluation.tasks.writers": "evaluation.tasks.generators",
    "evaluation.watch": "evaluation.call_counter",
    "extras": "utils.extras",
    "images": "media.images",
    "likelihood": "inference.scoring",
    "limits": "options (each option with its range; unigen.utils.option_types has the ranges)",
    "nn.few_rows": "nn.cpu.linear",
    "nn.llama": "nn.cpu.llama",
    "nn.painters": "nn.denoisers",
    "numbers": "utils.numbers",
    "output": "media.output",
    "painting": "inference.inpainting",
    "pairs": "backends.composed",
    "pipeline_support": "backends.diffusers_support",
    "pipelines": "backends.diffusers_engine",
    "precision": "utils.precision",
    "progress": "utils.progress",
    "relatives": "models.relatives",
    "request": "inference.request",
    "running": "inference.scheduler",
    "samplers.ode": "diffusion.solvers",
    "sequence": "document (unigen.batch has what is packed, unigen.media.pixels has pixels)",
    "serving.guard": "serving.middleware",
    "serving.vllm_engine": "backends.vllm_engine",
    "serving.vllm_guidance": "backends.vllm_guidance",
    "serving.vllm_models": "backends.vllm_models",
    "serving.work": "serving.worker",
    "templates": "model.template",
    "training.recipes": "training.recipe_files",
    "training.writers": "training.generator_setup",
}
"""Modules of version 0.1 below `unigen`, and where what they held is."""


class OldNameFinder:
    """A finder of `sys.meta_path` that refuses old names; the error has the new one."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        """Raise ModuleNotFoundError with the new name for a module of version 0.1; find nothing else."""
        new = MODULE_RENAMES.get(name.removeprefix("unigen.")) if name.startswith("unigen.") else None
        if new is not None:
            raise ModuleNotFoundError(
                f"the module {name} is unigen.{new} now"
            )  # with its name, `from unigen import old` drops it


def install() -> None:
    """Make imports of an old name fail with the new name in the error."""
    if OldNameFinder not in sys.meta_path:
        sys.meta_path.insert(0, OldNameFinder)  # type: ignore[arg-type]
