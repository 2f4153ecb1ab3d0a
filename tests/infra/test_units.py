import pytest

from vlp_jax.infra import units


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("train/flm/reconstruction_accuracy", 0.571, "57.1 %"),
        ("speed/samples_per_second", 1234.4, "1,234 samples/s"),
        ("memory/peak_bytes", 12.34e9, "12.3 GB"),
        ("memory/peak_bytes", 999_950_000, "1.0 GB"),
        ("compile/seconds/text16", 43.91, "43.9 s"),
        ("grounding_gap/colour", 41.26, "41.3 points"),
        ("grounding_gap/count", -3.0, "−3.0 points"),
        ("matmul_peak_tflops", 801.4, "801.4 TFLOP/s"),
        ("train/loss", 2.34567, "2.346"),
        ("train/learning_rate", 0.0003, "3e−4"),
        ("train/skipped", 0.0, "0"),
        ("parameters", 346_123_456.0, "346,123,456"),
        ("train/loss", float("nan"), "nan"),
        ("train/accuracy", float("inf"), "∞"),
    ],
)
def test_unit_follows_from_name(name: str, value: float, text: str) -> None:
    assert units.format_value(name, value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.012, "12 ms"),
        (0.9996, "1.0 s"),
        (59.96, "1 min 00 s"),
        (245.0, "4 min 05 s"),
        (7620.0, "2 h 07 min"),
    ],
)
def test_durations_round_to_the_next_unit(seconds: float, text: str) -> None:
    assert units.format_seconds(seconds) == text
