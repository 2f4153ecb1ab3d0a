"""Weight files: safetensors and npz read, safetensors written, pickles refused.

A parameter file of this project is a safetensors file whose names are the paths of the parameter
tree (``image_tower/block_00/mlp/in/kernel``), with the config, the tokenizer, the step and the
metrics in its metadata. It may hold a part of a model: what was imported, for instance.
"""

import dataclasses
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from vlp_jax.infra.errors import ConfigError
from vlp_jax.version import __version__

# Name of the weights in a folder: as Hugging Face stores a model, and as this project exports one.
WEIGHTS_FILE = "model.safetensors"
# Which file of a folder holds which tensor, where a large model is stored in several.
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
SETTINGS_FILES = ("config.json", "preprocessor_config.json")

_FORMAT_KEY, _FORMAT = "vlp_jax_parameters", "1"
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


class WeightsError(ValueError):
    """A weight file that cannot be used; the message names the file, the problem, the remedy."""

    def __init__(self, file: str | os.PathLike[str], problem: str, remedy: str) -> None:
        super().__init__(f"{os.fspath(file)}: {problem}. {remedy}.")
        self.problem, self.remedy = problem, remedy


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a public checkpoint holds.

    Attributes:
        file: it was read from.
        arrays: public name -> array, as stored.
        settings: ``config.json`` updated with ``preprocessor_config.json`` where a folder was read
            that has them; else empty.
    """

    file: pathlib.Path
    arrays: dict[str, np.ndarray]
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a parameter file says of itself.

    Attributes:
        config: of the run or of the import, as JSON holds it.
        tokenizer: ``tokenizer.json`` as text; empty in a file without text parameters.
        step: updates that made the parameters; None for imported ones.
        metrics: evaluated for these very parameters; empty where none were.
        sources: what the parameters were made of: part -> file name, or the name of the run.
        base: of tunables alone, what they were made on, as ``train.base`` tells it; else empty.
    """

    config: dict[str, Any]
    tokenizer: str
    step: int | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    base: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_strings(self) -> dict[str, str]:
        """As safetensors holds metadata."""
        fields = {key: json.dumps(value) for key, value in dataclasses.asdict(self).items()}
        return {_FORMAT_KEY: _FORMAT, "version": __version__, **fields}

    @classmethod
    def from_strings(cls, strings: Mapping[str, str]) -> "Metadata":
        """Inverse of ``to_strings``."""
        told = {"base": "{}", **strings}  # which earlier files do not say: they are whole
        return cls(**{f.name: json.loads(told[f.name]) for f in dataclasses.fields(cls)})


def read_weights(path: str | os.PathLike[str]) -> Weights:
    """Read a public checkpoint.

    Args:
        path: a ``.safetensors`` or ``.npz`` file; or a folder as Hugging Face stores a model, with
            ``model.safetensors``, or several files and their index, and, if there, the JSON files
            of its settings.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it is a pickle, of an unknown kind, or damaged; or one of several is missing.
    """
    folder = pathlib.Path(path)
    whole = not (folder / INDEX_FILE).is_file() or (folder / WEIGHTS_FILE).is_file()
    file = _locate(path) if whole else folder / INDEX_FILE
    if file.suffix in _PICKLES:
        raise WeightsError(
            file,
            "a pickle, which can run any code when it is read",
            "Convert it where you trust it: safetensors.torch.save_file({name: tensor.clone() for "
            "name, tensor in torch.load(FILE, weights_only=True).items()}, 'model.safetensors'); "
            "MAE and open_clip keep their tensors one level deeper, in ['model'] or ['state_dict']",
        )
    if file.name == INDEX_FILE:
        arrays = _read_shards(file)
    elif file.suffix == ".safetensors":
        arrays = _read_safetensors(file)[0]
    elif file.suffix == ".npz":
        arrays = _read_npz(file)
    else:
        raise WeightsError(
            file, f"{file.suffix or 'no ending'!r} is no kind of weights", "Give .safetensors, .npz"
        )
    settings: dict[str, Any] = {}
    if pathlib.Path(path).is_dir():
        for name in SETTINGS_FILES:
            settings |= _read_settings(file.with_name(name))
    return Weights(file, arrays, settings)


