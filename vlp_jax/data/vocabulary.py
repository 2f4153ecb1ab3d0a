"""What models and objectives need to know of a tokenizer."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """Sizes and roles of token ids, without the library that makes them.

    Attributes:
        size: number of token ids.
        mask_id: the mask token.
        continues: which ids carry on the word of the token before, bool [size].
    """

    size: int
    mask_id: int
    continues: np.ndarray

    @classmethod
    def of_words(cls, size: int, mask_id: int) -> "Vocabulary":
        """A vocabulary in which every token is a word."""
        return cls(size, mask_id, np.zeros(size, np.bool_))
