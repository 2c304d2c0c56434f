"""The files by which replicas are started: well formed, and their commands are ones that `unigen serve` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from unigen.cli import parser_of
from unigen.serving.guard import OPEN


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    return root / "docs" / "deploy"


def test_composed_replicas_are_those_of_the_router(folder: Path) -> None:
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    ports = [parser_of("serve").parse_args(services[name]["command"]).port for name in ("one", "two")]
    router = (folder / "nginx.conf").read_text()
    assert all(f"server 127.0.0.1:{port} " in router for port in ports) and len(set(ports)) == 2


def test_the_cluster_asks_what_the_server_answers_without_a_key(folder: Path) -> None:
    deployment, service = yaml.safe_load_all((folder / "kubernetes.yaml").read_text())
    pod: Any = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    options = parser_of("serve").parse_args(container["args"])
    assert container["ports"][0]["containerPort"] == options.port
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in OPEN
    assert pod["spec"]["terminationGracePeriodSeconds"] > options.timeout
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
