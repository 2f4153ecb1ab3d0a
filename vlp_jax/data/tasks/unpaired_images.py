"""Images without texts: all pictures below a folder.

    UnpairedImages("/data/photographs", split="train")   # whatever folders they lie in
    UnpairedImages("/data/imagenet", split="val")        # those below val/, as there is a train/

Where the folder has a folder ``train``, splits are folders; else a hash of each picture's path
makes them, which stays the same whatever pictures come or go.

Every picture has one text, the word ``picture``, for batches whose objectives read none.
"""

import os
import pathlib

from vlp_jax.data.decode import MAX_PIXELS, MAX_SIDE
from vlp_jax.data.hashed_splits import SPLITS, check_shares, split_of
from vlp_jax.data.source import CaptionsOnly
from vlp_jax.data.tasks.annotated import AnnotatedImages, Example
from vlp_jax.data.tasks.columns import Columns
from vlp_jax.data.tasks.image_labels import SUFFIXES, pictures_below, split_folder
from vlp_jax.infra.errors import ConfigError

TEXT = "picture"


class UnpairedImages(CaptionsOnly, AnnotatedImages):
    """Pictures alone: a ``Source`` of one split."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        *,
        val_percent: float = 1.0,
        test_percent: float = 1.0,
        name: str = "images",
        key: str = "data.root",
        max_side: int = MAX_SIDE,
        max_pixels: int = MAX_PIXELS,
    ):
        """Lists the folder; opens no picture.

        Args:
            root: the folder.
            split: ``train``, ``val`` or ``test``.
            val_percent: share of the pictures that is split ``val``, where a hash makes splits.
            test_percent: share of the pictures that is split ``test``, where a hash makes splits.
            name: of the source.
            key: config key of ``root``, for messages.
            max_side: longest side of an image, in pixels, that is decoded.
            max_pixels: largest width x height that is decoded.

        Raises:
            ConfigError: an argument cannot be used, or there is no such folder or no picture.
        """
        section, folder = key.rpartition(".")[0], pathlib.Path(root)
        held_out = {"val": val_percent, "test": test_percent}
        if split not in SPLITS:
            raise ConfigError(f"{section}.split", f"{split!r}", f"Use one of {', '.join(SPLITS)}")
        check_shares(held_out, section)
        if not folder.is_dir():
            raise ConfigError(key, f"{folder} is no folder", "Point it at a folder of pictures")
        by_folders = (folder / "train").is_dir()
        below = split_folder(folder, split) if by_folders else folder
        paths = [] if below is None else pictures_below(below)
        names = [path.relative_to(folder).as_posix() for path in paths]
        mine = [n for n in names if by_folders or split_of(os.fsencode(n), held_out) == split]
        if not mine:
            there = f"of {len(names)} below {folder}" if names else f"below {below or folder}"
            raise ConfigError(
                key,
                f"no picture of split {split!r} {there}",
                f"Put some there ({', '.join(sorted(SUFFIXES))})"
                + ("" if by_folders else f", or raise {section}.{split}_percent"),
            )
        super().__init__(
            folder,
            [Example(((n,),), split, TEXT, True) for n in mine],
            split,
            folder,
            name=name,
            what="picture",
            missing_images="error",
            columns=Columns((), f"{section}.groups"),
            max_side=max_side,
            max_pixels=max_pixels,
        )
