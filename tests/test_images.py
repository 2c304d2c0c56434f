"""Pictures and masks are read as a viewer shows them, wherever they come from."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, features

from unigen.document import Document, Segment
from unigen.media.images import ImageError, is_image_path, read_image, read_mask
from unigen.media.pixels import to_pixels

WIDTH, HEIGHT = 48, 32
UPRIGHT = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE"}
STORED = {number: Image.Transpose[name] for number, name in UPRIGHT.items()} | {8: Image.Transpose.ROTATE_270}
"""How a camera stores the upright scene under each orientation."""


def scene() -> Image.Image:
    """Red at the left, blue at the right, green along the top: no turn leaves it as it is."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, : WIDTH // 2], pixels[:, WIDTH // 2 :], pixels[: HEIGHT // 4] = (
        (220, 30, 30),
        (30, 30, 220),
        (30, 200, 30),
    )
    return Image.fromarray(pixels)


def ramp() -> np.ndarray:
    """Greys uint8 (H, W) of all brightnesses."""
    return np.linspace(0, 255, WIDTH * HEIGHT).astype(np.uint8).reshape(HEIGHT, WIDTH)


def file_of(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(kind: int, depth: int, rows: np.ndarray, key: bytes = b"") -> bytes:
    """A PNG of rows of bytes; kind: 0 grey, 2 RGB, 4 grey and alpha; key: its tRNS."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    width = rows.shape[1] * 8 // (depth * {0: 1, 2: 3, 4: 2}[kind])
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0))
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    marks = chunk(b"tRNS", key) if key else b""
    return b"\x89PNG\r\n\x1a\n" + head + marks + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def big_endian(values: np.ndarray) -> np.ndarray:
    """uint16 (H, ...) as rows of bytes, the high one first."""
    return values.reshape(len(values), -1).astype(">u2").view(np.uint8)


def difference(read: Image.Image, wanted: Any) -> int:
    """The greatest between a picture and an array or picture, of 255."""
    assert read.mode == "RGB" and not read.info
    values = np.asarray(wanted).astype(int)
    values = values if values.ndim == 3 else values[..., None].repeat(3, 2)
    assert read.size == values.shape[1::-1]
    return int(np.abs(np.asarray(read).astype(int) - values).max())


def turned(format: str, orientation: int, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return file_of(scene().transpose(STORED[orientation]), format, exif=exif, **options)


CAMERA = [
    ("JPEG", {"quality": 95, "subsampling": 0}, 12),
    ("PNG", {}, 0),
    ("WEBP", {"lossless": True}, 0),
    ("TIFF", {}, 0),
]
CAMERA += [("MPO", {"quality": 95, "subsampling": 0}, 12)]
CAMERA += [("AVIF", {"quality": 95, "subsampling": "4:4:4"}, 20)] if features.check("avif") else []


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(("format", "options", "margin"), CAMERA, ids=[format for format, *_ in CAMERA])
def test_turned_pictures_are_upright(format: str, options: dict[str, Any], margin: int, orientation: int) -> None:
    data = turned(format, orientation, **options)
    assert difference(read_image(data), scene()) <= margin
    stored = Image.open(io.BytesIO(data))
    assert difference(read_image(stored), scene()) <= margin  # a PIL image that knows its EXIF
    assert difference(read_image(read_image(data)), scene()) <= margin  # turned once


def test_damaged_exif_does_not_lose_a_picture() -> None:
    image = scene()
    for exif in (
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0" + b"\xff" * 40,
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x07\0",
    ):
        assert difference(read_image(file_of(image, "PNG", exif=exif)), image) == 0


GREY16 = ramp().astype(np.uint16) * 256 + 37
MANY_BITS: dict[str, Callable[[], bytes]] = {
    "PNG of 16 bits": lambda: file_of(Image.fromarray(GREY16), "PNG"),
    "TIFF of 16 bits": lambda: file_of(Image.fromarray(GREY16), "TIFF"),
    "TIFF of 16 bits, high byte first": lambda: file_of(Image.fromarray(GREY16.astype(">u2")), "TIFF"),
    "TIFF of 32 bits": lambda: file_of(Image.fromarray(GREY16.astype(np.int32)), "TIFF"),
    "TIFF of floats": lambda: file_of(Image.fromarray(ramp().astype(np.float32) / 255), "TIFF"),
    "PGM of 16 bits": lambda: file_of(Image.fromarray(GREY16), "PPM"),
    "PNG of 16 bits and alpha": lambda: png(4, 16, big_endian(np.stack((GREY16, np.full_like(GREY16, 65535)), -1))),
    "PNG of 4 bits": lambda: png(0, 4, (ramp()[:, ::2] // 17 << 4) | (ramp()[:, 1::2] // 17)),
}


@pytest.mark.parametrize("kind", MANY_BITS)
def test_greys_of_other_bits(kind: str) -> None:
    margin = 17 if kind == "PNG of 4 bits" else 0
    assert difference(read_image(MANY_BITS[kind]()), ramp()) <= margin


def test_colours_of_16_bits() -> None:
    colours = np.asarray(scene()).astype(np.uint16) * 257
    assert difference(read_image(png(2, 16, big_endian(colours))), scene()) == 0


def test_depth_maps_are_read() -> None:
    """As the data tool writes them: uint16 PNG, 65535 is far."""
    depth = np.full((HEIGHT, WIDTH), 65535, np.uint16)
    depth[8:24, 8:24] = 20000
    from data_tools.make_scenes import png_cell

    data = png_cell(depth)["bytes"]
    assert Image.open(io.BytesIO(data)).mode == "I;16"
    assert difference(read_image(data), depth >> 8) == 0


def test_a_value_that_is_transparent() -> None:
    """PNG's tRNS of greys of 16, 4 and 2 bits and of colours of 16: that value is paper, all others stay."""
    grey = png(0, 16, big_endian(GREY16), struct.pack(">H", int(GREY16[4, 4])))
    wanted = np.where(GREY16 == GREY16[4, 4], 255, ramp())
    assert difference(read_image(grey), wanted) == 0 and (wanted != ramp()).any()
    for depth, black in ((4, 0x22), (2, 0xAA)):
        assert (
            difference(
                read_image(png(0, depth, np.full((4, 4), black, np.uint8), struct.pack(">H", 2))),
                np.full((4, 32 // depth), 255),
            )
            == 0
        )
    colours = np.asarray(scene()).astype(np.uint16) * 257
    blue = read_image(png(2, 16, big_endian(colours), struct.pack(">HHH", *(257 * c for c in (30, 30, 220)))))
    assert blue.getpixel((WIDTH - 1, HEIGHT - 1)) == (255, 255, 255) and blue.getpixel((0, HEIGHT - 1)) == (220, 30, 30)


def test_white_is_zero_and_twelve_bits() -> None:
    """Tags of TIFF that PIL leaves to its reader."""
    white_is_zero = file_of(Image.fromarray(65535 - GREY16), "TIFF", tiffinfo={262: 0})
    assert Image.open(io.BytesIO(white_is_zero)).tag_v2[262] == 0  # type: ignore[attr-defined]
    assert difference(read_image(white_is_zero), ramp()) == 0
    twelve = ramp().astype(np.int64).ravel() * 16 + 5
    pairs = (twelve[::2] << 12) | twelve[1::2]  # two greys in three bytes
    strip = b"".join(int(pair).to_bytes(3, "big") for pair in pairs)
    tags = {256: WIDTH, 257: HEIGHT, 258: 12, 259: 1, 262: 1, 273: 122, 277: 1, 278: HEIGHT, 279: len(strip)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0\0\0\0"
    assert len(head) == tags[273]
    assert difference(read_image(head + strip), ramp()) == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((8, 8), 70_000, np.int32), "from 70000 to 70000: save it with 8 or 16 bits"),
        (np.full((8, 8), -3, np.int32), "from -3 to -3"),
        (np.full((8, 8), 255.0, np.float32), "floats from 255 to 255: scale them to 0 to 1"),
        (np.full((8, 8), np.nan, np.float32), "not finite"),
    ],
)
def test_values_of_no_known_range(values: np.ndarray, message: str, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "scan.tiff")
    with pytest.raises(ImageError, match=f"scan.tiff.*{message}"):
        read_image(tmp_path / "scan.tiff")


def test_other_kinds_of_files() -> None:
    image = scene()
    palette = image.quantize(16)
    paper = np.asarray(image).copy()
    paper[np.asarray(palette) == palette.getpixel((0, 0))] = 255  # type: ignore[index]
    assert difference(read_image(file_of(palette, "PNG", transparency=palette.getpixel((0, 0)))), paper) <= 2
    assert difference(read_image(file_of(palette, "PNG")), image) <= 2
    bits = Image.fromarray(ramp()).convert("1")
    assert difference(read_image(file_of(bits, "PNG")), np.asarray(bits) * 255) == 0
    assert difference(read_image(file_of(image.convert("CMYK"), "JPEG", quality=95)), image) <= 16
    frames: dict[str, Any] = {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180)]}
    for format, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        assert difference(read_image(file_of(image, format, **frames, **options)), image) == 0, format
    hole = image.convert("RGBA")
    hole.putalpha(Image.linear_gradient("L").resize(hole.size))
    alpha = np.asarray(hole)[..., 3:] / 255
    assert difference(read_image(file_of(hole, "PNG")), (np.asarray(image) * alpha + 255 * (1 - alpha)).round()) <= 1


