"""Reading pictures: the one place where files, bytes, PIL images, arrays and tensors become pictures and masks.

    read_image("photo.jpg")                      # RGB, 8 bits, upright, transparency laid on white
    read_mask("strokes.png")                     # L, 255 where to regenerate: white and opaque pixels
    read_mask(data, transparent_is_edit=True)      # as OpenAI's API has it: what is transparent, where anything is

A picture is read as a viewer shows it: turned as its EXIF says, more than 8 bits scaled down, in sRGB, its first frame.
What cannot be read is a ValueError in one line that names the file. Does not depend on torch, models or HTTP.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, TypeGuard

import numpy as np
from PIL import Image, ImageChops, ImageCms, UnidentifiedImageError

if TYPE_CHECKING:
    from torch import Tensor

ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | BinaryIO | Image.Image | np.ndarray[Any, Any] | Tensor"
)

MAX_PIXELS = 32_000_000
FLOAT_TOLERANCE = 0.5 / 255
"""How far floats may lie outside of 0 to 1, where they are cut off: half a step of 8 bits."""
MAX_NAME_LENGTH = 400
"""Characters of a file's name that a message holds; longer ones lose their middle."""
IMAGE_SUFFIXES = frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .mpo .webp .gif .bmp .dib .tif .tiff .avif .avifs .heic .heif .jp2 .j2k .jpx"
    " .ppm .pgm .pbm .pnm .pfm .tga .ico .icns .qoi .dds .psd .pcx".split()
)
"""What the name of a picture file ends in, in lower case."""
ORIENTATION = 0x0112
EXIF_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation."""
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
"""Tags of TIFF."""


class ImageError(ValueError):
    """A picture that cannot be read; the message is one line that names it."""


def read_image(
    source: ImageSource,
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] | None = None,
) -> Image.Image:
    """Read a picture as a viewer shows it.

    Args:
        source: a path, the bytes of a file, an open binary file, a PIL image, an array or a tensor. Arrays and tensors
            are (H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4, with or without a batch dimension of 1; uint8,
            uint16, bool, other integers from 0 to 255, or floats from 0 to 1.
        name: what messages call the picture; by default its file's name.
        max_pixels: larger pictures are refused before their pixels are decoded.
        formats: PIL's names of the file formats that are read; by default all.

    Returns:
        A new 8-bit RGB image without metadata, upright, transparency laid on white.

    Raises:
        ImageError: a ValueError in one line, for what is missing, damaged, too large or not a picture.
    """
    rgb, alpha = _decode_source(source, name or image_name(source), max_pixels, formats, srgb=True)
    if alpha is None:
        return rgb
    background = Image.new("RGB", rgb.size, "white")
    background.paste(rgb, mask=alpha)
    return background


def read_mask(
    source: ImageSource,
    *,
    transparent_is_edit: bool = False,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] | None = None,
) -> Image.Image:
    """Read which pixels of an image are to be regenerated.

    White marks: a pixel of at least half the full brightness, its colour times its opacity. So transparent pixels of a
    layer that an editor exported mark nothing. In arrays True marks, and integers of 0 and 1 are such truth values.

    Args:
        source: as of `read_image`.
        transparent_is_edit: OpenAI's convention, for masks that hold fully transparent pixels: these mark, and no
            others.
        name: as of `read_image`.
        max_pixels: as of `read_image`.
        formats: as of `read_image`.

    Returns:
        A new image of mode L, 255 where to regenerate and 0 elsewhere.

    Raises:
        ImageError: as `read_image`, and for a mask that marks nothing or is a coloured picture with a transparent part,
            as OpenAI's API takes it.
    """
    name = name or image_name(source, "mask")
    source = _to_array(source, name) if _is_tensor(source) else source
    if isinstance(source, np.ndarray) and source.dtype.kind in "iu" and source.size and 0 <= source.min():
        source = source.astype(bool) if source.max() <= 1 else source
    rgb, alpha = _decode_source(source, name, max_pixels, formats, srgb=False)
    if transparent_is_edit and alpha is not None and alpha.getextrema()[0] == 0:
        return alpha.point(lambda value: 255 * (value == 0))
    coverage = rgb.convert("L")
    if alpha is not None:
        if _has_transparent_hole(rgb, alpha):
            hint = "transparent pixels mark nothing, paint white the region to regenerate"
            raise ImageError(f"{name} is a picture with a hole, and not a mask: {hint}")
        coverage = ImageChops.multiply(coverage, alpha)
    brightest = coverage.getextrema()[1]
    if brightest < 128:  # type: ignore[operator]
        limits_text = f"its brightest opaque pixel is {brightest} of 255, a mark is at least 128"
        raise ImageError(f"{name} marks nothing: paint white the region to regenerate ({limits_text})")
    return coverage.point(lambda value: 255 * (value >= 128))


def _has_transparent_hole(colour: Image.Image, alpha: Image.Image) -> bool:
    """Whether a part is fully transparent, and more than a quarter of what is visible has a colour."""
    rgb, visible = np.asarray(colour), np.asarray(alpha) >= 128
    if alpha.getextrema()[0] != 0 or not visible.any():
        return False
    return bool((rgb.max(-1) - rgb.min(-1) > 32)[visible].mean() > 0.25)


def is_image_path(text: str) -> bool:
    """Whether a text is one line that ends like the name of a picture file; the file need not exist."""
    stem, suffix = os.path.splitext(text)
    return suffix.lower() in IMAGE_SUFFIXES and len(text.splitlines()) == 1 and not stem[-1:].isspace()


def missing_file_message(source: object, name: str | None = None) -> str:
    """The message for a picture file that does not exist."""
    name, text = name or image_name(source), source if isinstance(source, str) else ""
    if text.lower().startswith("file://"):
        return f"{name} is an address: give the file's path, without file://"
    if text.lower().startswith("data:"):
        return f"{name} is an address that holds a picture: give the path of a file, or its bytes"
    return f"{name} is an address, not a file: download it first" if "://" in text else f"{name} does not exist"


def is_image(value: object) -> TypeGuard[ImageSource]:
    """Whether a value is of a type that `read_image` takes, text apart."""
    image_types = (os.PathLike, bytes, bytearray, Image.Image, np.ndarray)
    return isinstance(value, image_types) or _is_tensor(value) or (hasattr(value, "read") and hasattr(value, "seek"))


def _decode_source(
    source: Any, name: str, max_pixels: int, formats: tuple[str, ...] | None, srgb: bool
) -> tuple[Image.Image, Image.Image | None]:
    """The colours (RGB) and, where anything is transparent, the alpha (L) of an upright picture, both new images."""
    if not is_image(source) and not isinstance(source, str):
        image_types = "a path, the bytes of a file, a PIL image, an array or a tensor"
        raise ImageError(f"a picture is {image_types}, not {type(source).__name__}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, about files that it reads nevertheless
            if _is_tensor(source):
                source = _to_array(source, name)
            if isinstance(source, np.ndarray):
                source = _from_array(source, name)
            if isinstance(source, Image.Image):
                return _decode(source, name, max_pixels, srgb)
            file = io.BytesIO(source) if isinstance(source, (bytes, bytearray)) else source
            with Image.open(file, formats=formats) as image:
                return _decode(image, name, max_pixels, srgb)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(f"{name} cannot be decoded: it takes too much memory") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large: at most {max_pixels:,} pixels") from error
    except FileNotFoundError as error:
        raise ImageError(missing_file_message(source, name)) from error
    except IsADirectoryError as error:
        raise ImageError(f"{name} is a folder: give a picture file in it") from error
    except Exception as error:  # plugins raise whatever a damaged file leads them to
        format_names = "PNG or JPEG" if formats is None else ", ".join(formats)
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({_reason(error)})"
        if isinstance(source, str) and source[:5].lower() == "data:":  # longer than a name may be
            raise ImageError(missing_file_message(source, name)) from error
        raise ImageError(f"{name} cannot be read: is it a {format_names} file?{reason}") from error


def _decode(image: Any, name: str, max_pixels: int, srgb: bool) -> tuple[Image.Image, Image.Image | None]:
    _check_size(image, name, max_pixels)
    tile = image.tile[0].args if getattr(image, "tile", None) else None
    image.load()
    _check_size(image, name, max_pixels)  # some formats know their size only now
    tags = getattr(image, "tag_v2", {})
    bits, inverted = tags.get(BITS_PER_SAMPLE, (16,))[0], tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
    profile, transpose = image.info.get("icc_profile") if srgb else None, _exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        grey, alpha = _to_uint8(image, name, bits, inverted)
    else:
        grey, alpha = image, None
        if image.has_transparency_data:
            image = image.convert("LA") if image.mode == "La" else _scale_transparency_key(image, tile)
            rgba = image.convert("RGBA")
            grey, alpha = rgba.convert("RGB"), rgba.getchannel("A")
    if grey.mode in ("1", "P"):
        grey = grey.convert("RGB")
    rgb = _to_srgb(grey, profile) if profile else grey.convert("RGB")
    if transpose is not None:
        rgb, alpha = rgb.transpose(transpose), alpha and alpha.transpose(transpose)
    rgb.info = {}
    return rgb, alpha


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"{name} is too large: {width}x{height} pixels, at most {max_pixels:,}")
    if not width * height:
        raise ImageError(f"{name} has no pixels: it is {width}x{height}")


def _exif_transpose(image: Image.Image) -> Image.Transpose | None:
    """What makes the picture upright. Damaged EXIF is ignored."""
    try:
        return EXIF_TRANSPOSES.get(image.getexif().get(ORIENTATION))  # type: ignore[arg-type]
    except Exception:
        return None


def _to_uint8(image: Image.Image, name: str, bits: int, inverted: bool) -> tuple[Image.Image, Image.Image | None]:
    """Greys of 16 bits, or floats of 0 to 1, as L, and the alpha where one value is transparent. Integers of 32 bits
    hold 16, or 8 where none is above 255, as PIL's own convert("I") makes them."""
    values = np.asarray(image)
    if values.dtype.kind == "f":
        grey = _floats_to_uint8(values, name)
    else:
        values = values.astype(np.int32)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise ImageError(f"{name} holds values from {low} to {high}: save it with 8 or 16 bits, 0 to 65535")
        values_uint8 = image.mode == "I" and high <= 255
        grey = (values >> (0 if values_uint8 else min(bits, 16) - 8)).astype(np.uint8)
    key = image.info.get("transparency")
    alpha = None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    return Image.fromarray(255 - grey if inverted else grey), alpha


def _floats_to_uint8(values: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ImageError(f"{name} holds values that are not finite")
    low, high = float(values.min()), float(values.max())
    if low < -FLOAT_TOLERANCE or high > 1 + FLOAT_TOLERANCE:
        raise ImageError(f"{name} holds floats from {low:g} to {high:g}: scale them to 0 to 1")
    values_uint8: np.ndarray = (values.clip(0, 1) * 255).round().astype(np.uint8)
    return values_uint8


def _scale_transparency_key(image: Image.Image, tile: Any) -> Image.Image:
    """PNG's transparent value as PIL's convert() wants it: of 8 bits, where the file has others."""
    key = image.info.get("transparency")
    if isinstance(key, int) and tile in ("L;2", "L;4"):
        key *= 85 if tile == "L;2" else 17
    elif isinstance(key, tuple) and max(key) > 255:
        key = tuple(value >> 8 for value in key)
    else:
        return image
    image = image.copy()
    image.info["transparency"] = key
    return image


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The picture's colours by its ICC profile; a damaged profile, or one for other images, is ignored."""
    try:
        source_profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" not in ImageCms.getProfileDescription(source_profile):
            target = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source_profile, target, outputMode="RGB")
            return image.convert("RGB") if converted is None else converted
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        pass
    return image.convert("RGB")


def _is_tensor(value: object) -> TypeGuard[Tensor]:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _to_array(tensor: Tensor, name: str) -> np.ndarray:
    """A tensor's values, colours last."""
    try:
        tensor = tensor.detach().cpu()
        while tensor.ndim > 3 and len(tensor) == 1:
            tensor = tensor[0]
        if tensor.is_floating_point():
            tensor = tensor.float()  # numpy has no bfloat16
        if tensor.ndim == 3 and tensor.shape[0] in (1, 3, 4):
            tensor = tensor.permute(1, 2, 0)
        values: np.ndarray = tensor.numpy()
    except Exception as error:  # of one that is sparse, quantized, nested or has no values
        raise ImageError(f"{name} is a tensor whose values cannot be read: {_reason(error)}") from error
    return values


def _from_array(values: np.ndarray, name: str) -> Image.Image:
    """An image of 8 bits: L, RGB or RGBA."""
    shape = values.shape
    while values.ndim > 3 and len(values) == 1:
        values = values[0]
    if values.ndim == 3 and values.shape[2] not in (1, 3, 4) and values.shape[0] in (1, 3, 4):
        values = values.transpose(1, 2, 0)
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)):
        image_types = "(H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4"
        raise ImageError(f"{name} is an array of shape {shape}: one picture is {image_types}")
    if not values.size:
        raise ImageError(f"{name} has no pixels: it is an array of shape {shape}")
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    kind = values.dtype.kind
    if kind == "f":
        values_uint8 = _floats_to_uint8(values, name)
    elif kind == "b":
        values_uint8 = np.where(values, 255, 0).astype(np.uint8)
    elif values.dtype == np.uint16:
        values_uint8 = (values >> 8).astype(np.uint8)
    elif kind in "iu":
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 255:
            raise ImageError(f"{name} holds {values.dtype} from {low} to {high}: give uint8, uint16, or 0 to 255")
        values_uint8 = values.astype(np.uint8)
    else:
        raise ImageError(f"{name} is an array of {values.dtype}: give uint8, uint16, bool or floats of 0 to 1")
    return Image.fromarray(np.ascontiguousarray(values_uint8))


def image_name(source: object, kind: str = "image") -> str:
    """What messages call a picture: by its file, where it has one."""
    for file in (source, getattr(source, "filename", None), getattr(source, "name", None)):
        if isinstance(file, (str, os.PathLike)) and str(file):
            break
    else:
        return f"the {kind}"
    text = str(file)
    text = text if len(text) <= MAX_NAME_LENGTH else f"{text[: MAX_NAME_LENGTH // 2]}...{text[-MAX_NAME_LENGTH // 2 :]}"
    return f"{kind} {text if text.isprintable() and text == text.strip() else repr(text)}"


def _reason(error: Exception) -> str:
    """One line that says what a library complained about."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__
