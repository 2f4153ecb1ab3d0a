"""Use a checkpoint on one's own images and texts.

    predictor = Predictor.load("WORKDIR")                 # or a .safetensors file
    predictor.caption(["cat.jpg"])                        # [[("a cat on a mat", -3.1)]]
    predictor.answer("cat.jpg", "what is this?")          # [("cat", 0.93), ...]
    predictor.rank(["cat.jpg", "dog.jpg"], ["a cat"])     # float32 [images, texts]
    predictor.embed_images(["cat.jpg"])                   # float32 [n, E], unit vectors

Which of these a checkpoint can do depends on the objectives it was trained with; the others say
which objective is missing. On the command line: ``python -m tools.predict``.
"""

import pathlib
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from ml_collections import ConfigDict

from vlp_jax.data.decode import decode_image, resize_centre
from vlp_jax.data.tokenizer import Tokenizer, normalise_caption
from vlp_jax.infra.errors import ConfigError
from vlp_jax.infra.mesh import make_mesh
from vlp_jax.models.sizes import build_model
from vlp_jax.objectives import build_objectives
from vlp_jax.objectives.base import Params
from vlp_jax.objectives.classification import NLVR2, VQA, Classification
from vlp_jax.objectives.contrastive import ITC, ITM
from vlp_jax.objectives.flm import FLM
from vlp_jax.objectives.single_stream import AR, PrefixLM
from vlp_jax.train.initial import read_origin
from vlp_jax.transfer.generate import caption_search, generate
from vlp_jax.transfer.ranking import Ranker, Texts

Image = str | pathlib.Path | np.ndarray  # a file, or uint8 [H, W, 3]
T = TypeVar("T")


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
        self.objectives = build_objectives(config.objectives, self.model, vocabulary, 1)
        self.params = jax.device_put(params)

    @classmethod
    def load(cls, path: str | pathlib.Path, checkpoint: str = "latest") -> "Predictor":
        """Read a run's workdir, one of its checkpoints, or an exported parameter file.

        Args:
            path: of any of these.
            checkpoint: of a workdir: ``latest``, ``best`` or a step.

        Raises:
            ValueError, OSError: the message names the file and the remedy.
        """
        origin = read_origin(path, checkpoint)
        if not origin.tokenizer:
            raise ConfigError("init_from", f"{path} holds no tokenizer", "Use a run's checkpoint")
        return cls(
            ConfigDict(origin.config),
            Tokenizer.from_json(origin.tokenizer, str(path)),
            origin.classes,
            origin.params(),
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

    def caption(
        self, images: Sequence[Image], beams: int = 3, max_length: int = 0
    ) -> list[list[tuple[str, float]]]:
        """Captions of each image with their log-probabilities, best first.

        Args:
            images: files or arrays.
            beams: captions of each; 1: greedy search.
            max_length: most tokens with <s> and </s>; 0: ``data.max_text_length`` of the run.
        """
        trained = any(isinstance(o, AR | PrefixLM | FLM) for o in self.objectives)
        if not trained:
            raise self._missing("ar, prefix_lm or flm")
        search = caption_search(
            self.tokenizer, max_length or self.config.data.max_text_length, beams=beams
        )
        found = generate(self.model, self.params, self._pixels(images), search)
        ids, lengths, scores = map(np.asarray, found)
        return [
            [
                (self.tokenizer.decode(ids[row, k, 1 : lengths[row, k] - 1]), float(score))
                for k, score in enumerate(scores[row])
                if np.isfinite(score)
            ]
            for row in range(len(ids))
        ]

    def embed_images(self, images: Sequence[Image]) -> np.ndarray:
        """Unit vectors: float32 [n, E]."""
        return self._ranker(matching=False).encode_images(self.params, [self._pixels(images)])[0]

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors: float32 [n, E]."""
        return self._encode_texts(self._ranker(matching=False), texts).embeddings

    def rank(
        self, images: Sequence[Image], texts: Sequence[str], shortlist: int = 128
    ) -> np.ndarray:
        """How well each text describes each image: float [images, texts], higher is better.

        Cosines; where the checkpoint has an ``itm``, it re-ranks the best ``shortlist`` of each
        row and column, and only the order within a row or a column means something.
        """
        matching = any(isinstance(o, ITM) for o in self.objectives)
        ranker = self._ranker(matching)
        encoded = ranker.encode_images(self.params, [self._pixels(images)])
        encoded_texts = self._encode_texts(ranker, texts)
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
        logits = np.asarray(jax.jit(task.logits)(self.params, batch))[0, : len(self.classes)]
        if isinstance(task, VQA):
            chances = 1.0 / (1.0 + np.exp(-logits))
        else:
            chances = np.exp(logits - np.logaddexp.reduce(logits))
        best = np.argsort(-chances, kind="stable")[:top]
        return [(self.classes[i], float(chances[i])) for i in best]

    def _ranker(self, matching: bool) -> Ranker:
        itc = self._objective(ITC, "itc")
        itm = self._objective(ITM, "itm") if matching else None
        return Ranker(itc, itm, make_mesh(devices=jax.devices()[:1]))

    def _encode_texts(self, ranker: Ranker, texts: Sequence[str]) -> Texts:
        return ranker.encode_texts(self.params, *self._tokens(texts))

    def _tokens(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Padded ids int32 [n, N] and lengths int32 [n]."""
        texts = [normalise_caption(text) for text in texts]
        if not all(texts):
            raise ValueError("an empty text has no meaning to a model; give one or more words")
        return self.tokenizer.padded(texts, self.config.data.max_text_length)

    def _pixels(self, images: Sequence[Image]) -> np.ndarray:
        size = self.config.data.image_size
        return np.stack([_read(image, size) for image in images])

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


def _read(image: Image, size: int) -> np.ndarray:
    """uint8 [size, size, 3], short side resized and centre cropped, as in training."""
    if isinstance(image, np.ndarray):
        return resize_centre(image, size)
    return decode_image(pathlib.Path(image).read_bytes(), size, str(image))
