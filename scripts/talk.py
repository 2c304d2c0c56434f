"""A conversation with `unigen serve` by the official openai client: text, a picture, a question about it, a story.

    unigen serve --port 8000 &
    python scripts/talk.py [--port 8000] [--folder talk]

Pictures are saved in the folder, and what was said is printed as it came.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from unigen.media.output import one_line_errors, write_atomically  # noqa: E402
from unigen.utils.argparser import OneLineParser  # noqa: E402
from unigen.utils.option_types import number_argument  # noqa: E402


@one_line_errors
def main() -> int:
    parser = OneLineParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=number_argument(1, 65_535), default=8000)
    parser.add_argument("--folder", default="talk", help="where pictures are saved (default: %(default)s)")
    options = parser.parse_args()
    import openai

    client = openai.OpenAI(base_url=f"http://{options.host}:{options.port}/v1", api_key="none")
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)

    def keep(name: str, url: str) -> str:
        data = base64.b64decode(url.rpartition(",")[2])
        write_atomically(folder / name, lambda out: out.write(data))
        return f"[{folder / name}]"

    try:
        model = client.models.list().data[0].id
    except openai.APIConnectionError:
        raise ValueError(f"no unigen serve answers at {options.host}:{options.port}: start one") from None
    messages: list[Any] = []

    def ask(text: str, **how: Any) -> Any:
        print(f"> {text}")
        messages.append({"role": "user", "content": text})
        answer = client.chat.completions.create(model=model, messages=messages, seed=0, **how)
        message = answer.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        return message

    print(ask("what can you draw?", modalities=["text"]).content)
    messages.clear()
    image_message: Any = ask("two apples on a blue background", modalities=["image"])
    print(keep("apples.png", image_message.images[0]["image_url"]["url"]))
    print(ask("how many apples are there?").content)

    print("> a story about a witch and her raven")
    story_messages: Any = [{"role": "user", "content": "a story about a witch and her raven"}]
    stream = client.chat.completions.create(
        model=model, messages=story_messages, seed=1, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        if not chunk.choices:
            usage: Any = chunk.usage
            print(
                f"\n{usage.completion_tokens_details.image_tokens} of {usage.completion_tokens} tokens are of pictures"
            )
            continue
        delta: Any = chunk.choices[0].delta
        print(delta.content or "", end="", flush=True)
        for image in getattr(delta, "images", None) or []:
            print("\n" + keep(f"story-{image['index'] + 1}.png", image["image_url"]["url"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
