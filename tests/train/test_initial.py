"""Runs that start from another run's parameters, and the predictor over a checkpoint."""

import functools
import json
import shutil
import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from tiny import tiny_model
from tiny_config import get_config

from vlp_jax.compress.buckets import Bucket
from vlp_jax.data.augment import normalize
from vlp_jax.data.batch import EXTRA_FIELDS, FIELDS, batch_spec
from vlp_jax.data.decode import decode_image
from vlp_jax.infra.checkpoint_reader import load_params
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.manifest import CheckpointMismatchError
from vlp_jax.models.image_tower import image_tower
from vlp_jax.models.pretrained import Metadata, NoPartFits, WeightsError, save_parameters
from vlp_jax.models.tuning_config import tuning_config
from vlp_jax.objectives import build_objectives
from vlp_jax.objectives.classification import Classification
from vlp_jax.predict import Predictor
from vlp_jax.train.checks import check_classes
from vlp_jax.train.config import default_config
from vlp_jax.train.initial import Origin, read_origin
from vlp_jax.train.setup import plain, prepare


def save(config, workdir):
    """A run that stopped before its first update."""
    setup = prepare(config, workdir)
    with setup.open_checkpoints() as checkpoints:
        checkpoints.save(0, setup.first_state()[0], {}, setup.checkpoint_extra())
        checkpoints.wait()
    return setup


