"""The device mesh, and how a batch of host rows becomes global arrays on it.

Three named axes: ``data`` (replicas), ``fsdp`` (replicas that share one copy of the parameters) and
``model`` (tensor parallelism, of which no rule makes use yet). The batch is split over the first
two. All axes are of the Auto type: the compiler places what the annotations leave open.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlp_jax.infra.errors import ConfigError

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    model: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Arrange the devices along (data, fsdp, model).

    Args:
        data: size of the data axis; -1 in any one axis means all devices that the others leave.
        fsdp: devices that share one copy of the parameters and of the optimiser state.
        model: devices that share one row of the batch.
        devices: the devices to use; all of them by default.

    Returns:
        A mesh of Auto axes. The order of the devices follows the interconnect.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "model": model}
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise ConfigError(
                f"mesh.{name}",
                f"{size} is no axis size",
                "Use a positive number, or -1 for the rest",
            )
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ConfigError(
            f"mesh.{open_axes[1]}",
            f"only one axis can take the rest, but {' and '.join(open_axes)} are both -1",
            "Give one of them a size",
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and len(devices) % fixed == 0:
        sizes[open_axes[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        asked = " x ".join(f"{name}={size}" for name, size in sizes.items())
        # The axis to blame is the largest that the user has fixed.
        blamed = max((name for name in AXES if sizes[name] != -1), key=lambda name: sizes[name])
        raise ConfigError(
            f"mesh.{blamed}",
            f"{asked} does not fit {len(devices)} devices",
            f"Choose sizes whose product is {len(devices)}, or -1 for one axis and a product "
            f"of the others that divides {len(devices)}",
        )
    return jax.make_mesh(
        tuple(sizes[name] for name in AXES),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=devices,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over (data, fsdp), every other dimension whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Number of pieces into which the rows of a batch are cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch_size(
    mesh: Mesh, batch_size: int, accumulation: int = 1, key: str = "data.batch_size"
) -> None:
    """Refuse a global batch that does not fill every device with equal micro-batches.

    Args:
        mesh: the mesh of the run.
        batch_size: rows of one global batch.
        accumulation: micro-batches in one update.
        key: of the config, where the size is said.

    Raises:
        ConfigError: names the key, the devices, and the nearest sizes that fit.
    """
    unit = batch_shards(mesh) * accumulation
    if batch_size > 0 and batch_size % unit == 0:
        return
    below, above = batch_size // unit * unit, (batch_size // unit + 1) * unit
    fitting = f"{below} or {above}" if below > 0 else f"{max(above, unit)}"
    micro = f" in {accumulation} micro-batches" if accumulation > 1 else ""
    raise ConfigError(
        key,
        f"{batch_size} rows cannot be shared equally{micro} by the {batch_shards(mesh)} devices "
        f"along {' x '.join(f'{axis}={mesh.shape[axis]}' for axis in BATCH_AXES)}",
        f"Use a multiple of {unit}, such as {fitting}",
    )


def host_rows(mesh: Mesh, batch_size: int) -> slice:
    """The contiguous rows of a global batch that this process must read.

    Processes that share rows (a model axis that spans hosts) get the same slice.

    Args:
        mesh: the mesh of the run.
        batch_size: rows of one global batch, as ``check_batch_size`` admits it.

    Raises:
        ConfigError: the mesh scatters the rows of this process over the batch.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    spans = sorted({index[0].indices(batch_size)[:2] for index in indices if index})
    if any(stop != start for (_, stop), (start, _) in itertools.pairwise(spans)):
        raise ConfigError(
            "mesh.data",
            f"process {jax.process_index()} would hold the scattered rows {spans}",
            "Order the axes so that each process holds neighbouring devices of the batch axes",
        )
    return slice(spans[0][0], spans[-1][1])


def global_batch(host_batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Put this process's rows of every array on its devices; explicit transfers only.

    Args:
        host_batch: name -> array [rows of this process, ...], in the order of ``host_rows``.
        mesh: the mesh of the run.

    Returns:
        name -> global array [B, ...], sharded by ``batch_sharding``.
    """
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows)
        for name, rows in host_batch.items()
    }
