"""A network in two parts: the frozen prefix, computed once per batch, and the suffix that depends on generated tensors.

Tracing was tried on 55 networks of timm and on as many modules that look at their inputs. timm's either can be traced
or raise TraceError (vgg, convit, crossvit, mobilevit, twins). Other code raises anything: RuntimeError for `len(x)`,
TypeError for `range(x.shape[1])`, KeyError for `TABLE[x.shape[1]]`, or its own exception for an input that is not a
tensor. So an untraceable network is identified by where an exception was raised, not by its type: `_traced`.
"""

from __future__ import annotations

import copy
import inspect
import operator
import traceback
from collections import Counter
from collections.abc import Callable, Collection
from functools import cache, partialmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.dropout import _DropoutNd
from tqdm.auto import tqdm

ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
TWINS = {getattr(operator, f"i{name}"): getattr(operator, name) for name in ARITHMETIC}  # in place -> a new result
NEW = {*TWINS.values(), torch.cat, F.conv2d, F.linear, F.batch_norm, F.layer_norm, F.group_norm}  # never return a view


class Split(NamedTuple):
    """`network(x) == suffix(*prefix(x))`; the suffix shares its parameters, and their names, with the network."""

    prefix: Callable[[Tensor], tuple]
    suffix: nn.Module


def split(network: nn.Module, generated: Collection[str]) -> Split:
    """Cut a network at the first operations that depend on generated parameters or buffers; sets evaluation mode.

    Every value that crosses the cut is passed on, those of residual branches among them. Neither part changes them in
    place, so many suffixes can follow one prefix. Where generated parameters stand first the prefix is empty. A network
    that torch.fx cannot trace, or whose in-place operations cannot be replaced, becomes the suffix as a whole, which
    costs time; this is said once.
    """
    graph = _traced(network.eval())
    if isinstance(graph, Exception):
        message = (str(graph).splitlines() or [""])[0]
        return _all_suffix(network, f"torch.fx cannot trace it ({type(graph).__name__}: {message})")
    if not _without_in_place(graph, network):
        return _all_suffix(network, "it changes a tensor in place that is also read through a view")
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
    return Split(_part(network, before), _part(network, after))


def _traced(network: nn.Module) -> fx.Graph | Exception:
    """The graph of a network; or, where torch.fx cannot trace it, the exception that its forward or torch.fx raised.

    The forward runs on proxies, not on tensors, so code that works otherwise may raise anything. An exception that
    this file itself raises is a bug here, and propagates.
    """
    try:
        return _Tracer().trace(network)
    except Exception as error:
        if traceback.extract_tb(error.__traceback__)[-1].filename == __file__:
            raise
        return error


def _all_suffix(network: nn.Module, reason: str) -> Split:
    """An empty prefix; the network gets copies of the images, since it may change them in place."""
    _say_once(f"note: {type(network).__name__} is computed as a whole for every checkpoint: {reason}")
    if _copied not in network._forward_pre_hooks.values():
        network.register_forward_pre_hook(_copied)
    return Split(lambda images: (images,), network)


@cache
def _say_once(line: str) -> None:
    tqdm.write(line)


def _copied(network: nn.Module, inputs: tuple) -> tuple:
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in inputs)


def _part(network: nn.Module, graph: fx.Graph) -> nn.Module:
    """A module that computes a graph with the modules of a network; those that work in place are replaced."""
    part = fx.GraphModule(network, graph)
    for target in {node.target for node in graph.nodes if node.op == "call_module"}:
        if getattr(part.get_submodule(target), "inplace", False):
            module = copy.copy(part.get_submodule(target))
            module.inplace = False
            part.add_submodule(target, module)
    return part