MODES = ("1", "L", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I", "LA", "La", "PA", "RGBa", "RGBX")


@pytest.mark.parametrize("mode", MODES)
def test_pil_images_of_every_mode(mode: str) -> None:
    grey = mode in ("1", "L", "I", "LA", "La")
    image = (
        scene()
        .convert("LA" if mode == "La" else "P" if mode == "PA" else "RGBA" if mode == "RGBa" else mode)
        .convert(mode)
    )
    wanted = scene().convert(mode).convert("RGB") if mode in ("1", "P") else scene().convert("L" if grey else "RGB")
    margin = {"YCbCr": 3, "HSV": 2, "PA": 50}.get(mode, 0)
    assert difference(read_image(image), wanted.convert("RGB")) <= margin


def test_colours_are_brought_to_srgb() -> None:
    """A profile of another colour space is followed; sRGB, a damaged one and one of another kind change nothing."""
    image, srgb = scene(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert difference(read_image(file_of(image, "PNG", icc_profile=srgb)), image) == 0
    for useless in (b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()):
        assert difference(read_image(file_of(image, "PNG", icc_profile=useless)), image) == 0
    # red and green change places: sRGB whose tags of these two colorants are named the other way round
    swapped = (
        srgb.replace(b"rXYZ", b"____").replace(b"gXYZ", b"rXYZ").replace(b"____", b"gXYZ").replace(b"sRGB", b"wRGB")
    )
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "wRGB".encode("utf-16-be"))
    wanted = np.asarray(image)[..., [1, 0, 2]]
    assert difference(read_image(file_of(image, "PNG", icc_profile=swapped)), wanted) <= 2
    own = image.copy()
    own.info["icc_profile"] = swapped
    assert difference(read_image(read_image(own)), wanted) <= 2  # once


EIGHT = np.asarray(scene())
ARRAYS: dict[str, Any] = {
    "uint8": EIGHT,
    "floats": EIGHT / 255,
    "float16": (EIGHT / 255).astype(np.float16),
    "uint16": EIGHT.astype(np.uint16) * 256 + 37,
    "int64": EIGHT.astype(np.int64),
    "channels first": EIGHT.transpose(2, 0, 1),
    "a batch of one": EIGHT[None],
    "a batch of one, channels first": EIGHT.transpose(2, 0, 1)[None],
    "RGBA": np.concatenate((EIGHT, np.full((HEIGHT, WIDTH, 1), 255, np.uint8)), 2),
    "RGBA floats, channels first": np.concatenate((EIGHT / 255, np.ones((HEIGHT, WIDTH, 1))), 2).transpose(2, 0, 1),
    "every second row of a larger one": EIGHT.repeat(2, 0)[::2],
    "beyond 1 by rounding": (EIGHT / 255 * (1 + 1e-6)),
    "torch, channels first": torch.from_numpy(EIGHT.copy()).permute(2, 0, 1) / 255,
    "torch, channels last": torch.from_numpy(EIGHT.copy()),
    "torch, a batch of one": (torch.from_numpy(EIGHT.copy()).permute(2, 0, 1) / 255)[None],
    "torch, a batch of one, channels last": (torch.from_numpy(EIGHT.copy()) / 255)[None],
    "torch, bfloat16 that is learnt": (torch.from_numpy(EIGHT.copy()) / 255).bfloat16().requires_grad_(),
}
GREYS: dict[str, Any] = {
    "grey": ramp(),
    "grey, (H, W, 1)": ramp()[..., None],
    "grey, (1, H, W)": ramp()[None],
    "grey floats": ramp() / 255,
    "grey uint16": GREY16,
    "grey torch": torch.from_numpy(ramp() / 255),
    "grey torch, (1, H, W)": torch.from_numpy(ramp())[None],
}


@pytest.mark.parametrize("kind", [*ARRAYS, *GREYS])
def test_arrays_and_tensors(kind: str) -> None:
    given, wanted = (ARRAYS[kind], scene()) if kind in ARRAYS else (GREYS[kind], ramp())
    assert difference(read_image(given), wanted) <= ("float16" in kind)
    pixels = to_pixels([given], 16)
    assert (pixels - to_pixels([read_image(np.asarray(wanted))], 16)).abs().max() <= 1 / 127.5 + 1e-6
    if not isinstance(given, torch.Tensor) or given.ndim > 2:
        segment = Document.of([given, "how many?"]).segments[0]
        assert segment.text is None and (to_pixels([segment.image], 16) - pixels).abs().max() <= 1e-6


def test_truth_values_are_black_and_white() -> None:
    assert difference(read_image(ramp() > 99), np.where(ramp() > 99, 255, 0)) == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (EIGHT.astype(np.float32), "floats from 30 to 220: scale them to 0 to 1"),
        (EIGHT / 127.5 - 1, "floats from -0.76"),
        (torch.from_numpy(EIGHT / 127.5 - 1), "floats from -0.76"),
        (np.full((4, 4), np.nan), "not finite"),
        (np.full((4, 4, 3), np.inf), "not finite"),
        (EIGHT.astype(np.int64) * 300, "int64 from 9000 to 66000"),
        (EIGHT[:0], "no pixels"),
        (np.zeros((0, 0)), "no pixels"),
        (np.zeros((2, 8, 8, 3)), r"shape \(2, 8, 8, 3\)"),
        (torch.zeros(2, 3, 8, 8), r"shape \(2, 3, 8, 8\)"),
        (np.zeros((8, 8, 5), np.uint8), r"shape \(8, 8, 5\)"),
        (np.zeros(8, np.uint8), r"shape \(8,\)"),
        (np.array(5, np.uint8), r"shape \(\)"),
        (np.array([["a"]]), "array of <U1"),
        (np.zeros((4, 4), complex), "array of complex128"),
        (5, "not int"),
        (None, "not NoneType"),
        ([scene()], "not list"),
    ],
)
def test_what_is_no_picture_is_one_line(values: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message) as error:
        read_image(values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("read", [read_image, read_mask])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(3, 4, 4, device="meta"),
        torch.eye(4).to_sparse(),
        torch.zeros(4, 4, dtype=torch.complex64).conj(),
    ],
    ids=["without values", "sparse", "conjugate"],
)
def test_tensors_without_plain_values_are_one_line(read: Any, tensor: torch.Tensor) -> None:
    with pytest.raises(ImageError, match="is a tensor whose values cannot be read") as error:
        read(tensor)
    assert "\n" not in str(error.value)


