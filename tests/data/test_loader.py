import gc
import logging
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from tests.data.fake import TOKENIZER, Fake, FakePairs, planned
from vlp_jax.data.batch import FIELDS, batch_spec
from vlp_jax.data.cache import ImageCache
from vlp_jax.data.eval_plan import EvalPlan
from vlp_jax.data.loader import MAX_PLACES, BadCounts, Loader
from vlp_jax.data.plan import Plan
from vlp_jax.data.source import NothingReadable

EDGES = (8, 12, 16, 24)
DAMAGED = (3, 4, 10, 17, 31)


def plan_of(*sources, batch_size=8):
    return Plan(sources or [planned(Fake())], batch_size, 0, EDGES, image_size=4)


def load(plan, start=0, stop=40, **kwargs):
    with Loader(plan, start, stop, **kwargs) as loader:
        return list(loader)


def assert_same(left, right):
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys() == FIELDS.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_batches_are_as_planned_and_declared():
    plan = plan_of()
    for t, batch in enumerate(load(plan)):
        planned_batch = plan.batch(t)
        for name, spec in batch_spec(planned_batch.bucket, 8).items():
            assert batch[name].shape == spec.shape, name
            assert batch[name].dtype == spec.dtype, name
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], planned_batch.record)
        np.testing.assert_array_equal(batch["text_length"], planned_batch.length)
        np.testing.assert_array_equal(batch["position"], planned_batch.position)
        assert batch["valid"].all()
        assert not batch["replaced"].any()
        for row, length in enumerate(batch["text_length"]):
            ids = batch["text_ids"][row]
            captions = plan.sources[0].captions
            np.testing.assert_array_equal(
                ids[:length],
                captions.ids(planned_batch.record[row], planned_batch.caption[row]),
            )
            assert (ids[length:] == TOKENIZER.pad_id).all()


@pytest.mark.parametrize("damaged", [(), DAMAGED])
def test_resumed_equals_uninterrupted_whatever_the_threads(damaged):
    plan = plan_of(planned(Fake(damaged=damaged)))
    whole = load(plan, threads=4, prefetch=8)
    assert_same(load(plan, start=23, threads=0), whole[23:])
    assert_same(load(plan, start=0, stop=5, threads=1, prefetch=1), whole[:5])
    assert load(plan, start=7, stop=7) == []


@pytest.mark.parametrize("hosts", [2, 4])
def test_slices_of_hosts_make_up_the_global_batch_also_with_damage(hosts):
    sources = planned(Fake(40, "a", DAMAGED)), planned(Fake(40, "b", (5, 6)), 0.5)
    plan = plan_of(*sources)
    whole = load(plan)
    parts = [load(plan, host=host, hosts=hosts) for host in range(hosts)]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in FIELDS}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)
    assert sum(batch["replaced"].sum() for batch in whole) > 0


def test_a_damaged_record_is_replaced_by_one_of_its_source_that_fits(caplog):
    source = Fake(50, damaged=DAMAGED)
    plan = plan_of(planned(source), planned(Fake(60, "other")))
    with caplog.at_level(logging.WARNING), Loader(plan, 0, 60) as loader:
        batches = list(loader)
    replaced = 0
    for t, batch in enumerate(batches):
        want = plan.batch(t)
        for row in range(8):
            is_damaged = want.source[row] == 0 and want.record[row] in DAMAGED
            assert (batch["replaced"][row] > 0) == is_damaged
            record = int(batch["image"][row, 0, 0, 0])
            replaced += int(batch["replaced"][row])
            if not is_damaged:
                assert record == want.record[row]
                continue
            assert record not in DAMAGED
            length = batch["text_length"][row]
            captions = range(source.num_captions(np.asarray([record]))[0])
            assert any(
                np.array_equal(plan.sources[0].captions.ids(record, i), got)
                for i in captions
                for got in [batch["text_ids"][row, :length]]
            )
            assert record not in want.record[want.source == 0]  # not twice in a batch
    assert replaced > 5
    assert loader.bad.total == replaced
    assert set(loader.bad.counts) == {"torn picture", "burnt picture"}
    places = loader.bad.places()  # all of them, each once, however often it was met
    assert len(set(places)) == len(places) == len(DAMAGED)
    assert {kind for kind, _ in places} == {"torn picture", "burnt picture"}
    assert len(caplog.records) == 2  # once a kind
    assert "record" in caplog.text


