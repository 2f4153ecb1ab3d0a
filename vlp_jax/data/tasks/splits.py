"""Whether splits are clean: no picture in two of them."""

from vlp_jax.data.cache import uncached
from vlp_jax.data.source import Generated, Source


def shared_images(a: Source, b: Source) -> list[str]:
    """Keys of the pictures that both sources have, sorted; empty for clean splits.

    Pictures of different worlds are not listed: to make 20,000 scenes again takes seconds.

    Args:
        a: a bounded source.
        b: another.

    Raises:
        ValueError: a source is unbounded.
    """
    worlds = [
        source.world if isinstance(source, Generated) else None
        for source in (uncached(a), uncached(b))
    ]
    if None not in worlds and worlds[0] != worlds[1]:
        return []
    return sorted(_image_keys(a) & _image_keys(b))


def _image_keys(source: Source) -> set[str]:
    if source.num_records is None:
        raise ValueError(
            f"data.sources.{source.name}.num_records must be set: the pictures of an unbounded "
            "source cannot be listed"
        )
    return {key for record in range(source.num_records) for key in source.image_key(record)}
