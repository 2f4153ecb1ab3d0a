"""Settings of every test: 8 fake CPU devices, float32, rank promotion raises.

Compiles dominate the suite, so XLA's backend optimisations, its fusion emitters and its split
code generation are off. What compares runs bit for bit does so once more with them, as users
compile, among the slow tests. No program is compiled twice: until the session ends, its workers
and the processes that tests start keep what they compile in one folder. Tracing is half of what is
left: it goes without names of scopes and source lines in programs, and without most of Python's
collections, which would look through all that is cached again and again (together a sixth of the
time of tests/models/test_three_towers.py and test_shared.py).
"""

import gc
import os
import pathlib
import tempfile
from collections.abc import Iterator

from tests.compiler_flags import QUICK_COMPILES
from tests.quick_cases import mark_others_slow

os.environ["JAX_PLATFORMS"] = os.environ.get("VLP_TEST_PLATFORM", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK_COMPILES}"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("FLAX_PROFILE", "false")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit the folder
    _CACHE = tempfile.TemporaryDirectory(prefix="compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest
from absl import logging

from vlp_jax.infra.compilation import enable_compile_cache

jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(200_000, 20, 100)

REPO = pathlib.Path(__file__).resolve().parent.parent
PACK = REPO.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def _one_cache() -> Iterator[None]:
    """Runs and tools that a test calls leave programs where they please; later tests do not."""
    yield
    if jax.config.jax_compilation_cache_dir != (folder := os.environ["JAX_COMPILATION_CACHE_DIR"]):
        enable_compile_cache(folder, min_compile_seconds=0.0)


@pytest.fixture(autouse=True)
def _as_loud_as_before() -> Iterator[None]:
    """Tools that a test calls silence the log of their process; later tests read it."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="session")
def pack() -> pathlib.Path:
    """The folder of the real data pack, or a skip that says what is missing."""
    if not (PACK / "captions.json").is_file():
        pytest.skip("the real data pack is absent: ../shared/data/captions.json not found")
    return PACK


# Minutes of one worker each, mostly of processes they start: first, so that at the end no worker
# waits for another.
_LONGEST = (
    *("test_resume.py", "test_searching.py", "test_tuning.py", "test_step.py"),
    *("test_skip_check.py", "test_named_batches.py"),
)


@pytest.hookimpl(tryfirst=True)  # before pytest takes out what is marked
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is slow; start the longest files first (a worker gets one after the other)."""
    mark_others_slow(items, REPO / "tests", whole=not any("::" in arg for arg in config.args))
    items.sort(key=lambda item: (*_LONGEST, item.path.name).index(item.path.name))
