"""What is ``auto`` in a config, by what the origin has trained."""

import json
from typing import Any

import pytest

from vlp_jax.train.adopted import adopt
from vlp_jax.train.config import default_config
from vlp_jax.train.initial import Origin


def origin(**objectives: dict[str, Any]) -> Origin:
    return Origin("there", None, {}, {"objectives": objectives}, tokenizer="", classes=())


def contrast():
    config = default_config("tiny")
    with config.unlocked():
        config.objectives = {"itc": {"pool": "auto"}}
    return config


@pytest.mark.parametrize(
    ("found", "pool"),
    [
        (None, "class"),
        (origin(flm={}), "mean"),  # which has read the first tokens for nothing in particular
        (origin(mim={}), "mean"),
        (origin(vqa={"readout": "query"}), "mean"),  # was itself tuned from what predicts words
        (origin(moco={}), "class"),
        (Origin("there", None, {}, {}, tokenizer="", classes=()), "class"),  # imported
        (origin(flm={}, itc={}), "class"),  # the default of a contrast
        (origin(pairs={"type": "itc", "pool": "mean"}), "mean"),
        (origin(pairs={"type": "itc", "pool": "class"}), "class"),
    ],
)
def test_a_contrast_pools_as_that_which_trained_the_origin(found, pool):
    config = contrast()
    adopt(config, None, found)
    assert config.objectives.itc.pool == pool


@pytest.mark.parametrize(("section", "pool"), [({}, "class"), ({"pool": "mean"}, "mean")])
def test_a_run_that_has_begun_pools_as_it_did(tmp_path, section, pool):
    """Also one that began before there was the key."""
    (tmp_path / "config.json").write_text(json.dumps({"objectives": {"itc": section}}))
    config = contrast()
    adopt(config, tmp_path, None)
    assert config.objectives.itc.pool == pool


def test_what_a_config_says_itself_stays():
    config = contrast()
    config.objectives.itc.pool = "class"
    adopt(config, None, origin(flm={}))
    assert config.objectives.itc.pool == "class"
