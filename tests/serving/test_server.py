"""The server as its users see it: with the official openai client, and with wrong requests."""

from __future__ import annotations

import base64
import io
import os
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

import unigen
from unigen.document import Segment
from unigen.media.output import data_uri
from unigen.serving.pictures import image_from_data_uri

MODEL = "unigen-tiny"
APPLES = "two apples on a blue background"


@pytest.fixture(scope="module")
def engine() -> Any:
    return unigen.load(MODEL)


@pytest.fixture(scope="module")
def apples(engine: Any) -> Image.Image:
    return engine.generate(APPLES, seed=3)


def chat_text(text: str, *images: Image.Image) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def pixels(image: Any) -> bytes:
    return image.tobytes()


def open_image(file: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(file)))


def assert_close(event: Any, image: Image.Image) -> bool:
    """Are the images equal up to one level? Two flows in one batch round their sums differently."""
    return bool(np.abs(np.asarray(open_image(event.b64_json), int) - np.asarray(image)).max() <= 1)


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def child_pid(served: Any) -> str:
    """The id of the model's process."""
    listed = subprocess.run(["ps", "-ww", "-o", "pid=,args=", "--ppid", str(served.process.pid)], capture_output=True)
    (child,) = [line.split()[0] for line in listed.stdout.decode().splitlines() if "spawn_main" in line]
    return child


def test_images_equal_the_engines_alone_and_under_load(tiny_server: Any, engine: Any, apples: Any) -> None:
    """Every pixel is equal, whatever joins and leaves the batch."""
    client = tiny_server.client()

    def draw(seed: int) -> Any:
        return client.images.generate(model=MODEL, prompt=APPLES, extra_body={"seed": seed})

    alone = draw(3)
    assert pixels(open_image(alone.data[0].b64_json)) == pixels(apples)
    assert alone.usage.output_tokens == 64 and alone.size == "64x64" and alone.model == MODEL
    used = {"seed": 3, "generator": "next-token", "guidance": 3.0, "temperature": 0.8, "top_k": 0, "top_p": 0.5}
    assert alone.data[0].settings == used
    flown = client.images.generate(model=MODEL, prompt=APPLES, extra_body={"seed": 3, "generator": "flow", "steps": 2})
    used = {"seed": 3, "generator": "flow", "guidance": 5.0, "steps": 2, "solver": "euler", "guider": "cfg"}
    assert flown.data[0].settings == used
    with ThreadPoolExecutor(12) as pool:
        loaded = list(pool.map(draw, range(12)))
    for seed, answer in enumerate(loaded):
        assert pixels(open_image(answer.data[0].b64_json)) == pixels(engine.generate(APPLES, seed=seed)), seed


def test_conversation_with_text_and_images(tiny_server: Any, engine: Any, apples: Image.Image) -> None:
    client = tiny_server.client()
    chat = client.chat.completions.create
    answer = chat(model=MODEL, messages=chat_text("describe this picture", apples), modalities=["text"], seed=0)
    assert answer.choices[0].message.content == engine.describe(apples, candidates=1)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens > 64 and answer.usage.completion_tokens_details.image_tokens == 0
    drawn = chat(model=MODEL, messages=chat_text(APPLES), modalities=["image"], seed=3)
    message = drawn.choices[0].message
    assert message.content == "" and pixels(image_from_data_uri(message.images[0]["image_url"]["url"])) == pixels(
        apples
    )
    turns = [*chat_text(APPLES), message.model_dump(), *chat_text("how many apples?")]
    asked = unigen.Document(
        [
            unigen.Segment(text=APPLES),
            unigen.Segment(image=apples, role="assistant"),
            unigen.Segment(text="how many apples?"),
        ]
    )
    answer = chat(model=MODEL, messages=turns, modalities=["text"])
    assert answer.choices[0].message.content == engine.generate(asked, "text")


