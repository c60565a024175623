"""Seeds of independent random streams."""

from __future__ import annotations

import numpy as np


def stream(seed: int, name: str | int) -> int:
    """The seed of one stream of a seed, in [0, 2^63), such as that of the denoiser, or of step or network k.

    Streams of different (seed, name) are independent (numpy's SeedSequence), so that nothing random depends on what
    else is random beside it.

    Args:
        seed: of the whole.
        name: of the stream, or its number.
    """
    number = int.from_bytes(name.encode(), "big") if isinstance(name, str) else name
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0]) >> 1
