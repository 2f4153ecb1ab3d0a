"""The top of a ranking is guarded, and what cannot be is told."""

import json

import numpy as np
import pytest

from tests.tiny_config import get_config
from vlp_jax.data.guarded import keep_guarded, kept_guarded, read_guarded
from vlp_jax.data.sources import build_source
from vlp_jax.infra.errors import ConfigError


def rows_of(records, source="scenes", split="train"):
    return [
        {"rank": rank, "source": source, "split": split, "record": record}
        for rank, record in enumerate(records, start=1)
    ]


def read(tmp_path, rows, percent=50.0, **section):
    file = tmp_path / "compressed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = get_config()
    with config.unlocked():
        config.data.sources.scenes.update(section)
    config.compression.guard_file = str(file)
    config.compression.guard_percent = percent
    return read_guarded(config, {"scenes": build_source(config, "scenes")})


@pytest.mark.parametrize(
    ("percent", "records"),
    [(50.0, [3, 9]), (1.0, [9]), (75.0, [3, 9, 400]), (100.0, [3, 9, 11, 400])],
)
def test_the_top_of_the_ranking_is_guarded(tmp_path, percent, records):
    found = read(tmp_path, rows_of([9, 3, 400, 11])[::-1], percent)
    np.testing.assert_array_equal(found["scenes"], records)
    assert found["scenes"].dtype == np.int64
    keep_guarded(tmp_path / "guarded.json", found)
    again = kept_guarded(tmp_path / "guarded.json")
    assert list(again) == ["scenes"]
    np.testing.assert_array_equal(again["scenes"], records)


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (rows_of([1]), {"percent": 0.0}, r"guard_percent: 0\.0"),
        (rows_of([1]), {"percent": 101.0}, r"guard_percent: 101\.0"),
        ([], {}, "guard_file: .* ranks nothing"),
        ([{"rank": 1}], {}, "guard_file: .* is no ranking .*'source'"),
        (rows_of([1], source="photos"), {}, "ranks the source 'photos'.*There are .*scenes"),
        (rows_of([1], split="val"), {}, "ranks 'val' of 'scenes', and this run trains on 'train'"),
        (rows_of([512]), {}, "names record 512 of 'scenes', which has 512"),
        (rows_of([1]), {"num_records": None}, r"no end.*data\.sources\.scenes\.num_records"),
    ],
)
def test_what_cannot_be_guarded_is_told(tmp_path, rows, arguments, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, rows, **arguments)


def test_a_file_that_is_none_is_named(tmp_path):
    config = get_config()
    config.compression.guard_file = str(tmp_path / "absent.jsonl")
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        read_guarded(config, {})
