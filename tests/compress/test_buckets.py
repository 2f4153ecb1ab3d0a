"""Static sizes and their names."""

import pytest

from vlp_jax.compress.buckets import Bucket, View, bucket_label, view_of


@pytest.mark.parametrize(
    ("view", "grid", "tokens", "label"),
    [
        (View.whole(224, 16), 14, 197, "p16@224"),
        (View(224, 16, 49), 14, 50, "p16@224k49"),
        (View.whole(240, 48), 5, 26, "p48@240"),
        (View(240, 30, 32), 8, 33, "p30@240k32"),
    ],
)
def test_tokens_of_the_fact_sheet(view, grid, tokens, label):
    assert (view.grid, view.tokens, view.label) == (grid, tokens, label)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((224, 20, 49), "20 px do not divide an image of 224 px"),
        ((224, 16, 197), "197 patches cannot be kept of the 196"),
        ((224, 16, 0), "0 patches cannot be kept"),
        ((224, 0, 1), "0 px do not divide"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        View(*sizes)


def test_a_bucket_has_a_name_and_a_view_for_each_index():
    query, key = View(64, 8, 16), View.whole(64, 8)
    bucket = Bucket(12, 64, (query, key))
    assert [view_of(bucket, index) for index in range(3)] == [query, key, key]
    assert view_of(Bucket(12, 64)) is None
    assert view_of(None) is None
    sizes = (("pairs", bucket), ("text", Bucket(8, 64)))
    assert bucket_label(sizes) == "12x64/p8@64k16/p8@64+8x64"
    assert bucket_label(sizes, named=True) == "pairs:12x64/p8@64k16/p8@64+text:8x64"
    assert sorted([bucket, Bucket(12, 64)])[0] == Bucket(12, 64)
