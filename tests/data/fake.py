"""A source small enough to reason about: pictures name their record, captions vary in length."""

import numpy as np

from vlp_jax.data.captions import EncodedCaptions
from vlp_jax.data.planned import PlannedSource
from vlp_jax.data.source import BadExample, CaptionsOnly
from vlp_jax.data.tokenizer import Tokenizer

WORDS = ("red", "green", "blue", "square", "circle", "left", "of", "the", "above", "small")
MAX_LENGTH = 24
TOKENIZER = Tokenizer.train([" ".join(WORDS)] * 3, vocab_size=200)


class Fake(CaptionsOnly):
    """Captions of 1 to 20 words, one to three a record; the records in ``damaged`` raise."""

    def __init__(self, num_records=50, name="fake", damaged=(), captions_at_most=3):
        self.name = name
        self.num_records = num_records
        self.damaged = frozenset(damaged)
        self._captions_at_most = captions_at_most

    def num_captions(self, records):
        return 1 + np.asarray(records, np.int64) % self._captions_at_most

    def caption(self, record, index):
        length = 1 + (record * 7 + index * 5) % 20
        return " ".join(WORDS[(record + index + word) % len(WORDS)] for word in range(length))

    def image(self, record, size):
        if record in self.damaged:
            raise BadExample("torn picture" if record % 2 else "burnt picture", f"record {record}")
        return np.broadcast_to(np.uint8([record % 256, record // 256, 7]), (size, size, 3)).copy()

    def word_classes(self):
        return {}


class FakePairs(Fake):
    """Two pictures and a label; of the records in ``second_damaged`` the second is torn."""

    extra_fields = ("second_image", "label")
    classes = ("even", "odd")

    def __init__(self, *args, second_damaged=(), **kwargs):
        super().__init__(*args, **kwargs)
        self.second_damaged = frozenset(second_damaged)

    def extras(self, record, size):
        if record in self.second_damaged:
            raise BadExample("torn second picture", f"record {record}")
        second = np.full((size, size, 3), 255 - record, np.uint8)
        return {"second_image": second, "label": np.asarray(record % 2, np.int32)}


def planned(source, weight=1.0, store=None, **kwargs):
    captions = EncodedCaptions(source, TOKENIZER, MAX_LENGTH, store=store)
    return PlannedSource(source, captions, weight, **kwargs)
