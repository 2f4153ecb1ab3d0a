"""The shipped configs fit the real pack, and the one for photographs runs on it."""

import json

import pytest

from configs.flm_folder import get_config
from configs.transfer import captioning, glue, retrieval
from vlp_jax.data.sources import build_source
from vlp_jax.infra.preemption import ExitCode
from vlp_jax.train.loop import train
from vlp_jax.train.setup import prepare


@pytest.mark.pack
@pytest.mark.parametrize("task", [captioning, retrieval])
@pytest.mark.parametrize("split", ["val", "test"])
def test_every_image_of_the_pack_is_captioned_and_ranked(pack, task, split):
    config = task.get_config("pack")
    config.data.root = str(pack)
    source = build_source(config, "captions", split)
    wanted = config.evals[split].num_examples
    assert wanted == 0 if split == "test" else wanted == source.num_records  # 0: all of them


@pytest.mark.pack
def test_the_sentences_of_the_pack_are_a_run(pack, tmp_path):
    config = glue.get_config("pack,shared_tiny")
    config.data.root = str(pack / "text")
    setup = prepare(config, tmp_path)
    source = setup.sources["sentences"]
    assert source.task == "sst2"
    assert 17_000 < source.num_records < 19_000  # nine tenths of 20,000
    assert setup.evaluators["test"].figures == ("accuracy", "score", "majority")
    assert setup.total_steps == 3 * source.num_records // 32


@pytest.mark.slow
@pytest.mark.pack
def test_flm_folder_trains_on_the_pack_and_reports_its_photographs(pack, tmp_path, capsys):
    config = get_config()
    config.data.root = str(pack)
    config.total_steps = 4
    config.data.text_edges = (32,)
    assert train(prepare(config, tmp_path / "run")) == ExitCode.OK
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["metrics"]["reconstruction/unigram_entropy"] > 4.0
    assert summary["metrics"]["train/replaced"] == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/png;base64") >= 16  # eight photographs, each with its heat map
