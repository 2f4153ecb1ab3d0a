"""The source: its contract, labels, and what it says of bad arguments."""

import pickle

import numpy as np
import pytest

from vlp_jax.data.scenes import MAX_COUNT, SHAPES, SPLITS, Scenes


def test_sizes_of_the_splits():
    assert Scenes().num_records is None
    assert Scenes(num_records=20_000).num_records == 20_000
    for split in SPLITS[1:]:
        assert Scenes(split=split).num_records == 2000
        assert Scenes(split=split, num_records=7).num_records == 7


def test_a_subset_is_the_beginning_of_the_unbounded_split():
    assert Scenes(num_records=10).caption(9, 0) == Scenes().caption(9, 0)


def test_num_captions():
    counts = Scenes().num_captions(np.arange(4))
    assert counts.dtype == np.int64
    assert counts.tolist() == [5, 5, 5, 5]


def test_a_pickled_copy_is_the_same_source():
    source = Scenes(level="easy", split="val", seed=3)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.caption(5, 1) == source.caption(5, 1)
    assert np.array_equal(copy.image(5, 32), source.image(5, 32))
    assert copy.questions(5) == source.questions(5)


def test_labels_describe_the_largest_object():
    source = Scenes()
    labels = source.labels(np.arange(50))
    assert set(labels) == {"shape", "colour", "size", "texture", "count"}
    for record in range(50):
        objects = source.scene(record).objects
        largest = max(objects, key=lambda obj: obj.radius)
        assert labels["shape"][record] == largest.shape
        assert labels["colour"][record] == largest.colour
        assert labels["size"][record] == largest.size
        assert labels["texture"][record] == largest.texture
        assert labels["count"][record] == len(objects)
    assert all(values.dtype == np.int32 for values in labels.values())
    assert labels["count"].max() <= MAX_COUNT
    assert labels["shape"].max() < len(SHAPES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, r"data\.sources\.toy\.split must be one of train, val, test, comp"),
        ({"level": "hrad"}, r"data\.sources\.toy\.level must be one of easy, full, hard; got 'hr"),
        ({"seed": -1}, r"data\.sources\.toy\.seed must be 0 or more; got -1"),
        ({"num_records": 0}, r"data\.sources\.toy\.num_records must be at least 1, or None"),
    ],
)
def test_bad_arguments_name_the_config_key(arguments, message):
    with pytest.raises(ValueError, match=message):
        Scenes(name="toy", **arguments)


@pytest.mark.parametrize("record", [-1, 2000])
def test_records_outside_the_split_are_refused(record):
    with pytest.raises(IndexError, match=f"record {record} is outside the val split of 2000"):
        Scenes(split="val").image(record, 32)


def test_large_seeds_differ():
    assert Scenes(seed=2**40).scene(0) != Scenes(seed=0).scene(0)
