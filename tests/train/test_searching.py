"""A search in a run: what updates do without, what is compared, what is kept, what is refused."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import BUCKET, make_batch, make_program
from tiny_search import UNITS, search_config

from vlp_jax.infra.checkpoint_reader import load_params
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.metrics import read_metrics
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.infra.sharding import by_path
from vlp_jax.models.tuning import is_skipped
from vlp_jax.train.config import check_keys
from vlp_jax.train.loop import train
from vlp_jax.train.searching import SEARCH_FILE, Searcher
from vlp_jax.train.setup import Setup, prepare
from vlp_jax.transfer.methods import set_method
from vlp_jax.transfer.units import pruned

WITH_PRIOR = {"search.prior": 0.5}


@pytest.fixture(scope="module")
def program():
    config = search_config()
    check_keys(config)
    program = make_program(config)
    return program, program.lower(BUCKET).compile()


def test_an_update_moves_what_it_has_drawn_and_nothing_else(program):
    """Adapters of what is skipped neither move nor decay nor have their moments changed."""
    program, update = program
    state = program.init()
    moved = dict.fromkeys(UNITS, 0)
    for step in range(6):
        kept = {unit: bool(on) for unit, on in program.search.kept(state).items()}
        assert sum(kept.values()) == len(UNITS) - 2
        before = by_path(jax.device_get(state.params))
        moments = by_path(jax.device_get(state.opt_state))
        batches = program.batches({"pairs": make_batch(seed=step)})
        state, metrics = update(state, batches, program.moment(50))
        assert np.isfinite(metrics["loss"])
        after = by_path(jax.device_get(state.params))
        now = by_path(jax.device_get(state.opt_state))
        for unit in UNITS:
            inside = [p for p in before if is_skipped(p, (unit,)) and "_adapter/up" in p]
            instead = [p for p in before if p.startswith(f"{unit}/replacement/up")]
            assert inside
            assert instead
            for path in inside + instead:
                on = kept[unit] == (path in inside)
                assert np.array_equal(before[path], after[path]) != on, path
                own = [name for name in moments if name.endswith(f"/{path}")]
                assert len(own) == 2
                for name in own:
                    assert np.array_equal(moments[name], now[name]) != on, name
            moved[unit] += kept[unit]
            assert after[f"{unit}/block_kept"] == 1.0
    assert len({*moved.values()}) > 1 or 0 < moved[UNITS[0]] < 6  # patterns changed


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Setup, int]:
    """A finished search, and how often its comparison was traced."""
    workdir = tmp_path_factory.mktemp("search") / "whole"
    traced = 0
    compare = Searcher._compare

    def counted(self, *args):
        nonlocal traced
        traced += 1
        return compare(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Searcher, "_compare", counted)
        setup = prepare(search_config(**WITH_PRIOR), workdir)
        assert train(setup) == ExitCode.OK
    return workdir, setup, traced


def test_a_search_is_compiled_once_and_ends_with_a_choice(whole):
    workdir, setup, traced = whole
    assert traced == 1
    found = json.loads((workdir / SEARCH_FILE).read_text())
    assert found["units"] == list(UNITS)
    assert len(found["skipped"]) == 2
    assert set(found["skipped"]) <= set(UNITS)
    assert found["by_count"][0]["skipped"] == []
    assert [len(one["skipped"]) for one in found["by_count"]] == [0, 1, 2, 3, 4]
    assert found["by_count"][2]["skipped"] == [u for u in UNITS if u in found["skipped"]]
    assert found["by_count"][2]["loss"] == pytest.approx(found["loss"], abs=1e-6)
    assert found["flops_saved"] == pytest.approx(
        sum(c for u, c in zip(UNITS, found["costs"], strict=True) if u in found["skipped"])
    )
    assert (np.asarray(found["costs"]) > 0).all()
    params = by_path(load_params(workdir / "checkpoints", "latest").state)
    for unit in UNITS:
        assert params[f"{unit}/block_kept"] == float(unit not in found["skipped"])
    decided = [r["step"] for r in read_metrics(workdir) if "search/seconds" in r]
    assert decided == [10, 14, 18, 22]  # after 6 of warm-up, every 4
    facts = json.loads((workdir / "run.json").read_text())
    assert facts["compile_seconds"]["decisions"] > 0
    assert 0 < facts["decisions_share_of_time"] < 1
    assert setup.total_steps == 24


def test_what_is_compared_are_pruned_networks(whole, tmp_path):
    """The loss of a choice is that of a network without it, and draws are common to all."""
    workdir, setup, _ = whole
    searcher = setup.decider
    params = load_params(workdir / "checkpoints", "latest").state
    state = setup.program.init().replace(params=jax.tree.map(jnp.asarray, params))
    choices = np.array([[True, False, False, True], [False] * 4, [False, True, True, False]])
    compared = searcher.on(state, choices, [5])
    again = searcher.on(state, choices[2:], [5])
    searcher.close()
    np.testing.assert_array_equal(again.losses[0], compared.losses[0, 2:])
    batches = searcher._batches(5)
    searcher.close()
    key = jax.random.fold_in(jax.random.fold_in(state.rng, 5), 0x5C2)
    for row, loss in zip(choices, compared.losses[0], strict=True):
        gone = tuple(unit for unit, off in zip(UNITS, row, strict=True) if off)
        config = search_config(**{"model.tuning.gated": (), "model.tuning.skip": gone})
        config.search.method = ""
        other = prepare(config, tmp_path / f"run_{len(gone)}_{row[0]}").program
        [objective], [(_, bucket)] = other.objectives, searcher._plan.buckets()[0]
        output = objective.loss(
            pruned(state.params, gone),
            state.extras["objectives"]["mlm"],
            batches["pairs"],
            jax.random.fold_in(key, 0),
            bucket,
            train=False,
        )
        assert float(output.loss.sum / output.loss.weight) == pytest.approx(loss, abs=1e-5)


def test_what_is_expected_is_measured_before_the_first_comparison_and_kept(whole):
    """Of units that change the tokens more, more; whatever later updates make of them."""
    _, setup, _ = whole
    searcher, state = setup.decider, setup.program.init()
    first, _ = searcher.decide(state, 10)
    dissimilarity = searcher._dissimilarity(state, [searcher._number(10)])
    searcher.close()
    assert ((dissimilarity > 0) & (dissimilarity < 2)).all()
    expected = np.asarray(first.extras["search"]["expected"])
    np.testing.assert_allclose(expected, 0.5 * dissimilarity, rtol=1e-5)
    moved = first.replace(params=jax.tree.map(lambda x: 1.1 * x, first.params))
    later, _ = searcher.decide(moved, 14)
    searcher.close()
    np.testing.assert_array_equal(later.extras["search"]["expected"], expected)


@pytest.mark.slow
def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(whole, tmp_path):
    """Bit for bit, from a checkpoint between two comparisons."""
    done = whole[0]
    expected = load_params(done / "checkpoints", "latest")
    workdir = tmp_path / "again"
    shutil.copytree(done, workdir, ignore=shutil.ignore_patterns("metrics.jsonl", SEARCH_FILE))
    for step in (18, 24):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    assert train(prepare(search_config(**WITH_PRIOR), workdir)) == ExitCode.OK
    again = load_params(workdir / "checkpoints", "latest")
    assert again.step == expected.step
    jax.tree.map(np.testing.assert_array_equal, again.state, expected.state)
    assert (workdir / SEARCH_FILE).read_text() == (done / SEARCH_FILE).read_text()


@pytest.mark.parametrize("method", ["random", "similarity", "greedy"])
def test_what_a_search_is_measured_against(whole, tmp_path, method):
    """From the state of another search, without training on."""
    workdir, setup, _ = whole
    state = setup.program.init()
    found = {}
    for seed in (0, 1) if method == "random" else (0,):
        config = search_config(**{"search.method": method, "seed": seed})
        other = prepare(config, tmp_path / f"{method}_{seed}")
        assert not other.decider.is_due(10)
        other.decider.compile()
        params = load_params(workdir / "checkpoints", "latest").state
        own = state.replace(
            params=jax.tree.map(jnp.asarray, params), extras={**state.extras, "search": {}}
        )
        own, _ = other.decider.conclude(own, 24)
        other.decider.close()
        found[seed] = json.loads((other.workdir / SEARCH_FILE).read_text())
        assert len(found[seed]["skipped"]) == 2
    if method == "random":
        assert sorted(found[0]["harm"]) == sorted(found[1]["harm"]) == [0.0, 1.0, 2.0, 3.0]
        return
    assert found[0]["harm"] != [0.0] * 4
    if method == "similarity":
        assert all(0 < harm < 2 for harm in found[0]["harm"])
        return
    curve = found[0]["by_count"]
    first = found[0]["units"].index(curve[1]["skipped"][0])
    assert found[0]["harm"][first] == min(found[0]["harm"])
    added = curve[1]["loss"] - curve[0]["loss"]
    assert added == pytest.approx(found[0]["harm"][first], abs=1e-5)


def test_a_run_skips_what_a_search_has_chosen(whole, tmp_path):
    chosen = json.loads((whole[0] / SEARCH_FILE).read_text())["skipped"]
    config = search_config(skip_from=str(whole[0]))
    set_method(config, "adapter")
    setup = prepare(config, tmp_path / "run")
    assert list(setup.config.model.tuning.skip) == chosen
    paths = by_path(setup.program.state_spec.params)
    assert not any(is_skipped(path, chosen) for path in paths)
    assert any(path.startswith(f"{chosen[0]}/replacement/") for path in paths)
    both = search_config(skip_from=str(whole[0]), **{"model.tuning.skip": (chosen[0],)})
    set_method(both, "adapter")
    both.model.tuning.skip = (chosen[0],)
    with pytest.raises(ConfigError, match=r"skip_from: beside model\.tuning\.skip"):
        prepare(both, tmp_path / "both")
    nowhere = search_config(skip_from=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"skip_from: .*search\.json is not there"):
        prepare(nowhere, tmp_path / "other")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"search.skipped": 4}, r"search\.skipped: 4 of 4 units"),
        ({"search.split": "test"}, r"search\.split: 'test' is what the run is tested on"),
        ({"search.split": "train"}, r"search\.split: the run trains on 'train'"),
        ({"search.candidates": 7}, r"search\.candidates: 7, but there are only 6"),
        ({"search.warmup_percent": 90.0}, r"search\.every_steps: of 24 updates, 22 are warm-up"),
        ({"search.method": "das"}, r"search\.method: 'das'"),
        ({"search.prior": -1.0}, r"search\.prior: -1\.0"),
        (
            {"search.prior": 1.0, "search.reward": "paper"},
            r"search\.prior: 1\.0, but reward='paper' expects nothing",
        ),
        ({"search.reward": "free"}, r"search\.reward: 'free'"),
        ({"model.tuning.gated": ()}, r"model\.tuning\.gated: it names no unit"),
        (
            {"model.tuning.gated": ("fusion", "fusion/mlp")},
            r"model\.tuning\.gated: 'fusion_tower/image_block_00/mlp' is named twice, or beside",
        ),
        (
            {"model.tuning.gated": ("text_lower_0",)},
            r"model\.tuning\.gated: 'text_lower_0' is no unit of this model",
        ),
    ],
)
def test_bad_input_names_the_key(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        prepare(search_config(**overrides), tmp_path / "run")
