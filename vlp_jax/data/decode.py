"""JPEG and PNG bytes to a square uint8 picture; everything else an image needs is done on device.

The header is read first, by code that trusts nothing in it, so that an absurd size is refused
before a byte is decoded. JPEGs go to libjpeg-turbo through ``simplejpeg``, shrunk by eighths
in the transform domain (DCT scaling) to the last size not below the one wanted: of the
decoders that notice a truncated file it measured fastest (``python -m tools.bench_decode``).
Pillow decodes PNGs and the rare CMYK JPEG, whose ink polarity it knows.
"""

import dataclasses
import io
import struct
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from vlp_jax.data.source import BadExample

MAX_SIDE = 12_000  # pixels
MAX_PIXELS = 64_000_000

# Pictures are decoded side by side by the loader; OpenCV's own threads would only get in the way.
cv2.setNumThreads(1)

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_NO_LENGTH = {0x01, *range(0xD0, 0xDA)}  # JPEG markers that no segment follows
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # start of frame, of any coding
_START_OF_SCAN = 0xDA
_APP1 = 0xE1
_END_OF_IMAGE = b"\xff\xd9"
_ORIENTATION = 0x0112  # EXIF tag

# EXIF orientation (CIPA DC-008, tag 0x0112) -> what makes the picture upright.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of its picture.

    Attributes:
        format: ``JPEG`` or ``PNG``.
        width: pixels, before orientation.
        height: pixels, before orientation.
        channels: colour components of a JPEG (1 grey, 3 colour, 4 CMYK); 0 for a PNG.
        orientation: EXIF orientation, 1 (upright) to 8.
    """

    format: str
    width: int
    height: int
    channels: int
    orientation: int


def decode_image(
    data: bytes,
    size: int,
    where: str,
    max_side: int = MAX_SIDE,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Decodes, resizes the short side to ``size`` and crops the centre.

    Grey, palette and CMYK pictures become RGB, transparent pixels white, 16-bit samples 8-bit,
    and the EXIF orientation of a JPEG is obeyed.

    Args:
        data: the whole JPEG or PNG file.
        size: side of the result in pixels.
        where: names the file in errors.
        max_side: longest side accepted, in pixels.
        max_pixels: largest width x height accepted.

    Returns:
        uint8 [size, size, 3] RGB, contiguous.

    Raises:
        BadExample: ``image too large``, ``truncated image``, or ``unreadable image`` (not a JPEG
            or PNG, or damaged; libjpeg's warnings count as damage).
    """
    header = read_header(data, where)
    if max(header.width, header.height) > max_side or header.width * header.height > max_pixels:
        raise BadExample("image too large", f"{where} ({header.width} x {header.height} px)")
    if header.format == "JPEG" and header.channels in (1, 3):
        pixels = _decode_jpeg(data, size, where)
    else:
        pixels = _decode_with_pillow(data, header, where)
    square = resize_centre(pixels, size)
    if header.orientation in _UPRIGHT:
        square = _UPRIGHT[header.orientation](square)
    return np.ascontiguousarray(square)


def resize_centre(pixels: np.ndarray, size: int) -> np.ndarray:
    """The centre square of uint8 [H, W, 3], resized to [size, size, 3] without aliasing.

    By pixel area to shrink, bicubically to enlarge. To shrink by no more than a fifth, as is
    common after DCT scaling, bilinear is as near to Pillow's antialiased bicubic (42 dB on
    photographs) in a fifth of the time.
    """
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side]
    if side == size:
        return square
    if side < size:
        method = cv2.INTER_CUBIC
    elif side <= 1.2 * size:
        method = cv2.INTER_LINEAR
    else:
        method = cv2.INTER_AREA
    return cv2.resize(square, (size, size), interpolation=method)


def read_header(data: bytes, where: str) -> Header:
    """Format, size and orientation of a JPEG or PNG, without decoding it.

    Raises:
        BadExample: ``truncated image`` or ``unreadable image``.
    """
    try:
        if data[:2] == b"\xff\xd8":
            header = _read_jpeg_header(data)
        elif data[:8] == _PNG_SIGNATURE and data[12:16] == b"IHDR":
            width, height = struct.unpack_from(">II", data, 16)
            header = Header("PNG", width, height, channels=0, orientation=1)
        else:
            kind = "unreadable image" if data else "truncated image"
            raise BadExample(kind, f"{where} (neither JPEG nor PNG)")
    except (struct.error, IndexError) as error:
        raise BadExample("truncated image", f"{where} (ends in its header)") from error
    if header.width == 0 or header.height == 0:
        raise BadExample("unreadable image", f"{where} (no pixels)")
    return header


def _read_jpeg_header(data: bytes) -> Header:
    """Walks the segments (ITU T.81, annex B) up to the frame header; IndexError at the end."""
    orientation, place = 1, 2
    while True:
        place = data.find(b"\xff", place)
        if place < 0:
            raise IndexError("no frame")
        while data[place] == 0xFF:  # fill bytes may come before a marker
            place += 1
        marker, place = data[place], place + 1
        if marker in _NO_LENGTH or marker == 0:
            continue
        (length,) = struct.unpack_from(">H", data, place)
        if marker in _FRAMES:
            height, width, channels = struct.unpack_from(">HHB", data, place + 3)
            return Header("JPEG", width, height, channels, orientation)
        if marker == _START_OF_SCAN:
            raise IndexError("a scan before any frame")
        if marker == _APP1 and data[place + 2 : place + 8] == b"Exif\x00\x00":
            orientation = _read_orientation(data[place + 8 : place + length])
        place += length


def _read_orientation(exif: bytes) -> int:
    """The orientation tag of a TIFF header and its first directory; 1 if absent or damaged."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, directory)
        for entry in range(entries):
            tag, _, _, value = struct.unpack_from(order + "HHIH", exif, directory + 2 + 12 * entry)
            if tag == _ORIENTATION:
                return value
    except struct.error:  # pictures with damaged metadata are still pictures
        return 1
    return 1


def _decode_jpeg(data: bytes, size: int, where: str) -> np.ndarray:
    try:
        return simplejpeg.decode_jpeg(data, "RGB", min_height=size, min_width=size, min_factor=1)
    except ValueError as error:
        ends_early = "premature" in str(error).lower() or _END_OF_IMAGE not in data
        kind = "truncated image" if ends_early else "unreadable image"
        raise BadExample(kind, f"{where} ({error})") from error


def _decode_with_pillow(data: bytes, header: Header, where: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=(header.format,)) as image:
            if image.size != (
                header.width,
                header.height,
            ):  # a second header, to get past the first
                raise ValueError("two headers")
            image.load()
            return np.asarray(_to_rgb(image))
    except Exception as error:  # of damaged files, Pillow raises what it happens on
        kind = "truncated image" if "truncated" in str(error).lower() else "unreadable image"
        raise BadExample(kind, f"{where} ({error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
