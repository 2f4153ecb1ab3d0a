"""The cache of pictures: the same pixels, reuse, replacement, and faults."""

import json
import pickle

import numpy as np
import pytest

from tests.data.fake import FakePairs
from vlp_jax.data.cache import ImageCache
from vlp_jax.data.scenes import Scenes, ScenesNLVR2, ScenesVQA
from vlp_jax.data.source import BadExample, ManyRows


def easy(num_records=300, **arguments):
    return Scenes(level="easy", num_records=num_records, **arguments)


class Damaged(Scenes):
    """Scenes of which some records cannot be read."""

    def image(self, record, size):
        if record % 5 == 2:
            raise BadExample("truncated image", f"record {record}")
        return super().image(record, size)


class Unreadable(Scenes):
    """A source whose pictures nobody may ask for."""

    def image(self, record, size):
        raise AssertionError("the cache should have served this")


@pytest.mark.parametrize("in_file", [False, True])
def test_the_cache_serves_what_the_source_gives(tmp_path, in_file):
    source = easy()
    cache = ImageCache(source, 32, path=tmp_path / "train.npy" if in_file else None)
    assert cache.name == source.name
    assert cache.num_records == 300
    for record in (0, 255, 256, 299):
        assert np.array_equal(cache.image(record, 32), source.image(record, 32))
    assert cache.caption(7, 3) == source.caption(7, 3)
    assert cache.num_captions(np.arange(3)).tolist() == [5, 5, 5]
    assert cache.word_classes() == source.word_classes()


def test_a_finished_file_is_used_again(tmp_path):
    path = tmp_path / "caches" / "train.npy"
    source = easy()
    ImageCache(source, 32, path=path)
    again = ImageCache(Unreadable(level="easy", num_records=300), 32, path=path)
    assert np.array_equal(again.image(11, 32), source.image(11, 32))
    assert sorted(p.name for p in path.parent.iterdir()) == ["train.json", "train.npy"]


@pytest.mark.parametrize(
    ("arguments", "size"), [({"seed": 1}, 32), ({"num_records": 40}, 32), ({}, 48)]
)
def test_a_file_of_other_pictures_is_made_anew(tmp_path, arguments, size):
    path = tmp_path / "train.npy"
    ImageCache(easy(50), 32, path=path)
    source = easy(**{"num_records": 50, **arguments})
    cache = ImageCache(source, size, path=path)
    assert cache.num_records == source.num_records
    assert np.array_equal(cache.image(7, size), source.image(7, size))


