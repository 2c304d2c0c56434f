"""Imports run downward only, and what the command line starts with is light.

Run: pytest tests/test_imports.py
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from unigen.utils.module_renames import MODULE_RENAMES

# From bottom to top. What stands on one line does not import each other.
LAYERS = [
    {"utils"},
    {"options", "config"},
    {"media", "hub"},
    {"document"},
    {"batch"},
    {"samplers"},
    {"diffusion"},
    {"nn"},
    {"tokenizers"},
    {"generators"},
    {"model"},
    {"models", "inference", "data", "toyworld"},
    {"backends"},
    {"loading", "option_groups"},
    {"training", "evaluation"},
    {"serving"},
    {"commands"},
    {"__main__"},
]
HEIGHT = {name: i for i, names in enumerate(LAYERS) for name in names}
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
            if HEIGHT.get(target, len(LAYERS)) >= HEIGHT[part]:  # `unigen` itself names all of them
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
        ("model.unified", "from unigen.inference import engine"),
        ("document", "import unigen.nn.backbone"),
        ("evaluation.runner", "from unigen.training import trainer"),
        ("nn.conv", "import unigen"),
        ("models.liquid", "from unigen.models.janus import X"),
        ("models.lumina", "from unigen.models.janus import X"),
        ("data.x", "import torchvision"),
        ("commands.train", "from recipes.tiny import build"),
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


HELPS = """
import unigen
from unigen.commands.main import COMMANDS, main

main(["--help"])
for name, command in COMMANDS.items():
    try:
        hasattr(command, "add_arguments") and main([name, "--help"])
    except SystemExit:
        pass
"""


def test_import_and_help_are_light() -> None:
    assert not loaded(HELPS) & HEAVY
    assert loaded("import torch") & HEAVY


def dependencies(sources: dict[str, str]) -> dict[str, set[str]]:
    """The modules that each module imports anywhere, a package by its `__init__`."""
    graph = {}
    for module, source in sources.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                names.update({str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)})
        names = {name.removeprefix("unigen.") for name in names}
        graph[module] = {full for name in names for full in (name, f"{name}.__init__") if full in sources} - {module}
    return graph


def test_no_modules_import_each_other(root: Path) -> None:
    """Not through others either, nor inside functions."""
    sources = modules(root)
    list(TopologicalSorter(dependencies(sources)).static_order())
    with pytest.raises(CycleError):
        around = {
            "utils.text": "def f():\n    from unigen.utils import files",
            "utils.files": "import unigen.utils.text",
        }
        list(TopologicalSorter(dependencies(sources | around)).static_order())


def missing(source: str, modules: set[str]) -> list[str]:
    """Strings that name a module or something in it, as entry points and vLLM's options do, but no module is there."""
    strings = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    named = [s for s in strings if isinstance(s, str) and re.fullmatch(r"unigen(\.[a-z_0-9]+)+([.:][A-Z_a-z]\w*)?", s)]
    known = {f"unigen.{module.removesuffix('.__init__')}" for module in modules} | {"unigen.load", "unigen.json"}
    return [s for s in named if s not in known and re.split(r"[:]|\.(?=\w+$)", s)[0] not in known]


def test_strings_name_modules_that_are_there(root: Path) -> None:
    sources = modules(root)
    assert not [(module, name) for module, source in sources.items() for name in missing(source, set(sources))]
    points = re.findall(r'= "(unigen\.[\w.]+:\w+)"', (root / "pyproject.toml").read_text())
    assert len(points) == 2 and not missing(f"x = {points!r}", set(sources))
    assert missing("x = 'unigen.nowhere.module:name'", set(sources))


def test_an_old_name_of_a_module_says_the_new_one(root: Path) -> None:
    sources = {name.removesuffix(".__init__") for name in modules(root)}
    assert not sources & set(MODULE_RENAMES) and {new.split(" ")[0] for new in MODULE_RENAMES.values()} <= sources
    with pytest.raises(ModuleNotFoundError, match="the module unigen.sequence is unigen.document"):
        importlib.import_module("unigen.sequence")
    with pytest.raises(ImportError, match="the module unigen.cli is unigen.commands.main now"):
        exec("from unigen import cli")
    with pytest.raises(ModuleNotFoundError, match="No module named 'unigen.nowhere'"):
        importlib.import_module("unigen.nowhere")
