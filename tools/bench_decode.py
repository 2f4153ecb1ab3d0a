"""Compares JPEG decoders on real photographs: images per second on one core.

    python -m tools.bench_decode --root=../shared/data [--split=train] [--images=200] [--repeats=5]

Prints two tables, one of the files as they are and one of 640 x 480 mosaics of them (the size of
COCO's photographs, encoded at quality 90), at 64, 224 and 288 px. Every decoder is followed by the
same centre crop and resize, on one thread; a figure is the median over the repeats, in CPU time. A
decoder can be used only if it notices a file that ends early. `ours` is what the loader calls,
header checks included.
"""

import io
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import rich.console
import rich.table
import simplejpeg
from absl import app, flags
from PIL import Image

from vlp_jax.data.decode import decode_image, resize_centre
from vlp_jax.data.folder import Folder
from vlp_jax.data.source import BadExample
from vlp_jax.infra.command import bad_input, parse_flags

ROOT = flags.DEFINE_string("root", "../shared/data", "Folder with images and annotations.")
SPLIT = flags.DEFINE_string("split", "train", "Split to read.")
IMAGES = flags.DEFINE_integer("images", 200, "How many images to decode.", lower_bound=9)
REPEATS = flags.DEFINE_integer("repeats", 5, "Repeats to take the median of.", lower_bound=1)

SIZES = (64, 224, 288)
MOSAIC = (480, 640)

Decoder = Callable[[bytes, int], np.ndarray]


def _simplejpeg(**options: Any) -> Decoder:
    return lambda data, size: simplejpeg.decode_jpeg(data, "RGB", **options)


def _simplejpeg_scaled(**options: Any) -> Decoder:
    return lambda data, size: simplejpeg.decode_jpeg(
        data, "RGB", min_height=size, min_width=size, min_factor=1, **options
    )


def _opencv(data: bytes, size: int) -> np.ndarray:
    del size
    return _opencv_as(data, cv2.IMREAD_COLOR_RGB)


def _opencv_reduced(data: bytes, size: int) -> np.ndarray:
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    shrink = min(height, width) // size
    flag = cv2.IMREAD_COLOR_RGB
    if shrink >= 2:
        flag = {
            2: cv2.IMREAD_REDUCED_COLOR_2,
            4: cv2.IMREAD_REDUCED_COLOR_4,
            8: cv2.IMREAD_REDUCED_COLOR_8,
        }[1 << min(3, shrink.bit_length() - 1)]
        return cv2.cvtColor(_opencv_as(data, flag), cv2.COLOR_BGR2RGB)
    return _opencv_as(data, flag)


def _opencv_as(data: bytes, flag: int) -> np.ndarray:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    if pixels is None:
        raise ValueError("not decoded")
    return pixels


def _pillow(data: bytes, size: int) -> np.ndarray:
    del size
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def _pillow_draft(data: bytes, size: int) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (size, size))
        return np.asarray(image.convert("RGB"))


DECODERS: dict[str, Decoder] = {
    "simplejpeg": _simplejpeg(),
    "simplejpeg, scaled": _simplejpeg_scaled(),
    "simplejpeg, scaled, fast DCT": _simplejpeg_scaled(fastdct=True, fastupsample=True),
    "OpenCV": _opencv,
    "OpenCV, reduced": _opencv_reduced,
    "Pillow": _pillow,
    "Pillow, draft": _pillow_draft,
}


def images_per_second(
    decoders: Mapping[str, Decoder], files: Sequence[bytes], size: int, repeats: int
) -> dict[str, float]:
    """Median over ``repeats`` passes through ``files``, in CPU time of the calling thread.

    The decoders take turns, so that a machine that slows down is not held against one of them.
    """
    rates: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(repeats):
        for name, decode in decoders.items():
            start = time.thread_time()
            for data in files:
                decode(data, size)
            rates[name].append(len(files) / (time.thread_time() - start))
    return {name: statistics.median(rates[name]) for name in decoders}


def notices_truncation(decode: Decoder, files: Sequence[bytes], size: int) -> bool:
    """Whether every file cut at two thirds makes the decoder raise."""
    for data in files:
        try:
            decode(data[: len(data) * 2 // 3], size)
        except (ValueError, OSError, BadExample):
            continue
        return False
    return True


def mosaics(files: Sequence[bytes], count: int) -> list[bytes]:
    """``count`` JPEGs of 640 x 480 px, each of nine pictures at their own resolution.

    Enlarging the pictures instead would leave little detail, and make decoding look too fast.
    """
    result = []
    for index in range(count):
        tiles = [
            resize_centre(
                simplejpeg.decode_jpeg(files[(index * 9 + tile) % len(files)], "RGB"), 224
            )
            for tile in range(9)
        ]
        rows = [np.concatenate(tiles[row : row + 3], axis=1) for row in (0, 3, 6)]
        picture = np.concatenate(rows)[: MOSAIC[0], : MOSAIC[1]]
        result.append(
            simplejpeg.encode_jpeg(
                np.ascontiguousarray(picture), quality=90, colorsubsampling="420"
            )
        )
    return result


def _finished(decode: Decoder) -> Decoder:
    """The decoder, followed by crop and resize."""
    return lambda data, size: resize_centre(decode(data, size), size)


def _table(title: str, files: Sequence[bytes], repeats: int) -> rich.table.Table:
    mean_kib = sum(map(len, files)) / len(files) / 1024
    table = rich.table.Table(
        title=f"{title}: {len(files)} files of {mean_kib:.0f} KiB; images/s on one core"
    )
    table.add_column("decoder")
    for size in SIZES:
        table.add_column(f"{size} px", justify="right")
    table.add_column("notices truncation")
    candidates = {name: _finished(decode) for name, decode in DECODERS.items()}
    candidates["ours"] = lambda data, size: decode_image(data, size, "bench")
    rates = [images_per_second(candidates, files, size, repeats) for size in SIZES]
    for name, decode in candidates.items():
        raises = notices_truncation(decode, files[:20], SIZES[-1])
        table.add_row(name, *(f"{rate[name]:,.0f}" for rate in rates), "yes" if raises else "no")
    return table


def read_files(root: str, split: str, images: int) -> list[bytes]:
    """The JPEG files among the first images of a split.

    Args:
        root: folder with images and annotations.
        split: of it.
        images: how many to look at.

    Raises:
        ValueError, OSError: there is none, or one is damaged; the message names it.
    """
    try:
        folder = Folder(root, split, key="--root")
    except ValueError as error:
        raise ValueError(f"--root={root}, --split={split}: {error}") from error
    count = min(images, folder.num_records)
    paths = [
        path for path in map(folder.path, range(count)) if path.suffix.lower() in (".jpg", ".jpeg")
    ]
    if not paths:
        raise ValueError(
            f"--root={root}: none of the first {count} images of split {split!r} is a JPEG file; "
            "give a folder of photographs, or another --split"
        )
    files = [path.read_bytes() for path in paths]
    for path, data in zip(paths, files, strict=True):
        try:
            decode_image(data, SIZES[0], str(path))
        except BadExample as bad:
            raise ValueError(f"{bad.kind}: {bad.where}; mend or remove the file") from bad
    return files


def main(argv: Sequence[str]) -> None:
    """Prints the tables."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    with bad_input():
        files = read_files(ROOT.value, SPLIT.value, IMAGES.value)
    console = rich.console.Console()
    console.print(_table("Files as they are", files, REPEATS.value))
    console.print(_table("640 x 480 mosaics", mosaics(files, len(files)), REPEATS.value))


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
