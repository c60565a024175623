"""How far networks are from each other in what they compute, as a loss that their weights can be trained with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pdiff.method.collection import StateDict
from pdiff.method.generators.neurons import Outputs
from pdiff.method.log import ignore
from pdiff.networks.images import TrainingPart
from pdiff.networks.predict import logits
from pdiff.seeds import stream

POOL_BYTES = 64 << 20  # of training images that are kept in memory to choose from


def output_distances(
    network: nn.Module, part: TrainingPart, *, images: int, device: torch.device | str = "cpu"
) -> Outputs:
    """A function of the tensors (B, *shape) of found and of true networks: squared distances of their logits, (B,).

    They are means over classes and over random training images, other ones at every call. A constant that is added to
    all logits of an image changes no probability, and does not count. Gradients reach the found networks alone.

    Args:
        network: of their architecture, whose own tensors stand for those that are not given; it is no longer trained.
        part: training images; nothing else may decide what a network becomes.
        images: of each call.
        device: of the networks.

    Raises:
        TypeError: another part of the data set.
    """
    if not isinstance(part, TrainingPart):
        raise TypeError(f"outputs are compared on training images alone, expected a TrainingPart, but got {part!r}")
    size = 4 * next(part.batches(1))[0].numel()
    pool, _ = next(part.stream(min(len(part), POOL_BYTES // size), seed=stream(0, "behaviour"), device=device))
    network = network.to(device).eval().requires_grad_(False)

    def computed(tensors: StateDict, x: Tensor) -> Tensor:
        """Logits (B, images, classes)."""
        return torch.cat([*logits(network, tensors, (x,), len(next(iter(tensors.values()))), ignore)])

    def distances(found: StateDict, true: StateDict) -> Tensor:
        x = pool[torch.randint(len(pool), (images,), device=device)]
        with torch.no_grad():
            expected = computed(true, x)
        difference = computed(found, x) - expected
        return (difference - difference.mean(dim=-1, keepdim=True)).square().mean(dim=(1, 2))

    return distances