def is_parameter_file(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file, or a folder with ``model.safetensors``, and so no run's workdir."""
    path = pathlib.Path(path)
    return path.is_file() or (path / WEIGHTS_FILE).is_file()


def load_parameters(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read the parameters of a file that ``save_parameters`` wrote.

    Args:
        path: the file, or a folder with ``model.safetensors``.

    Returns:
        Path in the parameter tree -> array, for ``merge``.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it is damaged, or not of this project.
    """
    return _read_own(path)[0]


def load_metadata(path: str | os.PathLike[str]) -> Metadata:
    """Read what a file of ``save_parameters`` says of itself; arguments as ``load_parameters``."""
    return Metadata.from_strings(_read_own(path)[1])


def save_parameters(
    path: str | os.PathLike[str], params: Mapping[str, np.ndarray], metadata: Metadata
) -> None:
    """Write a parameter file, whole or not at all.

    Args:
        path: ends in ``.safetensors``; an existing file is replaced.
        params: path in the parameter tree -> array; dtypes are kept.
        metadata: stored in the file.

    Raises:
        WeightsError: the file has another ending.
    """
    file = pathlib.Path(path)
    if file.suffix != ".safetensors":
        raise WeightsError(file, "parameters are written as safetensors", "End it in .safetensors")
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    # The library writes the buffer of an array, whatever its strides; a number stays one, which
    # np.ascontiguousarray makes a vector.
    arrays = {name: np.asarray(array, order="C") for name, array in sorted(params.items())}
    fresh.touch()
    usual = fresh.stat().st_mode
    try:
        safetensors.numpy.save_file(arrays, fresh, metadata=metadata.to_strings())
        fresh.chmod(usual)  # the library makes files that only their owner can read
        os.replace(fresh, file)
    finally:
        fresh.unlink(missing_ok=True)


def check_vocabulary(metadata: Metadata, tokenizer: str, file: str | os.PathLike[str]) -> None:
    """Compare the vocabulary that text parameters were trained with to that of a run.

    Args:
        metadata: of the parameter file; one without a tokenizer passes.
        tokenizer: of the run, ``tokenizer.json`` as text.
        file: named in the error.

    Raises:
        ConfigError: a token has another number; the first such token is named.
    """
    if not metadata.tokenizer:
        return
    theirs, ours = _tokens(metadata.tokenizer), _tokens(tokenizer)
    differing = [i for i in sorted({*theirs, *ours}) if theirs.get(i) != ours.get(i)]
    if differing:
        first = differing[0]
        raise ConfigError(
            "tokenizer.path",
            f"{os.fspath(file)} was trained with another vocabulary: {len(theirs)} tokens, not "
            f"{len(ours)}; token {first} is {theirs.get(first, 'absent')!r} there and "
            f"{ours.get(first, 'absent')!r} in this run",
            "Use the tokenizer.json that came with the weights",
        )


def _tokens(tokenizer: str) -> dict[int, str]:
    content = json.loads(tokenizer)
    tokens = {number: token for token, number in content["model"]["vocab"].items()}
    return tokens | {token["id"]: token["content"] for token in content["added_tokens"]}


def _locate(path: str | os.PathLike[str]) -> pathlib.Path:
    given = pathlib.Path(path)
    file = given / WEIGHTS_FILE if given.is_dir() else given
    if not file.is_file():
        kinds = (".safetensors", ".npz", *_PICKLES)
        others = sorted(f.name for f in given.glob("*") if f.suffix in kinds)
        raise FileNotFoundError(
            f"{file} not found; give a .safetensors or .npz file, or a folder with {WEIGHTS_FILE}"
            + (f"; there is {', '.join(others)}" if others else "")
        )
    return file


def _read_safetensors(file: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with safetensors.safe_open(file, framework="numpy") as content:
            arrays = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            return arrays, content.metadata() or {}
    except safetensors.SafetensorError as error:
        raise WeightsError(file, f"damaged ({error})", "Fetch the file again") from error


def _read_shards(index: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of all files that an index names."""
    where = _read_settings(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise WeightsError(index, "no index: it has no `weight_map`", "Fetch the file again")
    arrays: dict[str, np.ndarray] = {}
    for name in sorted(set(where.values())):
        shard = index.with_name(name)
        if not shard.is_file():
            raise WeightsError(index, f"{name}, which it names, is not there", "Fetch it as well")
        arrays |= _read_safetensors(shard)[0]
    lacking = sorted(set(where) - set(arrays))
    if lacking:
        raise WeightsError(
            index,
            f"{len(lacking)} tensors are in none of its files: {', '.join(lacking[:3])}",
            "Fetch all files again, from one revision",
        )
    return arrays


def _read_npz(file: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        # Opened here: np.load leaves a damaged file open.
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            return {name: _restored(content[name]) for name in content.files}
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise WeightsError(
            file, f"damaged, or with pickled objects inside ({error})", "Fetch the file again"
        ) from error


def _restored(array: np.ndarray) -> np.ndarray:
    """A bfloat16 array, which NumPy stores as two bytes of unknown meaning, is one again."""
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


def _read_settings(file: pathlib.Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(file, f"not JSON ({error})", "Fetch the file again") from error
    return content


def _read_own(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    file = _locate(path)
    arrays, metadata = _read_safetensors(file) if file.suffix == ".safetensors" else ({}, {})
    if metadata.get(_FORMAT_KEY) != _FORMAT:
        raise WeightsError(
            file,
            "not a parameter file of this project",
            "Make one of a public checkpoint by `python -m tools.import_weights`, or of a run by "
            "`python -m tools.export_weights`",
        )
    return arrays, metadata