def test_story_has_text_and_images_in_known_order(tiny_server: Any, engine: Any) -> None:
    """As parts, as text with offsets of the images, and sent back: the same story."""
    prompt = "a story about a witch and her raven"
    asked: dict[str, Any] = {"model": MODEL, "messages": chat_text(prompt), "seed": 1, "max_images": 2}
    story = engine.generate(prompt, "interleaved", seed=1, max_images=2)
    texts = [part for part in story if isinstance(part, str)]
    drawn = [data_uri(part) for part in story if not isinstance(part, str)]
    status, answer = tiny_server.get("/v1/chat/completions", asked)
    message = answer["choices"][0]["message"]
    assert status == 200 and message["content"] == "\n\n".join(texts)
    assert [image["image_url"]["url"] for image in message["images"]] == drawn
    assert [image["offset"] for image in message["images"]] == [len(texts[0]), len("\n\n".join(texts[:2]))]
    _, answer = tiny_server.get("/v1/chat/completions", asked | {"content_format": "parts"})
    parts = answer["choices"][0]["message"]["content"]
    assert [part.get("text") or part["image_url"]["url"] for part in parts] == [
        part if isinstance(part, str) else data_uri(part) for part in story
    ]
    more = {"modalities": ["text"], "max_tokens": 8, "seed": 0}
    answers = [
        tiny_server.get(
            "/v1/chat/completions", asked | more | {"messages": [*chat_text(prompt), given, *chat_text("and then?")]}
        )
        for given in (message, {"role": "assistant", "content": parts})
    ]
    assert answers[0][0] == 200 and answers[0][1]["choices"] == answers[1][1]["choices"]
    assert answers[0][1]["usage"] == answers[1][1]["usage"]


@pytest.mark.parametrize("question", ["What's in this image?", "how many apples are there?", "Describe the image."])
def test_question_about_an_image_is_answered(tiny_server: Any, apples: Any, question: str) -> None:
    """Wherever the image stands in its message, and without modalities."""
    (message,) = chat_text(question, apples)
    answers = [
        tiny_server.get("/v1/chat/completions", {"model": MODEL, "messages": [message | {"content": content}], **more})
        for content in (message["content"], message["content"][::-1])
        for more in ({"seed": 1}, {"seed": 2, "modalities": ["text"]})
    ]
    texts = {answer["choices"][0]["message"]["content"] for _, answer in answers}
    assert len(texts) == 1 and texts != {""} and "images" not in answers[0][1]["choices"][0]["message"]
    if "how many" in question:
        assert texts == {"two"}
    (edit,) = chat_text("make the background red", apples)
    status, answer = tiny_server.get("/v1/chat/completions", {"model": MODEL, "messages": [edit], "max_images": 1})
    assert status == 200 and answer["choices"][0]["message"]["images"]


def test_story_is_streamed_part_by_part(tiny_server: Any, engine: Any) -> None:
    prompt = "a story about a witch and her raven"
    stream = tiny_server.client().chat.completions.create(
        model=MODEL, messages=chat_text(prompt), seed=1, stream=True, stream_options={"include_usage": True}
    )
    parts: list[Any] = []
    content = ""
    for chunk in stream:
        if not chunk.choices:
            usage = chunk.usage
            continue
        delta = chunk.choices[0].delta
        if delta.content:
            content += delta.content
            if parts and isinstance(parts[-1], str):
                parts[-1] += delta.content
            else:
                assert delta.content.startswith("\n\n") == bool(parts)  # it is parted from the text before
                parts.append(delta.content.strip())
        for image in getattr(delta, "images", None) or []:
            assert image["offset"] == len(content)
            assert image["index"] == sum(not isinstance(part, str) for part in parts)
            parts.append(image_from_data_uri(image["image_url"]["url"]))
        reason = chunk.choices[0].finish_reason
    story = engine.generate(prompt, "interleaved", seed=1)
    assert [p if isinstance(p, str) else pixels(p) for p in parts] == [
        p if isinstance(p, str) else pixels(p) for p in story
    ]
    assert sum(not isinstance(part, str) for part in parts) >= 3 and reason == "stop"
    assert usage.completion_tokens_details.image_tokens == 64 * sum(not isinstance(p, str) for p in story)


@pytest.mark.slow
def test_story_and_answer_with_responses_api(tiny_server: Any, engine: Any, apples: Image.Image) -> None:
    """Whole and streamed, they equal the answers of the engine."""
    client, prompt = tiny_server.client(), "a story about a witch and her raven"
    asked: dict[str, Any] = {"model": MODEL, "input": prompt, "extra_body": {"seed": 1}}
    asked["tools"] = [{"type": "image_generation"}]
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        streamed = stream.get_final_response()
    story = [part if isinstance(part, str) else pixels(part) for part in engine.generate(prompt, "interleaved", seed=1)]
    for answer in (whole, streamed):
        parts = [
            one.content[0].text if one.type == "message" else pixels(open_image(one.result)) for one in answer.output
        ]
        assert parts == story and answer.status == "completed" and answer.usage.total_tokens > 64
    seen = {"type": "input_image", "image_url": data_uri(apples), "detail": "auto"}
    question = [{"role": "user", "content": [{"type": "input_text", "text": "how many apples are there?"}, seen]}]
    assert client.responses.create(model=MODEL, input=question).output_text == "two"


