"""Streams of a seed: distinct, independent, and the same for ever."""

import torch

from pdiff.seeds import stream


def test_streams_are_distinct() -> None:
    seeds = {stream(seed, name) for seed in (0, 1, 2**31) for name in (*range(1000), "denoiser", "autoencoder")}
    assert len(seeds) == 3 * 1002 and all(0 <= seed < 2**63 for seed in seeds)
    assert stream(3, 4) == stream(3, 4) != stream(4, 3)


def test_streams_are_the_same_for_ever() -> None:
    """Others than these would change the result of every experiment, and what interrupted runs go on with."""
    found = [stream(0, "denoiser"), stream(0, "heldout"), stream(7, "autoencoder"), stream(0, 0), stream(2**32 - 1, 5)]
    assert found == [
        867486981122277638,
        559785815306348851,
        6509373142002938689,
        7896617691693857887,
        7339547851177579782,
    ]


def test_numbers_of_neighbouring_streams_are_not_correlated() -> None:
    rows = [torch.randn(2000, generator=torch.Generator().manual_seed(stream(0, k))) for k in range(20)]
    correlations = torch.corrcoef(torch.stack(rows)) - torch.eye(20)
    assert correlations.abs().max() < 0.1  # 0.022 is its standard deviation
