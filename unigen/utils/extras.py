"""Packages that only a part of the project needs: which extra brings them, and the line where one is missing.

require_extra("serve")  # ValueError: fastapi is not installed; run: pip install 'unigen[serve]'
"""

from __future__ import annotations

import importlib.util

EXTRA_MODULES = {
    "train": ("accelerate", "datasets", "tensorboard"),
    "serve": (
        "fastapi",
        "starlette",
        "uvicorn",
        "h11",
        "pydantic",
        "prometheus_client",
        "python_multipart",
        "httpx",
    ),
    "eval": ("torchmetrics", "sklearn", "scipy"),
    "browser": ("selenium",),
    "quantization": ("bitsandbytes",),
}
"""The top-level modules that are imported of each extra of pyproject.toml."""
EXTRA_COMMANDS = ("train", "serve", "eval")
"""Those of `unigen` that have an extra of their own name."""


def require_extra(extra: str, *modules: str) -> None:
    """Check that packages of an extra are installed, without importing them.

    Args:
        extra: a name in `EXTRA_MODULES`.
        modules: those of its modules that are needed now; none: all.

    Raises:
        ValueError: one is missing; says in one line how to install it.
    """
    for module in modules or EXTRA_MODULES[extra]:
        try:
            is_installed = importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            is_installed = False
        if not is_installed:
            raise ValueError(install_hint(module, extra))


def install_hint(module: str, extra: str | None) -> str:
    """The line that says how to install a missing module."""
    return f"{module} is not installed; run: pip install 'unigen{f'[{extra}]' if extra else ''}'"


def missing_module_message(error: ModuleNotFoundError, command: str = "") -> str | None:
    """The line for a module that could not be imported.

    Args:
        error: raised by the import.
        command: of `unigen` that was run, which names the extra of a package that another one needs.

    Returns:
        None for a module of this project: that is a fault, and none of the installation's.
    """
    module = (error.name or "").partition(".")[0]
    if not module or module == "unigen":
        return None
    extras = [extra for extra, modules in EXTRA_MODULES.items() if module in modules]
    preferred = command if command in EXTRA_COMMANDS else None
    return install_hint(module, preferred if preferred in extras or not extras else extras[0])
