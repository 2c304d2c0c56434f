"""Names are the field's: what was renamed does not come back.

Run: pytest tests/test_names.py
"""

from __future__ import annotations

import ast
from pathlib import Path

BANNED = {
    "AdaptedPipeline": "ConnectedDiffusersEngine",
    "Adapter": "Connector: an adapter is LoRA's",
    "Asked": "FixedPromptTemplate",
    "Begun": "Started",
    "Busy": "QueueFull",
    "Captions": "CaptionDataset",
    "Down": "ModelUnavailable",
    "Drawing": "GenerationFields",
    "Ended": "Finished",
    "FewRowsLinear": "PackedLinear",
    "Frame": "BuildContext: a frame is a video's",
    "Guard": "GuardMiddleware",
    "LlamaLM": "InferenceLlama",
    "Mixture": "MultiGeneratorLoss",
    "NotFinite": "NonFiniteError",
    "PAPER": "PAD_COLOR",
    "PairedEngine": "ComposedEngine: a pair is DPO's",
    "PipelineEngine": "DiffusersEngine",
    "QA": "QAPair",
    "Read": "StepInput",
    "Refused": "Rejected",
    "Running": "Scheduler",
    "Sight": "VisionEncoder",
    "Span": "SegmentSpec",
    "Together": "BatchedWorker",
    "Totals": "MetricAccumulator",
    "TransformersReader": "TransformersEngine",
    "Verdict": "Judgement",
    "Watch": "CallCounter",
    "World": "SceneRenderer",
    "as_words": "as_text",
    "assemble": "build_model",
    "blends": "blend_images",
    "checked": "build_request",
    "closest": "rerank_captions",
    "coarse_dct": "quantize_dct",
    "damage_of": "wrap_load_errors",
    "few_rows_linear": "packed_linear",
    "frame_of": "build_context",
    "keeping": "prepare_inpainting",
    "likeliest": "argmax_ids",
    "side_by_side": "fused_linears",
    "spelt": "normalize_text",
    "spoken": "serialize_segment",
    "teach": "add_generators",
    "told_before": "is_repeated",
    "truest": "rerank_images",
    "use_few_rows": "pack_linears",
    "usual_output": "default_output",
    "widen": "to_float32",
}
"""Identifiers of version 0.1, and the terms that took their place."""
PHRASES = {"refuses to know": "Does not depend on"}
"""Words of the project's own, and plain English."""
WORDS = frozenset(
    "again asked drawn held here kept made mine named ours own read said seen shown some theirs there thing told usual "
    "wanted what written".split()
)
"""Participles, pronouns and adverbs. No variable, parameter, field, function or class is called so."""
FOLDERS = ("unigen", "recipes", "data_tools", "scripts")


def bound_names(source: str) -> set[str]:
    """The names that a source defines: of variables, parameters, fields, functions, classes and aliases."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                found.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.alias(asname=str(name)):
                found.add(name)
    return found


def identifiers(source: str) -> set[str]:
    """All names that a source defines, reads, imports, or gives by keyword."""
    found = bound_names(source)
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name) | ast.keyword(arg=str(name)):
                found.add(name)
    return found


def test_names_are_nouns_and_verbs(root: Path) -> None:
    sources = {path: path.read_text() for folder in FOLDERS for path in (root / folder).rglob("*.py")}
    used = {
        (str(path.relative_to(root)), name) for path, source in sources.items() for name in bound_names(source) & WORDS
    }
    assert not used
    for line in (
        "said = 1",
        "def f(asked): ...",
        "def told(): ...",
        "x.own = 1",
        "for what in y: ...",
        "import a as here",
    ):
        assert bound_names(line) & WORDS, line
    assert not bound_names("f(own=said)") & WORDS  # names of others


def test_no_banned_name_is_used(root: Path) -> None:
    sources = {path: path.read_text() for folder in FOLDERS for path in (root / folder).rglob("*.py")}
    used = {(str(path.relative_to(root)), name) for path, s in sources.items() for name in identifiers(s) & set(BANNED)}
    assert not used, {(where, name, BANNED[name]) for where, name in used}


def phrases(text: str) -> set[str]:
    """The banned phrases in a text, wherever its lines break."""
    words = " ".join(text.lower().split())
    return {phrase for phrase in PHRASES if phrase in words}


def test_no_banned_phrase_is_used(root: Path) -> None:
    folders = [root / folder for folder in (*FOLDERS, "docs")]
    files = [path for folder in folders for kind in ("py", "md", "js") for path in folder.rglob(f"*.{kind}")]
    used = {path: found for path in [*files, root / "README.md"] if (found := phrases(path.read_text()))}
    assert not used
    assert phrases("It refuses\n    to know models.")


def test_a_banned_name_is_noticed() -> None:
    lines = (
        "def f(checked): ...",
        "class World: ...",
        "x.keeping()",
        "f(truest=1)",
        "from a import spoken",
        "Busy = 1",
    )
    assert all(identifiers(line) & set(BANNED) for line in lines)
