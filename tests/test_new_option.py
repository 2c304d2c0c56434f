"""An option that comes with a new generator is known to every surface, and no other file is edited for it.

A folder adds the modules `generators/blinking.py` and `generators/options/blinking.py` to the package, in a process of
its own. Run: pytest tests/test_new_option.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from unigen.commands import main as cli

GENERATOR = """
from unigen.generators.next_token import NextToken
from unigen.generators.options.blinking import BlinkOptions

class Blinking(NextToken):
    name = "blinking"
    options = (*NextToken.options, BlinkOptions)

GENERATOR = Blinking
"""
OPTIONS = """
from dataclasses import dataclass
from unigen.options import OptionGroup, option
from unigen.utils.option_types import FloatRange

@dataclass(frozen=True)
class BlinkOptions(OptionGroup):
    blink: float = option(0.25, "how often it blinks", FloatRange(0, 2))
"""
SCRIPT = """
import inspect, json, sys
import unigen.generators, unigen.generators.options

added, folder = sys.argv[1:]
unigen.generators.__path__.append(added)
unigen.generators.options.__path__.append(added + "/options")

from unigen.commands import main as cli

surfaces = {
    "help": cli.build_parser("generate").format_help(),
    "parsed": cli.build_parser("generate").parse_args(["x", "--blink", "1.5"]).blink,
    "torch": "torch" in sys.modules,
}

import unigen
from unigen.commands import eval as eval_command
from unigen.document import Document
from unigen.evaluation.runner import find_task
from unigen.generators import find_generator
from unigen.generators.options.blinking import BlinkOptions
from unigen.serving.app import create_app
from unigen.serving.jobs import Job
from unigen.serving.form import parse_form_fields
from unigen.serving.protocol import GenerationRequest
from unigen.serving.worker import BatchedWorker

surfaces["eval help"] = eval_command.build_parser("scenes", find_task("scenes")).format_help()
engine = unigen.load(folder, "cpu")
engine.model.generators["blinking"] = find_generator("blinking")(engine.model.image_tokenizer.grid)


def error(call):
    try:
        call()
    except ValueError as wrong:
        return str(wrong)


surfaces["errors"] = [
    error(lambda: cli.build_parser("generate").parse_args(["x", "--blink", "3"])),
    error(lambda: engine.generate("a dog", generator="blinking", blink=3)),
    error(lambda: engine.generate("a dog", generator="blinking", blnk=1)),
    error(lambda: engine.generate("a dog", blink=1)),
]
worker = BatchedWorker(engine, 4)
worker.submit(0, Job(Document.of("a dog"), "image", {"generator": "blinking", "blink": 1.5}))
surfaces["settings"] = [next(worker.step())[1].settings["blink"]]
surfaces["settings"] += [engine.build_request("a dog", "image", generator="blinking", **given).settings()["blink"]
                      for given in ({}, {"options": BlinkOptions(blink=0.5)})]
info = engine.info()
surfaces["info"] = [info["takes"]["blinking"], info["sampling"]["blinking"]["blink"]]
surfaces["keywords"] = list(inspect.signature(engine.generate).parameters)
surfaces["form"] = parse_form_fields(GenerationRequest, {"blink": "0.5"})
surfaces["schema"] = GenerationRequest.model_json_schema()["properties"]["blink"]
surfaces["asked"] = GenerationRequest(prompt="a dog", blink=0.5).options()
print("FOUND", json.dumps(surfaces))
"""


@pytest.fixture(scope="module")
def surfaces(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict:
    pytest.importorskip("fastapi")
    added = tmp_path_factory.mktemp("added")
    (added / "options").mkdir()
    (added / "blinking.py").write_text(GENERATOR)
    (added / "options" / "blinking.py").write_text(OPTIONS)
    line = [sys.executable, "-c", SCRIPT, str(added), str(tiny_folder)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.partition("FOUND ")[2])


def test_the_command_line_has_it(surfaces: dict) -> None:
    assert (
        "--blink BLINK" in surfaces["help"] and "how often it blinks" in surfaces["help"] and surfaces["parsed"] == 1.5
    )
    assert "--blink BLINK" in surfaces["eval help"] and not surfaces["torch"]
    assert "--blink" not in cli.build_parser("generate").format_help()  # the control: of this process


def test_errors_name_it(surfaces: dict) -> None:
    of_line, of_range, of_spelling, of_another = surfaces["errors"]
    assert "argument --blink: '3' is not a number from 0 to 2" in of_line
    assert of_range == "blink must be a number from 0 to 2, not 3"
    assert of_spelling == "generate has no option 'blnk'; did you mean 'blink'?"
    assert of_another.startswith("next-token does not take blink: leave that out (it takes guidance, temperature")


def test_requests_have_it(surfaces: dict) -> None:
    assert surfaces["schema"]["description"] == "how often it blinks"
    assert {"maximum": 2, "minimum": 0, "type": "number"} in surfaces["schema"]["anyOf"]
    assert surfaces["form"] == {"blink": 0.5} and surfaces["asked"] == {"blink": 0.5}


def test_settings_and_signatures_report_it(surfaces: dict) -> None:
    assert surfaces["settings"] == [1.5, 0.25, 0.5]
    assert "blink" in surfaces["info"][0] and surfaces["info"][1] == 0.25
    assert "blink" in surfaces["keywords"] and "temperature" in surfaces["keywords"]
