"""Seeds of independent random streams."""

from __future__ import annotations

import numpy as np


def sample_seed(seed: int, k: int) -> int:
    """The seed of network k of a draw: independent streams for every (seed, k), whatever the batch or the count."""
    return int(np.random.SeedSequence((seed, k)).generate_state(1, np.uint64)[0]) >> 1
