"""The caption bench runs both ways, and its figures belong together."""

import json
import subprocess
import sys

import pytest
from tiny_config import get_config

from tests.conftest import REPO
from vlp_jax.models.flops import text_flops, vit_flops, vocabulary_flops
from vlp_jax.models.sizes import build_model


@pytest.mark.slow
def test_bench_generate_prints_one_json_line() -> None:
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "tools.bench_generate",
            f"--config={REPO / 'tests' / 'tiny_config.py'}",
            "--batch=4",
            "--max_length=6",
            "--prefix_multiple=2",
            "--repeats=1",
        ],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["same_tokens"] == 1.0
    assert figures["batch"] == 4
    whole, decoding, flops = figures, figures["decoding"], figures["flops_per_caption"]
    for part, image in ((whole, flops["encode"]), (decoding, 0.0)):
        ratio = (flops["uncached"] + image) / (flops["cached"] + image)
        assert part["flop_ratio"] == pytest.approx(ratio, abs=1e-3)
        seconds = part["uncached_seconds"] / part["cached_seconds"]
        assert part["speedup"] == pytest.approx(seconds, rel=2e-2)
        assert part["share"] == pytest.approx(part["speedup"] / part["flop_ratio"], rel=2e-2)
    assert whole["cached_seconds"] > decoding["cached_seconds"] > 0

    config = get_config()
    model = build_model(config.model, config.tokenizer.vocab_size, 4, config.data.image_size)
    c = model.config
    # Five tokens follow <s>; what is known of them, padded to a multiple of two, is encoded again.
    texts = sum(text_flops(c, tokens, 1) + vocabulary_flops(c, 1) for tokens in (2, 2, 4, 4, 6))
    projected = 2.0 * c.image.tokens * c.text.width * c.image.block.width
    expected = texts - 5 * projected  # once, with the image
    assert flops["uncached"] == pytest.approx(expected, rel=1e-6)
    assert flops["encode"] == pytest.approx(vit_flops(c.image) + projected, rel=1e-6)