def test_an_interrupted_build_leaves_nothing_behind(tmp_path):
    path = tmp_path / "train.npy"
    with pytest.raises(AssertionError, match="should have served"):
        ImageCache(Unreadable(num_records=10), 32, path=path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("in_file", [False, True])
def test_damaged_records_stay_damaged(tmp_path, in_file):
    path = tmp_path / "train.npy" if in_file else None
    for _ in range(2):  # made, and read again
        cache = ImageCache(Damaged(level="easy", num_records=10), 32, path=path)
        for record in range(10):
            if record % 5 == 2:
                with pytest.raises(BadExample, match=f"truncated image: record {record}") as raised:
                    cache.image(record, 32)
                assert raised.value.kind == "truncated image"
            else:
                assert cache.image(record, 32).any()


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("kind", [ScenesVQA, ScenesNLVR2])
def test_extra_fields_are_kept_as_well(tmp_path, monkeypatch, kind, in_file):
    path = tmp_path / "train.npy" if in_file else None
    source = kind(level="easy", num_records=20)
    records = np.array([3, 0, 3, 19])
    want = [{"image": source.image(r, 16), **source.extras(r, 16)} for r in records]
    cache = ImageCache(source, 16, path=path)
    if in_file:
        names = {"train.json", "train.npy", *(f"train.{n}.npy" for n in kind.extra_fields)}
        assert {file.name for file in tmp_path.iterdir()} == names
        monkeypatch.setattr(kind, "examples", lambda *_: pytest.fail("made again"))
        cache = ImageCache(source, 16, path=path)
    assert isinstance(cache, ManyRows)
    rows = cache.rows(records, 16, ("image", *kind.extra_fields))
    for row, (record, fields) in enumerate(zip(records, want, strict=True)):
        assert np.array_equal(cache.image(record, 16), fields.pop("image"))
        extras = cache.extras(record, 16)
        assert extras.keys() == fields.keys() == set(kind.extra_fields)
        for name, value in fields.items():
            assert extras[name].dtype == rows[name].dtype == value.dtype
            assert np.array_equal(extras[name], value)
            assert np.array_equal(rows[name][row], value)
    assert np.array_equal(rows["image"][0], cache.image(3, 16))


@pytest.mark.parametrize("in_file", [False, True])
def test_a_damaged_second_picture_matters_to_those_who_read_it(tmp_path, in_file):
    source = FakePairs(10, damaged=(1,), second_damaged=(4,))
    path = tmp_path / "train.npy" if in_file else None
    for _ in range(2):  # made, and read again
        cache = ImageCache(source, 4, path=path, identity="pairs")
        assert cache.image(4, 4).any()
        assert cache.extras(1, 4)["label"] == 1
        with pytest.raises(BadExample, match="torn second picture: record 4"):
            cache.extras(4, 4)
        records = np.array([4, 1, 0, 4])
        assert cache.damaged(records, with_extras=False).tolist() == [False, True, False, False]
        assert cache.damaged(records, with_extras=True).tolist() == [True, True, False, True]


def test_files_of_which_one_is_gone_are_made_anew(tmp_path):
    source = ScenesNLVR2(level="easy", num_records=4)
    ImageCache(source, 16, path=tmp_path / "train.npy")
    (tmp_path / "train.label.npy").unlink()
    cache = ImageCache(source, 16, path=tmp_path / "train.npy")
    assert cache.extras(2, 16)["label"] == source.extras(2, 16)["label"]


@pytest.mark.parametrize("in_file", [False, True])
def test_a_pickled_copy_serves_the_same(tmp_path, in_file):
    cache = ImageCache(easy(500), 32, path=tmp_path / "train.npy" if in_file else None)
    sent = pickle.dumps(cache)
    assert (len(sent) < 100_000) == in_file  # a mapped file is not sent along
    assert np.array_equal(pickle.loads(sent).image(9, 32), cache.image(9, 32))


def test_a_served_picture_can_be_written_to():
    cache = ImageCache(easy(3), 32)
    picture = cache.image(0, 32)
    before = picture.copy()
    picture[:] = 0
    assert np.array_equal(cache.image(0, 32), before)


@pytest.mark.slow
def test_workers_make_the_same_pictures(tmp_path):
    alone, many = ImageCache(easy(600), 32), ImageCache(easy(600), 32, workers=2)
    assert all(np.array_equal(alone.image(r, 32), many.image(r, 32)) for r in range(600))


def test_what_cannot_be_cached_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.sources\.scenes\.num_records must be set"):
        ImageCache(Scenes(), 32)
    with pytest.raises(ValueError, match=r"must end in \.npy"):
        ImageCache(easy(), 32, path=tmp_path / "train.bin")
    source = easy(5)
    del source.identity
    with pytest.raises(ValueError, match="no identity"):
        ImageCache(source, 32, path=tmp_path / "train.npy")
    cache = ImageCache(source, 32, path=tmp_path / "train.npy", identity="mine")
    with pytest.raises(ValueError, match="cached at 32 px; asked for 64"):
        cache.image(0, 64)
    with pytest.raises(IndexError, match="record 5 of 5"):
        cache.image(5, 32)


def test_a_damaged_description_is_named(tmp_path):
    path = tmp_path / "train.npy"
    ImageCache(easy(5), 32, path=path)
    (tmp_path / "train.json").write_text("{")
    with pytest.raises(ValueError, match=r"train\.json is not JSON .* delete it"):
        ImageCache(easy(5), 32, path=path)


def test_a_file_that_is_not_what_its_description_says_is_named(tmp_path):
    path = tmp_path / "train.npy"
    ImageCache(easy(5), 32, path=path)
    assert json.loads((tmp_path / "train.json").read_text())["num_records"] == 5
    np.save(path, np.zeros((4, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="does not hold what"):
        ImageCache(easy(5), 32, path=path)
