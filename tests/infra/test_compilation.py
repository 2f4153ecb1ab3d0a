"""One program per bucket; flags only where a GPU will be used; the cache survives the process."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from vlp_jax.infra import compilation


def test_each_bucket_is_built_once():
    built = []

    def build(bucket):
        built.append(bucket)
        return jax.jit(lambda x: x + bucket).lower(jnp.zeros(())).compile()

    steps = compilation.CompiledSteps(limit=2)
    assert steps.compile(1, build)(jnp.zeros(())) == 1
    assert steps.compile(2, build)(jnp.zeros(())) == 2
    assert steps[1](jnp.zeros(())) == 1
    assert built == [1, 2]
    assert set(steps.seconds) == {1, 2}
    assert all(seconds > 0 for seconds in steps.seconds.values())
    with pytest.raises(RuntimeError, match="compiled already"):
        steps.compile(1, build)
    with pytest.raises(RuntimeError, match="planned with 2"):
        steps.compile(3, build)
    with pytest.raises(RuntimeError, match="not among those compiled"):
        steps[3]
    assert built == [1, 2]


def test_a_failed_build_leaves_no_trace():
    steps = compilation.CompiledSteps(limit=1)
    with pytest.raises(ZeroDivisionError):
        steps.compile(1, lambda bucket: 1 // 0)
    assert steps.compile(1, lambda bucket: "step") == "step"


@pytest.mark.parametrize(
    ("platforms", "expected"), [("cpu", False), ("tpu,cpu", False), ("cuda,cpu", True)]
)
def test_platform_is_told_without_jax(monkeypatch, platforms, expected):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert compilation.is_gpu_host() == expected


def test_no_flags_without_a_gpu(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--a=1")
    assert compilation.set_gpu_flags() == {}
    assert os.environ["XLA_FLAGS"] == "--a=1"


def test_flags_of_the_user_stay(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("XLA_FLAGS", "--a=1 --b")
    assert compilation.set_gpu_flags({"a": "2", "b": "2", "c": "2"}) == {"c": "2"}
    assert os.environ["XLA_FLAGS"] == "--a=1 --b --c=2"


CACHED = """
import sys, jax, jax.numpy as jnp
jax.config.update("jax_log_compiles", False)
from vlp_jax.infra import compilation
hits = []
jax.monitoring.register_event_listener(
    lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None
)
jax.jit(lambda x: x * 2)(jnp.ones(3))  # decides, before the call, that there is no cache
compilation.enable_compile_cache(sys.argv[1], min_compile_seconds=0.0)
jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.ones((4, 4))).compile()
print(len(hits))
"""


def test_the_cache_is_hit_by_the_next_process(tmp_path):
    counts = [
        int(subprocess.check_output([sys.executable, "-c", CACHED, str(tmp_path)], text=True))
        for _ in range(2)
    ]
    assert counts[0] == 0
    assert counts[1] > 0
