"""How far networks are from each other in what they compute, as a loss that their weights can be trained with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from pdiff.method.collection import StateDict
from pdiff.method.generators.neurons import Outputs
from pdiff.networks.images import TrainingPart
from pdiff.networks.predict import cheap_together
from pdiff.seeds import stream

POOL_BYTES = 64 << 20  # of training images that are kept in memory to choose from


def output_distances(
    network: nn.Module, part: TrainingPart, *, images: int, device: torch.device | str = "cpu"
) -> Outputs:
    """A function of the tensors (B, *shape) of found and of true networks: squared distances of their logits, (B,).

    They are means over classes and over random training images, other ones at every call. A constant that is added to
    all logits of an image changes no probability, and does not count. Gradients reach the found networks alone.

    Args:
        network: of their architecture; what is not given of a network has the values that it has here.
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

    def logits(tensors: StateDict, x: Tensor) -> Tensor:
        """(B, images, classes)."""
        if cheap_together(tensors):
            return vmap(lambda state: functional_call(network, state, (x,)))(tensors)
        count = len(next(iter(tensors.values())))
        states = ({name: tensor[k] for name, tensor in tensors.items()} for k in range(count))
        return torch.stack([functional_call(network, state, (x,)) for state in states])

    def distances(found: StateDict, true: StateDict) -> Tensor:
        x = pool[torch.randint(len(pool), (images,), device=device)]
        with torch.no_grad():
            expected = logits(true, x)
        difference = logits(found, x) - expected
        return (difference - difference.mean(dim=-1, keepdim=True)).square().mean(dim=(1, 2))

    return distances
