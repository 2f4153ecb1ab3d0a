import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageDraw

from vlp_jax.data.decode import decode_image, read_header
from vlp_jax.data.source import BadExample


def picture(width=320, height=200):
    """A red upper left corner, a green lower right one, and a smooth blue slope between."""
    slope = np.linspace(0, 255, width, dtype=np.uint8)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 2] = slope
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width // 2, height // 2), fill="red")
    draw.rectangle((width // 2, height // 2, width, height), fill=(0, 255, 0))
    return image


def encoded(image, format="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **({"quality": 95} if format == "JPEG" else {}), **options)
    return stream.getvalue()


def png_chunk(kind, content):
    return (
        struct.pack(">I", len(content)) + kind + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )  # fmt: skip


def png_header(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)


def assert_bad(data, kind, **limits):
    with pytest.raises(BadExample, match="some/file") as caught:
        decode_image(data, 32, "some/file.jpg", **limits)
    assert caught.value.kind == kind


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [16, 64, 100, 288])
def test_resized_and_cropped_like_pillow(format, size):
    image = picture()
    got = decode_image(encoded(image, format), size, "x")
    assert got.shape == (size, size, 3)
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous
    cropped = image.crop((60, 0, 260, 200)).resize((size, size), Image.Resampling.BOX)
    difference = np.abs(got.astype(int) - np.asarray(cropped).astype(int))
    assert difference.mean() < 6  # an edge between two pixels is drawn differently


def test_shrinking_averages():
    noise = np.random.default_rng(0).integers(0, 2, (512, 512, 1)) * np.full(3, 255)
    got = decode_image(encoded(Image.fromarray(noise.astype(np.uint8)), "PNG"), 32, "x")
    assert np.abs(got.astype(int) - 127).max() < 48  # picking pixels would give 0 and 255


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA", "RGBA", "I;16"])
def test_other_modes_become_rgb(mode):
    image = picture().convert("L") if mode == "I;16" else picture().convert(mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    expected = picture().convert(mode if mode in ("L", "1", "P") else "RGB").convert("RGB")
    if mode in ("LA", "I;16"):
        expected = picture().convert("L").convert("RGB")
    got = decode_image(encoded(image, "JPEG" if mode in ("L", "CMYK") else "PNG"), 200, "x")
    expected = np.asarray(expected.crop((60, 0, 260, 200)))
    assert np.abs(got.astype(int) - expected.astype(int)).mean() < 6


def test_transparency_becomes_white():
    image = picture().convert("RGBA")
    image.putalpha(0)
    assert (decode_image(encoded(image, "PNG"), 32, "x") == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_obeyed(orientation):
    upright = picture(200, 200)
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    stored = upright if inverse is None else upright.transpose(inverse)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, exif=exif)
    assert read_header(data, "x").orientation == orientation
    got = decode_image(data, 50, "x").astype(int)
    expected = np.asarray(upright.resize((50, 50), Image.Resampling.BOX)).astype(int)
    assert np.abs(got - expected).mean() < 5


def test_damaged_exif_is_ignored():
    data = encoded(picture(), exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f")
    assert decode_image(data, 16, "x").shape == (16, 16, 3)


@pytest.mark.parametrize("progressive", [False, True])
def test_headers(progressive):
    header = read_header(encoded(picture(), progressive=progressive), "x")
    assert (header.format, header.width, header.height, header.channels) == ("JPEG", 320, 200, 3)
    assert read_header(encoded(picture().convert("L")), "x").channels == 1
    header = read_header(encoded(picture(), "PNG"), "x")
    assert (header.format, header.width, header.height) == ("PNG", 320, 200)


def test_truncated_files_are_bad():
    for format in ("JPEG", "PNG"):
        data = encoded(picture(), format)
        for end in (1, 9, 20, len(data) // 3, len(data) * 2 // 3):
            with pytest.raises(BadExample) as caught:
                decode_image(data[:end], 32, "x")
            if end > 200:
                assert caught.value.kind == "truncated image", (format, end, str(caught.value))
    assert_bad(encoded(picture())[:-100], "truncated image")
    assert_bad(encoded(picture().convert("CMYK"))[:-100], "truncated image")
    assert_bad(b"", "truncated image")


def test_no_damage_gets_past_as_another_error():
    rng = np.random.default_rng(0)
    for format in ("JPEG", "PNG"):
        whole = np.frombuffer(encoded(picture(), format), np.uint8)
        for _ in range(100):
            data = whole.copy()
            places = rng.integers(0, min(len(data), 700), 3)
            data[places] = rng.integers(0, 256, 3)
            try:
                decode_image(data.tobytes(), 32, "x")
            except BadExample:
                continue


def test_garbage_is_bad():
    assert_bad(b"GIF89a" + bytes(100), "unreadable image")
    assert_bad(b"\xff\xd8" + bytes(100), "truncated image")
    assert_bad(b"\xff\xd8\xff\xda\x00\x02", "truncated image")
    data = bytearray(encoded(picture()))
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(range(200, 240))
    assert_bad(bytes(data), "unreadable image")
    assert_bad(png_header(0, 10), "unreadable image")


def test_absurd_sizes_are_refused_before_decoding(monkeypatch):
    def refuse(*_, **__):
        pytest.fail("decoded")

    jpeg = bytearray(encoded(picture()))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 20_000, 20_000)
    with monkeypatch.context() as patch:
        patch.setattr(simplejpeg, "decode_jpeg", refuse)
        patch.setattr(Image, "open", refuse)
        assert_bad(bytes(jpeg), "image too large")
        assert_bad(png_header(20_000, 20_000), "image too large")
        assert_bad(png_header(20_000, 1), "image too large")  # a side
        assert_bad(png_header(9_000, 9_000), "image too large")  # an area
        assert_bad(encoded(picture(), "PNG"), "image too large", max_side=300)
        assert_bad(encoded(picture()), "image too large", max_pixels=320 * 200 - 1)
    decode_image(encoded(picture()), 32, "x", max_pixels=320 * 200, max_side=320)


def test_a_second_header_does_not_get_a_bomb_past_the_first():
    data = png_header(10, 10) + png_header(11_000, 5_000)[8:]
    data += png_chunk(b"IDAT", zlib.compress(bytes(100))) + png_chunk(b"IEND", b"")
    assert_bad(data, "unreadable image")
