"""From a section of a config to a source."""

import collections
import hashlib
import inspect
import pathlib
from collections.abc import Mapping

from ml_collections import ConfigDict

from vlp_jax.data.cache import ImageCache, original
from vlp_jax.data.folder import Folder
from vlp_jax.data.scenes import (
    Scenes,
    ScenesEntailment,
    ScenesLabels,
    ScenesNLVR2,
    ScenesVQA,
)
from vlp_jax.data.source import Source, has_pictures
from vlp_jax.data.tasks import (
    GLUE,
    NLVR2,
    VQA,
    ImageLabels,
    UnpairedImages,
    VisualEntailment,
)
from vlp_jax.data.tasks.annotated import AnnotatedImages
from vlp_jax.data.texts import Texts
from vlp_jax.data.worse_labels import with_worse_labels
from vlp_jax.infra.errors import ConfigError, section_arguments

SOURCES: Mapping[str, type] = {
    "scenes": Scenes,
    "scenes_vqa": ScenesVQA,
    "scenes_nlvr2": ScenesNLVR2,
    "scenes_entailment": ScenesEntailment,
    "scenes_labels": ScenesLabels,
    "folder": Folder,
    "vqa": VQA,
    "nlvr2": NLVR2,
    "visual_entailment": VisualEntailment,
    "image_labels": ImageLabels,
    "unpaired_images": UnpairedImages,
    "glue": GLUE,
    "texts": Texts,
}
# Keys of a source's section that are read here and not by the source.
_WORSE = ("label_noise", "imbalance")
_RESERVED = ("type", "weight", "split", "cache", "batch", *_WORSE)


def build_source(
    config: ConfigDict, name: str, split: str | None = None, num_records: int | None = None
) -> Source:
    """A source of ``config.data.sources``.

    A section with ``cache`` keeps its pictures and extra fields in memory, or in files of
    ``data.cache_dir`` that runs share; ``data.cache_workers`` processes make them. Labels are made
    worse (``label_noise``, ``imbalance``) on the way out of these, and of the section's own split
    alone.

    Args:
        config: of the run.
        name: of the source.
        split: in place of the section's own; a section without one means ``train``.
        num_records: for another split, how many records are wanted of a source that can make any
            number; the section's ``num_records`` belongs to its own split.

    Raises:
        ConfigError: no such source, or a key it does not take.
        ValueError: from the source, naming the key or the file.
    """
    path = f"data.sources.{name}"
    if name not in config.data.sources:
        raise ConfigError(path, "no such source", f"There are {sorted(config.data.sources)}")
    section = config.data.sources[name]
    kind = section.get("type", name)
    if kind not in SOURCES:
        raise ConfigError(f"{path}.type", f"{kind!r} is no source", f"Use one of {sorted(SOURCES)}")
    parameters = inspect.signature(SOURCES[kind]).parameters
    known = [name for name in parameters if name not in ("name", "key")]
    arguments = section_arguments(section, path, known, _RESERVED)
    for key in known:
        missing = parameters[key].default is inspect.Parameter.empty and key != "split"
        if missing and not arguments.get(key):
            raise ConfigError(f"{path}.{key}", "missing", "Add it")
    own_split = section.get("split", "train")
    if split not in (None, own_split) and "num_records" in known:
        arguments["num_records"] = num_records
    if "key" in parameters:
        arguments["key"] = f"{path}.root"
    source = SOURCES[kind](split=split or own_split, name=name, **arguments)
    if section.get("cache", False) and not has_pictures(source):
        raise ConfigError(f"{path}.cache", f"{kind!r} has no pictures to keep", "Remove it")
    if section.get("cache", False) and source.num_records is not None:
        source = ImageCache(
            source,
            config.data.image_size,
            path=_cache_path(config, source),
            workers=config.data.cache_workers,
        )
    if split not in (None, own_split):
        return source
    worse = {key: section[key] for key in _WORSE if key in section}
    return with_worse_labels(source, path, **worse)


def bad_captions(sources: Mapping[str, Source]) -> dict[str, collections.Counter[str]]:
    """Captions, by kind, that each source left out when it read its annotations; if it did."""
    found = {}
    for name, source in sources.items():
        read = original(source)
        if isinstance(read, Folder | AnnotatedImages | GLUE | Texts) and read.bad_captions:
            found[name] = read.bad_captions
    return found


def missing_images(sources: Mapping[str, Source]) -> int:
    """Images that annotations name and that are not there, where ``missing_images`` is ``skip``."""
    count = 0
    for source in sources.values():
        read = original(source)
        if isinstance(read, Folder | AnnotatedImages):
            count += read.num_missing
    return count


def _cache_path(config: ConfigDict, source: Source) -> pathlib.Path | None:
    """Where the pictures are kept, those of every set in a file of their own; None: in memory."""
    if not config.data.cache_dir:
        return None
    identity = getattr(source, "identity", None)
    text = f"{identity} {source.num_records} {config.data.image_size}"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return pathlib.Path(config.data.cache_dir) / f"{source.name}-{digest[:12]}.npy"
