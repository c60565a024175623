"""A network in two: the frozen prefix, computed once, and the suffix that depends on generated parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import NamedTuple

from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp


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


def shrink(suffix: nn.Module, inputs: tuple, generated: Collection[str]) -> nn.Module:
    """The suffix with frozen convolutions of 1 x 1 images replaced by their central tap, which is all they use.

    Deep layers have such images where a network meets small pictures: the last ones of ResNet-18 at 32 x 32.

    Args:
        suffix: of `split`; a suffix that was not traced is returned as it is.
        inputs: what the prefix gives for some batch.
        generated: names whose modules stay as they are.
    """
    if not isinstance(suffix, fx.GraphModule):
        return suffix
    ShapeProp(suffix).propagate(*inputs)
    calls = Counter(node.target for node in suffix.graph.nodes if node.op == "call_module")
    for node in suffix.graph.nodes:
        module = suffix.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(module, nn.Conv2d) or any(name.startswith(f"{node.target}.") for name in generated):
            continue
        image, result = (n.meta["tensor_meta"].shape[2:] for n in (node.args[0], node))
        if image == result == (1, 1) and calls[node.target] == 1 and _has_central_tap(module):
            suffix.add_submodule(node.target, _CentralTap(module))
    return suffix


def _has_central_tap(convolution: nn.Conv2d) -> bool:
    """Whether exactly one tap of the kernel meets a 1 x 1 image, and zeros the others."""
    padding, dilation = convolution.padding, convolution.dilation
    if convolution.padding_mode != "zeros" or isinstance(padding, str) or convolution.groups > 1:
        return False
    triples = zip(padding, dilation, convolution.kernel_size, strict=True)
    return all(p % d == 0 and p // d < k for p, d, k in triples)


class _CentralTap(nn.Linear):
    """What a convolution makes of 1 x 1 images, as the matrix product that it is."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__(convolution.in_channels, convolution.out_channels, convolution.bias is not None)
        row, column = (p // d for p, d in zip(convolution.padding, convolution.dilation, strict=True))
        self.weight = nn.Parameter(convolution.weight[:, :, row, column].detach().clone(), requires_grad=False)
        self.bias = convolution.bias

    def forward(self, images: Tensor) -> Tensor:
        """(B, inputs, 1, 1) -> (B, outputs, 1, 1)."""
        return super().forward(images.flatten(1))[:, :, None, None]


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