def noise(mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, channels), np.uint8), mode)


@pytest.mark.parametrize("format", [format for format, *_ in CAMERA] + ["GIF", "BMP", "JPEG2000", "ICO", "TGA", "PPM"])
def test_damaged_files_are_one_line_with_their_name(format: str, tmp_path: Path) -> None:
    """Cut at many places and with bytes changed, a file is read or refused by its name; nothing else happens."""
    whole, rng, refused = file_of(noise(), format), np.random.default_rng(1), 0
    path = tmp_path / "holiday.png"
    damaged = [whole[: len(whole) * k // 12] for k in range(12)]
    for _ in range(24):
        changed = np.frombuffer(whole, np.uint8).copy()
        at = rng.integers(0, min(len(changed), 400), 6)
        changed[at] = rng.integers(0, 256, 6)
        damaged.append(changed.tobytes())
    for data in damaged:
        path.write_bytes(data)
        for read in (read_image, read_mask):
            try:
                read(path)
            except ValueError as error:
                refused += 1
                assert "holiday.png" in str(error) and " at 0x" not in str(error) and "\n" not in str(error)
    assert refused > 10


def test_any_exception_of_a_plugin_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scene().save(tmp_path / "a.png")
    for kind in (RuntimeError, struct.error, OverflowError, zlib.error, EOFError, IndexError, KeyError, AttributeError):

        def load(self: Any, kind: type[Exception] = kind) -> None:
            raise kind("bad\nthing")

        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
        with pytest.raises(ImageError, match=r"a.png cannot be read: .*\(.*bad.*thing.*\)$"):
            read_image(tmp_path / "a.png")

    def full(self: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", full)
    with pytest.raises(ImageError, match="a.png cannot be decoded: it takes too much memory"):
        read_image(tmp_path / "a.png")


def test_messages_name_the_picture(tmp_path: Path) -> None:
    cut = tmp_path / "cut.png"
    cut.write_bytes(file_of(noise(), "PNG")[:5000])
    for source in (cut, str(cut), Image.open(cut), cut.open("rb")):
        with pytest.raises(ImageError, match="image .*cut.png cannot be read"):
            read_image(source)
    with pytest.raises(ImageError, match="^mask .*cut.png cannot be read"):
        read_mask(cut)
    with pytest.raises(ImageError, match="^the mask cannot be read: is it a PNG, GIF file"):
        read_mask(cut.read_bytes(), name="the mask", formats=("PNG", "GIF"))
    with pytest.raises(ImageError, match="^the image cannot be read"):
        read_image(cut.read_bytes())
    for source, message in (
        (tmp_path, "is a folder: give a picture file in it"),
        ("a" * 5000 + ".png", "cannot be read"),
        ("nul\0.png", "cannot be read"),
        ("data:image/png;base64," + "A" * 100_000, r"^.{1,500}is an address that holds a picture: give.{1,60}$"),
        (f"file://{cut}", "is an address: give the file's path, without file://"),
        ("cut.png ", "image 'cut.png ' does not exist"),
        ("two\nlines.png", r"'two\\nlines.png' does not exist"),
        ("https://example.com/a.png", "is an address, not a file"),
    ):
        with pytest.raises(ImageError, match=message) as error:
            read_image(source)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("read", [read_image, read_mask])
def test_size_is_checked_before_pixels_are_decoded(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = file_of(Image.new("1", (9000, 9000), 1), "PNG")

    def load(self: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(ImageError, match="too large: 9000x9000 pixels, at most 32,000,000"):
        read(bomb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # a limit of the user's own
    with pytest.raises(ImageError, match="too large"):
        read(bomb)
    monkeypatch.undo()
    with pytest.raises(ImageError, match="too large: 48x32 pixels, at most 1,000"):
        read(file_of(scene(), "PNG"), max_pixels=1000)


def test_warnings_of_pil_stay_inside() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(file_of(scene().quantize(16), "PNG", transparency=bytes([0, 128] + [255] * 14)))


# ---------------------------------------------------------------- masks

MARKED = np.zeros((HEIGHT, WIDTH), bool)
MARKED[8:24, 20:40] = True


def layer(ground: tuple[int, ...], mark: tuple[int, ...]) -> Image.Image:
    pixels = np.full((HEIGHT, WIDTH, 4), ground, np.uint8)
    pixels[MARKED] = mark
    return Image.fromarray(pixels)


def marked(mask: Any, **options: Any) -> np.ndarray:
    read = read_mask(mask, **options)
    assert read.mode == "L" and set(np.unique(read)) <= {0, 255}
    return np.asarray(read) == 255


WHITE = np.where(MARKED, 255, 0).astype(np.uint8)
MASKS: dict[str, Any] = {
    "L": Image.fromarray(WHITE),
    "1": Image.fromarray(MARKED),
    "RGB": Image.fromarray(WHITE).convert("RGB"),
    "16 bits": Image.fromarray(WHITE.astype(np.uint16) * 257),
    "16 bits, dark grey elsewhere": Image.fromarray(np.where(MARKED, 65535, 20000).astype(np.uint16)),
    "palette": Image.fromarray(WHITE).convert("P"),
    "white strokes on a transparent layer": layer((0, 0, 0, 0), (255, 255, 255, 255)),
    "white strokes on a transparent white layer": layer((255, 255, 255, 0), (255, 255, 255, 255)),
    "black and white and half transparent black": layer((0, 0, 0, 128), (255, 255, 255, 255)),
    "opaque RGBA": layer((0, 0, 0, 255), (255, 255, 255, 255)),
    "grey and alpha": layer((255, 255, 255, 0), (255, 255, 255, 255)).convert("LA"),
    "bool array": MARKED,
    "bool tensor": torch.from_numpy(MARKED),
    "bool tensor, (1, H, W)": torch.from_numpy(MARKED)[None],
    "array of 0 and 1": MARKED.astype(np.uint8),
    "tensor of 0 and 1": torch.from_numpy(MARKED).long(),
    "float array": MARKED.astype(np.float32),
    "float tensor (1, 1, H, W)": torch.from_numpy(MARKED)[None, None].float(),
    "array": WHITE,
    "colour array": WHITE[..., None].repeat(3, 2),
}


@pytest.mark.parametrize("kind", MASKS)
def test_white_and_opaque_marks(kind: str) -> None:
    mask = MASKS[kind]
    assert np.array_equal(marked(mask), MARKED)
    if isinstance(mask, Image.Image):
        assert np.array_equal(marked(file_of(mask, "PNG")), MARKED)
        assert np.array_equal(marked(read_mask(mask)), MARKED)
        if "transparent" not in kind and "alpha" not in kind:  # the same where nothing is transparent
            assert np.array_equal(marked(file_of(mask, "PNG"), transparent_is_edit=True), MARKED)


@pytest.mark.parametrize("ground", [(0, 0, 0, 255), (255, 255, 255, 255), (0, 0, 0, 1), (200, 30, 30, 255)])
def test_transparency_marks_where_openais_convention_is_asked_for(ground: tuple[int, ...]) -> None:
    assert np.array_equal(marked(file_of(layer(ground, (0, 0, 0, 0)), "PNG"), transparent_is_edit=True), MARKED)


def test_a_picture_with_a_hole_is_no_mask_of_white() -> None:
    """It is OpenAI's kind of mask; by white it would mark the bright parts of the picture, and not the hole."""
    cut_out = scene().convert("RGBA")
    cut_out.putalpha(Image.fromarray(255 - WHITE))
    with pytest.raises(ImageError, match="a picture with a hole, and not a mask"):
        read_mask(cut_out)
    assert np.array_equal(marked(file_of(cut_out, "PNG"), transparent_is_edit=True), MARKED)


def test_masks_are_turned_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = file_of(Image.fromarray(WHITE).transpose(STORED[6]), "PNG", exif=exif)
    assert np.array_equal(marked(data), MARKED)


@pytest.mark.parametrize(
    "mask",
    [
        WHITE * 0,
        MARKED & False,
        WHITE // 255 * 90,
        layer((0, 0, 0, 0), (0, 0, 0, 255)),
        layer((255, 255, 255, 0), (255, 255, 255, 90)),
    ],
)
def test_a_mask_that_marks_nothing(mask: Any) -> None:
    with pytest.raises(ImageError, match="marks nothing: paint white"):
        read_mask(mask)


# ---------------------------------------------------------------- texts that are names of files


def test_a_text_is_a_picture_where_it_names_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scene().save("a cat.png")
    scene().save("UPPER.JPG")
    for name in ("a cat.png", "UPPER.JPG", str(tmp_path / "a cat.png")):
        assert Document.of([name, "what is it?"]).segments[0].image == Path(name)
        assert Document.of(name).segments[0].image == Path(name)
    for name in ("none.png", "a dog.jpeg", "/nowhere/x.webp", "x" * 3000 + ".png"):
        with pytest.raises(ValueError, match="does not exist") as error:
            Document.of(["what is it?", name])
        assert "\n" not in str(error.value) and "Segment(text=" in str(error.value)
    with pytest.raises(ValueError, match="is an address, not a file"):
        Document.of("https://example.com/cat.png")
    (tmp_path / "red dog").write_bytes(b"no picture")
    for words in (
        "red dog",
        "two apples",
        "a cat.png.",
        "a cat.png\n",
        "save\nit.png",
        ".png",
        "the ending .png",
        "v1.5",
        "",
    ):
        assert Document.of([words, "a"]).segments[0].text == words
    assert Document.of(Segment(text="a cat.png")).segments[0].text == "a cat.png"
    assert is_image_path("x.PNG") and not is_image_path("x.pdf") and not is_image_path("png")


def test_pixels_and_codes_are_told_apart() -> None:
    for codes in (torch.zeros(2, 2, dtype=torch.int64), torch.arange(4)):
        assert Document.of([codes, "a"]).segments[0].image is codes
    for pixels in (torch.zeros(3, 8, 8), torch.zeros(8, 8, dtype=torch.uint8), torch.zeros(8, 8, 3, dtype=torch.uint8)):
        assert isinstance(Document.of([pixels, "a"]).segments[0].image, Image.Image)
        assert isinstance(Segment(image=pixels).image, Image.Image)
    assert isinstance(Document.of(file_of(scene(), "PNG")).segments[0].image, Image.Image)
    with pytest.raises(ValueError, match="not float"):
        Document.of(["a", 2.5])


def test_every_method_takes_every_kind_of_picture(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turned file, by its name, as a path, as bytes, opened, as PIL, array or tensor, is one and the same picture."""
    monkeypatch.chdir(tmp_path)
    upright = scene().resize((24, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(STORED[6]).save("a.png", exif=exif)
    layer((0, 0, 0, 0), (255, 255, 255, 255)).resize((24, 16), Image.Resampling.NEAREST).save("mask.png")
    values = np.asarray(upright)
    kinds: list[Any] = ["a.png", Path("a.png"), Path("a.png").read_bytes(), Image.open("a.png"), values / 255]
    kinds += [torch.from_numpy(values.copy()).permute(2, 0, 1)]
    calls: dict[str, Callable[[Any], Any]] = {
        "describe": lambda x: engine.describe(x, candidates=1, max_tokens=4),
        "question": lambda x: engine.describe(x, "how many?", max_tokens=4),
        "generate": lambda x: engine.generate([x, "a dog"], max_tokens=4),
        "batch": lambda x: engine.generate_batch([[x, "a dog"], x])[0],
        "stream": lambda x: list(engine.stream([x, "a dog"], "image"))[0],
        "edit": lambda x: engine.edit(x, "a dog"),
        "inpaint": lambda x: engine.inpaint(x, "a dog", "mask.png", steps=2),
        "pair": lambda x: engine.generate_joint(image=x)[1],
    }
    for name, call in calls.items():
        wanted = call(upright)
        for kind in kinds:
            made = call(kind)
            same = made == wanted if isinstance(made, str) else difference(read_image(made), read_image(wanted)) == 0
            assert same, (name, type(kind))
        with pytest.raises(ValueError, match=r"image none.png does not exist"):
            call("none.png")
    lying = upright.transpose(STORED[6])
    assert any(difference(calls[name](lying), calls[name](upright)) for name in ("generate", "edit", "inpaint"))
    drawn = engine.edit(upright, "none.png"), engine.generate([upright, Segment(text="none.png")])
    assert difference(drawn[0], drawn[1]) == 0  # an instruction is words, whatever it ends in
