"""Imports run downward only, and what the command line starts with is light.

Run: pytest tests/test_imports.py
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

# From top to bottom. What stands on one line does not import each other. `unigen` itself loads engines: it is one.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"chat"},
    {"serving"},
    {"reasoning"},
    {"training", "evaluation", "probes"},
    {"pairs"},
    {"adapters"},
    {"engine", "models", "data", "pipelines"},
    {"running"},
    {"likelihood", "request", "painting", "pipeline_support"},
    {"model"},
    {"generators", "tokenizers", "templates"},
    {"nn", "samplers"},
    {"sequence", "config", "output", "hub", "precision", "relatives", "disk"},
    {"limits"},
    {"arguments", "display", "extras", "images", "numbers", "progress"},
]
HEIGHT = {name: len(LAYERS) - i for i, names in enumerate(LAYERS) for name in names}
BUILT_ON = {"models.lumina": "models.chameleon"}
"""A family that is another's layers under another grammar says so here; all others do not import each other."""
ABOVE = {"recipes", "scripts", "data_tools", "tests"}


def imported(source: str) -> set[str]:
    """The dotted names of the modules that the source imports anywhere, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "import by full names"
            base = node.module or ""
            names.update(f"{base}.{alias.name}" if base == "unigen" else base for alias in node.names)
    return names


def faults(module: str, source: str) -> list[str]:
    """What is wrong with the imports of unigen.<module>."""
    part, found = module.split(".")[0], []
    for name in sorted(imported(source)):
        root, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if root == "torchvision":
            found.append(f"{module} imports torchvision, which is not a dependency")
        elif root in ABOVE:
            found.append(f"{module} imports {name}, which stands above the package")
        elif root == "unigen" and part != "__init__" and target != part:
            height = HEIGHT.get(target, HEIGHT["engine"])
            if height >= HEIGHT[part]:
                found.append(f"{module} imports {name}, which does not stand below it")
        if (
            part == "models"
            and name.startswith("unigen.models.")
            and module != "models.__init__"
            and not name.startswith(f"unigen.{BUILT_ON.get(module, module)}")
        ):
            found.append(f"{module} imports {name}: families never import each other")
    return found


def modules(root: Path) -> dict[str, str]:
    return {
        ".".join(path.relative_to(root / "unigen").with_suffix("").parts): path.read_text()
        for path in sorted((root / "unigen").rglob("*.py"))
    }


def test_imports_run_downward(root: Path) -> None:
    sources = modules(root)
    unknown = {name.split(".")[0] for name in sources} - set(HEIGHT) - {"__init__"}
    assert not unknown, f"give {unknown} a line in LAYERS"
    assert [fault for name, source in sources.items() for fault in faults(name, source)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("training.trainer", "def f():\n    from unigen.evaluation import runner"),
        ("model", "from unigen import engine"),
        ("sequence", "import unigen.nn.backbone"),
        ("evaluation.runner", "from unigen.training import trainer"),
        ("nn.conv", "import unigen"),
        ("models.liquid", "from unigen.models.janus import X"),
        ("models.lumina", "from unigen.models.janus import X"),
        ("data.x", "import torchvision"),
        ("cli", "from recipes.tiny import build"),
    ],
)
def test_the_rules_can_fail(module: str, source: str) -> None:
    assert faults(module, source)


def loaded(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after running the code."""
    code += "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {"torch", "transformers", "diffusers", "datasets", "accelerate", "numpy", "PIL"}


def test_import_and_help_are_light() -> None:
    code = "import unigen\nfrom unigen.cli import COMMANDS, main\nmain(['--help'])\n"
    code += "for name, command in COMMANDS.items():\n"
    code += "    try:\n        command.arguments and main([name, '--help'])\n    except SystemExit:\n        pass"
    assert not loaded(code) & HEAVY
    assert loaded("import torch") & HEAVY
