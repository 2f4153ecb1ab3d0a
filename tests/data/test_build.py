"""From a config to sources and plans: what is kept in files, and what trains a tokenizer."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.data.fake import Fake
from vlp_jax.data import build
from vlp_jax.data.build import build_plan, build_tokenizer
from vlp_jax.data.scenes import VOCABULARY, Scenes, ScenesNLVR2
from vlp_jax.data.scenes.task_texts import TASK_WORDS
from vlp_jax.data.sources import build_source
from vlp_jax.data.tokenizer import Tokenizer


def config_of(cache_dir="", **source):
    return ConfigDict(
        {
            "seed": 0,
            "tokenizer": {"path": "", "vocab_size": 500, "kind": "wordpiece"},
            "model": {"text": {"max_positions": 48}},
            "data": {
                "image_size": 16,
                "batch_size": 8,
                "max_text_length": 48,
                "text_edges": (),
                "num_edges": 4,
                "edge_multiple": 4,
                "window_batches": 32,
                "batches": {},
                "alternate": "",
                "cache_dir": str(cache_dir),
                "cache_workers": 0,
                "sources": {"scenes": source},
            },
        }
    )


def every_text(source, records):
    counts = source.num_captions(np.asarray(records))
    return [
        source.caption(record, index)
        for record, count in zip(records, counts, strict=True)
        for index in range(count)
    ]


def test_a_tokenizer_is_trained_on_all_of_a_small_source():
    config = config_of()
    sources = [Scenes(num_records=30, level="easy"), Fake(20)]
    texts = every_text(sources[0], range(30)) + every_text(sources[1], range(20))
    expected = Tokenizer.train(texts, 500)
    assert build_tokenizer(config, sources).to_json() == expected.to_json()


def test_a_tokenizer_is_trained_on_a_sample_of_a_large_source(monkeypatch):
    monkeypatch.setattr(build, "TOKENIZER_SAMPLE", 50)
    read = []
    monkeypatch.setattr(
        Fake, "caption", lambda self, record, index: read.append(record) or "red square"
    )
    build_tokenizer(config_of(), [Fake(1000)])
    assert 40 <= len(read) <= 50
    assert min(read) == 0
    assert max(np.diff(sorted(set(read)))) <= 41  # from end to end
    assert max(read) > 950
    monkeypatch.setattr(build, "UNBOUNDED_SAMPLE", 50)
    read.clear()
    build_tokenizer(config_of(), [Fake(None)])
    assert set(read) == set(range(10))


@pytest.mark.parametrize(("level", "whole"), [("hard", True), ("easy", False)])
def test_a_tokenizer_trained_on_rich_captions_has_the_words_of_tasks_whole(tmp_path, level, whole):
    config = config_of(tmp_path, type="scenes", level=level, num_records=100, cache=True)
    tokenizer = build_tokenizer(config, [build_source(config, "scenes")])
    words = [word for word in (*VOCABULARY, *TASK_WORDS) if word.isalpha()]
    pieces = [len(ids) - 2 for ids in tokenizer.encode(words, 64)]
    assert (max(pieces) == 1) == whole


def test_a_tokenizer_is_kept_beside_the_pictures(tmp_path, monkeypatch):
    def tokenizer(seed=0, **changes):
        scenes = {"num_records": 30, "level": "easy", "seed": seed}
        config = config_of(tmp_path, **scenes, cache=True)
        config.tokenizer.update(changes)
        return build_tokenizer(config, [build_source(config, "scenes")]).to_json()

    first = tokenizer()
    assert tokenizer(vocab_size=100) != first
    assert len(list(tmp_path.glob("scenes-*.tokenizer-*.json"))) == 2
    assert tokenizer(seed=1) != first
    monkeypatch.setattr(Tokenizer, "train", lambda *_: pytest.fail("trained again"))
    assert tokenizer() == first
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        tokenizer(vocab_size=101)


def test_captions_are_kept_beside_the_pictures(tmp_path, monkeypatch):
    config = config_of(tmp_path, type="scenes", level="easy", num_records=40, cache=True)
    source = build_source(config, "scenes")
    tokenizer = build_tokenizer(config, [source])
    plan = build_plan(config, {"scenes": source}, tokenizer)
    [pictures] = tmp_path.glob("scenes-*.npy")
    [kept] = tmp_path.glob("scenes-*.captions-*.npz")
    [trained] = tmp_path.glob("scenes-*.tokenizer-*.json")
    files = {pictures.name, pictures.with_suffix(".json").name, kept.name, trained.name}
    assert {file.name for file in tmp_path.iterdir()} == files
    monkeypatch.setattr(Scenes, "captions", lambda *_: pytest.fail("written again"))
    monkeypatch.setattr(Scenes, "image", lambda *_: pytest.fail("drawn again"))
    again = build_plan(config, {"scenes": build_source(config, "scenes")}, tokenizer)
    for t in range(3):
        assert again.fingerprint(t) == plan.fingerprint(t)
        lengths = [some.batch("pairs", t).length for some in (again, plan)]
        np.testing.assert_array_equal(*lengths)


def test_splits_and_sets_have_files_of_their_own(tmp_path, monkeypatch):
    config = config_of(tmp_path, type="scenes_nlvr2", level="easy", num_records=6, cache=True)
    sets = [(None, None), ("train", 4), ("val", 4), ("val", 5), ("test", 5)]
    made = [build_source(config, "scenes", split, number) for split, number in sets]
    assert [source.num_records for source in made] == [6, 6, 4, 5, 5]
    assert len(list(tmp_path.glob("scenes-*.json"))) == 4
    monkeypatch.setattr(ScenesNLVR2, "examples", lambda *_: pytest.fail("made again"))
    for (split, number), source in zip(sets, made, strict=True):
        again = build_source(config, "scenes", split, number)
        assert np.array_equal(again.image(3, 16), source.image(3, 16))
