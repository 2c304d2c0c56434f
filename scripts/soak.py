"""Many requests at once against `unigen serve`, some of them cut off or wrong: every answer must be the right one.

    unigen serve --port 8000 --queue 256 &
    python scripts/soak.py --port 8000 [--requests 2000] [--clients 32] [--minutes 30] [--json FILE]

First each kind of request is asked alone. Then clients ask at random; what they get must equal what came alone, what is
malformed must be a 4xx, and some leave before they have an answer. Ends with exit code 1 where an answer was wrong, the
memory of the server and its model (the median of a quarter of the time) grew by more than 5% from the third quarter to
the last, or the server is not healthy at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from unigen.media.output import one_line_errors  # noqa: E402
from unigen.utils.argparser import OneLineParser  # noqa: E402
from unigen.utils.files import write_report  # noqa: E402
from unigen.utils.option_types import SEED, number_argument  # noqa: E402

PROMPTS = ("two apples on a blue background", "a red car", "three penguins", "a rose left of a house")
DISCONNECT_SHARE, MALFORMED_SHARE = 0.1, 0.05
MAX_MEMORY_GROWTH = 0.05


def make_requests(model: str, picture: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> (path, body) of what is asked; all of it is seeded."""
    requests: dict[str, tuple[str, dict[str, Any]]] = {}
    for i, phrase in enumerate(PROMPTS):
        for generator in ("next-token", "masked", "next-scale"):
            body = {"model": model, "prompt": phrase, "seed": i, "generator": generator, "n": 1 + i % 2}
            requests[f"{generator} {phrase}"] = ("/v1/images/generations", body)
    image_part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
    for i, question in enumerate(("describe this picture", "how many apples?", "what color is the background?")):
        messages = [{"role": "user", "content": [image_part, {"type": "text", "text": question}]}]
        body = {"model": model, "messages": messages, "seed": i, "modalities": ["text"]}
        requests[question] = ("/v1/chat/completions", body | {"stream": i % 2 == 1})
    messages = [{"role": "user", "content": "a story about a witch and her raven"}]
    for stream in (False, True):
        body = {"model": model, "messages": messages, "seed": 1, "max_images": 2, "stream": stream}
        requests[f"story {stream}"] = ("/v1/chat/completions", body)
    return requests


