"""Splits by a hash of each record, which is in the same one whatever records come or go."""

import hashlib
from collections.abc import Mapping

from vlp_jax.infra.errors import ConfigError

SPLITS = ("train", "val", "test")


def split_of(data: bytes, held_out: Mapping[str, float]) -> str:
    """The split of a record.

    Args:
        data: what it is known by; equal ones are in one split.
        held_out: percent of the records in ``val`` and in ``test``.
    """
    place = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") / (1 << 64) * 100.0
    for split in ("test", "val"):  # so that the test set stays when `val` is made larger
        if place < held_out[split]:
            return split
        place -= held_out[split]
    return "train"


def check_shares(held_out: Mapping[str, float], section: str) -> None:
    """Refuse shares that are none, or leave no training record.

    Args:
        held_out: percent of the records in ``val`` and in ``test``.
        section: of the source in the config.

    Raises:
        ConfigError: names the key and the remedy.
    """
    for split, percent in held_out.items():
        if not 0.0 <= percent < 100.0:
            raise ConfigError(
                f"{section}.{split}_percent",
                f"{percent}",
                "Use a share of at least 0 and below 100",
            )
    if sum(held_out.values()) >= 100.0:
        raise ConfigError(
            f"{section}.val_percent",
            f"{held_out['val']} and test_percent={held_out['test']} leave nothing to train on",
            "Lower them to below 100 together",
        )
