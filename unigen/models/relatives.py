"""Explanations for public checkpoints that are close to the families here and do not load: what they are, and which
repository loads instead.

Only names of files and config.json are read. Does not depend on: how any model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

BY_MODEL_TYPE = {
    "Emu3": "is Emu3 in its authors' layout; that of transformers loads: Emu3-community/Emu3-Gen-hf draws, "
    "Emu3-community/Emu3-Chat-hf answers",
    "Emu3VisionVQ": "is Emu3's image tokenizer alone; a model that has it loads: Emu3-community/Emu3-Gen-hf",
    "bagel": "is BAGEL, which draws by rectified flow and is not supported",
}
"""Explanations by model_type of config.json."""
BY_CLASS_PREFIX = {
    "Showo2": "is Show-o2, which draws by flow matching and is not supported; Show-o is: showlab/show-o-512x512",
    "MAGVITv2": "is Show-o's image tokenizer alone; the model loads: showlab/show-o-512x512",
}
"""Explanations by the beginning of _class_name of config.json."""
BY_FILE = {
    "consolidate_params.json": "is Chameleon in its authors' layout; that of transformers loads: facebook/chameleon-7b "
    "answers, leloy/Anole-7b-v0.1-hf draws, too",
    "params.json": "is in the layout of Meta's code, as GAIR/Anole-7b-v0.1, which is not read; Anole in that of "
    "transformers is: leloy/Anole-7b-v0.1-hf",
    "llm_config.json": BY_MODEL_TYPE["bagel"],
    "*.gguf": "holds weights for llama.cpp (GGUF), which are not read: give the repository that they were made from",
    "*.onnx": "holds ONNX weights, which are not read: give the repository that they were made from",
}
"""Explanations for folders without config.json, by the pattern of a file in them."""
EMU3_VOCAB_SIZE = 184_622
"""Vocabulary size of Emu3; Emu3.5 has a larger one."""


def explain_unsupported(folder: Path, config: Mapping[str, object]) -> str | None:
    """One line on a folder that belongs to no family.

    Args:
        folder: the folder, local or of the hub's cache.
        config: the contents of its config.json, {} where there is none.

    Returns:
        The line, or None where nothing is known of the folder.
    """
    if (folder / "adapter_config.json").is_file():
        return f"{folder} {_explain_lora(folder)}"
    kind, name = str(config.get("model_type")), str(config.get("_class_name"))
    message = BY_MODEL_TYPE.get(kind)
    if kind == "Emu3" and (
        config.get("vocab_size", EMU3_VOCAB_SIZE) != EMU3_VOCAB_SIZE or "Emu3.5" in str(folder.absolute())
    ):
        message = "is Emu3.5, which is not supported; Emu3 is: Emu3-community/Emu3-Gen-hf"
    message = message or next((line for begin, line in BY_CLASS_PREFIX.items() if name.startswith(begin)), None)
    if message is None and not config:
        message = next((line for pattern, line in BY_FILE.items() if next(folder.glob(pattern), None)), None)
    return message and f"{folder} {message}"


def _explain_lora(folder: Path) -> str:
    """The explanation for a folder with a LoRA adapter, with its base model where the folder names one."""
    import json

    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    base_text = f" of {base}" if isinstance(base, str) and base else ""
    return (
        f"holds an adapter (LoRA){base_text}, not a model: merge it into its model (peft: merge_and_unload), save that"
    )