NUM_PREVIEWS = {"next-scale": 3, "flow": 3, "masked": 3, "next-token": 0}


@pytest.mark.parametrize("generator", NUM_PREVIEWS)
def test_image_previews(tiny_server: Any, engine: Any, generator: str) -> None:
    """The official client reads the stream; the last image equals the one without previews."""
    told = {"seed": 3, "generator": generator}
    stream = tiny_server.client().images.generate(
        model=MODEL, prompt=APPLES, stream=True, partial_images=3, n=2, extra_body=told
    )
    events: list[list[Any]] = [[], []]
    for event in stream:
        events[event.index].append(event)
    for i, (*seen, made) in enumerate(events):
        options: dict[str, Any] = {"seed": 3 + i, "generator": generator}
        *wanted, whole = engine.stream(APPLES, "image", previews=3, **options)
        assert [event.partial_image_index for event in seen] == list(range(NUM_PREVIEWS[generator]))
        assert {event.type for event in seen} <= {"image_generation.partial_image"}
        for event, preview in zip(seen, wanted, strict=True):
            assert assert_close(event, preview.image) and not assert_close(event, whole)
        assert made.type == "image_generation.completed" and assert_close(made, whole)
        assert made.size == "64x64" and made.output_format == "png" and made.background == "opaque"
        assert made.settings["seed"] == 3 + i and made.settings["generator"] == generator
        assert made.usage.output_tokens == 64 and made.usage.input_tokens_details.image_tokens == 0
        assert (
            made.usage.total_tokens == 64 + made.usage.input_tokens == 64 + made.usage.input_tokens_details.text_tokens
        )


def test_edit_previews(tiny_server: Any, engine: Any, apples: Image.Image) -> None:
    """Previews of an inpainted area are composited into the image."""
    client, files = tiny_server.client(), []
    mask = Image.new("RGB", apples.size)
    mask.paste("white", (0, 0, 32, 64))
    for picture in (apples, mask):
        file = io.BytesIO()
        picture.save(file, "PNG")
        files.append(("a.png", file.getvalue()))
    told = {"seed": "2", "generator": "flow", "steps": "4"}
    asked: dict[str, Any] = {"image": files[0], "model": MODEL, "stream": True, "partial_images": 2}
    *seen, made = client.images.edit(prompt="make the background red", extra_body=told, **asked)
    assert [event.type for event in seen] == ["image_edit.partial_image"] * 2 and made.type == "image_edit.completed"
    wanted = engine.edit(apples, "make the background red", seed=2, generator="flow", steps=4)
    assert pixels(open_image(made.b64_json)) == pixels(wanted) and made.usage.input_tokens_details.image_tokens == 64
    *seen, made = client.images.edit(mask=files[1], prompt="an apple", extra_body={"seed": "2"}, **asked)
    assert len(seen) == 2 and pixels(open_image(made.b64_json)) == pixels(
        engine.inpaint(apples, "an apple", mask, seed=2)
    )
    right = (40, 0, 64, 64)
    for event in seen:
        assert pixels(open_image(event.b64_json).crop(right)) == pixels(open_image(made.b64_json).crop(right))
        assert pixels(open_image(event.b64_json)) != pixels(open_image(made.b64_json))


def test_chat_previews_on_request(tiny_server: Any) -> None:
    """Marked as partial, before the finished image, and after the text before it."""
    body: dict[str, Any] = {"generator": "masked", "max_images": 2}
    prompt = chat_text("a story about a witch and her raven")

    def stream_parts(**more: Any) -> list[Any]:
        stream = tiny_server.client().chat.completions.create(
            model=MODEL, messages=prompt, seed=1, stream=True, extra_body=body | more
        )
        parts: list[Any] = [""]
        for chunk in stream:
            delta = chunk.choices[0].delta
            for image in getattr(delta, "images", None) or []:
                parts += [(image["index"], image.get("partial", False), image["image_url"]["url"]), ""]
            parts[-1] += delta.content or ""
        return parts

    plain, shown = stream_parts(), stream_parts(partial_images=2)
    assert [part[:2] for part in plain[1::2]] == [(0, False), (1, False)]
    images = shown[1::2]
    assert [part[:2] for part in images] == [(i, partial) for i in range(2) for partial in (True, True, False)]
    assert [part for part in images if not part[1]] == plain[1::2] and len({part[2] for part in images}) == 6
    texts = shown[::2]
    assert [texts[0], texts[3]] == plain[::2][:2] and texts[1] == texts[2] == ""