def small_config(objectives, **changes):
    config = get_config()
    config.optim.ema_decay = 0.0
    config.checkpoint.best_metric = ""
    with config.unlocked():
        config.evals = {}
        config.objectives = objectives
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A pretrained run of another width than the default."""
    workdir = tmp_path_factory.mktemp("origin")
    objectives = {
        "mlm": {},
        "ar": {},
        "itc": {"embedding_dim": 8},
        "itm": {"readout": "auto"},
    }
    changes = {"model.text.width": 24, "model.image.width": 24}
    return save(small_config(objectives, **changes), workdir)


def downstream(origin, **changes):
    changes = {"init_from": str(origin.workdir), "adopt_model": True, **changes}
    objectives = {"answers": {"type": "entailment", "num_classes": 3, "readout": "auto"}}
    return small_config(objectives, **changes)


def test_parameters_geometry_tokenizer_and_readout_are_taken_over(origin, tmp_path):
    setup = prepare(downstream(origin), tmp_path)
    assert setup.config.model.text.width == 24
    assert setup.config.objectives.answers.readout == "bidirectional"  # what MLM has trained
    assert setup.tokenizer.to_json() == origin.tokenizer.to_json()
    state, report = setup.first_state()
    there = load_params(origin.workdir / "checkpoints").state
    jax.tree.map(np.testing.assert_array_equal, state.params["image_tower"], there["image_tower"])
    fresh = setup.program.init().params
    jax.tree.map(np.testing.assert_array_equal, state.params["answers_head"], fresh["answers_head"])
    assert {row.parameter.split("/")[0] for row in report.of("new")} == {"answers_head"}
    assert "vocabulary_head" in {
        r.parameter.split("/")[0] or r.sources[0].split("/")[0] for r in report.of("unused")
    }


@pytest.mark.slow
def test_a_shared_stack_is_taken_over_by_a_config_that_names_none(tmp_path):
    """Its type with its geometry, and of a run of images the stack for a task with texts."""
    config = small_config({"mim": {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}})
    with config.unlocked():
        config.model = default_config("shared_tiny").model
    size = {"width": 16, "heads": 2, "mlp_width": 32, "depth": 2, "patch_size": 8}
    config.model.image.update(size)
    config.model.reconstructor.depth = 1
    origin = save(config, tmp_path / "origin")
    setup = prepare(downstream(origin), tmp_path / "run")
    assert (setup.config.model.type, setup.config.model.image.depth) == ("shared", 2)
    state, report = setup.first_state()
    there = load_params(origin.workdir / "checkpoints").state
    jax.tree.map(np.testing.assert_array_equal, state.params["image_tower"], there["image_tower"])
    new = {row.parameter.split("/")[0] for row in report.of("new")}
    assert {"text_embedding", "reconstructor_0", "answers_head"} <= new
    assert "image_tower" not in new


def test_of_a_student_and_its_teacher_the_teacher_is_handed_on(tmp_path):
    """What evaluators saw of the run, and the predictor would."""
    dino = {"hidden_dim": 16, "embedding_dim": 8, "prototypes": 8, "small_size": 8}
    setup = prepare(small_config({"dino": dino}), tmp_path)
    state, _ = setup.first_state()
    extras = state.extras["objectives"]["dino"]
    moved = {**extras, "target": jax.tree.map(lambda x: x + 1.0, extras["target"])}
    state = state.replace(extras={**state.extras, "objectives": {"dino": moved}})
    with setup.open_checkpoints() as checkpoints:
        checkpoints.save(0, state, {}, setup.checkpoint_extra())
        checkpoints.wait()
    found = read_origin(tmp_path).params()
    jax.tree.map(
        np.testing.assert_array_equal, found["image_tower"], moved["target"]["image_tower"]
    )
    with pytest.raises(CheckpointMismatchError, match="extras/absent is absent"):
        load_params(tmp_path / "checkpoints", overlays=("extras/absent",))
    with pytest.raises(CheckpointMismatchError, match=r"holds .* which params does not"):
        load_params(tmp_path / "checkpoints", overlays=("extras/objectives/dino",))


def test_a_begun_run_needs_its_origin_no_more(origin, tmp_path):
    moved = tmp_path / "origin"
    shutil.copytree(origin.workdir, moved)
    run = tmp_path / "run"
    save(downstream(origin, init_from=str(moved)), run)
    shutil.rmtree(moved)
    setup = prepare(downstream(origin, init_from=str(moved)), run)
    assert setup.origin is None
    assert setup.config.model.text.width == 24
    assert setup.config.objectives.answers.readout == "bidirectional"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": "/nowhere"}, r"config\.init_from: /nowhere is neither"),
        ({"init_checkpoint": "newest"}, r"config\.init_checkpoint: 'newest' is no checkpoint"),
        ({"init_checkpoint": "7"}, r"no checkpoint of step 7"),
        ({"adopt_model": False}, r"width|shape|differ"),
        ({"data.image_size": 24, "model.image.patch_size": 4}, None),
    ],
)
def test_misfits_are_found_before_any_device_time(origin, tmp_path, changes, message):
    config = downstream(origin, **changes)
    if message is None:  # another grid of patches is no misfit: the table is resized
        setup = prepare(config, tmp_path)
        _, report = setup.first_state()
        assert [row.parameter for row in report.of("resized")] == ["image_tower/position_embedding"]
        return
    with pytest.raises((ValueError, OSError), match=message):
        prepare(config, tmp_path)


@pytest.mark.slow
def test_a_fine_tuned_run_hands_its_readout_on(origin, tmp_path, caplog):
    """Pretrained by MLM, fine-tuned, and fine-tuned again: still read as MLM has trained it."""
    first = save(downstream(origin), tmp_path / "first")
    again = prepare(downstream(first), tmp_path / "again")
    assert again.config.objectives.answers.readout == "bidirectional"
    itc = save(small_config({"itc": {"embedding_dim": 8}}), tmp_path / "itc")
    silent = prepare(downstream(itc), tmp_path / "silent")
    assert silent.config.objectives.answers.readout == "query"
    assert "does not say which readout it has trained" in caplog.text


def test_a_choice_where_there_is_one_checkpoint_is_refused(origin, tmp_path):
    read_origin(origin.workdir / "checkpoints" / "0")
    for path in (origin.workdir / "checkpoints" / "0", tmp_path / "exported.safetensors"):
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.touch()
        with pytest.raises(ConfigError, match=r"init_checkpoint: '5' of .* is a single one"):
            read_origin(path, "5")


def test_labels_mean_the_same_in_all_sources_and_fit_the_head():
    def source(*classes):
        return types.SimpleNamespace(classes=classes)

    objective = Classification(tiny_model(), "answers", 3)
    check_classes({"a": source("no", "yes"), "b": source(), "c": source("no", "yes")}, [objective])
    with pytest.raises(ConfigError, match=r"data.sources.c: its 2 classes .* data.sources.a"):
        check_classes({"a": source("no", "yes"), "c": source("yes", "no")}, [objective])
    with pytest.raises(ConfigError, match=r"objectives.answers.num_classes: 3 .* has 4"):
        check_classes({"a": source(*"abcd")}, [objective])


def test_another_vocabulary_is_refused(origin, tmp_path):
    other = json.loads(origin.tokenizer.to_json())
    vocabulary = other["model"]["vocab"]
    last, before = sorted(vocabulary, key=vocabulary.get)[-1:-3:-1]
    vocabulary[last], vocabulary[before] = vocabulary[before], vocabulary[last]
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"token"):
        prepare(downstream(origin, **{"tokenizer.path": str(file)}), tmp_path / "run")


@pytest.fixture(scope="module")
def predictor(origin):
    return Predictor.load(origin.workdir)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    files = [folder / f"{i}.png" for i in range(3)]
    for file in files:
        Image.fromarray(draw.integers(0, 256, (30, 40, 3), np.uint8)).save(file)
    return files


def test_the_predictor_is_the_run(origin, predictor):
    arrays = read_origin(origin.workdir).arrays
    assert int(sum(a.size for a in arrays.values())) == sum(
        leaf.size for leaf in jax.tree.leaves(predictor.params)
    )
    assert predictor.tokenizer.to_json() == origin.tokenizer.to_json()


def test_ranking_orders_images_and_texts(predictor, pictures):
    texts = ["a red square", "two circles"]
    images = predictor.embed_images(pictures)
    words = predictor.embed_texts(texts)
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, rtol=1e-5)
    assert predictor.rank(pictures, texts).shape == (3, 2)
    alone = predictor.embed_images(pictures[1:2])
    np.testing.assert_allclose(alone, images[1:2], atol=1e-5)
    assert words.shape == (2, 8)


def test_captions_are_ordered_by_probability(predictor, pictures):
    [first, *_] = predictor.caption(pictures, beams=2, max_length=6)
    scores = [score for _, score in first]
    assert scores == sorted(scores, reverse=True)
    # An array is read as its file is.
    array = np.asarray(Image.open(pictures[0]))
    [again] = predictor.caption([array], beams=2, max_length=6)
    assert [text for text, _ in again] == [text for text, _ in first]


@pytest.fixture(scope="module")
def answering(origin):
    """Kind -> a predictor with a fresh head of four classes, of which three have a name."""
    image, tokenizer = origin.config.data.image_size, origin.tokenizer
    model = origin.program.objectives[0].model
    spec = batch_spec(Bucket(8, image), 1, (*FIELDS, *EXTRA_FIELDS))

    def build(kind):
        config = ConfigDict(plain(origin.config))
        with config.unlocked():
            config.objectives = {"task": {"type": kind, "num_classes": 4}}
        [task] = build_objectives(config.objectives, model, tokenizer.vocabulary)
        params = jax.jit(lambda key: task.init(key, spec)[0])(jax.random.key(3))
        params["task_head"]["classifier"]["bias"] = np.array([0.5, -0.5, 0.0, 9.0], np.float32)
        return Predictor(config, tokenizer, ("no", "maybe", "yes"), params)

    return functools.cache(build)


@pytest.mark.parametrize("kind", ["vqa", "entailment", "nlvr2"])
def test_answers_are_the_named_classes_by_probability(answering, pictures, kind, caplog):
    predictor = answering(kind)
    [task] = predictor.objectives

    def ask(text, first=0):
        if kind == "nlvr2":
            return predictor.compare(pictures[first], pictures[1], text)
        return predictor.answer(pictures[first], text, top=2)

    found = ask("is it red?")
    size = predictor.config.data.image_size
    shown = np.stack([decode_image(file.read_bytes(), size, "") for file in pictures[:2]])
    ids, lengths = predictor.tokenizer.padded(["is it red?"], predictor.config.data.max_text_length)
    batch = {"image": shown[:1], "second_image": shown[1:], "text_ids": ids, "text_length": lengths}
    logits = np.asarray(task.logits(predictor.params, batch), np.float64)[0, :3]
    chances = 1 / (1 + np.exp(-logits))
    if kind != "vqa":
        chances = np.exp(logits) / np.exp(logits).sum()
    best = np.argsort(-chances)[:2]
    assert [answer for answer, _ in found] == [("no", "maybe", "yes")[i] for i in best]
    np.testing.assert_allclose([chance for _, chance in found], chances[best], rtol=1e-4)

    caplog.clear()
    with jax.log_compiles():
        assert ask("is it blue?", first=2) != found
    messages = [record.getMessage() for record in caplog.records]
    assert not [text for text in messages if "ompil" in text], "another picture and question"


def test_images_are_classified_by_probability(answering, pictures):
    predictor = answering("image_classification")
    [task] = predictor.objectives
    found = predictor.classify(pictures, top=2)
    size = predictor.config.data.image_size
    shown = np.stack([decode_image(file.read_bytes(), size, "") for file in pictures])
    logits = np.asarray(task.logits(predictor.params, {"image": shown}), np.float64)[:, :3]
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert len(found) == len(pictures)
    for row, wanted in zip(found, chances, strict=True):
        best = np.argsort(-wanted)[:2]
        assert [label for label, _ in row] == [("no", "maybe", "yes")[i] for i in best]
        np.testing.assert_allclose([chance for _, chance in row], wanted[best], rtol=1e-4)
    with pytest.raises(ValueError, match="this needs vqa or entailment"):
        predictor.answer(pictures[0], "is it red?")


@pytest.mark.slow
def test_a_tower_of_images_alone_embeds_them(origin, pictures):
    """Its class tokens as unit vectors; texts it has none."""
    config = ConfigDict(plain(origin.config))
    with config.unlocked():
        config.objectives = {"simclr": {}}
    predictor = Predictor(config, origin.tokenizer, (), origin.first_state()[0].params)
    found = predictor.embed_images(pictures)
    shown = np.stack([decode_image(f.read_bytes(), config.data.image_size, "") for f in pictures])
    tower = image_tower(predictor.model.config.image)
    tokens = tower.apply({"params": predictor.params["image_tower"]}, normalize(shown))
    wanted = np.asarray(tokens)[:, 0]
    wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    with pytest.raises(ValueError, match="this needs itc"):
        predictor.embed_texts(["a red square"])


def test_captions_need_a_forward_stream_that_was_trained(origin, pictures):
    config = ConfigDict(plain(origin.config))
    weights = {"reconstruction": 1.0, "forward": 0.0, "reverse": 1.0}
    with config.unlocked():
        config.objectives = {"flm": {"loss_weights": weights}}
    predictor = Predictor(config, origin.tokenizer, (), {})
    with pytest.raises(ValueError, match=r"needs ar, prefix_lm, or flm with loss_weights\.forward"):
        predictor.caption(pictures)
    with pytest.raises(ValueError, match="shortlist=0: give 1 or more"):
        predictor.rank(pictures, ["red"], shortlist=0)


def test_what_a_checkpoint_cannot_do_is_said(predictor, pictures, tmp_path):
    with pytest.raises(ValueError, match="needs vqa or entailment: fine-tune it"):
        predictor.answer(pictures[0], "what?")
    with pytest.raises(ValueError, match="empty text; give one or more words"):
        predictor.embed_texts([" . "])
    with pytest.raises(ValueError, match="text is not valid UTF-8"):
        predictor.embed_texts(["caf\udce9"])
    with pytest.raises(OSError, match="absent"):
        predictor.embed_images([tmp_path / "absent.jpg"])


def test_a_damaged_origin_is_named_with_its_key(origin, tmp_path):
    moved = tmp_path / "origin"
    shutil.copytree(origin.workdir, moved)
    (moved / "checkpoints" / "0" / "manifest.json").write_text("half a fi")
    with pytest.raises(ConfigError, match=r"config\.init_from: every checkpoint in .* is damaged"):
        prepare(downstream(origin, init_from=str(moved)), tmp_path / "run")


def test_imported_weights_are_no_predictor(origin, tmp_path):
    file = tmp_path / "init.safetensors"
    metadata = Metadata({"model": {}}, origin.tokenizer.to_json())
    save_parameters(file, {"type_embedding": np.zeros((2, 4), np.float32)}, metadata)
    with pytest.raises(ConfigError, match=r"imported weights, .* Fine-tune from it"):
        Predictor.load(file)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((40, 40, 3), np.float32),  # black as bytes, whatever the picture
        np.zeros((40, 40), np.uint8),
        np.zeros((40, 40, 4), np.uint8),
        np.zeros((0, 40, 3), np.uint8),
    ],
)
def test_arrays_that_are_no_rgb_image_are_refused(predictor, image):
    with pytest.raises(ValueError, match=r"give uint8 \[height, width, 3\]"):
        predictor.embed_images([image])


def test_one_instead_of_a_list_is_refused(predictor, pictures):
    for one in (str(pictures[0]), pictures[0], np.zeros((8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="images: give a list"):
            predictor.caption(one)
    with pytest.raises(ValueError, match="texts: give a list"):  # else one text for each letter
        predictor.embed_texts("red")
    with pytest.raises(ValueError, match="images: the list is empty"):
        predictor.embed_images([])


def test_an_image_that_cannot_be_decoded_is_named_with_a_remedy(predictor, tmp_path):
    file = tmp_path / "cat.jpg"
    file.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cat\.jpg .*give a sound JPEG or PNG"):
        predictor.caption([file])


def test_what_is_not_read_of_a_text_is_said(predictor, caplog):
    predictor.embed_texts(["red " * 500, "red \N{SNOWMAN}"])
    cut, unknown = [record.getMessage() for record in caplog.records]
    assert "502 tokens: only the first" in cut
    assert "1 words or signs" in unknown


def test_many_images_are_captioned_as_each_alone(predictor, pictures, monkeypatch):
    whole = predictor.caption(pictures, beams=1, max_length=5)
    monkeypatch.setattr("vlp_jax.predict._ROWS_AT_ONCE", 2)
    for one, other in zip(whole, predictor.caption(pictures, beams=1, max_length=5), strict=True):
        assert [text for text, _ in one] == [text for text, _ in other]


def test_a_second_call_compiles_nothing(predictor, pictures, caplog):
    def rank():
        caplog.clear()
        with jax.log_compiles():
            predictor.rank(pictures, ["red", "blue"])
        return [r.getMessage() for r in caplog.records if "_encode" in r.getMessage()]

    predictor._rankers.clear()
    assert rank()
    assert not rank()


@pytest.mark.parametrize(
    ("shapes", "depth", "error", "told"),
    [
        ({"tower/kernel": (3,)}, 3, WeightsError, r"model\.depth=2 and not 3, so that .* in shape"),
        ({"tower/kernel": (3,)}, 2, WeightsError, r"run: of another architecture: 1 parameters"),
        ({"head/kernel": (2,)}, 3, NoPartFits, r"run: of another architecture: it holds tower"),
    ],
)
def test_a_misfit_names_the_geometry_that_differs(shapes, depth, error, told):
    config = {"model": {"depth": 2, "dtype": "float32"}}
    origin = Origin("run", 1, {"tower/kernel": np.zeros(2)}, config, "", ())
    with pytest.raises(WeightsError, match=told) as raised:
        origin.check_fit(shapes, {"depth": depth, "dtype": "bfloat16"})
    assert raised.type is error


@pytest.mark.slow
def test_a_tuned_model_starts_from_a_plain_one_and_not_the_other_way_round(origin, tmp_path):
    """Adapters are fresh, skipped parts are left over; what lacks them is told by its keys."""
    config = downstream(origin)
    config.objectives.answers.readout = "bidirectional"
    with config.unlocked():
        config.model.tuning = tuning_config()
        config.model.tuning.skip = ("text_upper_0/mlp",)
        config.model.tuning.adapter.kind = "serial"
        config.model.tuning.prompt.update(kind="deep", length=3)
    setup = prepare(config, tmp_path / "tuned")
    state, report = setup.first_state()
    rows = {row.parameter: row.status for row in report.rows}
    assert rows["text_upper_0/cross_attention_adapter/up/kernel"] == "new"
    assert rows["text_upper_0/mlp_replacement/up/kernel"] == "new"
    assert rows["text_upper_0/prompt/tokens"] == "new"
    assert rows["text_upper_0/self_attention/query/kernel"] == "used"
    assert "mlp" not in state.params["text_upper_0"]
    assert ("unused", (24, 48)) in {(row.status, row.shape) for row in report.rows}
    tuned = save(config, tmp_path / "saved")
    plain = downstream(tuned)
    named = r'made with config\.model\.tuning\.adapter\.kind="serial" and not "", config\.model\.'
    named += r'tuning\.prompt\.kind="deep" and not "", .*config\.model\.tuning\.skip=.*_upper_0/mlp'
    named += r".*Skip the units that these weights lack \(config\.model\.tuning\.skip\)"
    with pytest.raises(WeightsError, match=named):
        prepare(plain, tmp_path / "plain")