def malform(rng: random.Random, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The body with one thing wrong."""
    failures: list[dict[str, Any]] = [{"n": 0}, {"seed": "x"}, {"banana": 1}, {"model": "nobody"}, {"temperature": -1}]
    failures += [{"guidance": "much"}, {"steps": 0}, {"size": "huge"}, {"generator": "crayon"}, {"top_p": 7}]
    malformed_body = {**body, **rng.choice(failures)}
    if rng.random() < 0.2:
        del malformed_body["messages" if "messages" in malformed_body else "prompt"]
    return malformed_body


def comparable_answer(text: str, stream: bool) -> Any:
    """What an answer says, without what is new each time: its id and the time."""
    if not stream:
        data = json.loads(text)
        return data.get("data") or [(c["message"], c["finish_reason"]) for c in data["choices"]]
    events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    if events[-1] != "[DONE]":
        raise ValueError("the stream broke off")
    text_of, pictures = "", []
    for event in map(json.loads, events[:-1]):
        delta = event["choices"][0]["delta"]
        text_of += delta.get("content") or ""
        pictures += [(len(text_of), image["image_url"]["url"]) for image in delta.get("images", [])]
    return text_of, pictures


def server_memory(port: int) -> int:
    """Bytes that the process that listens there and its children hold; 0 where this cannot be known."""
    try:
        process_table = subprocess.run(
            ["ps", "-ww", "-eo", "pid=,ppid=,rss=,args="], capture_output=True, text=True
        ).stdout
    except OSError:
        return 0
    rows = [line.split(None, 3) for line in process_table.splitlines()]
    first = [row[0] for row in rows if len(row) == 4 and "serve" in row[3] and f"--port {port}" in row[3]]
    return sum(1024 * int(row[2]) for row in rows if row[0] in first or row[1] in first)


async def run_stress_test(options: argparse.Namespace) -> dict[str, Any]:
    import httpx

    url = f"http://{options.host}:{options.port}"
    rng, counts, failures, sizes = random.Random(options.seed), Counter[str](), [], [(0.0, 0)]
    limits = httpx.Limits(max_connections=options.clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        try:
            model = (await client.get("/v1/models")).json()["data"][0]["id"]
        except (httpx.HTTPError, KeyError, ValueError):
            raise ValueError(f"no unigen serve answers at {url}: start one") from None
        first = await client.post("/v1/images/generations", json={"prompt": PROMPTS[0], "seed": 3})
        requests = make_requests(model, first.json()["data"][0]["b64_json"])
        expected_answers = {}
        for name, (path, body) in requests.items():
            answer = await client.post(path, json=body)
            answer.raise_for_status()
            expected_answers[name] = comparable_answer(answer.text, body.get("stream", False))
        start, end = time.monotonic(), time.monotonic() + 60 * options.minutes
        num_remaining = options.requests

        async def run_client() -> None:
            nonlocal num_remaining
            while num_remaining > 0 and time.monotonic() < end:
                num_remaining -= 1
                name, (path, body) = rng.choice(list(requests.items()))
                draw = rng.random()
                try:
                    if draw < MALFORMED_SHARE:
                        status = (await client.post(path, json=malform(rng, path, body))).status_code
                        counts["malformed"] += 1
                        if not 400 <= status < 500:
                            failures.append(f"malformed {name}: {status}")
                        continue
                    if draw < MALFORMED_SHARE + DISCONNECT_SHARE:
                        counts["left"] += 1
                        await client.post(path, json=body, timeout=rng.random())
                        continue
                    answer = await client.post(path, json=body)
                except httpx.TimeoutException:
                    continue
                except httpx.HTTPError as error:
                    failures.append(f"{name}: {error!r}")
                    continue
                counts[str(answer.status_code)] += 1
                if answer.status_code == 429:
                    await asyncio.sleep(float(answer.headers["retry-after"]))
                elif answer.status_code != 200:
                    failures.append(f"{name}: {answer.status_code} {answer.text[:200]}")
                elif comparable_answer(answer.text, body.get("stream", False)) != expected_answers[name]:
                    failures.append(f"{name}: another answer than alone")

        async def watch() -> None:
            while True:
                await asyncio.sleep(2)
                sizes.append((time.monotonic() - start, await asyncio.to_thread(server_memory, options.port)))

        watching = asyncio.create_task(watch())
        await asyncio.gather(*[run_client() for _ in range(options.clients)])
        seconds = time.monotonic() - start
        watching.cancel()
        await asyncio.sleep(2)
        ready = (await client.get("/ready")).json()
        metrics = (await client.get("/metrics")).text
    gauges = [line for line in metrics.splitlines() if line.startswith(("unigen_jobs", "unigen_cache_positions"))]
    if ready.get("starts") != 1 or any(not line.endswith(" 0.0") for line in gauges):
        failures.append(f"not at rest at the end: {ready}, {gauges}")
    quarters = [[size for elapsed, size in sizes if q / 4 <= elapsed / seconds < (q + 1) / 4] or [1] for q in range(4)]
    held_in = [statistics.median(quarter) for quarter in quarters]
    growth = held_in[3] / held_in[2] - 1
    if growth > MAX_MEMORY_GROWTH:
        failures.append(f"memory grew by {growth:.1%} in the last quarter")
    done = options.requests - num_remaining
    return {
        "requests": done,
        "seconds": seconds,
        "counts": counts,
        "growth": growth,
        "mb": [round(size / 1e6) for size in held_in],
        "wrong": failures,
    }


@one_line_errors
def main() -> int:
    parser = OneLineParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=number_argument(1, 65_535), default=8000)
    parser.add_argument("--requests", type=number_argument(1, 1_000_000), default=2000)
    parser.add_argument("--clients", type=number_argument(1, 10_000), default=32)
    parser.add_argument("--minutes", type=number_argument(0, 100_000, is_integer=False, above=True), default=30)
    parser.add_argument("--seed", type=SEED.parse, default=0)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    report = asyncio.run(run_stress_test(options))
    counts = ", ".join(f"{count} {name}" for name, count in sorted(report["counts"].items()))
    print(f"{report['requests']} requests of {options.clients} clients in {report['seconds']:.0f} s: {counts}")
    print(f"memory by quarters {report['mb']} MB, {report['growth']:+.1%} in the last; wrong: {len(report['wrong'])}")
    for line in report["wrong"][:20]:
        print(line)
    if options.json:
        row = {"name": "soak", "value": len(report["wrong"]), "unit": "wrong"}
        row |= {name: report[name] for name in ("requests", "growth", "mb")} | {"counts": dict(report["counts"])}
        command = f"python scripts/soak.py {' '.join(sys.argv[1:])}".strip()
        write_report(options.json, command=command, model="served", rows=[row], seconds=report["seconds"])
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
