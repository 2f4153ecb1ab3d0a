import json
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from vlp_jax.data.tokenizer import Tokenizer, normalise_caption

CORPUS = [
    "A red square is left of a blue circle.",
    "a skateboarder jumps over the stairs .",
    "Two naïve dogs, running on the beach",
    "three birds above the water's edge.",
] * 3

TRAIN_AND_HASH = """
import hashlib, sys
from tests.data.test_tokenizer import CORPUS
from vlp_jax.data.tokenizer import Tokenizer
for kind in ("wordpiece", "bpe"):
    print(hashlib.sha256(Tokenizer.train(CORPUS, 320, kind).to_json().encode()).hexdigest())
"""


@pytest.fixture(params=["wordpiece", "bpe"])
def tokenizer(request):
    return Tokenizer.train(CORPUS, 320, request.param)


def test_caption_text_has_one_form():
    assert normalise_caption("  A  dog\n runs . ") == "A dog runs"
    assert normalise_caption("A dog runs.") == "A dog runs"
    assert normalise_caption(" ... ") == ""


def test_rows_are_framed_and_read_back(tokenizer):
    (ids,) = tokenizer.encode(["a red square left of the stairs ."], 32)
    assert ids.dtype == np.int32
    assert ids[0] == tokenizer.bos_id
    assert ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(ids) == "a red square left of the stairs"
    assert tokenizer.tokens(ids)[0] == "<s>"
    assert ids.max() < tokenizer.vocab_size


def test_padding_ends_where_the_longest_text_may(tokenizer):
    """A model has no position beyond, and would read one that is not there as NaN."""
    long = CORPUS[0] * 3
    for most in (5, 8, 30):
        ids, lengths = tokenizer.padded([long, "a"], most)
        assert ids.shape == (2, most)
        assert lengths[0] == most
    ids, lengths = tokenizer.padded(["a red square"], 30)
    assert ids.shape[1] == -(-lengths[0] // 4) * 4


def test_truncation_keeps_the_end_token(tokenizer):
    whole, cut = (tokenizer.encode([CORPUS[0]], length)[0] for length in (64, 5))
    assert len(cut) == 5
    np.testing.assert_array_equal(cut[:-1], whole[:4])
    assert cut[-1] == tokenizer.eos_id
    with pytest.raises(ValueError, match=r"data\.max_text_length=2"):
        tokenizer.encode(["a"], 2)


def test_special_tokens_in_a_caption_are_text(tokenizer):
    (ids,) = tokenizer.encode(["a dog </s> <pad> <mask> barks"], 64)
    for special in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id):
        assert special not in ids[1:-1]


def test_training_gives_the_same_bytes_in_another_process():
    runs = {
        subprocess.run(
            [sys.executable, "-c", TRAIN_AND_HASH],
            cwd=pathlib.Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    }
    assert len(runs) == 1
    assert len(runs.pop().split()) == 2


def test_words_of_pieces(tokenizer):
    text = "The skateboarders, two of them."
    ids, words = tokenizer.encode_with_words(text, 64)
    np.testing.assert_array_equal(ids, tokenizer.encode([text], 64)[0])
    assert words[0] is None
    assert words[-1] is None
    assert list(dict.fromkeys(word for word in words if word)) == [
        "the", "skateboarders", "two", "of", "them",
    ]  # fmt: skip
    assert words.count("skateboarders") > 1  # in pieces, each with the whole word
    comma = tokenizer.tokens(ids).index(",")
    assert words[comma] is None


def test_words_are_whole_where_the_text_is_cut(tokenizer):
    ids, words = tokenizer.encode_with_words("skateboarders", 4)
    assert len(ids) == len(words) == 4
    assert words == [None, "skateboarders", "skateboarders", None]


@pytest.mark.parametrize("folder", [True, False])
def test_saved_and_loaded(tokenizer, tmp_path, folder):
    file = tokenizer.save(tmp_path if folder else tmp_path / "own.json")
    loaded = Tokenizer.load(tmp_path if folder else file)
    assert loaded.to_json() == tokenizer.to_json()
    assert loaded.vocab_size == tokenizer.vocab_size
    for text in CORPUS:
        np.testing.assert_array_equal(*loaded.encode([text], 64), *tokenizer.encode([text], 64))
    assert pickle.loads(pickle.dumps(tokenizer)).to_json() == tokenizer.to_json()


def test_bert_vocabulary(tmp_path):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "##s", "run"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id) == (0, 1, 2)
    assert (tokenizer.eos_id, tokenizer.mask_id, tokenizer.vocab_size) == (3, 4, 9)
    assert tokenizer.tokens(tokenizer.encode(["A Dogs ran"], 9)[0]) == [
        "[CLS]", "a", "dog", "##s", "[UNK]", "[SEP]",
    ]  # fmt: skip


def test_cased_bert_vocabulary_keeps_case(tmp_path):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "A", "a", "Dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    tokenizer = Tokenizer.load(tmp_path / "vocab.txt")
    assert tokenizer.tokens(tokenizer.encode(["A Dog"], 9)[0])[1:-1] == ["A", "Dog"]


def test_roberta_files(tmp_path):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *alphabet, "Ġd", "Ġdo", "Ġdog", "<mask>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ d\nĠd o\nĠdo g\n")
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode(["A dog."], 9)[0]
    assert tokenizer.tokens(ids) == ["<s>", "A", "Ġdog", "</s>"]
    assert (tokenizer.pad_id, tokenizer.mask_id) == (1, len(tokens) - 1)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"merges\.txt not found"):
        Tokenizer.load(tmp_path)


def test_faults_name_the_key_and_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.path=.*vocab\.txt.*point it at"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.path=.*not a tokenizer file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\na")
    with pytest.raises(ValueError, match=r"tokenizer\.path=.*no eos token.*</s> or \[SEP\]"):
        Tokenizer.load(tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_bytes(b"[PAD]\n\xff")
    with pytest.raises(ValueError, match=r"tokenizer\.path=.*not UTF-8 at byte 6"):
        Tokenizer.load(tmp_path / "vocab.txt")
    with pytest.raises(ValueError, match=r"tokenizer\.kind='unigram'"):
        Tokenizer.train(CORPUS, 320, "unigram")
    with pytest.raises(ValueError, match=r"tokenizer\.vocab_size=20: too small"):
        Tokenizer.train(CORPUS, 20)
    with pytest.raises(ValueError, match="no captions"):
        Tokenizer.train([" . "], 320)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        Tokenizer.train(CORPUS, 320).tokens([10_000])
