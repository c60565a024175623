"""A network in two: the frozen prefix, computed once, and the suffix that depends on generated parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from torch import Tensor, fx, nn


class Split(NamedTuple):
    """`network(x) == suffix(*prefix(x))`; the suffix shares its parameters, and their names, with the network."""

    prefix: Callable[[Tensor], tuple]
    suffix: nn.Module


def split(network: nn.Module, generated: Collection[str]) -> Split:
    """Cut a network in evaluation mode at the first operations that depend on generated parameters or buffers.

    Whatever crosses the cut is passed on, so that residual branches come along. A network that torch.fx cannot trace,
    or whose generated parameters stand first, is all suffix.
    """
    try:
        graph = fx.Tracer().trace(network.eval())
    except Exception:
        return Split(lambda images: (images,), network)
    dependent = _dependent(graph, generated)
    before, after = fx.Graph(), fx.Graph()
    kept: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node not in dependent and node.op != "output":
            kept[node] = before.node_copy(node, kept.__getitem__)
    crossing = [node for node in kept if any(user in dependent for user in node.users)]
    before.output(tuple(kept[node] for node in crossing))
    moved = {node: after.placeholder(node.name) for node in crossing}
    for node in graph.nodes:
        if node in dependent:
            moved[node] = after.node_copy(node, moved.__getitem__)
    return Split(fx.GraphModule(network, before), fx.GraphModule(network, after))


def _dependent(graph: fx.Graph, generated: Collection[str]) -> set[fx.Node]:
    """Nodes that read a generated tensor, or the output of one that does; the output is always among them."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        owner = f"{node.target}." if node.op == "call_module" else None
        reads = owner is not None and any(name.startswith(owner) for name in generated)
        reads = reads or (node.op == "get_attr" and node.target in generated)
        if reads or node.op == "output" or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found
