"""Answers of `unigen serve` under load: time to the first part, tokens and pictures a second, against transformers.

    python scripts/bench.py serve [--model 100M] [--dtype float32] [--concurrency 1,8,32] [--engines local,vllm]
        [--kinds text,picture] [--repeat 2] [--json FILE]

A server is started as a user starts it, one for each engine (vLLM's is that of .venv-serve, by
scripts/install_serve.sh), and so many clients ask at once, of the same weights in every row: text (64
tokens, streamed), pictures with guidance, and without. "transformers": `generate()` on the same prompts as one batch,
in this process and without HTTP, the best that its own server could do if all requests came at once, in turn with the
server's answers; for pictures with guidance it is its `guidance_scale`. "first": seconds to the first text or picture,
in the mean of the clients.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from scripts.benches.decode import PROMPT, load_model, transformers_generate
from unigen.utils.argparser import OneLineParser
from unigen.utils.files import write_report
from unigen.utils.option_types import number_argument

MAX_TOKENS = 64
VLLM_PYTHON = Path(__file__).resolve().parents[2] / ".venv-serve" / "bin" / "python"
KINDS = ("text", "picture", "unguided picture")


@contextmanager
def start_server(engine: str, model: str, dtype: str, slots: int, log: str) -> Iterator[str]:
    """The address of a server with this model, ready to answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python = sys.executable if engine == "local" else str(VLLM_PYTHON)
    command = [
        python,
        "-m",
        "unigen",
        "serve",
        "--engine",
        engine,
        "--model",
        model,
        "--name",
        "bench",
        "--port",
        str(port),
    ]
    command += ["--slots", str(slots), "--queue", str(slots), "--timeout", "3600", "--dtype", dtype]
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=dict(os.environ))
    import httpx

    url = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            try:
                if httpx.get(url + "/ready").status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        else:
            raise ValueError(f"the server did not start:\n{open(log).read()}")
        yield url
    finally:
        process.terminate()
        process.wait(60)


async def send_request(client: Any, kind: str, seed: int) -> tuple[float, int]:
    """One request: seconds to its first part, and how many tokens or pictures it gave."""
    start = time.perf_counter()
    if kind != "text":
        body = {"prompt": PROMPT, "seed": seed, "guidance": 3.0 if kind == "picture" else 1.0, "temperature": 1.0}
        answer = await client.post("/v1/images/generations", json=body)
        answer.raise_for_status()
        return time.perf_counter() - start, 1
    messages = [{"role": "user", "content": "describe a picture"}]
    chat_body = {
        "model": "bench",
        "messages": messages,
        "modalities": ["text"],
        "max_tokens": MAX_TOKENS,
        "temperature": 1.0,
    }
    chat_body |= {"stream": True, "stream_options": {"include_usage": True}, "seed": seed}
    first, tokens = None, 0
    async with client.stream("POST", "/v1/chat/completions", json=chat_body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if first is None and event["choices"] and event["choices"][0]["delta"].get("content"):
                first = time.perf_counter() - start
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return first or time.perf_counter() - start, tokens


async def run_clients(url: str, kind: str, clients: int) -> tuple[float, float]:
    """So many at once: tokens or pictures a second, and seconds to the first part in the mean."""
    import httpx

    async with httpx.AsyncClient(base_url=url, timeout=None, limits=httpx.Limits(max_connections=clients)) as client:
        start = time.perf_counter()
        answers = await asyncio.gather(*[send_request(client, kind, seed) for seed in range(clients)])
        seconds = time.perf_counter() - start
    return sum(count for _, count in answers) / seconds, sum(first for first, _ in answers) / clients


def baseline(model: Any, kind: str, clients: int) -> float:
    """Tokens or pictures a second of one batch of `generate()`."""
    height, width = model.image_tokenizer.grid
    run = transformers_generate(model, clients, kind == "picture")
    start = time.perf_counter()
    tokens = run()
    rate = tokens / (time.perf_counter() - start)
    return rate if kind == "text" else rate / (height * width)


def main(args: list[str]) -> int:
    parser = OneLineParser(prog="bench.py serve", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="100M", help="100M (random weights) or tiny (the shipped one)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--engines", default="local", help="local, vllm or both (default: %(default)s)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="(default: %(default)s)")
    parser.add_argument("--repeat", type=number_argument(1, 100_000), default=2, help="the best counts")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(args)
    levels = [int(level) for level in options.concurrency.split(",") if level.isdecimal()]
    kinds, engines = options.kinds.split(","), options.engines.split(",")
    if set(engines) - {"local", "vllm"}:
        raise ValueError(f"unknown engine {options.engines!r}: local, vllm, or both with a comma")
    if "vllm" in engines and not VLLM_PYTHON.exists():
        raise ValueError("vLLM is not installed: run scripts/install_serve.sh")
    if not levels or min(levels) < 1 or set(kinds) - set(KINDS):
        raise ValueError(f"--concurrency takes whole numbers, --kinds some of {', '.join(KINDS)}")
    if options.model not in ("100M", "tiny"):
        raise ValueError(f"unknown model {options.model!r}: 100M or tiny")
    model = load_model(options.model, getattr(torch, options.dtype))
    rows: list[dict[str, Any]] = []
    started = time.monotonic()
    print("engine  kind              clients  unit        rate  first s  transformers  ratio")
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        for engine in engines:
            with start_server(engine, folder, options.dtype, 2 * max(levels), f"{folder}.log") as url:
                asyncio.run(run_clients(url, "unguided picture", 1))
                for kind, clients in itertools.product(kinds, levels):
                    rate, first, baseline_rate = 0.0, float("inf"), 0.0
                    for _ in range(options.repeat):  # in turn, since a machine's speed drifts
                        now, soonest = asyncio.run(run_clients(url, kind, clients))
                        rate, first = max(rate, now), min(first, soonest)
                        baseline_rate = max(baseline_rate, baseline(model, kind, clients))
                    unit = "tokens/s" if kind == "text" else "pictures/s"
                    print(
                        f"{engine:<7} {kind:<17} {clients:>7}  {unit:<10} {rate:>6.2f} {first:>8.2f} "
                        f"{baseline_rate:>13.2f} "
                        f"{rate / baseline_rate:>6.2f}",
                        flush=True,
                    )
                    row = {"name": f"{engine}, {kind}, {clients}", "value": rate, "unit": unit, "first": first}
                    rows.append(row | {"baseline": baseline_rate, "ratio": rate / baseline_rate})
            os.remove(f"{folder}.log")
    if options.json:
        command = f"python scripts/bench.py serve {' '.join(args)}".strip()
        write_report(options.json, command=command, model=options.model, rows=rows, seconds=time.monotonic() - started)
    return 0