def test_best_of_several_candidates(tiny_server: Any, engine: Any, apples: Image.Image) -> None:
    """The engine's own choice, alone, with other requests and in a stream; the tokens of all candidates are counted."""
    client, asked = tiny_server.client(), {"seed": 3, "candidates": 4}
    words = "a red dog left of a house"
    best = engine.generate_batch([words] * 4, range(3, 7), candidates=4)
    assert any(pixels(best[i]) != pixels(engine.generate(words, seed=3 + i)) for i in range(4))
    made = client.images.generate(model=MODEL, prompt=words, n=4, extra_body=asked)
    assert [pixels(open_image(one.b64_json)) for one in made.data] == [pixels(one) for one in best]
    assert made.usage.output_tokens == 4 * 4 * 64 and made.data[0].settings["candidates"] == 4
    (last,) = client.images.generate(
        model=MODEL, prompt=words, stream=True, partial_images=3, extra_body=asked | {"generator": "next-scale"}
    )
    wanted = engine.generate(words, seed=3, candidates=4, generator="next-scale")
    assert last.type == "image_generation.completed" and pixels(open_image(last.b64_json)) == pixels(wanted)
    told = client.chat.completions.create(
        model=MODEL, messages=chat_text("describe this picture", apples), modalities=["text"], extra_body=asked
    )
    running, ended = engine.new_scheduler(), []
    for request in engine.prepare([apples, "describe this picture"], "text", candidates=4, seed=3).requests:
        running.add_request(request)
    while running:
        running.step()
        ended += running.finished.values()
    assert told.choices[0].message.content == engine.describe(apples, candidates=4, seed=3)
    assert told.choices[0].finish_reason == "stop"
    assert told.usage.completion_tokens == sum(usage.text_tokens for usage in ended)
    assert tiny_server.jobs == 0 and tiny_server.metric("unigen_batch_sequences") == 0


def test_disconnect_from_an_image_stream_frees_its_slot(tiny_server: Any) -> None:
    before = tiny_server.metric("unigen_images_total")
    options = {"generator": "flow", "steps": 250, "seed": 1}
    stream = tiny_server.client().images.generate(
        model=MODEL, prompt=APPLES, stream=True, partial_images=3, extra_body=options
    )
    assert next(iter(stream)).type == "image_generation.partial_image"
    assert tiny_server.jobs == 1
    stream.close()
    wait_until(lambda: tiny_server.jobs == 0 == tiny_server.metric("unigen_cache_positions"))
    assert tiny_server.metric("unigen_images_total") == before


def test_stop_strings_and_max_tokens(tiny_server: Any, engine: Any, apples: Image.Image) -> None:
    chat = tiny_server.client().chat.completions.create
    whole = engine.describe(apples, candidates=1)
    messages = chat_text("describe this picture", apples)
    cut = chat(model=MODEL, messages=messages, modalities=["text"], stop=[" background", whole[4:9]])
    assert cut.choices[0].message.content == whole[:4].rstrip() and cut.choices[0].finish_reason == "stop"
    short = chat(model=MODEL, messages=messages, modalities=["text"], max_tokens=2)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2
    many = chat(model=MODEL, messages=messages, modalities=["text"], n=3, temperature=1.5, seed=5)
    assert [choice.settings["seed"] for choice in many.choices] == [5, 6, 7]


