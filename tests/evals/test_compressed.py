"""Examples that compression hurts: planted ones with a very small subject are found."""

import json

import jax
import numpy as np
import pytest

from tests.evals.conftest import announced
from vlp_jax.data.augment import normalize
from vlp_jax.data.guarded import read_guarded
from vlp_jax.data.scenes import Scenes
from vlp_jax.evals import build_evaluators
from vlp_jax.evals.compressed import TEMPERATURE
from vlp_jax.infra.artifacts import ARTIFACTS_FOLDER, load
from vlp_jax.infra.errors import ConfigError
from vlp_jax.models.vit import ViT

PLANTED = tuple(range(0, 30, 3))
SECTION = {"source": "scenes", "num_examples": 32, "draws": 4, "shown": 5}


@pytest.fixture
def small_subjects(monkeypatch):
    """Records of ``PLANTED`` show a dot on a blank ground, each at a place of its own."""
    plain = Scenes.image

    def image(self, record, size):
        if record not in PLANTED:
            return plain(self, record, size)
        number = PLANTED.index(record)
        picture = np.full((size, size, 3), 235, np.uint8)
        y, x = 4 + 8 * (number // 4), (4 + 8 * (number % 4)) % 28
        picture[y : y + 3, x : x + 3] = np.random.default_rng(number).integers(0, 200, 3)
        return picture

    monkeypatch.setattr(Scenes, "image", image)


def evaluator_of(context, section, workdir=None):
    fields = {} if workdir is None else {"workdir": workdir}
    [evaluator] = build_evaluators(context({"compressed": section}, **fields)).values()
    return evaluator


def test_pictures_with_a_small_subject_are_ranked_first(
    with_evals, params, small_subjects, tmp_path
):
    section = {**SECTION, "buckets": ("p4@32k48", "whole")}
    evaluator = evaluator_of(with_evals, section, tmp_path)
    found = announced(evaluator, evaluator.run(params, step=7))
    rows = [
        json.loads(line)
        for line in (tmp_path / "predictions" / "compressed.jsonl").read_text().splitlines()
    ]
    assert [row["rank"] for row in rows] == list(range(1, 33))
    # By a tower of random weights, which tells most of the other pictures well enough.
    first = {row["record"] for row in rows[: len(PLANTED)]}
    assert len(first & set(PLANTED)) >= 8
    # What a run guards by this file: a third of what was ranked.
    config = evaluator._context.config.copy_and_resolve_references()
    config.compression.guard_file = str(tmp_path / "predictions" / "compressed.jsonl")
    config.compression.guard_percent = 100 * len(PLANTED) / 32
    guarded = read_guarded(config, evaluator._context.sources)
    assert set(guarded["scenes"].tolist()) == first
    losses = [row["loss"]["p4@32k48"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert found["p4@32k48/loss"] == pytest.approx(np.mean(losses))
    assert found["p4@32k48/loss_worst"] == pytest.approx(np.mean(losses[:3]))
    gallery = load(tmp_path / ARTIFACTS_FOLDER / "compressed")
    assert len(gallery.cards) == 5
    assert len(gallery.cards[0].images) == 2
    assert gallery.cards[0].title.startswith("1: ")
    table = load(tmp_path / ARTIFACTS_FOLDER / "compressed_buckets")
    assert table.rows[0][:2] == ("p4@32k48", 49)


def test_figures_are_those_of_a_plain_recomputation(with_evals, context, params, host_params):
    """Of larger patches, where nothing is drawn."""
    section = {**SECTION, "num_examples": 10, "draws": 1, "buckets": ("p8@32",)}
    evaluator = evaluator_of(with_evals, section)
    found = announced(evaluator, evaluator.run(params))
    [flm] = context.objectives
    tower = ViT(flm.model.config.image)
    source = Scenes("train", level="easy", num_records=100)
    pixels = normalize(np.stack([source.image(record, 32) for record in range(10)]))
    variables = {"params": host_params["image_tower"]}
    view = evaluator._views[0]
    whole, part = (
        np.asarray(tower.apply(variables, *arguments)[:, 0], np.float64)
        for arguments in ((pixels,), (pixels, None, view, jax.random.split(jax.random.key(0), 10)))
    )
    mean = whole.mean(axis=0, keepdims=True)
    whole, part = (
        (x - mean) / np.linalg.norm(x - mean, axis=1, keepdims=True) for x in (whole, part)
    )
    moved = 1 - (whole * part).sum(axis=1)
    logits = part @ whole.T / TEMPERATURE
    losses = np.log(np.exp(logits).sum(axis=1)) - np.diagonal(logits)
    assert found["p8@32/moved"] == pytest.approx(moved.mean(), rel=1e-3)
    assert found["p8@32/loss"] == pytest.approx(losses.mean(), rel=1e-3)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"buckets": ()}, r"evals\.compressed\.buckets: name no compressed image"),
        ({"buckets": ("whole",)}, r"evals\.compressed\.buckets: name no compressed image"),
        ({"buckets": ("p5@32",)}, r"evals\.compressed\.buckets: 'p5@32'"),
        ({"buckets": ("p8@32",), "draws": 0}, r"evals\.compressed\.draws: 0"),
    ],
)
def test_errors_name_the_key(with_evals, section, message):
    with pytest.raises(ConfigError, match=message):
        build_evaluators(with_evals({"compressed": {**SECTION, **section}}))
