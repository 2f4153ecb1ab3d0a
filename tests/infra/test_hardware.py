"""Facts are complete, memory is named by its source, and the peak is a real one."""

import json
import mmap

import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.infra import hardware


def test_device_facts_are_json_and_complete():
    facts = json.loads(json.dumps(hardware.device_facts()))
    assert facts["device_count"] == jax.device_count()
    assert facts["versions"]["jax"] == jax.__version__
    assert {"python", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"} <= set(
        facts["versions"]
    )


def test_memory_of_the_process_on_cpu():
    size = 2**26
    before = hardware.memory()
    with mmap.mmap(-1, size) as ballast:  # pages of its own: malloc may hand out resident ones
        ballast.write(bytes(size))
        after = hardware.memory()
    assert after.source == "process RSS"
    assert after.in_use - before.in_use > 0.9 * size
    assert after.peak >= after.in_use


def test_chained_products_stay_finite_and_are_not_optimised_away():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(256, 256)).astype(np.float32) for _ in range(2))
    b /= 16
    product = np.asarray(hardware._chained_products(a, b, 3))
    np.testing.assert_allclose(product, a @ b @ b @ b, rtol=1e-3, atol=1e-3)
    assert 0.1 < np.std(hardware._chained_products(a, b, 32)) < 10


def test_peak_is_plausible_and_does_not_grow_with_the_chain():
    """If the compiler dropped products of the chain, a longer one would read higher."""
    short = hardware.measure_matmul_peak(hardware.PeakSetting(jnp.float32, 256, 16))
    long = hardware.measure_matmul_peak(hardware.PeakSetting(jnp.float32, 256, 64))
    assert 1e8 < short < 1e14
    assert long < 4 * short
