"""Text-length edges: the lengths that rows are padded to, fitted to the captions of a run.

edges = fit_edges(batch_maxima(captions.histogram(), batch_size=256),
                  num_edges=6, multiple_of=4, longest=captions.longest)
"""

import numpy as np


def batch_maxima(
    histogram: np.ndarray, batch_size: int, window_batches: int = 32, windows: int = 64
) -> np.ndarray:
    """How often a planned batch's longest row has each length: int64 [max_length + 1].

    Rows are not padded to their own edge but to their batch's, so edges are fitted to these
    counts. Drawn from the histogram with a fixed seed: ``windows`` windows of ``window_batches``
    batches, sorted by length and cut, as the plan does.
    """
    rng = np.random.default_rng(0)
    shares = histogram / histogram.sum()
    counts = rng.multinomial(batch_size * window_batches, shares, size=windows)
    # The longest row of batch b is the first length by which (b + 1) * batch_size rows are passed.
    passed = np.cumsum(counts, axis=1)
    ends = np.arange(1, window_batches + 1) * batch_size
    longest = np.concatenate([np.searchsorted(row, ends) for row in passed])
    return np.bincount(longest, minlength=len(histogram)).astype(np.int64)


def fit_edges(
    histogram: np.ndarray, num_edges: int = 6, multiple_of: int = 4, longest: int | None = None
) -> tuple[int, ...]:
    """The text-length edges that waste the fewest tokens; optimal, by dynamic programming.

    Args:
        histogram: int64 [max_length + 1], how many rows (or batches, see ``batch_maxima``) have
            each length.
        num_edges: most edges to have; fewer are returned if more would not help.
        multiple_of: every edge is a multiple of this.
        longest: a length the last edge must hold, though the histogram may not reach it.

    Returns:
        Increasing edges; a row of length n is padded to the first edge >= n.

    Raises:
        ValueError: the histogram is empty, or a number is below 1.
    """
    if num_edges < 1 or multiple_of < 1:
        raise ValueError(
            f"data.num_edges={num_edges}, data.edge_multiple={multiple_of}: both must be at least 1"
        )
    if not histogram.any():
        raise ValueError("cannot fit text-length edges: the length histogram is empty")
    last = max(int(np.flatnonzero(histogram)[-1]), longest or 0, 1)
    size = -(-last // multiple_of)  # candidate edge i is i * multiple_of, 0 < i <= size
    edges = np.arange(size + 1) * multiple_of
    covered = np.cumsum(np.pad(histogram, (0, max(0, edges[-1] + 1 - len(histogram)))))[edges]
    covered[0] = 0  # rows of length 0 go to the first edge
    # best[k][j]: fewest tokens that hold all rows up to edge j with k edges, j the last of them.
    best = np.full((num_edges + 1, size + 1), np.inf)
    previous = np.zeros((num_edges + 1, size + 1), np.int64)
    best[0, 0] = 0
    for k in range(1, num_edges + 1):
        for j in range(1, size + 1):
            cost = best[k - 1, :j] + edges[j] * (covered[j] - covered[:j])
            previous[k, j] = np.argmin(cost)
            best[k, j] = cost[previous[k, j]]
    k, j = int(np.argmin(best[:, size])), size
    chosen = []
    while j > 0:
        chosen.append(int(edges[j]))
        k, j = k - 1, int(previous[k, j])
    return tuple(reversed(chosen))
