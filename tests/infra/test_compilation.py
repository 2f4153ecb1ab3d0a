"""One program per bucket; flags only where a GPU will be used; the cache survives the process."""

import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest

from vlp_jax.infra import compilation


def test_each_bucket_is_built_once():
    traced, told = [], []

    def lower(bucket):
        traced.append(bucket)
        return jax.jit(lambda x: x + bucket).lower(jnp.zeros(())).compile

    steps = compilation.CompiledSteps(limit=2)
    steps.compile([2, 1], lower, told.append)
    assert steps[1](jnp.zeros(())) == 1
    assert steps[2](jnp.zeros(())) == 2
    assert traced == told == [2, 1]
    assert set(steps.seconds) == {1, 2}
    assert all(seconds > 0 for seconds in steps.seconds.values())
    with pytest.raises(RuntimeError, match="compiled already"):
        steps.compile([1], lower)
    with pytest.raises(RuntimeError, match="compiled already"):
        compilation.CompiledSteps(limit=2).compile([3, 3], lower)
    with pytest.raises(RuntimeError, match="planned with 2"):
        steps.compile([3], lower)
    with pytest.raises(RuntimeError, match="not among those compiled"):
        steps[3]
    assert traced == [2, 1]


def test_buckets_are_compiled_at_the_same_time():
    everyone = threading.Barrier(3, timeout=60)

    def lower(bucket):
        return lambda: (everyone.wait(), bucket)[1]  # returns when all three are being compiled

    steps = compilation.CompiledSteps(limit=3)
    steps.compile(range(3), lower)
    assert [steps[bucket] for bucket in range(3)] == [0, 1, 2]


def test_a_failed_build_leaves_no_trace():
    steps = compilation.CompiledSteps(limit=1)
    for fault in (lambda bucket: 1 // 0, lambda bucket: lambda: 1 // 0):
        with pytest.raises(ZeroDivisionError):
            steps.compile([1], fault)
    steps.compile([1], lambda bucket: lambda: "step")
    assert steps[1] == "step"


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
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", CACHED, str(tmp_path)]
    counts = [int(subprocess.check_output(command, text=True, env=environment)) for _ in range(2)]
    assert counts[0] == 0
    assert counts[1] > 0