def test_places_of_bad_examples_are_kept_up_to_a_limit():
    bad = BadCounts()
    for number in range(MAX_PLACES + 5):
        for _ in range(2):
            bad.add("torn picture", f"{number}.jpg")
    assert bad.total == 2 * (MAX_PLACES + 5)
    assert bad.places() == [("torn picture", f"{number}.jpg") for number in range(MAX_PLACES)]
    again = pickle.loads(pickle.dumps(bad))
    assert (again.counts, again.places()) == (bad.counts, bad.places())


class OneByOne(ImageCache):
    """A cache that is read row by row."""

    damaged = rows = None


CACHED = {
    "whole": [(Fake(60), 1.0, True)],
    "damaged": [(Fake(60, damaged=DAMAGED), 1.0, True)],
    "beside another": [
        (Fake(60, "a", DAMAGED), 1.0, True),
        (Fake(40, "b", (5, 6)), 0.5, False),
        (Fake(50, "c"), 0.3, True),
    ],
    "extra fields": [(FakePairs(60, damaged=DAMAGED, second_damaged=(8, 9)), 1.0, True)],
    "extra fields beside another": [
        (FakePairs(60, "a", second_damaged=(8, 9)), 1.0, True),
        (FakePairs(40, "b", second_damaged=(1,)), 1.0, False),
    ],
}


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("sources", CACHED.values(), ids=CACHED)
def test_rows_read_at_once_are_those_read_one_by_one(sources, extra, fixed):
    extra_fields = sources[0][0].extra_fields if extra else ()

    def read(cache):
        mixture = [
            planned(cache(source, 4) if cached else source, weight)
            for source, weight, cached in sources
        ]
        plan = EvalPlan(mixture[0], 60, 8, EDGES, 4) if fixed else plan_of(*mixture)
        stop = plan.num_batches if fixed else 40
        with Loader(plan, 0, stop, threads=0, fields=(*FIELDS, *extra_fields)) as loader:
            return list(loader), loader.bad.counts

    at_once, bad = read(ImageCache)
    one_by_one, also_bad = read(OneByOne)
    uncached, bad_too = read(lambda source, size: source)
    assert bad == also_bad == bad_too
    for batches in zip(at_once, one_by_one, uncached, strict=True):
        assert list(batches[0]) == [*FIELDS, *extra_fields]
        for name, want in batches[2].items():
            for batch in batches[:2]:
                assert batch[name].dtype == want.dtype
                np.testing.assert_array_equal(batch[name], want)


def test_a_cache_is_read_at_once(monkeypatch):
    plan = plan_of(planned(ImageCache(Fake(60, damaged=DAMAGED), 4)))
    expected = load(plan)
    read = []
    one = ImageCache.image
    monkeypatch.setattr(
        ImageCache, "image", lambda *arguments: read.append(arguments) or one(*arguments)
    )
    assert_same(load(plan), expected)
    replaced = sum(int((batch["replaced"] > 0).sum()) for batch in expected)
    assert replaced < len(read) < 4 * replaced  # damaged rows and what stands in for them


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_is_an_error_that_names_the_source(workers):
    """One of its own, by which a run ends with its own code; also out of another process."""
    plan = plan_of(planned(Fake(9, "ruin", damaged=range(9))))
    with pytest.raises(
        NothingReadable, match=r"data\.sources\.ruin: . records tried .* step 0 .* picture: record"
    ):
        load(plan, workers=workers)


