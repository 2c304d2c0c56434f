"""The deployment files: well formed, with options that `unigen serve` has, and with minimal privileges."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from unigen.commands.main import build_parser
from unigen.serving.middleware import PUBLIC_PATHS


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    return root / "docs" / "deploy"


def entry(folder: Path) -> list[str]:
    """The arguments that the image gives `unigen serve` before those of a command."""
    (line,) = re.findall(r"^ENTRYPOINT (.*)$", (folder / "Dockerfile").read_text(), re.MULTILINE)
    words = json.loads(line)
    assert words[:2] == ["unigen", "serve"]
    return words[2:]


def test_compose_replicas_match_the_router(folder: Path) -> None:
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    replicas = [services[name] for name in ("one", "two")]
    options = [build_parser("serve").parse_args([*entry(folder), *one["command"]]) for one in replicas]
    router = (folder / "nginx.conf").read_text()
    assert all(f"server 127.0.0.1:{one.port} " in router for one in options) and len({one.port for one in options}) == 2
    for replica, one in zip(replicas, options, strict=True):
        assert one.host == "127.0.0.1" and one.trusted_proxy == ["127.0.0.1"], "the router alone is reached"
        (shared,) = replica["volumes"]
        assert shared.split(":")[1] == one.images_folder, "a picture's address leads to any replica"
        assert replica["cap_drop"] == ["ALL"] and replica["read_only"] and "no-new-privileges:true" in str(replica)
        assert re.fullmatch(r"unigen:\d+\.\d+\.\d+", replica["image"]) and replica["environment"]["UNIGEN_API_KEY"]
    listens = re.search(r"s/(.*?)/(.*?)/", services["router"]["command"][2])
    assert listens and listens[1] in router and listens[2] == "listen 8000"


def test_router_forwards_host_with_port(folder: Path) -> None:
    router = (folder / "nginx.conf").read_text()
    assert re.search(r"proxy_set_header Host \$http_host;", router), "$host would drop the port"
    assert re.search(r"X-Forwarded-For \$proxy_add_x_forwarded_for;", router)


def test_kubernetes_probes_use_public_paths(folder: Path) -> None:
    deployment, service = yaml.safe_load_all((folder / "kubernetes.yaml").read_text())
    pod: Any = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    options = build_parser("serve").parse_args([*entry(folder), *container["args"]])
    assert container["ports"][0]["containerPort"] == options.port
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in PUBLIC_PATHS
    assert pod["spec"]["terminationGracePeriodSeconds"] > options.timeout
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]


def test_kubernetes_pods_have_minimal_privileges(folder: Path) -> None:
    deployment, _ = yaml.safe_load_all((folder / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    given = pod["securityContext"] | container["securityContext"]
    assert given["capabilities"] == {"drop": ["ALL"]} and given["seccompProfile"] == {"type": "RuntimeDefault"}
    assert given["readOnlyRootFilesystem"] and given["runAsNonRoot"] and given["allowPrivilegeEscalation"] is False
    assert pod["automountServiceAccountToken"] is False
    assert re.fullmatch(r"unigen:\d+\.\d+\.\d+", container["image"])
    written = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= written


def test_monitor_sends_the_api_key(folder: Path) -> None:
    deployment, _ = yaml.safe_load_all((folder / "kubernetes.yaml").read_text())
    monitor = yaml.safe_load((folder / "monitor.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    (key,) = [one["valueFrom"]["secretKeyRef"] for one in container["env"] if one["name"] == "UNIGEN_API_KEY"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["authorization"] == {"type": "Bearer", "credentials": key}
    assert endpoint["port"] == container["ports"][0]["name"] and endpoint["path"] == "/metrics"
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
