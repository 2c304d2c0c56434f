"""Two replicas behind nginx with docs/deploy/nginx.conf; one of them is killed under load."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("nginx"), reason="there is no nginx here")]


@pytest.fixture
def router(start_server: Any, tiny_folder: Path, root: Path, tmp_path: Path) -> Iterator[Any]:
    """The replicas, and the router's address."""
    shared = ["--images-folder", str(tmp_path / "pictures"), "--trusted-proxy", "127.0.0.1"]
    replicas = [start_server("--model", str(tiny_folder), "--name", "small", *shared) for _ in range(2)]
    for replica in replicas:
        replica.wait()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = (root / "docs" / "deploy" / "nginx.conf").read_text().replace("/tmp/unigen-nginx", f"{tmp_path}/nginx")
    for old, new in ((8000, port), (8001, replicas[0].port), (8002, replicas[1].port)):
        assert f"127.0.0.1:{old}" in text
        text = text.replace(f"127.0.0.1:{old}", f"127.0.0.1:{new}")
    (tmp_path / "nginx.conf").write_text(text)
    process = subprocess.Popen(["nginx", "-c", str(tmp_path / "nginx.conf")], stderr=subprocess.DEVNULL)

    for _ in range(100):
        with socket.socket() as there:
            if there.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield replicas, f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(10)


def test_only_running_requests_of_a_dead_replica_are_lost(router: Any) -> None:
    (first, second), url = router
    ask, url = first.ask, url + "/v1/images/generations"
    body = {"model": "small", "prompt": "a", "n": 16}
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(ask, url, body | {"seed": seed}) for seed in range(60)]
        while sum(one.done() for one in running) < 10:
            time.sleep(0.02)
        os.kill(first.process.pid, signal.SIGKILL)
        answers = [one.result() for one in running]
    broken = [answer for status, answer in answers if status != 200]
    assert all(status in (200, 503) for status, _ in answers)
    assert all(answer["error"]["code"] == "try_again" for answer in broken)
    assert 0 < len(broken) <= 8  # what can run at a time
    assert all(ask(url, body | {"n": 1})[0] == 200 for _ in range(10))
    assert second.metric("unigen_images_total") > 16 * 10


def test_conversation_stays_on_one_replica(router: Any) -> None:
    replicas, url = router
    for _ in range(6):
        assert replicas[0].ask(url + "/v1/models", headers={"x-conversation": "seven"})[0] == 200
    counts = [replica.metric('unigen_requests_total{route="/v1/models"') for replica in replicas]
    assert sorted(counts) == [0, 6]


def test_image_urls_work_on_any_replica(router: Any) -> None:
    """They have the router's port, although the replicas listen on others."""
    replicas, url = router
    body = {"model": "small", "prompt": "a", "response_format": "url"}
    status, made = replicas[0].ask(url + "/v1/images/generations", body)
    assert status == 200 and made["data"][0]["url"].startswith(url + "/images/"), made
    path = made["data"][0]["url"].removeprefix(url)
    for where in (url, *(replica.url for replica in replicas)):
        with urllib.request.urlopen(where + path, timeout=60) as answer:
            assert answer.status == 200 and answer.headers["content-type"] == "image/png"
