"""What is refused before a run begins, and what a run that goes on must find again."""

import json
import shutil
import types
from contextlib import nullcontext

import chex
import numpy as np
import pytest
from tiny import tiny_model

from tests.data.fake import Fake
from tests.tiny_config import get_config
from vlp_jax.data.captions import EncodedCaptions
from vlp_jax.data.loader import Loader
from vlp_jax.data.planned import PlannedSource
from vlp_jax.data.source import NothingReadable
from vlp_jax.data.tokenizer import Tokenizer
from vlp_jax.infra.checkpoint_reader import load_params
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.infra.sharding import by_path
from vlp_jax.models.pretrained import merge
from vlp_jax.models.sizes import build_model
from vlp_jax.objectives.classification import Classification
from vlp_jax.train.checks import changed_keys, check_texts, without_foreign_heads
from vlp_jax.train.evaluation import is_save_due
from vlp_jax.train.facts import LOADED_FILE, write_loaded
from vlp_jax.train.initial import Origin, read_origin
from vlp_jax.train.loop import RunStopped, _check_health, train
from vlp_jax.train.setup import plain, prepare


def changed(**changes):
    config = get_config()
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A checkpoint to start from, after no update at all."""
    setup = prepare(get_config(), tmp_path_factory.mktemp("origin"))
    with setup.open_checkpoints() as checkpoints:
        checkpoints.save(0, setup.first_state()[0], {}, setup.checkpoint_extra())
    return setup


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.clip_norm", -1.0),
        ("optim.accumulation", 0),
        ("optim.ema_decay", 1.0),
        ("optim.ema_decay", -0.5),
        ("optim.b1", 1.0),
        ("optim.weight_decay", -0.1),
        ("optim.max_skipped", -1),
        ("schedule.peak", -1e-3),
        ("schedule.peak", float("nan")),
        ("data.image_size", 0),
        ("data.max_bad_fraction", 1.5),
        ("seed", 2**33),
        ("optim.clip_norm", None),
        ("objectives.flm.weight", "1"),
        ("objectives.flm.weight", float("nan")),
        ("objectives.flm.weight", -1.0),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, key, value):
    with pytest.raises(ConfigError, match=rf"config\.{key}: .* is (out of range|no number)\. Use"):
        prepare(changed(**{key: value}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"checkpoint.best_metric": "reconstruction/accuracy"}, r"checkpoint\.best_metric"),
        (
            {
                "objectives.flm.corruption_rate": {
                    "kind": "bandit",
                    "metric": "reconstruction/0.25/loss",
                },
            },
            r"objectives\.flm",
        ),
    ],
)
def test_a_figure_that_no_evaluator_gives_is_refused(tmp_path, changes, key):
    message = rf"config\.{key}: .* is none of the figures of evals\.reconstruction\. Use one of .*"
    with pytest.raises(ConfigError, match=message + r"reconstruction/0\.3/loss"):
        prepare(changed(**changes), tmp_path)
    prepare(changed(**{"checkpoint.best_metric": "reconstruction/grounding_gap/colour"}), tmp_path)


def test_a_logger_that_is_not_installed_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"log\.wandb: 'mine' needs the package wandb"):
        prepare(changed(**{"log.wandb": "mine"}), tmp_path)


@pytest.mark.slow
def test_a_run_that_was_ended_before_its_first_checkpoint_starts_from_its_origin(origin, tmp_path):
    """The folder of checkpoints is there from the start on; it says nothing of a checkpoint."""
    config = changed(**{"init_from": str(origin.workdir), "seed": 1})
    first = prepare(config, tmp_path)
    with first.open_checkpoints():
        pass
    again = prepare(config, tmp_path)
    assert again.origin is not None
    _, report = again.first_state()
    assert not report.of("new")
    write_loaded(tmp_path, report)
    told = [line.split("\t") for line in (tmp_path / LOADED_FILE).read_text().splitlines()]
    shapes = {
        path: "x".join(map(str, leaf.shape))
        for path, leaf in by_path(again.program.state_spec.params).items()
    }
    assert {row[1]: row[2] for row in told[1:]} == shapes
    with again.open_checkpoints() as checkpoints:
        checkpoints.save(1, again.first_state()[0], {}, again.checkpoint_extra())
    assert prepare(config, tmp_path).origin is None


def test_a_moving_average_of_keys_starts_from_the_origin(origin, tmp_path):
    """Or queries of a trained tower would be drawn towards a random one."""
    config = changed(**{"init_from": str(origin.workdir), "seed": 1, "checkpoint.best_metric": ""})
    with config.unlocked():
        config.evals = {}
        config.objectives = {"moco_v3": {"hidden_dim": 8, "embedding_dim": 4}}
    setup = prepare(config, tmp_path)
    state, _ = setup.first_state()
    fresh = setup.program.init()
    target = state.extras["objectives"]["moco_v3"]["target"]["image_tower"]
    kernel = target["patch_embedding"]["kernel"]
    np.testing.assert_array_equal(kernel, state.params["image_tower"]["patch_embedding"]["kernel"])
    assert (kernel != fresh.params["image_tower"]["patch_embedding"]["kernel"]).any()


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_what_the_origin_gives_is_not_drawn_and_the_rest_is_drawn_as_ever(
    ema_decay, origin, tmp_path
):
    config = changed(**{"init_from": str(origin.workdir), "optim.ema_decay": ema_decay})
    with config.unlocked():  # with positions that are resized, and a part that is new
        config.data.image_size *= 2
        config.objectives.itc = {"embedding_dim": 8}
    setup = prepare(config, tmp_path)
    state, report = setup.first_state()
    assert all(report.of(status) for status in ("used", "resized", "new"))

    whole = setup.program.init()
    merged, _ = merge(whole.params, setup.origin.arrays)
    chex.assert_trees_all_equal(state, setup.program.started_from(merged, whole))

    given = {row.parameter for row in report.of("used")}
    drawn = by_path(whole.params)
    for path, leaf in by_path(setup.program.init(given).params).items():
        assert (leaf == (0 if path in given else drawn[path])).all(), path


def test_a_tokenizer_is_kept_of_a_run_that_has_begun_alone(tmp_path):
    first = prepare(get_config(), tmp_path)
    other = changed(**{"data.sources.scenes.level": "hard"})
    assert prepare(other, tmp_path).tokenizer.to_json() != first.tokenizer.to_json()


def test_a_resumed_run_tells_that_its_data_have_changed(origin, caplog):
    extra = read_extra(origin)
    origin.check_same_data(extra)
    assert not caplog.records
    facts = extra["sources"]["scenes"]
    origin.check_same_data({"sources": {"scenes": {**facts, "images": 511}}})
    assert "data.sources.scenes had 511 images with" in caplog.text
    origin.check_same_data({})  # of an earlier version
    with pytest.raises(ConfigError, match=r"data\.sources\.scenes: its 0 classes are not the 1"):
        origin.check_same_data({"sources": {"scenes": {**facts, "classes": ["yes"]}}})


def test_a_resumed_run_tells_which_keys_change_what_it_computes(tmp_path, caplog):
    def start(**changes):
        caplog.clear()
        setup = prepare(changed(**changes), tmp_path)
        return caplog.text, setup

    start()
    assert not start(**{"optim.b1": 0.5})[0], "a run without a checkpoint begins anew"
    _, setup = start()
    with setup.open_checkpoints() as checkpoints:
        checkpoints.save(0, setup.first_state()[0], {}, setup.checkpoint_extra())
    free = {
        "data.threads": 2,
        "data.prefetch": 3,
        "log.every_steps": 7,
        "checkpoint.keep_latest": 5,
    }
    assert not start(**free, **{"evals.reconstruction.every_steps": 30})[0]
    text, _ = start(**{"data.window_batches": 64, "optim.b1": 0.8})
    assert "the last start in data.window_batches, optim: from here on" in text
    bandit = {
        "objectives.flm.corruption_rate": {"kind": "bandit", "metric": "reconstruction/0.3/loss"}
    }
    start(**bandit)
    text, _ = start(**bandit, **{"evals.reconstruction.every_steps": 30})
    assert "in evals: from here" in text


def test_keys_that_came_later_do_not_change_a_run_of_an_earlier_version():
    new = plain(get_config())
    old = json.loads(json.dumps(new))
    del old["compression"], old["model"]["image"]["positions"]
    assert changed_keys(old, new, watched=False) == []
    new["compression"]["schedule"] = "staged"
    assert changed_keys(old, new, watched=False) == ["compression"]


def test_a_model_of_an_earlier_version_is_built():
    config = get_config()
    with config.unlocked():
        del config.model.image["positions"]
    assert build_model(config.model, 50, 3, 16).config.image.positions == "learned"


STAGED = {
    "compression.schedule": "staged",
    "compression.buckets": ("p16@16", "whole"),
    "compression.costs": (0.25, 1.0),
}


def test_a_begun_run_keeps_its_schedule_of_buckets(tmp_path):
    """Whatever becomes of the formula or the file that its costs came from."""
    first = prepare(changed(**STAGED), tmp_path)
    assert first.total_steps == 250
    assert first.config.total_steps == 100
    kept = tmp_path / "schedule.json"
    moved = json.loads(kept.read_text()) | {"costs": [0.5, 1.0]}
    kept.write_text(json.dumps(moved))
    assert prepare(changed(**STAGED), tmp_path).total_steps == 250, "nothing is saved yet"
    kept.write_text(json.dumps(moved))
    with first.open_checkpoints() as checkpoints:
        checkpoints.save(1, first.first_state()[0], {}, first.checkpoint_extra())
    assert prepare(changed(**STAGED), tmp_path).total_steps == 150
    other = changed(**STAGED | {"compression.costs": (0.2, 1.0)})
    assert prepare(other, tmp_path).total_steps == 300, "a config that was changed is followed"


def test_guarded_examples_are_encoded_whole_and_paid_for(tmp_path):
    """Batches that hold one have a bucket of whole images; a run goes on as it was begun."""
    file, records = tmp_path / "ranking.jsonl", [*range(0, 512, 16)]
    rows = [
        {"rank": rank, "source": "scenes", "split": "train", "record": record}
        for rank, record in enumerate(records)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    guard = {
        "compression.schedule": "constant",
        "compression.buckets": ("p8@16k1",),
        "compression.costs": (0.5,),
        "compression.guard_file": str(file),
        "compression.guard_percent": 100.0,
        "evals": {},
        "checkpoint.best_metric": "",
    }
    setup = prepare(changed(**guard), tmp_path / "run")
    planned = [setup.plan.batch("pairs", t) for t in range(setup.plan.window_batches)]
    for t, batch in enumerate(planned):
        [(_, bucket)] = setup.program.bucket(setup.plan.bucket(t), t)
        assert (bucket.views == ()) == bool(np.isin(batch.record, records).any())
        assert not bucket.guarded
    share = sum(batch.bucket.guarded for batch in planned) / len(planned)
    assert setup.program.compression.guarded == pytest.approx(share, abs=0.04)
    cost = 0.5 + 0.5 * setup.program.compression.guarded
    assert setup.program.schedule.cost(3) == pytest.approx(cost)
    assert setup.total_steps == pytest.approx(100 / cost, abs=1)
    assert {bucket.views for [(_, bucket)] in setup.program.buckets(setup.plan.buckets())} == {
        (),
        setup.program.schedule.views(0),
    }
    with setup.open_checkpoints() as checkpoints:
        checkpoints.save(1, setup.first_state()[0], {}, setup.checkpoint_extra())
    file.unlink()
    again = prepare(changed(**guard), tmp_path / "run")
    for t, batch in enumerate(planned):
        np.testing.assert_array_equal(again.plan.batch("pairs", t).record, batch.record)
        assert again.plan.bucket(t) == (("pairs", batch.bucket),)
    with pytest.raises(FileNotFoundError, match=r"ranking\.jsonl"):
        prepare(changed(**guard), tmp_path / "other")
    alone = {"compression.guard_file": str(file)}
    (tmp_path / "ranking.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ConfigError, match=r"is empty, but compression\.guard_file is given"):
        prepare(changed(**alone), tmp_path / "other")


def test_text_lengths_and_views_share_the_buckets(tmp_path):
    """Fitted edges leave room for every view; those that the config gives are refused."""
    views = tuple(f"p1@{size}" for size in range(2, 9))
    config = changed(
        **{
            "data.text_edges": (),
            "data.num_edges": 6,
            "compression.schedule": "staged",
            "compression.buckets": views,
            "compression.costs": (0.5,) * 7,
        }
    )
    setup = prepare(config, tmp_path)
    assert len(setup.plan.edges) == 2
    assert len(setup.program.buckets(setup.plan.buckets())) == 14
    config.data.text_edges = (8, 10, 14)
    with pytest.raises(ConfigError, match=r"compression\.buckets: a run compiles at most 16"):
        prepare(config, tmp_path / "other")


def test_a_folder_of_data_may_be_moved():
    old = {"data": {"sources": {"a": {"root": "/here", "weight": 1.0}}, "root": "/here"}}
    new = {"data": {"sources": {"a": {"root": "/there", "weight": 1.0}}, "root": "/there"}}
    assert changed_keys(old, new, watched=False) == []
    new["data"]["sources"]["a"]["weight"] = 2.0
    assert changed_keys(old, new, watched=False) == ["data.sources"]


def read_extra(setup):
    return load_params(setup.workdir / "checkpoints").extra


class Captioned(Fake):
    """One caption a record, of words that a tokenizer of English colours has never seen, or has."""

    def __init__(self, texts):
        super().__init__(len(texts), "texts")
        self.texts = texts

    def num_captions(self, records):
        return np.ones(len(records), np.int64)

    def caption(self, record, index):
        return self.texts[record]


@pytest.mark.parametrize("store", [True, False])
def test_texts_that_the_tokenizer_cannot_spell_are_told_or_refused(caplog, store):
    """They would be trained as <unk>, which is predicted with ease."""
    tokenizer = Tokenizer.train(["red green blue"] * 9, vocab_size=60)

    def share(*texts):
        captions = EncodedCaptions(Captioned(texts), tokenizer, 8, store=store)
        plan = types.SimpleNamespace(sources=[PlannedSource(captions.source, captions)])
        return check_texts(plan)["texts"]

    assert share("red green", "blue") == 0.0
    assert not caplog.records
    assert share("red \N{SNOWMAN} green green", "blue") == 0.2
    assert "data.sources.texts: 20.0 % of the tokens are words or signs" in caplog.text
    share("red " * 20)
    assert "1 captions are cut to data.max_text_length=8 tokens" in caplog.text
    with pytest.raises(ConfigError, match=r"config\.tokenizer: 67% of the tokens of data\.sources"):
        share("\N{SNOWMAN} red \N{SNOWMAN}")


def test_a_head_of_other_classes_starts_fresh(caplog):
    """Where a config gives the number of classes, shapes agree whatever they mean."""
    objective = Classification(tiny_model(), "answers", 3)
    arrays = {"answers_head/pooler/kernel": np.zeros(1), "text_norm/scale": np.ones(1)}
    origin = Origin("run", 1, arrays, {}, "", ("no", "yes"))

    def kept(*classes):
        sources = {"a": types.SimpleNamespace(classes=classes)}
        return set(without_foreign_heads(origin, sources, [objective]).arrays)

    assert kept("no", "yes") == kept() == set(arrays)
    assert not caplog.records
    assert kept("yes", "no") == {"text_norm/scale"}
    assert "the 2 classes of run are not the 2 of this run, whose head is fresh" in caplog.text


class Scored:
    """An evaluator whose figure is known beforehand."""

    figures = ("base/accuracy", "0.3/loss")

    def run(self, params, step=0):
        yield "base/accuracy", 1.0 / (1 + step)  # the first is the best


@pytest.mark.parametrize(
    ("save_every", "ranks_every", "expected"),
    [
        (2, None, [2, 4, 6, 8, 10]),
        (2, 3, [2, 3, 4, 6, 8, 9, 10]),  # rarer: each has its own
        (3, 2, [4, 6, 10]),  # as frequent or more: those of 3 and 9 wait
        (4, 4, [4, 8]),
        (5, 1, [5, 10]),
    ],
)
def test_checkpoints_meet_evaluations(save_every, ranks_every, expected):
    saved, steps = 0, []
    for step in range(1, 11):
        ranked = bool(ranks_every) and step % ranks_every == 0
        if is_save_due(step, saved, save_every, ranked, ranks_every):
            steps.append(saved := step)
    assert steps == expected


@pytest.mark.slow
def test_what_is_evaluated_may_be_the_best_whenever_checkpoints_are_saved(tmp_path):
    """Evaluated at 3, 6, ... and saved at 2, 4, ...: without a save of its own, never at once."""
    changes = {"total_steps": 4, "evals.reconstruction.every_steps": 3}
    config = changed(**changes, **{"checkpoint.every_steps": 2})
    setup = prepare(config, tmp_path)
    setup.evaluators["reconstruction"] = Scored()
    assert train(setup) == ExitCode.OK
    assert load_params(tmp_path / "checkpoints", "best").step == 3
    assert read_origin(tmp_path, "best").params() is not None


@pytest.mark.slow
def test_a_set_of_which_nothing_can_be_read_ends_the_run_by_its_own_code(tmp_path, monkeypatch):
    def fail(self):
        raise NothingReadable("data.sources.scenes: none could be read")

    monkeypatch.setattr(Loader, "__next__", fail)
    with pytest.raises(RunStopped, match="none could be read") as stopped:
        train(prepare(changed(total_steps=1), tmp_path))
    assert stopped.value.code == ExitCode.TOO_MANY_BAD_EXAMPLES


@pytest.mark.parametrize(
    ("step", "replaced", "stops"),
    [(1, 10, False), (1, 11, True), (62, 10, False), (80, 12, False), (80, 13, True)],
)
def test_a_share_of_damaged_examples_is_judged_of_enough(origin, step, replaced, stops):
    """The limit is 1 % of 16 rows an update; few damaged ones are let pass until the end."""
    checkpoints = types.SimpleNamespace(latest_path=None)

    def look(step, replaced):
        counters = {"skipped_in_a_row": 0, "replaced": replaced}
        _check_health(origin, counters, step, checkpoints)

    with pytest.raises(RunStopped, match="examples were damaged") if stops else nullcontext():
        look(step, replaced)
    with pytest.raises(RunStopped, match="17 of 1600 examples"):
        look(origin.total_steps, 17)


@pytest.mark.slow
def test_without_a_best_checkpoint_its_evaluators_say_why(tmp_path, origin):
    shutil.copytree(origin.workdir, tmp_path / "run")
    config = changed(**{"total_steps": 1})
    with config.unlocked():
        config.evals.last = {**config.evals.reconstruction.to_dict(), "on": "best"}
        del config.evals.last["every_steps"]
    setup = prepare(config, tmp_path / "run")

    class Silent(Scored):
        def run(self, params, step=0):
            yield "0.3/loss", 1.0

    setup.evaluators.update(reconstruction=Silent(), last=Silent())
    with pytest.raises(ConfigError, match="no evaluation has given 'reconstruction/base/accuracy'"):
        train(setup)
    assert load_params(tmp_path / "run" / "checkpoints").step == 1, "the state is saved"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    other = config.copy_and_resolve_references()
    other.checkpoint.best_metric = "reconstruction/0.3/loss"
    again = prepare(other, tmp_path / "run")
    again.evaluators.update(setup.evaluators)
    assert train(again) == ExitCode.OK, "as the message says"
    assert load_params(tmp_path / "run" / "checkpoints").step == 1