def test_a_fixed_set_is_not_replaced():
    plan = EvalPlan(planned(Fake(30, damaged=DAMAGED)), 30, 8, EDGES, 4)
    seen = []
    for t, batch in enumerate(load(plan, stop=plan.num_batches)):
        want = plan.batch(t)
        damaged = np.isin(want.record, DAMAGED)
        np.testing.assert_array_equal(batch["replaced"], damaged)
        np.testing.assert_array_equal(batch["valid"], want.valid & ~damaged)
        assert not batch["image"][damaged].any()
        np.testing.assert_array_equal(batch["text_length"], want.length)
        seen += batch["image"][batch["valid"], 0, 0, 0].tolist()
    assert sorted(seen) == sorted(set(range(30)) - set(DAMAGED))


def test_positions_past_int32_wrap():
    plan = plan_of()
    t = 2**31 // 8
    (batch,) = load(plan, start=t, stop=t + 1)
    np.testing.assert_array_equal(batch["position"], np.arange(8))


def test_closing():
    loader = Loader(plan_of(), 0, 1000)
    next(loader)
    assert loader.step == 1
    loader.close()
    loader.close()
    with pytest.raises(ValueError, match="the loader is closed"):
        next(loader)
    forgotten = Loader(plan_of(), 0, 1000)
    next(forgotten)
    del forgotten
    gc.collect()  # pytest turns what a deletion raises into a failure


def test_bad_numbers_name_their_key():
    plan = plan_of()
    with pytest.raises(ValueError, match=r"data\.batch_size=8: 3 hosts do not divide it"):
        Loader(plan, 0, 1, hosts=3)
    with pytest.raises(ValueError, match=r"data\.workers: -1"):
        Loader(plan, 0, 1, workers=-1)
    with pytest.raises(ValueError, match=r"data\.prefetch: 1 is less than data\.threads=2"):
        Loader(plan, 0, 1, threads=2, prefetch=1)
    with pytest.raises(ValueError, match="total_steps: the run was restored at step 3"):
        Loader(plan, 3, 1)


def children(pid):
    """Process ids below a process, of which only the workers matter here."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def is_alive(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.slow
def test_worker_processes_give_the_same_batches_and_leave():
    plan = plan_of(planned(Fake(damaged=DAMAGED)))
    expected = load(plan)
    with Loader(plan, 0, 40, workers=2, threads=1, prefetch=1) as loader:
        got = [{name: array.copy() for name, array in batch.items()} for batch in loader]
        workers = children(os.getpid())
    assert_same(got, expected)
    assert loader.bad.total == sum(int(batch["replaced"].sum()) for batch in expected)
    with Loader(plan, 0, 40, workers=2, threads=1, prefetch=1) as loader:
        next(loader)  # closed long before the end
        workers += children(os.getpid())
    assert len(workers) >= 2
    tracker = [pid for pid in workers if "resource_tracker" in command_line(pid)]
    assert not [pid for pid in workers if is_alive(pid) and pid not in tracker]


def command_line(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return ""


SCRIPT = """
    import signal
    import time
    from tests.data.fake import Fake, planned
    from vlp_jax.data.loader import Loader
    from vlp_jax.data.plan import Plan

    if __name__ == "__main__":
        # A shell has its background jobs ignore SIGINT, and so what they start.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        plan = Plan([planned(Fake())], 8, 0, (8, 12, 16, 24), image_size=4)
        with Loader(plan, 0, 1000, workers=2, threads=1, prefetch=1) as loader:
            for _ in range(4):  # until both workers have started in full
                next(loader)
            print("ready", flush=True)
            time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_the_main_process(tmp_path, how):
    script = tmp_path / "main.py"
    script.write_text(textwrap.dedent(SCRIPT))
    repo = pathlib.Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repo)},
        start_new_session=True,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        workers = children(process.pid)
        assert len(workers) >= 2
        if how == signal.SIGINT:
            os.killpg(process.pid, how)  # as the terminal does
        else:
            process.send_signal(how)
        _, stderr = process.communicate(timeout=30)
    deadline = time.monotonic() + 15
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_alive, workers))
    if how == signal.SIGINT:
        assert stderr.count("KeyboardInterrupt") == 1  # the main process's; workers keep quiet
