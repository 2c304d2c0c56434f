"""Pictures that come from strangers, and pictures as they are sent.

A picture comes as a data URI or as bytes; from an address only where the server was started with --allow-fetch, and
then never from a private one. Only PNG, JPEG, WebP and GIF are read (the first frame), never a path. The server decodes
in a process of its own (`unigen.serving.decoder`).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import ipaddress
import math
import socket
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import urljoin

from PIL import Image

from unigen.media.images import MAX_PIXELS, read_image, read_mask

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_REDIRECTS = 3
FETCH_TIMEOUT = 10.0
"""For one picture, from its name to its last byte."""
DNS_EXECUTOR = ThreadPoolExecutor(4, "names")
"""Asks for the addresses of names, which may take as long as whoever answers wants."""
BASE64_WHITESPACE, BASE64_URL_SAFE = b" \t\r\n\f", bytes.maketrans(b"-_", b"+/")
"""Within base64: what is skipped, and the two letters that have another form in addresses."""


def open_image(data: bytes, name: str = "the picture") -> Image.Image:
    """A picture of which only the head is read: its size is known, and no pixel decoded. Raises ValueError."""
    try:
        with warnings.catch_warnings(action="ignore"):
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(f"{name} is too large: at most {MAX_PIXELS:,} pixels") from None
    except Exception:  # plugins raise whatever a damaged file leads them to
        raise ValueError(f"{name} cannot be read: send PNG, JPEG, WebP or GIF") from None
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width}x{image.height} pixels"
        raise ValueError(f"{name} is too large: {size}, at most {MAX_PIXELS:,}")
    return image


def decode_image(data: bytes | Image.Image, area: int | None = None) -> Image.Image:
    """A picture in RGB.

    Args:
        data: the bytes of a file, or what `open_image` gave for them.
        area: pixels to which a larger picture is made smaller, where its format allows it while it is decoded.
    Raises:
        ValueError: for what is no picture, or larger than `unigen.media.images.MAX_PIXELS`.
    """
    image = open_image(data) if isinstance(data, bytes) else data
    if area is not None and image.width * image.height > area:
        width, height = _fit_pixels(image.size, area)
        image.draft("RGB", (2 * width, 2 * height))
        image = _reduce_image(image, area)
    picture = read_image(image, name="the picture")
    size = _fit_pixels(picture.size, area)
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)


def decode_mask(data: bytes | Image.Image) -> Image.Image:
    """White where to paint: where the mask is transparent, as OpenAI has it, or where it is white if nothing is. Raises
    ValueError as `decode_image` does."""
    image = open_image(data, "the mask") if isinstance(data, bytes) else data
    return read_mask(image, transparent_marks=True, name="the mask")


def _reduce_image(image: Image.Image, area: int) -> Image.Image:
    """A picture of several times the area made smaller as it is stored, which costs a part of what its colours cost."""
    factor = math.ceil(math.sqrt(image.width * image.height / area))
    if factor < 3 or image.mode not in ("1", "P", "L", "LA", "RGB", "RGBA") or "transparency" in image.info:
        return image
    try:
        image.load()
    except Exception:  # `read_image` says what is wrong with it
        return image
    if image.mode in ("1", "P"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return image.reduce(factor)


def _fit_pixels(size: tuple[int, int], area: int | None) -> tuple[int, int]:
    """A size of the same shape with at most so many pixels."""
    width, height = size
    if area is None or width * height <= area:
        return size
    scale = math.sqrt(area / (width * height))
    return max(1, int(width * scale)), max(1, int(height * scale))


def image_from_data_uri(url: str) -> Image.Image:
    """A picture from a data URI such as data:image/png;base64,..."""
    return decode_image(bytes_from_data_uri(url))


def bytes_from_data_uri(url: str) -> bytes:
    """The file that a data URI holds, read as browsers do: what kind of picture it is, its bytes say; lines may be
    broken and the padding may lack. Raises ValueError."""
    head, comma, _ = url[:200].partition(",")
    kind, *parameters = head.lower().split(";")
    is_known_type = kind.startswith("data:image/") or kind in ("data:", "data:application/octet-stream")
    if not (comma and is_known_type and parameters and parameters[-1].strip() == "base64"):
        raise ValueError("a picture is given as data:image/png;base64,... (or jpeg, webp, gif)")
    letters = url[len(head) + 1 :].encode("ascii", "replace").translate(BASE64_URL_SAFE, BASE64_WHITESPACE).rstrip(b"=")
    try:
        return base64.b64decode(letters + b"=" * (-len(letters) % 4), validate=True)
    except binascii.Error:
        raise ValueError("the picture's base64 is damaged") from None


async def fetch_image(url: str, most: int) -> bytes:
    """The file of a picture, of at most so many bytes, from an http(s) address that is not private. Raises
    ValueError."""
    try:
        async with asyncio.timeout(FETCH_TIMEOUT):
            return await _fetch_image(url, most)
    except TimeoutError:
        raise ValueError(f"the picture's address takes longer than {FETCH_TIMEOUT:g} s") from None


async def _fetch_image(url: str, most: int) -> bytes:
    import httpx

    async with httpx.AsyncClient(timeout=FETCH_TIMEOUT, follow_redirects=False, trust_env=False) as client:
        try:
            for _ in range(MAX_REDIRECTS + 1):
                parsed_url: Any = httpx.URL(url)
                host = parsed_url.raw_host.decode()  # in ASCII, whatever its letters
                if parsed_url.scheme not in ("http", "https") or not host or parsed_url.userinfo:
                    raise ValueError("a picture's address is http or https, without a user")
                if (parsed_url.port or 0) >= 1 << 16:
                    raise httpx.InvalidURL("port")
                # to the very address that is checked, so that the name cannot mean another one by now
                address = await _resolve_public_address(
                    host, parsed_url.port or (443 if parsed_url.scheme == "https" else 80)
                )
                resolved_url = parsed_url.copy_with(host=address)
                headers = {
                    "Host": parsed_url.netloc.decode(),
                    "Accept-Encoding": "identity",
                }  # packed bytes may become many
                extensions = {"sni_hostname": host}
                async with client.stream("GET", resolved_url, headers=headers, extensions=extensions) as answer:
                    if answer.is_redirect:
                        url = urljoin(url, answer.headers["location"])
                        continue
                    if answer.status_code != 200:
                        raise ValueError(f"the picture's address answered with {answer.status_code}")
                    if not answer.headers.get("content-type", "").lower().startswith("image/"):
                        raise ValueError("the picture's address does not hold a picture")
                    data = bytearray()
                    async for chunk in answer.aiter_raw():
                        data += chunk
                        if len(data) > most:
                            raise ValueError(f"the picture at this address is larger than {most} bytes")
                    return bytes(data)
        except (httpx.HTTPError, httpx.InvalidURL, KeyError, UnicodeError):
            raise ValueError("the picture's address cannot be read") from None
    raise ValueError("the picture's address leads to too many others")


async def _resolve_public_address(host: str, port: int) -> str:
    """An address of the host; ValueError where any of its addresses is not for everyone."""
    try:
        ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        address_infos = await asyncio.get_running_loop().run_in_executor(DNS_EXECUTOR, ask)
    except (OSError, UnicodeError):
        raise ValueError("the picture's address cannot be found") from None
    addresses = [str(entry[4][0]).partition("%")[0] for entry in address_infos]
    if not all(_is_public_address(ipaddress.ip_address(address)) for address in addresses):
        raise ValueError("the picture's address is a private one")
    return addresses[0]


GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")
"""All addresses of IPv6 that hosts of the whole net have; outside lie 64:ff9b::/96, fec0::/10, ::127.0.0.1, ..."""
TUNNEL_NETWORKS = [ipaddress.ip_network(one) for one in ("2002::/16", "192.88.99.0/24")]
"""6to4: its addresses hold others, of IPv4."""
ISATAP = (0x5EFE, 0x0200_5EFE)
"""In the third quarter of an address of IPv6 whose last is one of IPv4."""


def _is_public_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Is it for everyone, and holds none that is not?"""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return _is_public_address(address.ipv4_mapped)
        if address not in GLOBAL_IPV6 or int(address) >> 32 & 0xFFFF_FFFF in ISATAP:
            return False
    if any(address in network for network in TUNNEL_NETWORKS if network.version == address.version):
        return False
    return address.is_global and not address.is_multicast


def encode_image(picture: Image.Image, format: str = "png", quality: int | None = None) -> bytes:
    """The picture as a PNG, JPEG or WebP file. quality: of the latter two, 0 to 100; None is 92."""
    buffer = io.BytesIO()
    lossy = {} if format == "png" else {"quality": 92 if quality is None else quality}
    picture.save(buffer, format=format.upper(), **lossy)
    return buffer.getvalue()
