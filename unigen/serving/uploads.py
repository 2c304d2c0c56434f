"""Images of requests, and images that are saved for their URL.

`ImageLoader` reads the images of a request: from data URIs, from addresses (with --allow-fetch) and from forms. They
are decoded in a process of their own (`unigen.serving.decoder`). `ImageStore` is the folder of `response_format: url`.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from PIL import Image
from pydantic import ValidationError
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from unigen.serving import pictures, protocol
from unigen.serving.config import ServerConfig
from unigen.serving.decoder import MAX_IMAGES, DecoderBusy, EncodedImage, ImageDecoder, ImageError
from unigen.serving.errors import HTTPError
from unigen.serving.form import parse_form_fields
from unigen.serving.streaming import cancel_on_disconnect

log = logging.getLogger("unigen.serving")
MIN_FREE_BYTES_PER_IMAGE = 4 << 20
"""Disk space that must be free for each image that is to be saved."""
MAX_FORM_FILES = 20
"""Files that a form is read with; all but one image and one mask are rejected by name."""
MAX_FORM_FIELDS = 40
FORM_FILES = ("image", "mask")
RequestT = TypeVar("RequestT", bound=protocol.ImagesRequest)


class ImageLoader:
    """Reads the images of requests.

    Args:
        config: limits of a request, and whether addresses are fetched.
        decoder: the process that decodes.
    """

    def __init__(self, config: ServerConfig, decoder: ImageDecoder) -> None:
        self.config, self.decoder = config, decoder

    async def load_files(self, urls: Sequence[str], param_paths: Sequence[str]) -> list[EncodedImage]:
        """Fetch the files of a request, which together are at most as large as a body may be.

        Args:
            urls: data URIs, which are returned as they are, and http(s) addresses.
            param_paths: where each stands in the request, for the error.

        Raises:
            HTTPError: too many images, or one that cannot be fetched (status 400).
        """
        if len(urls) > MAX_IMAGES:
            message = f"the request has {len(urls)} pictures: at most {MAX_IMAGES}"
            raise HTTPError(400, message, param=param_paths[MAX_IMAGES])
        files: list[EncodedImage] = []
        remaining_bytes, end = self.config.limits.max_body_bytes, time.monotonic() + self.config.request_timeout
        for url, param in zip(urls, param_paths, strict=True):
            if not url[:8].lower().startswith(("http://", "https://")):
                files.append(EncodedImage(url))
                continue
            try:
                if not self.config.allow_fetch:
                    raise ValueError("this server fetches no pictures (--allow-fetch): send data:image/png;base64,...")
                if time.monotonic() > end:
                    raise ValueError("the pictures' addresses take too long")
                data = await pictures.fetch_image(url, remaining_bytes)
            except ValueError as error:
                raise HTTPError(400, str(error), param=param) from None
            files.append(EncodedImage(data))
            remaining_bytes -= len(data)
        return files

    async def decode(
        self,
        request: Request,
        files: list[EncodedImage],
        param_paths: Sequence[str],
        num_answers: int,
        max_pixels: int | None = None,
    ) -> list[Image.Image]:
        """Decode the images of a request.

        Args:
            request: says whose turn it is in the decoder.
            files: the encoded images.
            param_paths: where each stands in the request, for the error.
            num_answers: how many answers use the images, each with a copy of its own.
            max_pixels: size to which larger images are reduced; None keeps them as they are.

        Raises:
            HTTPError: an image cannot be decoded (status 400), or the decoder is busy (429).
        """
        try:
            return await self.decoder.decode(files, num_answers, max_pixels, request.scope["state"].get("client", ""))
        except ImageError as error:
            raise HTTPError(400, str(error), param=param_paths[error.index]) from None
        except DecoderBusy:
            message = "the server cannot take more pictures now: ask again"
            raise HTTPError(429, message, code="busy", retry_after=2) from None

    async def parse_form(
        self, request: Request, body_type: type[RequestT]
    ) -> tuple[RequestT, Image.Image, Image.Image | None]:
        """Read a form with the file `image` and, optionally, the file `mask`.

        Args:
            request: with a multipart body.
            body_type: schema of the form's fields.

        Returns:
            The fields, the image (RGB) and the mask (L).

        Raises:
            HTTPError: the form cannot be read or has the wrong files.
            RequestValidationError: a field is wrong.
        """
        fields, files = await _split_form(await _read_form(request))
        try:
            body = body_type.model_validate(parse_form_fields(body_type, fields))
        except ValidationError as error:
            errors = [{**entry, "loc": ("body", *entry["loc"])} for entry in error.errors()]
            raise RequestValidationError(errors) from None
        names = [name for name in FORM_FILES if name in files]
        encoded_images = [EncodedImage(files[name], mask=name == "mask") for name in names]
        images = await cancel_on_disconnect(request, self.decode(request, encoded_images, names, body.n))
        return body, images[0], images[1] if "mask" in files else None


async def _read_form(request: Request) -> FormData:
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise HTTPError(400, "send multipart/form-data with a file named image")
    try:
        return await request.form(max_files=MAX_FORM_FILES, max_fields=MAX_FORM_FIELDS)
    except ClientDisconnect:
        raise HTTPError(499, "the client left") from None
    except OSError as error:  # starlette writes large files of a form to disk
        raise HTTPError(507, f"this server cannot take files now: {error.strerror}") from None
    except HTTPException as error:
        if error.status_code != 400:  # raised by the middleware
            raise
        raise HTTPError(400, f"the form cannot be read: {error.detail}") from None
    except ValueError:  # a charset such as "undefined"
        raise HTTPError(400, "the form cannot be read: send it as UTF-8") from None


async def _split_form(form: FormData) -> tuple[dict[str, str], dict[str, bytes]]:
    """Return the fields and the files of a form, by name."""
    fields: dict[str, str] = {}
    files: dict[str, bytes] = {}
    for form_name, value in form.multi_items():
        name = form_name.removesuffix("[]")  # clients that edit several images send a list
        if name == "image" and name in files:
            raise HTTPError(400, "one picture is edited at a time: send one image (a chat takes several)", param=name)
        if name in files or name in fields:
            raise HTTPError(400, f"the form has {name} more than once: give one", param=name)
        if isinstance(value, str):
            fields[name] = value
        else:
            files[name] = await value.read()
    for name in files:
        if name not in FORM_FILES:
            raise HTTPError(400, f"unknown file {name!r}: there are image and mask", param=name)
    if "image" not in files:
        raise HTTPError(400, "the form has no file named image", param="image")
    return fields, files


class ImageStore:
    """The folder where images are saved that clients request by URL.

    Args:
        folder: is made when it is first needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check_space(self, num_images: int) -> None:
        """Check before so many images are drawn that they can be saved.

        Raises:
            HTTPError: the folder cannot be written or the disk is full (status 507).
        """
        try:
            check_disk_space(self.folder, num_images * MIN_FREE_BYTES_PER_IMAGE)
        except ValueError as error:
            raise HTTPError(507, f"{error}: ask for b64_json", param="response_format") from None

    def save(self, data: bytes, format: str) -> str:
        """Save an image file.

        Args:
            data: the file.
            format: "png", "jpeg" or "webp".

        Returns:
            Its name in the folder.

        Raises:
            HTTPError: the disk does not take it (status 507).
        """
        from unigen.media.output import write_atomically

        name = f"{uuid.uuid4().hex}.{format}"
        try:
            write_atomically(self.folder / name, lambda file: file.write(data))
        except ValueError as error:  # its text contains the server's path, which the client does not need to know
            reason = getattr(error.__cause__, "strerror", None) or "the disk refuses"
            log.error("a picture cannot be kept: %s", error)
            raise HTTPError(507, f"this server cannot keep pictures now ({reason}): ask for b64_json") from None
        return name

    def find(self, name: str) -> Path | None:
        """Return the path of a saved image; None where there is none of that name."""
        if not re.fullmatch(r"[0-9a-f]{32}\.(png|jpeg|webp)", name) or not (self.folder / name).is_file():
            return None
        return self.folder / name


def check_disk_space(folder: Path, num_bytes: int) -> None:
    """Check that a file of this size can be written into the folder, which is created if it does not exist.

    The space is reserved for a moment: only that shows permissions, quotas and a full disk.

    Raises:
        ValueError: in one line.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        raise ValueError(f"the folder for pictures cannot take them now ({error.strerror})") from None
