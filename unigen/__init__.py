"""unigen: one small unified model framework that reads and writes text and images.

    import unigen
    engine = unigen.load("unigen-tiny")
    image = engine.generate("two apples on a blue background", seed=0)

Importing the package imports nothing heavy; torch comes with the first attribute that needs it.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

from unigen.utils.module_renames import install

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else it warns of its speed, at import and at every product
warnings.filterwarnings("ignore", message="IProgress not found")  # in notebooks without ipywidgets, bars are of text

install()

__version__ = "0.2.0"
__all__ = [
    "Document",
    "Engine",
    "GenerationResult",
    "Guidance",
    "InferenceEngine",
    "Preview",
    "Record",
    "Segment",
    "load",
]

if TYPE_CHECKING:
    from unigen.document import Document, Preview, Segment
    from unigen.inference.engine import Engine
    from unigen.inference.protocol import InferenceEngine
    from unigen.inference.results import GenerationResult, Record
    from unigen.loading import load
    from unigen.samplers.guidance import Guidance

_LAZY_IMPORTS = {
    "load": "unigen.loading",
    "Engine": "unigen.inference.engine",
    "InferenceEngine": "unigen.inference.protocol",
    "GenerationResult": "unigen.inference.results",
    "Record": "unigen.inference.results",
    "Guidance": "unigen.samplers.guidance",
    "Document": "unigen.document",
    "Preview": "unigen.document",
    "Segment": "unigen.document",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module 'unigen' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY_IMPORTS[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
