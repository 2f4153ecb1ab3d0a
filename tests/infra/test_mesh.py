"""The mesh refuses what does not fit, by name, and a batch lands where the mesh says."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from vlp_jax.infra import mesh as mesh_lib
from vlp_jax.infra.errors import ConfigError


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1)),
        ({"data": 1, "fsdp": -1}, (1, 8, 1)),
        ({"data": 2, "fsdp": 2, "model": 2}, (2, 2, 2)),
    ],
)
def test_minus_one_takes_the_rest(asked, sizes):
    mesh = mesh_lib.make_mesh(**asked)
    assert tuple(mesh.shape.values()) == sizes
    assert mesh.axis_names == ("data", "fsdp", "model")
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_a_subset_of_the_devices():
    mesh = mesh_lib.make_mesh(fsdp=2, devices=jax.devices()[:4])
    assert set(mesh.devices.flat) == set(jax.devices()[:4])


@pytest.mark.parametrize(
    ("asked", "key", "remedy"),
    [
        ({"fsdp": 3}, "config.mesh.fsdp", "product is 8"),
        ({"data": 2, "fsdp": 2}, "config.mesh.data", "product is 8"),
        ({"data": 2, "model": 16}, "config.mesh.model", "product is 8"),
        ({"data": -1, "fsdp": -1}, "config.mesh.fsdp", "Give one of them a size"),
        ({"fsdp": 0}, "config.mesh.fsdp", "positive"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(asked, key, remedy):
    with pytest.raises(ConfigError, match=remedy) as error:
        mesh_lib.make_mesh(**asked)
    assert str(error.value).startswith(key)


@pytest.mark.parametrize(
    ("batch", "accumulation", "suggestion"),
    [(20, 1, "16 or 24"), (24, 2, "16 or 32"), (3, 1, "such as 8"), (0, 1, "such as 8")],
)
def test_a_batch_that_does_not_divide_is_refused(batch, accumulation, suggestion):
    mesh = mesh_lib.make_mesh(fsdp=4)
    with pytest.raises(ConfigError, match=f"8 devices.*{suggestion}") as error:
        mesh_lib.check_batch_size(mesh, batch, accumulation)
    assert error.value.key == "data.batch_size"


def test_the_model_axis_does_not_split_the_batch():
    mesh_lib.check_batch_size(mesh_lib.make_mesh(data=2, fsdp=2, model=2), 4)
    mesh_lib.check_batch_size(mesh_lib.make_mesh(), 16, accumulation=2)


def test_rows_stay_in_order_and_transfers_are_explicit():
    mesh = mesh_lib.make_mesh(data=2, fsdp=4)
    host = {
        "image": np.arange(16 * 3, dtype=np.uint8).reshape(16, 3),
        "length": np.arange(16, dtype=np.int32),
    }
    with jax.transfer_guard("disallow"):
        batch = mesh_lib.global_batch(host, mesh)
    for name, rows in host.items():
        assert batch[name].sharding == mesh_lib.batch_sharding(mesh)
        assert batch[name].dtype == rows.dtype
        np.testing.assert_array_equal(jax.device_get(batch[name]), rows)
    assert batch["image"].addressable_shards[0].data.shape == (2, 3)


def test_one_host_reads_the_whole_batch():
    assert mesh_lib.host_rows(mesh_lib.make_mesh(fsdp=2), 32) == slice(0, 32)


def test_replicated():
    assert mesh_lib.replicated(mesh_lib.make_mesh()).spec == PartitionSpec()
