"""Pictures that come from strangers, and pictures as they are sent.

A picture comes as a data URI or as bytes; from an address only where the server was started with --allow-fetch, and
then never from a private one. Only PNG, JPEG, WebP and GIF are read (the first frame), never a path.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import ipaddress
import re
import socket
from typing import Any
from urllib.parse import urljoin, urlsplit

from PIL import Image

from unigen.images import read_image, read_mask

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MOST_REDIRECTS = 3
FETCH_SECONDS = 10.0
_DATA = re.compile(r"data:image/(png|jpeg|jpg|webp|gif);base64,", re.IGNORECASE)


def decoded(data: bytes) -> Image.Image:
    """An RGB picture. Raises ValueError for what is none, or larger than `unigen.images.MAX_PIXELS`."""
    return read_image(data, name="the picture", formats=FORMATS)


def decoded_mask(data: bytes) -> Image.Image:
    """White where to paint: where the mask is transparent, as OpenAI has it, or where it is white if nothing is. Raises
    ValueError as `decoded` does."""
    return read_mask(data, transparent_marks=True, name="the mask", formats=FORMATS)


def of_data(url: str) -> Image.Image:
    """A picture from a data URI such as data:image/png;base64,..."""
    match = _DATA.match(url)
    if not match:
        raise ValueError("a picture is given as data:image/png;base64,... (or jpeg, webp, gif)")
    try:
        data = base64.b64decode(url[match.end() :], validate=True)
    except binascii.Error:
        raise ValueError("the picture's base64 is damaged") from None
    return decoded(data)


async def fetched(url: str, most: int) -> Image.Image:
    """A picture of at most so many bytes from an http(s) address that is not private. Raises ValueError."""
    import httpx

    async with httpx.AsyncClient(timeout=FETCH_SECONDS, follow_redirects=False, trust_env=False) as client:
        try:
            for _ in range(MOST_REDIRECTS + 1):
                parts = urlsplit(url)
                if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
                    raise ValueError("a picture's address is http or https, without a user")
                address = await _public(parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
                # to that very address, so that the name cannot mean another one by now
                asked: Any = httpx.URL(url).copy_with(host=address)
                headers, extensions = {"Host": parts.netloc}, {"sni_hostname": parts.hostname}
                async with client.stream("GET", asked, headers=headers, extensions=extensions) as answer:
                    if answer.is_redirect:
                        url = urljoin(url, answer.headers["location"])
                        continue
                    if answer.status_code != 200:
                        raise ValueError(f"the picture's address answered with {answer.status_code}")
                    if not answer.headers.get("content-type", "").lower().startswith("image/"):
                        raise ValueError("the picture's address does not hold a picture")
                    data = b""
                    async for chunk in answer.aiter_bytes():
                        data += chunk
                        if len(data) > most:
                            raise ValueError(f"the picture at this address is larger than {most} bytes")
                    return await asyncio.to_thread(decoded, data)
        except (httpx.HTTPError, httpx.InvalidURL, KeyError):
            raise ValueError("the picture's address cannot be read") from None
    raise ValueError("the picture's address leads to too many others")


async def _public(host: str, port: int) -> str:
    """An address of the host; ValueError where any of its addresses is not for everyone."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ValueError("the picture's address cannot be found") from None
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    if not all(_open(ipaddress.ip_address(address)) for address in addresses):
        raise ValueError("the picture's address is a private one")
    return addresses[0]


def _open(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    return address.is_global and not address.is_multicast and (inner is None or _open(inner))


def encoded(picture: Image.Image, format: str = "png") -> bytes:
    """The picture as a PNG, JPEG or WebP file."""
    buffer = io.BytesIO()
    picture.save(buffer, format=format.upper(), **({"quality": 92} if format != "png" else {}))
    return buffer.getvalue()
