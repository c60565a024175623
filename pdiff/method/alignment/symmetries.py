"""Which units of a network may be permuted: read off its traced graph, then checked with a random permutation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from pdiff.method.alignment.groups import Group, Groups, permute_group
from pdiff.method.alignment.labelling import Labeller, leaves

SAME = 1e-9  # largest change of outputs, relative to the largest output, that is rounding in float64


def permutation_groups(network: nn.Module, *inputs: Any) -> Groups:
    """Find the groups of units of a network that may be permuted without changing what it computes.

    Hidden channels and features, also those that residual connections tie together; the heads of attention; whole norm
    groups of a GroupNorm, and whole groups of a grouped convolution. The network is traced by torch.fx in evaluation
    mode. What meets an operation that is not understood is left alone. At last a random permutation of all groups is
    applied to random weights in float64, and groups that change the outputs are left alone, too.

    Args:
        network: neither changed nor left in another mode.
        inputs: what it is called with; one small image suffices.
    """
    mode = network.training
    try:
        with torch.no_grad():
            return _checked(_found(network.eval(), inputs), network, inputs)
    finally:
        network.train(mode)


def _found(network: nn.Module, inputs: Sequence[Any]) -> Groups:
    """The groups according to the graph."""
    try:
        graph = fx.Tracer().trace(network)
    except Exception as error:  # the forward runs on proxies: code that works otherwise may raise anything
        reason = f"torch.fx cannot trace the network ({type(error).__name__})"
        return Groups((), {name: reason for name, tensor in network.state_dict().items() if tensor.is_floating_point()})
    return Labeller(network).run(graph, inputs).groups()


def _checked(groups: Groups, network: nn.Module, inputs: Sequence[Any]) -> Groups:
    """Leave alone the groups whose permutation changes the outputs."""
    if not len(groups):
        return groups
    state = _random_state(network)
    inputs = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    before = _outputs(network, state, inputs)
    kept = list(groups)
    if _changes(kept, network, state, inputs, before):
        kept = [group for group in groups if not _changes([group], network, state, inputs, before)]
        if _changes(kept, network, state, inputs, before):
            kept = []
    reason = "a random permutation of its units changed the outputs"
    failed = {place.name: reason for group in groups if group not in kept for place in group.places}
    return Groups(tuple(kept), failed | groups.left_alone)


def _random_state(network: nn.Module) -> dict[str, Tensor]:
    """The floating tensors of a network in float64, with noise, so that units differ where weights are equal."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for kind, named in (("parameter", network.named_parameters()), ("buffer", network.named_buffers())):
        for name, tensor in named:
            if tensor.is_floating_point():
                value = tensor.detach().double().cpu()
                noise = torch.randn(value.shape, generator=generator)
                noise = noise.abs() if kind == "buffer" else noise  # a running variance is positive
                scale = float(value.square().mean().sqrt()) or 1.0
                state[name] = (value + 0.3 * scale * noise).to(tensor.device)
    return state


def _changes(groups: Sequence[Group], network: nn.Module, state: dict, inputs: Sequence[Any], before: Tensor) -> bool:
    """Whether a random permutation of some groups changes the outputs."""
    generator = torch.Generator().manual_seed(1)
    permuted = {name: tensor[None] for name, tensor in state.items()}
    for group in groups:
        permutation = torch.randperm(group.size, generator=generator)
        if torch.equal(permutation, torch.arange(group.size)):
            permutation = permutation.roll(1)
        places = tuple(place for place in group.places if place.name in state)  # tied tensors have one name here
        permute_group(permuted, replace(group, places=places), permutation[None])
    after = _outputs(network, {name: tensor[0] for name, tensor in permuted.items()}, inputs)
    return not bool((after - before).abs().max() <= SAME * before.abs().max())


def _outputs(network: nn.Module, state: dict[str, Tensor], inputs: Sequence[Any]) -> Tensor:
    """All floating outputs in a row, float64."""
    inputs = tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs)
    results = leaves(functional_call(network, state, inputs))
    return torch.cat([leaf.flatten() for leaf in results if isinstance(leaf, Tensor) and leaf.is_floating_point()])