def test_edits_inpainting_and_variations(tiny_server: Any, engine: Any, apples: Image.Image) -> None:
    client, file = tiny_server.client(), io.BytesIO()
    apples.save(file, "PNG")
    image = ("apples.png", file.getvalue())
    edited = client.images.edit(image=image, prompt="make the background red", model=MODEL, extra_body={"seed": "1"})
    asked = engine.edit(apples, "make the background red", seed=1)
    assert pixels(open_image(edited.data[0].b64_json)) == pixels(asked)
    marks = Image.new("RGBA", apples.size, (0, 0, 0, 255))
    marks.paste((0, 0, 0, 0), (0, 0, 32, 64))  # OpenAI: painted where it is transparent
    white = Image.new("RGB", apples.size)
    white.paste("white", (0, 0, 32, 64))
    file = io.BytesIO()
    marks.save(file, "PNG")
    painted = client.images.edit(
        image=image, mask=("mask.png", file.getvalue()), prompt="an apple", model=MODEL, extra_body={"seed": "2"}
    )
    assert pixels(open_image(painted.data[0].b64_json)) == pixels(engine.inpaint(apples, "an apple", white, seed=2))
    varied = client.images.create_variation(image=image, n=2, model=MODEL, extra_body={"seed": "4", "variation": "0.3"})
    assert len(varied.data) == 2 and varied.data[0].b64_json != varied.data[1].b64_json
    assert varied.data[0].settings["generator"] == "masked"


def test_prompts_never_open_server_files(tiny_server: Any, engine: Any, apples: Image.Image, tmp_path: Path) -> None:
    """A prompt is text, even if it is the path of an image that the server could read."""
    path, file = tmp_path / "a.png", io.BytesIO()
    apples.save(path)
    apples.save(file, "PNG")
    words, client = Segment(text=str(path)), tiny_server.client()
    made = client.images.generate(prompt=str(path), model=MODEL, extra_body={"seed": 1}).data[0]
    assert pixels(open_image(made.b64_json)) == pixels(engine.generate(words, seed=1))
    assert pixels(open_image(made.b64_json)) != pixels(engine.generate(path, seed=1))
    edited = client.images.edit(
        image=("a.png", file.getvalue()), prompt="none.png", model=MODEL, extra_body={"seed": "1"}
    )
    assert pixels(open_image(edited.data[0].b64_json)) == pixels(
        engine.generate([apples, Segment(text="none.png")], seed=1)
    )


def test_damaged_or_huge_image_or_mask_is_rejected(tiny_server: Any) -> None:
    def file(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 4), np.uint8)
    whole, cut, cut_rgb = (
        file(Image.new("RGB", (64, 64))),
        *(file(Image.fromarray(noise[..., :n]))[:9000] for n in (4, 3)),
    )
    huge = file(Image.new("1", (13_000, 13_000), 1))
    for image, mask, names in (
        (cut, None, "image"),
        (whole, cut, "mask"),
        (whole, cut_rgb, "mask"),
        (whole, huge, "mask"),
    ):
        given = {"image": ("a.png", image)} | ({"mask": ("m.png", mask)} if mask else {})
        with pytest.raises(openai.BadRequestError) as error:
            tiny_server.client().images.edit(model=MODEL, prompt="a cat", **given)
        assert error.value.param == names and "BytesIO" not in str(error.value)


def test_images_by_url(tiny_server: Any) -> None:
    made = tiny_server.client().images.generate(model=MODEL, prompt="a rose", response_format="url")
    path = made.data[0].url.removeprefix(tiny_server.url)
    import urllib.request

    with urllib.request.urlopen(tiny_server.url + path) as answer:
        assert Image.open(io.BytesIO(answer.read())).size == (64, 64)
    for other in ("/images/..%2f..%2fetc%2fpasswd", "/images/" + "0" * 32 + ".png", "/images/log"):
        assert tiny_server.get(other)[0] == 404


