"""Use a checkpoint on one's own images and texts.

    predictor = Predictor.load("WORKDIR")                 # or a .safetensors file
    predictor.caption(["cat.jpg"])                        # [[("a cat on a mat", -3.1)]]
    predictor.answer("cat.jpg", "what is this?")          # [("cat", 0.93), ...]
    predictor.rank(["cat.jpg", "dog.jpg"], ["a cat"])     # float32 [images, texts]
    predictor.classify(["cat.jpg"])                       # [[("cat", 0.93), ...]]
    predictor.classify_texts(["a fine film"])             # [[("positive", 0.97), ...]]
    predictor.score_texts([("a cat sat", "a cat ran")])   # float32 [n]
    predictor.embed_images(["cat.jpg"])                   # float32 [n, E], unit vectors

Which of these a checkpoint can do depends on the objectives it was trained with; the others say
which objective is missing. On the command line: ``python -m tools.predict``.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from vlp_jax.data.captions import token_rows
from vlp_jax.data.decode import decode_image, resize_centre
from vlp_jax.data.files import text_fault
from vlp_jax.data.source import PAIR_SEPARATOR, BadExample
from vlp_jax.data.tasks.glue import NUM_SENTENCES
from vlp_jax.data.tokenizer import Tokenizer, normalise_caption
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import make_mesh
from vlp_jax.models.heads import unit
from vlp_jax.models.sizes import build_model
from vlp_jax.objectives import build_objectives, captioner
from vlp_jax.objectives.base import Params
from vlp_jax.objectives.classification import NLVR2, VQA, Classification, Classifier
from vlp_jax.objectives.contrastive import ITC, ITM
from vlp_jax.objectives.image_classification import ImageClassification
from vlp_jax.objectives.invariance import Invariance
from vlp_jax.objectives.text_tasks import TextClassification, TextRegression
from vlp_jax.objectives.tower import image_features
from vlp_jax.train.initial import read_origin
from vlp_jax.transfer.generate import caption_search, generate
from vlp_jax.transfer.quantize import quantized
from vlp_jax.transfer.ranking import Ranker

Image = str | pathlib.Path | np.ndarray  # a file, or uint8 [H, W, 3]
Text = str | tuple[str, str]  # two sentences, of tasks that read two
T = TypeVar("T")

QUANTIZE = ("", "int8")  # how the weights of blocks are held
_ROWS_AT_ONCE = 64  # images or texts on the device


class Predictor:
    """A checkpoint, ready to use.

    Attributes:
        config: of the run that made it.
        tokenizer: of that run.
        classes: what its classification head tells apart; () without one.
        params: of the model, on the default device.
    """

    def __init__(
        self, config: ConfigDict, tokenizer: Tokenizer, classes: tuple[str, ...], params: Params
    ):
        """See ``load``."""
        self.config, self.tokenizer, self.classes = config, tokenizer, classes
        vocabulary = tokenizer.vocabulary
        self.model = build_model(
            config.model, vocabulary.size, vocabulary.mask_id, config.data.image_size
        )
        self.objectives = build_objectives(config.objectives, self.model, vocabulary)
        self.params = jax.device_put(params)
        # These keep what they have compiled.
        self._rankers: dict[tuple[bool, int], Ranker] = {}
        self._logits = {
            objective.name: jax.jit(objective.logits)
            for objective in self.objectives
            if isinstance(objective, Classifier)
        }
        self._scores = {
            objective.name: jax.jit(objective.scores)
            for objective in self.objectives
            if isinstance(objective, TextRegression)
        }
        self._features = jax.jit(functools.partial(image_features, self.model.config.image))

    @classmethod
    def load(
        cls,
        path: str | pathlib.Path,
        checkpoint: str = "latest",
        base: str = "",
        quantize: str = "",
    ) -> "Predictor":
        """Read a run's workdir, one of its checkpoints, or an exported parameter file.

        Args:
            path: of any of these.
            checkpoint: of a workdir: ``latest``, ``best`` or a step.
            base: of tunables alone: where their base lies, if no longer where it was.
            quantize: ``int8``: the weights of blocks are held in eight bits, see
                ``transfer.quantize``; empty: in float32.

        Raises:
            ValueError, OSError: the message names the file and the remedy.
        """
        if quantize not in QUANTIZE:
            raise ValueError(f"quantize={quantize!r} is none of {QUANTIZE}")
        origin = read_origin(path, checkpoint, base)
        if not origin.tokenizer:
            raise ConfigError("init_from", f"{path} holds no tokenizer", "Use a run's checkpoint")
        if not origin.objectives:
            raise ConfigError(
                "init_from",
                f"{path} holds imported weights, which no objective of this project has trained",
                "Fine-tune from it (configs/transfer/) and use the checkpoint of that run",
            )
        return cls(
            ConfigDict(origin.config),
            Tokenizer.from_json(origin.tokenizer, str(path)),
            origin.classes,
            quantized(origin.params()) if quantize else origin.params(),
        )

    def answer(self, image: Image, question: str, top: int = 5) -> list[tuple[str, float]]:
        """The best answers with their probabilities, best first.

        For VQA each answer's own probability; for entailment they sum to 1.
        """
        task = self._objective(Classification, "vqa or entailment", but=NLVR2)
        return self._classify(task, [image], question, top)

    def compare(self, first: Image, second: Image, statement: str) -> list[tuple[str, float]]:
        """Whether a statement about two images is true: both classes with probabilities."""
        return self._classify(self._objective(NLVR2, "nlvr2"), [first, second], statement, 2)

    def classify(self, images: Sequence[Image], top: int = 5) -> list[list[tuple[str, float]]]:
        """The best classes of each image with their probabilities, best first.

        Args:
            images: files or arrays.
            top: most classes of each; the probabilities of all sum to 1.
        """
        task = self._objective(ImageClassification, "image_classification")
        pixels = self._pixels(images)
        logits = [
            self._logits[task.name](self.params, {"image": pixels[part]})
            for part in _parts(len(pixels))
        ]
        return [self._best(task, row, top) for row in np.concatenate(jax.device_get(logits))]

    def classify_texts(self, texts: Sequence[Text], top: int = 5) -> list[list[tuple[str, float]]]:
        """The best classes of each text, read without an image, with probabilities, best first.

        Args:
            texts: of one sentence or of two, as the task has them.
            top: most classes of each; the probabilities of all sum to 1.
        """
        task = self._objective(TextClassification, "text_classification")
        logits = self._of_texts(self._logits[task.name], texts)
        return [self._best(task, row, top) for row in logits]

    def score_texts(self, texts: Sequence[Text]) -> np.ndarray:
        """What ``text_regression`` makes of each text, in units of its target: float32 [n]."""
        task = self._objective(TextRegression, "text_regression")
        return self._of_texts(self._scores[task.name], texts)

    def caption(
        self, images: Sequence[Image], beams: int = 3, max_length: int = 0
    ) -> list[list[tuple[str, float]]]:
        """Captions of each image with their log-probabilities, best first.

        Args:
            images: files or arrays.
            beams: captions of each; 1: greedy search.
            max_length: most tokens with <s> and </s>; 0: ``data.max_text_length`` of the run.

        Raises:
            ValueError, OSError: an image or an argument cannot be used; this holds for all methods.
        """
        if not any(captioner(objective) for objective in self.objectives):
            raise self._missing("ar, prefix_lm, or flm with loss_weights.forward")
        search = caption_search(
            self.tokenizer, max_length or self.config.data.max_text_length, beams=beams
        )
        pixels = self._pixels(images)
        batches = [
            jax.device_get(generate(self.model, self.params, pixels[part], search))
            for part in _parts(len(pixels))
        ]
        ids, lengths, scores = map(np.concatenate, zip(*batches, strict=True))
        return [
            [
                (self.tokenizer.decode(ids[row, k, 1 : lengths[row, k] - 1]), float(score))
                for k, score in enumerate(scores[row])
                if np.isfinite(score)
            ]
            for row in range(len(ids))
        ]

    def embed_images(self, images: Sequence[Image]) -> np.ndarray:
        """Unit vectors: float32 [n, E].

        Those of ``itc``; without one, the class tokens of a tower that was trained by views of
        images (SimCLR, SimSiam, MoCo v3, DINO), as the evaluator ``neighbours`` compares them.
        """
        if self._has(Invariance) and not self._has(ITC):
            pixels = self._pixels(images)
            parts = [
                unit(self._features(self.params, pixels[part])) for part in _parts(len(pixels))
            ]
            return np.concatenate(jax.device_get(parts))
        ranker = self._ranker(len(images), matching=False)
        return ranker.encode_images(self.params, [self._pixels(images)]).embeddings

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors: float32 [n, E]."""
        ranker = self._ranker(len(texts), matching=False)
        return ranker.encode_texts(self.params, *self._tokens(texts)).embeddings

    def rank(
        self, images: Sequence[Image], texts: Sequence[str], shortlist: int = 128
    ) -> np.ndarray:
        """How well each text describes each image: float [images, texts], higher is better.

        Cosines; where the checkpoint has an ``itm``, it re-ranks the best ``shortlist`` of each
        row and column, and only the order within a row or a column means something.
        """
        if shortlist < 1:
            raise ValueError(f"shortlist={shortlist}: give 1 or more")
        matching = self._has(ITM)
        ranker = self._ranker(max(len(images), len(texts)), matching)
        pixels, tokens = self._pixels(images), self._tokens(texts)
        encoded = ranker.encode_images(self.params, [pixels])
        encoded_texts = ranker.encode_texts(self.params, *tokens)
        if matching:
            return ranker.rerank(self.params, encoded, encoded_texts, shortlist)
        return encoded.embeddings @ encoded_texts.embeddings.T

    def _classify(
        self, task: Classification, images: Sequence[Image], text: str, top: int
    ) -> list[tuple[str, float]]:
        ids, lengths = self._tokens([text])
        pixels = self._pixels(images)
        batch: dict[str, Any] = {"image": pixels[:1], "text_ids": ids, "text_length": lengths}
        if len(images) > 1:
            batch["second_image"] = pixels[1:]
        return self._best(task, np.asarray(self._logits[task.name](self.params, batch))[0], top)

    def _of_texts(self, run: Callable[..., jax.Array], texts: Sequence[Text]) -> np.ndarray:
        """What a task makes of texts: [n, ...]."""
        _check_several(texts, "texts")
        self._check_sentences(texts)
        ids, lengths = self._tokens(texts)
        parts = [
            run(self.params, {"text_ids": ids[part], "text_length": lengths[part]})
            for part in _parts(len(ids))
        ]
        return np.concatenate(jax.device_get(parts))

    def _check_sentences(self, texts: Sequence[Text]) -> None:
        """Refuse a sentence where the task has two, and the other way round."""
        tasks = [
            section.task
            for name, section in self.config.data.sources.items()
            if section.get("type", name) == "glue"
        ]
        for task in tasks:
            count = NUM_SENTENCES[task]
            for text in texts:
                if (len(text) if isinstance(text, tuple) else 1) != count:
                    wanted = {1: "one sentence", 2: "two sentences, (first, second)"}[count]
                    raise ValueError(
                        f"{text!r}: this checkpoint was trained on {task}; give {wanted}"
                    )

    def _best(self, task: Classifier, logits: np.ndarray, top: int) -> list[tuple[str, float]]:
        """The classes with the largest of the logits [C], with probabilities, best first."""
        logits = logits[: len(self.classes)]
        if isinstance(task, VQA):
            chances = 1.0 / (1.0 + np.exp(-logits))
        else:
            chances = np.exp(logits - np.logaddexp.reduce(logits))
        best = np.argsort(-chances, kind="stable")[:top]
        return [(self.classes[i], float(chances[i])) for i in best]

    def _ranker(self, rows: int, matching: bool) -> Ranker:
        """One that encodes about as many rows at a time as there are, for it fills up the rest."""
        itc = self._objective(ITC, "itc")
        itm = self._objective(ITM, "itm") if matching else None
        size = min(1 << max(rows - 1, 0).bit_length(), _ROWS_AT_ONCE)
        if (matching, size) not in self._rankers:
            mesh = make_mesh(devices=jax.devices()[:1])
            self._rankers[matching, size] = Ranker(itc, itm, mesh, batch_size=size)
        return self._rankers[matching, size]

    def _tokens(self, texts: Sequence[Text]) -> tuple[np.ndarray, np.ndarray]:
        """Padded ids int32 [n, N] and lengths int32 [n]; warns of what the model cannot read."""
        _check_several(texts, "texts")
        joined, pairs = [], any(isinstance(text, tuple) for text in texts)
        for text in texts:
            sentences = text if isinstance(text, tuple) else (text,)
            for sentence in sentences:
                if fault := text_fault(sentence, "text"):
                    raise ValueError(f"{sentence!r}: {fault}; give one or more words")
            joined.append(PAIR_SEPARATOR.join(map(normalise_caption, sentences)))
        most = self.config.data.max_text_length
        whole, _ = token_rows(self.tokenizer, joined, max(map(len, joined)) * 4 + 5, pairs)
        for text, ids in zip(texts, whole, strict=True):
            text = " / ".join(text) if isinstance(text, tuple) else text
            shown = text if len(text) <= 60 else f"{text[:57]}..."
            if len(ids) > most:
                logging.warning(
                    "%r has %d tokens: only the first %d are read (data.max_text_length of the "
                    "run)",
                    shown,
                    len(ids),
                    most,
                )
            unknown = int((ids == self.tokenizer.unk_id).sum())
            if unknown:
                logging.warning(
                    "%r has %d words or signs that the model has never seen", shown, unknown
                )
        rows, _ = token_rows(self.tokenizer, joined, most, pairs)
        return self.tokenizer.padded_rows(rows, most)

    def _pixels(self, images: Sequence[Image]) -> np.ndarray:
        """uint8 [n, S, S, 3]."""
        _check_several(images, "images")
        size = self.config.data.image_size
        return np.stack([_read(image, size) for image in images])

    def _has(self, kind: type) -> bool:
        return any(isinstance(objective, kind) for objective in self.objectives)

    def _objective(self, kind: type[T], wanted: str, but: type | None = None) -> T:
        for objective in self.objectives:
            if isinstance(objective, kind) and not (but and isinstance(objective, but)):
                return objective
        raise self._missing(wanted)

    def _missing(self, wanted: str) -> ValueError:
        return ValueError(
            f"this checkpoint was trained with {', '.join(o.name for o in self.objectives)}, and "
            f"this needs {wanted}: fine-tune it with that objective (configs/transfer/)"
        )


def _check_several(given: Sequence[Any], what: str) -> None:
    if isinstance(given, str | pathlib.Path | np.ndarray):
        raise ValueError(f"{what}: give a list, also of one")
    if not given:
        raise ValueError(f"{what}: the list is empty; give one or more")


def _parts(count: int) -> list[slice]:
    return [slice(i, i + _ROWS_AT_ONCE) for i in range(0, count, _ROWS_AT_ONCE)]


def _read(image: Image, size: int) -> np.ndarray:
    """uint8 [size, size, 3], short side resized and centre cropped, as in training."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(
                f"an image of {image.dtype} {list(image.shape)} is not read; give uint8 "
                "[height, width, 3], RGB from 0 to 255, or a file"
            )
        return resize_centre(image, size)
    try:
        return decode_image(pathlib.Path(image).read_bytes(), size, str(image))
    except BadExample as error:
        raise ValueError(f"{error}; give a sound JPEG or PNG of usual size") from error
