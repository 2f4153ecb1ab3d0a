"""What docs/results compares can be read: its runs are hours of a GPU away from any test."""

import pathlib

import pytest

from docs.results import compression
from tools.compare.configs import load
from vlp_jax.infra.errors import ConfigError
from vlp_jax.train.config import check_keys

REPO = pathlib.Path(__file__).parents[1]
SOURCE = "docs/results/compression.py"


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)


@pytest.mark.parametrize("objective", ["simclr", "moco_v3", "dino", "flm", "ar"])
def test_every_arm_of_a_comparison_is_a_config(objective: str) -> None:
    arms = compression.arms_of(objective)
    assert "p8@64+20" in arms
    for arm in ("whole", *arms):
        config = load(f"{SOURCE}:{objective},{arm}").config
        check_keys(config)
        compressed = not arm.startswith("whole")
        assert bool(config.compression.schedule) == compressed
        assert config.compression.tail_percent == (20.0 if arm.endswith("+20") else 0.0)
        assert len(config.compression.costs) == len(config.compression.buckets)


@pytest.mark.parametrize("objective", ["simclr", "moco_v3", "dino", "flm", "ar"])
def test_costs_of_all_buckets_are_there(objective: str) -> None:
    buckets, costs = compression.buckets_of(objective), compression.costs_of(objective)
    assert len(buckets) == len(costs)
    assert costs[buckets.index("whole")] == 1.0


def test_photographs_are_read_from_the_pack() -> None:
    config = load(f"{SOURCE}:simclr,p8@64+20,photographs").config
    assert set(config.data.sources) == {"photographs", "labels"}
    assert config.data.root == "../shared/data"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("simclr,p32@64", "is no arm, nor a bucket whose cost"),
        ("flm,whole,photographs", "learn from scenes alone"),
        ("simclr,whole,photographs,more", "write OBJECTIVE"),
    ],
)
def test_a_bad_argument_says_what_to_write(argument: str, message: str) -> None:
    with pytest.raises((ValueError, ConfigError), match=message):
        load(f"{SOURCE}:{argument}")


def test_a_schedule_that_is_not_derived_says_how_to(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"schedule.json is absent; make it by .* errors simclr"):
        compression.arms_of("simclr")