INVALID_REQUESTS: list[tuple[str, Any, str, int]] = [
    ("/v1/images/generations", {"prompt": "a", "banana": 1}, "banana", 400),
    ("/v1/images/generations", {"prompt": ""}, "prompt", 400),
    ("/v1/images/generations", {"prompt": "a", "n": 0}, "n", 400),
    ("/v1/images/generations", {"prompt": "a", "n": True}, "n", 400),
    ("/v1/images/generations", {"prompt": "a", "seed": -1}, "seed", 400),
    ("/v1/images/generations", {"prompt": "a", "model": "other"}, "unigen-tiny", 404),
    ("/v1/images/generations", {"prompt": "a", "generator": "none"}, "next-token", 400),
    ("/v1/images/generations", {"prompt": "a", "size": "512x384"}, "64x64", 400),
    ("/v1/images/generations", {"prompt": "a", "steps": 4}, "steps", 400),
    ("/v1/images/generations", {"prompt": "a", "guidance": "much"}, "guidance: ", 400),
    ("/v1/images/generations", {"prompt": "a", "str": 1}, "'str'", 400),
    ("/v1/images/generations", {"label": 7}, "class", 400),
    ("/v1/images/generations", b"{", "JSON", 400),
    ("/v1/images/generations", [], "", 400),
    ("/v1/images/generations", {"prompt": "a", "partial_images": 1}, "stream=true", 400),
    ("/v1/images/generations", {"prompt": "a", "stream": True, "partial_images": 4}, "partial_images", 400),
    ("/v1/images/generations", {"prompt": "a", "stream": True, "response_format": "url"}, "response_format", 400),
    ("/v1/images/generations", {"prompt": "a", "stream": True, "generator": "none"}, "next-token", 400),
    ("/v1/images/generations", {"prompt": "a", "candidates": 9}, "candidates", 400),
    ("/v1/images/generations", {"prompt": "a", "n": 4, "candidates": 5}, "n times candidates", 400),
    ("/v1/images/edits", {"prompt": "a"}, "multipart", 400),
    ("/v1/chat/completions", {"model": MODEL, "messages": []}, "messages", 400),
    ("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "tool", "content": "a"}]}, "role", 400),
    ("/v1/chat/completions", {"model": MODEL, "messages": chat_text("a"), "tools": [{}]}, "tools", 400),
    ("/v1/chat/completions", {"model": MODEL, "messages": chat_text("a"), "stream_options": {}}, "stream", 400),
    ("/v1/chat/completions", {"model": MODEL, "messages": chat_text("a"), "partial_images": 1}, "stream=true", 400),
    ("/v1/chat/completions", {"model": MODEL, "messages": chat_text("a"), "candidates": 2}, "candidates are", 400),
    ("/v1/chat/completions", {"model": MODEL, "messages": chat_text(" ")}, "empty", 400),
    ("/v1/chat/completions", {"model": MODEL, "messages": chat_text("a") + chat_text(" ")}, "empty", 400),
    ("/v1/chat/completions", {"model": MODEL, "messages": chat_text("a " * 5000), "stream": True}, "positions", 400),
    ("/v1/nothing", {}, "", 404),
]


@pytest.mark.parametrize(("path", "body", "names", "status"), INVALID_REQUESTS)
def test_errors_are_one_line(tiny_server: Any, path: str, body: Any, names: str, status: int) -> None:
    got, answer = tiny_server.get(path, body)
    assert got == status and set(answer) == {"error"} and names in answer["error"]["message"], answer
    assert "\n" not in answer["error"]["message"]


@pytest.mark.parametrize(
    "url",
    ["data:image/png;base64,@@", "data:image/png;base64,AAAA", "/etc/passwd", "file:///etc/passwd", "http://a/b.png"],
)
def test_invalid_image_is_a_one_line_error(tiny_server: Any, url: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is it?"}]
    with pytest.raises(openai.BadRequestError) as error:
        tiny_server.client().chat.completions.create(model=MODEL, messages=[{"role": "user", "content": content}])
    assert error.value.param == "messages.0.content.0.image_url.url"


def test_disconnect_frees_the_slot(tiny_server: Any) -> None:
    before = tiny_server.metric("unigen_images_total")
    stream = tiny_server.client().chat.completions.create(
        model=MODEL, messages=chat_text("a story about a witch and her raven"), stream=True, n=8, temperature=1.0
    )
    next(iter(stream))
    wait_until(lambda: tiny_server.metric("unigen_jobs_running") == 8)
    stream.close()
    wait_until(lambda: tiny_server.jobs == 0)
    with pytest.raises(openai.APITimeoutError):
        tiny_server.client(timeout=0.2).images.generate(model=MODEL, prompt="a rose", n=16)
    wait_until(lambda: tiny_server.jobs == 0 == tiny_server.metric("unigen_cache_positions"))
    assert tiny_server.metric("unigen_images_total") < before + 16


def test_full_queue_is_429(tiny_server: Any) -> None:
    def draw(_: int) -> Any:
        return tiny_server.get("/v1/images/generations", {"prompt": "a rose", "n": 16})

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(draw, range(4)))
    statuses = sorted(status for status, _ in answers)
    assert statuses[0] == 200 and statuses[-1] == 429, statuses
    assert next(answer for status, answer in answers if status == 429)["error"]["code"] == "busy"


def test_failed_image_is_an_error_event(tiny_server: Any) -> None:
    """After its previews comes an error, and no [DONE]."""
    options = {"generator": "flow", "steps": 250, "seed": 1}
    stream = tiny_server.client().images.generate(
        model=MODEL, prompt=APPLES, stream=True, partial_images=3, extra_body=options
    )
    events = iter(stream)
    assert next(events).type == "image_generation.partial_image"
    os.kill(int(child_pid(tiny_server)), signal.SIGKILL)
    with pytest.raises(openai.APIError, match="ask again"):
        for event in events:
            assert event.type == "image_generation.partial_image"
    tiny_server.wait()


def test_dead_model_process_is_restarted(tiny_server: Any) -> None:
    child = child_pid(tiny_server)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(tiny_server.get, "/v1/images/generations", {"prompt": "a rose", "n": 16})
        wait_until(lambda: tiny_server.metric("unigen_jobs_running") > 0)
        os.kill(int(child), signal.SIGKILL)
        status, answer = running.result()
    assert status == 503 and answer["error"]["code"] == "try_again"
    assert tiny_server.get("/ready")[0] == 503 and tiny_server.get("/health")[0] == 200
    assert tiny_server.get("/v1/images/generations", {"prompt": "a rose"})[0] == 503
    tiny_server.wait()
    assert tiny_server.get("/v1/images/generations", {"prompt": "a rose"})[0] == 200


def test_loading_is_503_and_shutdown_finishes_running_answers(start_server: Any, tiny_folder: Any) -> None:
    served = start_server("--model", str(tiny_folder), "--name", "small", "--api-key", "one", "--api-key", "two")
    key = {"authorization": "Bearer two"}
    wait_until(lambda: served.get("/health")[0] == 200)
    for modalities in ({}, {"modalities": ["text"]}):
        body = {"model": "small", "messages": chat_text("what is this?"), **modalities}
        status, answer = served.get("/v1/chat/completions", body, key)
        assert status == 503 and answer["error"]["code"] == "not_ready", answer
    served.wait()
    body = {"model": "small", "prompt": "a", "n": 8}
    assert served.get("/v1/images/generations", body)[0] == 401
    assert served.get("/v1/images/generations", body | {"model": "tiny"}, key)[0] == 404
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(served.get, "/v1/images/generations", body, key)
        time.sleep(0.1)
        assert served.stop() in (0, -signal.SIGTERM)  # it ends by the signal when it is done
        assert running.result()[0] == 200
    assert "two" not in served.log.read_text()


LEAVES_ONE = """
import os, subprocess, sys, threading, time

def leave():
    while os.getpgrp() != os.getpid():
        time.sleep(0.1)
    subprocess.Popen(["sleep", "600"])

if any("spawn_main" in word for word in sys.orig_argv):
    threading.Thread(target=leave, daemon=True).start()
"""


@pytest.mark.slow
def test_child_processes_of_the_model_process_end_with_it(
    start_server: Any, tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although nothing else ends them: when the model's process is killed, and when the server is."""
    (tmp_path / "sitecustomize.py").write_text(LEAVES_ONE)  # read when a Python begins
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    served = start_server("--model", str(tiny_folder), "--name", "small")
    for whole in (False, True):
        served.wait()
        child = int(child_pid(served))
        assert len(group(child)) == 2
        os.kill(served.process.pid if whole else child, signal.SIGKILL)
        wait_until(lambda: not group(child))  # noqa: B023


def group(leader: int) -> list[str]:
    """The processes of a group that have not ended."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat=,pid="], capture_output=True, text=True).stdout.splitlines()
    rows = [line.split() for line in listed]
    return [pid for pgid, state, pid in rows if int(pgid) == leader and not state.startswith("Z")]


def test_unservable_model_is_a_one_line_error(start_server: Any, tiny_server: Any) -> None:
    for arguments, says in (
        (["--model", "/nowhere"], "/nowhere"),
        (["--port", str(tiny_server.port)], "--port"),
    ):
        served = start_server(*arguments)
        assert served.process.wait(240) == 2
        lines = [line for line in served.log.read_text().splitlines() if not line.startswith("{")]
        assert len(lines) == 1 and says in lines[0], lines
