"""Image files: those of requests are checked, fetched and decoded, those of answers encoded.

An image is sent as a data URI or as bytes. It is fetched from an address only if the server was started with
--allow-fetch, and never from a private address. Only PNG, JPEG, WebP and GIF (its first frame) are read, and never a
path. The server decodes in a process of its own (`unigen.serving.decoder`).
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
from typing import TYPE_CHECKING
from urllib.parse import urljoin

from PIL import Image

from unigen.media.images import MAX_PIXELS, read_image, read_mask

if TYPE_CHECKING:
    import httpx

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_REDIRECTS = 3
FETCH_TIMEOUT = 10.0
"""Seconds for one image, from the look-up of its host to its last byte."""
DNS_EXECUTOR = ThreadPoolExecutor(4, "names")
"""Threads that look hosts up, which may take as long as the name server likes."""
BASE64_WHITESPACE, BASE64_URL_SAFE = b" \t\r\n\f", bytes.maketrans(b"-_", b"+/")
"""Whitespace that is skipped within base64, and the translation of its URL-safe alphabet."""
DEFAULT_QUALITY = 92
"""Quality of JPEG and WebP."""
GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")
"""The network of all public addresses of IPv6; 64:ff9b::/96, fec0::/10, ::127.0.0.1, ... are outside of it."""
TUNNEL_NETWORKS = [ipaddress.ip_network(network) for network in ("2002::/16", "192.88.99.0/24")]
"""6to4: its addresses contain addresses of IPv4."""
ISATAP = (0x5EFE, 0x0200_5EFE)
"""The third quarter of an address of IPv6 whose last quarter is an address of IPv4."""

# ---------------------------------------------------------------- decoding


def open_image(data: bytes, name: str = "the picture") -> Image.Image:
    """Read the header of an image: its size is known then, and no pixel is decoded.

    Args:
        data: the bytes of a file.
        name: of the image, for the error.

    Raises:
        ValueError: it is not an image of these formats, or larger than `unigen.media.images.MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(f"{name} is too large: at most {MAX_PIXELS:,} pixels") from None
    except Exception:  # Pillow's plugins raise exceptions of any kind for a damaged file
        raise ValueError(f"{name} cannot be read: send PNG, JPEG, WebP or GIF") from None
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width}x{image.height} pixels"
        raise ValueError(f"{name} is too large: {size}, at most {MAX_PIXELS:,}")
    return image


def decode_image(data: bytes | Image.Image, max_pixels: int | None = None) -> Image.Image:
    """Decode an image.

    Args:
        data: the bytes of a file, or the result of `open_image`.
        max_pixels: size to which a larger image is reduced, while it is decoded where its format allows that.

    Returns:
        The image in RGB.

    Raises:
        ValueError: it is not an image, or larger than `unigen.media.images.MAX_PIXELS`.
    """
    opened = open_image(data) if isinstance(data, bytes) else data
    if max_pixels is not None and opened.width * opened.height > max_pixels:
        width, height = _fit_pixels(opened.size, max_pixels)
        opened.draft("RGB", (2 * width, 2 * height))
        opened = _reduce_image(opened, max_pixels)
    image = read_image(opened, name="the picture")
    size = _fit_pixels(image.size, max_pixels)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)


def decode_mask(data: bytes | Image.Image) -> Image.Image:
    """Decode a mask, which marks where to inpaint.

    Args:
        data: the bytes of a file, or the result of `open_image`.

    Returns:
        The mask in L. It is white where the file is transparent, as OpenAI has it, or where the file is white if it has
        no transparent pixel.

    Raises:
        ValueError: as `decode_image`.
    """
    opened = open_image(data, "the mask") if isinstance(data, bytes) else data
    return read_mask(opened, transparent_is_edit=True, name="the mask")


def _reduce_image(image: Image.Image, max_pixels: int) -> Image.Image:
    """Reduce an image of several times `max_pixels` in its own mode, before the conversion to RGB."""
    factor = math.ceil(math.sqrt(image.width * image.height / max_pixels))
    if factor < 3 or image.mode not in ("1", "P", "L", "LA", "RGB", "RGBA") or "transparency" in image.info:
        return image
    try:
        image.load()
    except Exception:  # `read_image` says what is wrong with it
        return image
    if image.mode in ("1", "P"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return image.reduce(factor)


def _fit_pixels(size: tuple[int, int], max_pixels: int | None) -> tuple[int, int]:
    """Return a size of the same aspect ratio with at most `max_pixels` pixels."""
    width, height = size
    if max_pixels is None or width * height <= max_pixels:
        return size
    scale = math.sqrt(max_pixels / (width * height))
    return max(1, int(width * scale)), max(1, int(height * scale))


# ---------------------------------------------------------------- data URIs


def image_from_data_uri(uri: str) -> Image.Image:
    """Decode an image from a data URI such as data:image/png;base64,...

    Raises:
        ValueError: it is not a data URI of an image.
    """
    return decode_image(bytes_from_data_uri(uri))


def bytes_from_data_uri(uri: str) -> bytes:
    """Return the file in a data URI, which is read as browsers do.

    The bytes say which format the image has. Lines may be broken, and the padding may be missing.

    Raises:
        ValueError: it is not a data URI in base64.
    """
    head, comma, _ = uri[:200].partition(",")
    media_type, *parameters = head.lower().split(";")
    is_known_type = media_type.startswith("data:image/") or media_type in ("data:", "data:application/octet-stream")
    if not (comma and is_known_type and parameters and parameters[-1].strip() == "base64"):
        raise ValueError("a picture is given as data:image/png;base64,... (or jpeg, webp, gif)")
    letters = uri[len(head) + 1 :].encode("ascii", "replace").translate(BASE64_URL_SAFE, BASE64_WHITESPACE).rstrip(b"=")
    try:
        return base64.b64decode(letters + b"=" * (-len(letters) % 4), validate=True)
    except binascii.Error:
        raise ValueError("the picture's base64 is damaged") from None


# ---------------------------------------------------------------- fetching


async def fetch_image(url: str, max_bytes: int) -> bytes:
    """Fetch an image file from a public http(s) address.

    Args:
        url: the address; redirects are checked as it is.
        max_bytes: size of the file.

    Raises:
        ValueError: the address is private or not http(s), does not answer in time or not with an image, or the image is
            too large.
    """
    import httpx

    try:
        async with asyncio.timeout(FETCH_TIMEOUT):
            async with httpx.AsyncClient(timeout=FETCH_TIMEOUT, follow_redirects=False, trust_env=False) as client:
                for _ in range(MAX_REDIRECTS + 1):
                    data, location = await _fetch_once(client, url, max_bytes)
                    if location is None:
                        return data
                    url = urljoin(url, location)
    except TimeoutError:
        raise ValueError(f"the picture's address takes longer than {FETCH_TIMEOUT:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL, KeyError, UnicodeError):
        raise ValueError("the picture's address cannot be read") from None
    raise ValueError("the picture's address leads to too many others")


async def _fetch_once(client: httpx.AsyncClient, url: str, max_bytes: int) -> tuple[bytes, str | None]:
    """Return the file at an address, or b"" and the address that it redirects to."""
    import httpx

    parsed_url = httpx.URL(url)
    host = parsed_url.raw_host.decode()  # in ASCII, whatever its letters
    if parsed_url.scheme not in ("http", "https") or not host or parsed_url.userinfo:
        raise ValueError("a picture's address is http or https, without a user")
    if (parsed_url.port or 0) >= 1 << 16:
        raise httpx.InvalidURL("port")
    # connect to the very address that is checked: a second look-up of the name could give another one
    port = parsed_url.port or (443 if parsed_url.scheme == "https" else 80)
    address = await _resolve_public_address(host, port)
    headers = {"Host": parsed_url.netloc.decode(), "Accept-Encoding": "identity"}  # compressed data may grow
    extensions = {"sni_hostname": host}
    async with client.stream(
        "GET", parsed_url.copy_with(host=address), headers=headers, extensions=extensions
    ) as response:
        if response.is_redirect:
            return b"", response.headers["location"]
        if response.status_code != 200:
            raise ValueError(f"the picture's address answered with {response.status_code}")
        if not response.headers.get("content-type", "").lower().startswith("image/"):
            raise ValueError("the picture's address does not hold a picture")
        data = bytearray()
        async for chunk in response.aiter_raw():
            data += chunk
            if len(data) > max_bytes:
                raise ValueError(f"the picture at this address is larger than {max_bytes} bytes")
        return bytes(data), None


async def _resolve_public_address(host: str, port: int) -> str:
    """Return an IP address of the host.

    Raises:
        ValueError: the host is unknown, or one of its addresses is not public.
    """
    try:
        look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        address_infos = await asyncio.get_running_loop().run_in_executor(DNS_EXECUTOR, look_up)
    except (OSError, UnicodeError):
        raise ValueError("the picture's address cannot be found") from None
    addresses = [str(info[4][0]).partition("%")[0] for info in address_infos]
    if not all(_is_public_address(ipaddress.ip_address(address)) for address in addresses):
        raise ValueError("the picture's address is a private one")
    return addresses[0]


def _is_public_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Is the address public, and does it contain no address that is not?"""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return _is_public_address(address.ipv4_mapped)
        if address not in GLOBAL_IPV6 or int(address) >> 32 & 0xFFFF_FFFF in ISATAP:
            return False
    if any(address in network for network in TUNNEL_NETWORKS if network.version == address.version):
        return False
    return address.is_global and not address.is_multicast


# ---------------------------------------------------------------- encoding


def encode_image(image: Image.Image, format: str = "png", quality: int | None = None) -> bytes:
    """Encode an image.

    Args:
        image: the image.
        format: "png", "jpeg" or "webp".
        quality: of JPEG and WebP, 0 to 100; None is `DEFAULT_QUALITY`.

    Returns:
        The bytes of the file.
    """
    buffer = io.BytesIO()
    options = {} if format == "png" else {"quality": DEFAULT_QUALITY if quality is None else quality}
    image.save(buffer, format=format.upper(), **options)
    return buffer.getvalue()
