"""Fixtures: servers of unigen-tiny, started as users start them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.browser import HOST

Start = Callable[..., "ServerProcess"]


def send_request(url: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """Send a request: a body is posted, as JSON unless it is bytes. Returns the status (0: no connection) and the
    answer."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"content-type": "application/json", **(headers or {})}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, given), timeout=120) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    except urllib.error.URLError:
        return 0, None
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


class ServerProcess:
    """A running `unigen serve`."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        command = [sys.executable, "-m", "unigen", "serve", "--port", str(self.port), "--allow-host", HOST]
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                [*command, *arguments], stdout=out, stderr=subprocess.STDOUT, env={**os.environ}
            )

    def wait(self, seconds: float = 240) -> None:
        """Wait until the model is loaded."""
        for _ in range(int(seconds / 0.1)):
            if self.process.poll() is not None:
                raise AssertionError(self.log.read_text())
            if self.get("/ready")[0] == 200:
                return
            time.sleep(0.1)
        raise AssertionError("not ready:\n" + self.log.read_text())

    def get(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        return send_request(self.url + path, body, headers)

    ask = staticmethod(send_request)

    def metric(self, name: str) -> float:
        lines = [line for line in self.get("/metrics")[1].splitlines() if line.startswith(name)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    @property
    def jobs(self) -> float:
        return self.metric("unigen_jobs_running") + self.metric("unigen_jobs_waiting")

    def client(self, **options: Any) -> Any:
        import openai

        headers: dict[str, Any] = {"base_url": self.url + "/v1", "api_key": "none", "max_retries": 0, "timeout": 120}
        return openai.OpenAI(**headers | options)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start servers, which end with the test session."""
    started: list[ServerProcess] = []

    def start(*arguments: str) -> ServerProcess:
        started.append(ServerProcess(list(arguments), tmp_path_factory.mktemp("serve") / "log"))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def tiny_server(start_server: Start, tmp_path_factory: pytest.TempPathFactory) -> ServerProcess:
    served = start_server("--images-folder", str(tmp_path_factory.mktemp("pictures")), "--slots", "16", "--queue", "24")
    served.wait()
    return served