class _Proxy(fx.Proxy):
    """Records `x += y` as an in-place operation; torch.fx records `x = x + y`."""

    def _in_place(self, function: Callable, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    for _name in ARITHMETIC:
        locals()[f"__i{_name}__"] = partialmethod(_in_place, getattr(operator, f"i{_name}"))


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def _without_in_place(graph: fx.Graph, network: nn.Module) -> bool:
    """Replace every in-place operation by one with a new result, which all later readers of the changed tensor get.

    Returns:
        Whether that was possible; it is not where a view of the changed tensor is read later on.
    """
    order = {node: k for k, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not _works_in_place(node, network):
            continue
        changed, before = node.args[0], {n for n in graph.nodes if order[n] < order[node]}
        later = {n: [user for user in n.users if order[user] > order[node]] for n in _aliases(changed, before, network)}
        readers = later.pop(changed)
        if changed.op == "get_attr" or any(later.values()) or not _take_twin(node):
            return False
        for reader in readers:
            reader.replace_input_with(changed, node)
    return True


def _works_in_place(node: fx.Node, network: nn.Module) -> bool:
    """Whether a node changes its first argument."""
    if node.op == "call_module":
        module = network.get_submodule(node.target)
        return getattr(module, "inplace", False) and not isinstance(module, _DropoutNd)
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    if node.op != "call_function":
        return False
    given, name = _arguments(node), getattr(node.target, "__name__", "")
    return node.target in TWINS or name.endswith("_") or bool(given.get("inplace")) or given.get("out") is not None


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of a function by name, where Python knows the names."""
    try:
        return dict(inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments)
    except (TypeError, ValueError):
        return dict(node.kwargs)


def _take_twin(node: fx.Node) -> bool:
    """Replace an in-place operation by its twin with a new result; whether there is one. Modules: see `_part`."""
    if node.op == "call_method":
        node.target = node.target[:-1]
        return hasattr(Tensor, node.target)
    if node.op == "call_function" and node.kwargs.get("out") is None:
        if _arguments(node).get("inplace"):
            node.args, node.kwargs = (), {**_arguments(node), "inplace": False}
        else:
            name = node.target.__name__.removesuffix("_")
            node.target = TWINS.get(node.target) or getattr(F, name, None) or getattr(torch, name, None)
        return node.target is not None
    return node.op == "call_module"


def _aliases(node: fx.Node, among: set[fx.Node], network: nn.Module) -> set[fx.Node]:
    """A node and all others that may share its memory: its inputs and users, except through nodes with new results."""
    found, ahead = {node}, [node]
    while ahead:
        current = ahead.pop()
        near = {user for user in current.users if not _is_new(user, network)}
        near |= set() if _is_new(current, network) else set(current.all_input_nodes)
        near = (near & among) - found
        ahead += near
        found |= near
    return found


def _is_new(node: fx.Node, network: nn.Module) -> bool:
    """Whether a node certainly returns new memory; dropout, for one, returns its input in evaluation mode.

    In-place operations count as well: nodes are visited in order, so earlier ones have been replaced.
    """
    if node.op == "call_module":
        module = network.get_submodule(node.target)
        kinds = ("torch.nn.modules.activation", "torch.nn.modules.pooling")
        return any(True for _ in module.parameters()) or type(module).__module__ in kinds
    return node.op == "call_function" and node.target in NEW


def shrink(suffix: nn.Module, inputs: tuple, generated: Collection[str]) -> nn.Module:
    """Replace frozen convolutions of 1 x 1 images in a suffix by their central tap, the only one that counts there.

    Deep layers have such images where the pictures are small: the last ones of ResNet-18 at 32 x 32.

    Args:
        suffix: of `split`; a suffix that was not traced is returned as it is.
        inputs: what the prefix returns for a batch.
        generated: names of tensors whose modules are not replaced.
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
    """Whether exactly one tap of the kernel meets a 1 x 1 image, and all others meet zeros of the padding."""
    padding, dilation = convolution.padding, convolution.dilation
    if convolution.padding_mode != "zeros" or isinstance(padding, str) or convolution.groups > 1:
        return False
    triples = zip(padding, dilation, convolution.kernel_size, strict=True)
    return all(p % d == 0 and p // d < k for p, d, k in triples)


class _CentralTap(nn.Linear):
    """A convolution of 1 x 1 images as a matrix product."""

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
