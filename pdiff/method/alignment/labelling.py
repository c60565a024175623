"""The graph of a network, run on labels: which units its numbers belong to, and what tells units apart.

Every number that flows through the network gets a label: the unit that it belongs to, INVARIANT where no permutation
moves it, PADDING for a constant. Operations that only move numbers are run on the labels themselves. Every other one
says which units must be one, and by what its units can be told apart.
"""

from __future__ import annotations

import builtins
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations as ordered_pairs
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg

from pdiff.method.alignment.units import OUTSIDE, Units

INVARIANT, PADDING = 0, -1


def _names(*lists: str) -> set[str]:
    """Names of functions, methods and modules alike: `max_pool2d` and `MaxPool2d` are "maxpool2d"."""
    return {name.replace("_", "") for names in lists for name in names.split()}


HOMOGENEOUS = _names(  # f(cx) = c f(x) for c > 0, number by number
    "dropout dropout1d dropout2d dropout3d alpha_dropout identity relu leaky_relu neg to float double type_as",
    "contiguous clone detach",
)
POINTWISE = _names(
    "relu6 gelu silu sigmoid hardsigmoid hardswish tanh elu selu celu softplus softsign hardtanh hardshrink softshrink",
    "tanhshrink threshold mish logsigmoid exp log sqrt rsqrt reciprocal abs square sin cos erf clamp clip",
)
SUMS, PRODUCTS = _names("add sub iadd isub"), _names("mul div truediv imul itruediv")
ELEMENTWISE = SUMS | PRODUCTS | HOMOGENEOUS | POINTWISE | _names("pow maximum minimum where gt ge lt le eq ne")
MOVES = _names(
    "reshape view flatten unflatten permute transpose swapaxes movedim squeeze unsqueeze expand expand_as getitem cat",
    "concat stack chunk split tensor_split unbind narrow select roll flip repeat repeat_interleave index_select tile",
    "pixel_shuffle pixel_unshuffle channel_shuffle broadcast_to view_as reshape_as getattr",
)
POOLS = {f"{kind}pool{d}d": d for kind in ("max", "avg", "adaptiveavg", "adaptivemax") for d in (1, 2, 3)}
REDUCTIONS = _names("mean sum amax amin var std logsumexp")
SHAPES = _names("size dim numel getattr len _assert is_floating_point")
NAMESPACES = (torch, F, operator, builtins)
PADDING_MODES = {"Zero": "constant", "Constant": "constant", "Reflection": "reflect", "Replication": "replicate"}


class _Value:
    """A value in the network, with the label of each of its numbers.

    Attributes:
        value: a tensor, a tuple of tensors or anything else.
        labels: int64 of the same shape; a tuple of such; None where there is no tensor.
        name: in the state dict, where it is one of its tensors.
    """

    def __init__(self, value: Any, labels: Any = None, name: str | None = None) -> None:
        self.value, self.labels, self.name = value, labels, name


class Labeller:
    """Runs a traced network on values and labels."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.units = network, Units(network)
        self.node: fx.Node
        self.handlers: dict[str, Callable[..., Any]] = {
            **dict.fromkeys(MOVES, self.moved),
            **dict.fromkeys(ELEMENTWISE, self.elementwise),
            **dict.fromkeys(POOLS, self.pooled),
            **dict.fromkeys(REDUCTIONS, self.reduced),
            **dict.fromkeys(("conv1d", "conv2d", "conv3d"), self.convolution),
            **dict.fromkeys(("batchnorm", "instancenorm"), self.channel_norm),
            **dict.fromkeys(("layernorm", "rmsnorm"), self.layer_norm),
            **dict.fromkeys(("softmax", "logsoftmax"), self.softmax),
            **dict.fromkeys(("matmul", "bmm"), self.matrix_product),
            "linear": self.linear,
            "groupnorm": self.group_norm,
            "prelu": self.prelu,
            "scaleddotproductattention": self.attention,
            "multiheadattention": self.packed_attention,
            "pad": self.padded,
        }

    def run(self, graph: fx.Graph, inputs: Sequence[Any]) -> Units:
        """Label every value of a graph; what is known about the units then."""
        values: dict[fx.Node, _Value] = {}
        given = iter(inputs)
        for self.node in graph.nodes:
            args, kwargs = map_arg((self.node.args, self.node.kwargs), values.__getitem__)
            if self.node.op == "placeholder":
                value = next(given, *self.node.args)
                value = value.clone() if _is_tensor(value) else value  # it may be changed in place
                values[self.node] = _Value(value, _constant(value))
            elif self.node.op == "get_attr":
                values[self.node] = self.state_value(self.node.target)
            elif self.node.op == "output":
                for value in _labelled(args):
                    self.fix(value, OUTSIDE)
            else:
                values[self.node] = self.called(args, kwargs)
        return self.units

    def state_value(self, name: str) -> _Value:
        """A parameter, buffer or other attribute of the network."""
        value = operator.attrgetter(name)(self.network)
        return _Value(value, _constant(value), name if name in self.units.tensors else None)

    def called(self, args: tuple, kwargs: dict) -> _Value:
        """The result of the call at the current node."""
        function = self.function()
        versions = [(v, v.value._version) for v in _labelled((args, kwargs)) if _is_tensor(v.value)]
        result = function(*_plain(args), **_plain(kwargs))
        name, given, named = self.operation(args, kwargs)
        if not any(_is_tensor(leaf) for leaf in leaves(result)):
            if name not in SHAPES:
                self.unknown(None, args, kwargs)
            return _Value(result)
        labels, handler = None, self.handlers.get(name)
        if handler and _takes(handler, result, *given, **named):
            self.name, self.apply = name, function
            labels = handler(result, *given, **named)
        elif unchanged := [v for v, version in versions if v.value is result and result._version == version]:
            labels = self.labels(unchanged[0])  # such as stochastic depth in evaluation mode
        if labels is None:
            labels = self.unknown(result, args, kwargs)
        for leaf in leaves(labels):
            if _is_tensor(leaf):
                self.units.mark(_compact(leaf), 0, f"{self.node} has only some of them")
        return _Value(result, labels)

    def function(self) -> Callable[..., Any]:
        """What computes the current node."""
        if self.node.op == "call_module":
            return self.network.get_submodule(self.node.target)
        if self.node.op == "call_method":
            return lambda first, *args, **kwargs: getattr(first, self.node.target)(*args, **kwargs)
        return self.node.target

    def operation(self, args: tuple, kwargs: dict) -> tuple[str, tuple, dict]:
        """The name of the operation at the current node, and its arguments as those of the function of that name."""
        args, kwargs = map_aggregate((args, kwargs), lambda v: v.value if _is_plain(v) else v)
        if self.node.op == "call_module":
            return self.module_operation(self.network.get_submodule(self.node.target), args, kwargs)
        name = self.node.target if self.node.op == "call_method" else self.node.target.__name__
        if self.node.op == "call_function" and not any(getattr(n, name, 0) is self.node.target for n in NAMESPACES):
            return "", args, kwargs
        return name.replace("_", ""), args, kwargs

    def module_operation(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[str, tuple, dict]:
        """The same of a module, with its tensors among the arguments."""
        if not args:
            return "", args, kwargs
        name = type(module).__name__.lower()
        state = {n: self.state_value(f"{self.node.target}.{n}") for n, _ in _own_tensors(module)}
        weight, bias = state.get("weight"), state.get("bias")
        if name == "linear" or name == "prelu":
            args = (*args, weight, bias)[: 3 if name == "linear" else 2]
        elif name in ("conv1d", "conv2d", "conv3d"):
            args, kwargs = (*args, weight, bias), {"groups": module.groups}
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            name, args = "batchnorm", (*args, state.get("running_mean"), state.get("running_var"), weight, bias)
        elif name in ("layernorm", "rmsnorm"):
            args = (*args, module.normalized_shape, weight, bias)
        elif name == "groupnorm":
            args = (*args, module.num_groups, weight, bias)
        elif name in ("softmax", "logsoftmax"):
            args = (*args, module.dim)
        elif name == "multiheadattention":
            args = (module, *args)
        elif isinstance(module, (nn.ConstantPad1d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d)):
            name, args = "pad", (*args, module.padding, PADDING_MODES[type(module).__name__[:-5]])
        elif state:
            name = ""
        return name, args, kwargs

    def unknown(self, result: Any, args: Any, kwargs: Any) -> Any:
        """Labels of the result of an operation that is not understood: whatever it reads is not permuted."""
        what = type(self.function()).__name__ if self.node.op == "call_module" else self.node.name
        reason = f"{what} ({self.node}) is not understood" if what != self.node.name else f"{what} is not understood"
        inputs = [v for v in _labelled((args, kwargs)) if v.name is not None or self.has_units(v)]
        for value in inputs:
            self.fix(value, reason)
        if self.node.op == "call_module":
            module = self.function()
            for name, _ in (*module.named_parameters(), *module.named_buffers()):
                self.units.opaque(f"{self.node.target}.{name}", reason)
        if not inputs:
            return map_aggregate(result, _constant)
        unit = self.units.new(1)
        self.units.fix(unit, reason)
        return map_aggregate(result, lambda leaf: unit.expand(leaf.shape) if _is_tensor(leaf) else None)

    def labels(self, value: _Value) -> Any:
        """The labels of a value; those of a tensor of the state dict are made when first asked for."""
        if value.name is not None and value.value.numel() > 1:
            return self.units.elements(value.name)
        return value.labels

    def has_units(self, value: _Value) -> bool:
        """Whether a permutation moves any number of a value."""
        return any(bool((_compact(leaf) > 0).any()) for leaf in leaves(self.labels(value)) if _is_tensor(leaf))

    def fix(self, value: _Value, reason: str) -> None:
        """Fix all units of a value."""
        for leaf in leaves(self.labels(value)):
            if _is_tensor(leaf):
                self.units.fix(_compact(leaf), reason)

    def joined(self, *values: _Value | None) -> Tensor:
        """Labels of numbers that are each computed from one number of every value, broadcast.

        Units that meet are one. A unit that meets numbers that no permutation moves is identified by those numbers.
        """
        present = [(v, _compact(self.labels(v))) for v in values if v is not None and v.value is not None]
        for (value, a), (other, b) in ordered_pairs(present, 2):
            self.units.tie(a, b)
            still = torch.where(b == INVARIANT, a, INVARIANT)
            if not (still > 0).any() or other.value.numel() == 1:
                continue
            numbers = torch.arange(other.value.numel()).reshape(other.value.shape)
            if value.name is not None:
                self.units.fix(still, OUTSIDE)  # a weight of inputs
            else:
                self.units.mark(still, numbers, f"each meets other values in {self.node}")
        return torch.stack(torch.broadcast_tensors(*(labels for _, labels in present))).amax(0)

    def merged(self, labels: Tensor, dims: Sequence[int]) -> Tensor:
        """Make all units along some dimensions one; padding does not count. Those dimensions have size 1 afterwards."""
        compact = _compact(labels)
        merged = compact.amax(tuple(dims), keepdim=True)
        self.units.tie(merged, compact)
        self.units.fix(torch.where(compact == INVARIANT, merged, INVARIANT), OUTSIDE)
        return merged

    def along(self, value: _Value, dim: int) -> Tensor:
        """The unit of every index along one dimension of a value, (n,)."""
        labels = self.labels(value)
        dim %= labels.ndim
        return self.merged(labels, [d for d in range(labels.ndim) if d != dim]).flatten().expand(labels.shape[dim])

    def moved(self, result: Any, first: Any, *args: Any, **kwargs: Any) -> Any:
        """Operations that only move the numbers of the first argument."""
        if not self.name.endswith("as") and any(self.has_units(v) for v in _labelled((args, kwargs))):
            return None
        return self.apply(map_aggregate(first, lambda v: self.labels(v)), *_plain(args), **_plain(kwargs))

    def padded(
        self, result: Tensor, x: _Value, pad: Sequence[int], mode: str = "constant", value: Any = None
    ) -> Tensor:
        """Numbers beyond the edge are the same constant everywhere, or copies."""
        return F.pad((self.labels(x) - PADDING).double(), pad, mode).long() + PADDING

    def elementwise(self, result: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Each number of the result is computed from one of every argument."""
        values = [value for value in (*args, *kwargs.values()) if isinstance(value, _Value)]
        labels = self.joined(*(values[:1] if self.name in HOMOGENEOUS else values))
        sums = self.name in SUMS and len(values) == 2 and all((_compact(self.labels(v)) > 0).all() for v in values)
        products = self.name in PRODUCTS and len(values) == 1 and args[0] is values[0]
        if not (sums or products or self.name in HOMOGENEOUS):
            self.units.scaled(labels)
        return labels.expand(result.shape)

    def pooled(self, result: Tensor, x: _Value, *args: Any, **kwargs: Any) -> Tensor:
        """Numbers along the last dimensions are mixed."""
        return self.merged(self.labels(x), range(-POOLS[self.name], 0)).expand(result.shape)

    def reduced(self, result: Tensor, x: _Value, dim: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """Sums and the like: invariant where they run over units, else of the unit that they run over."""
        labels = self.labels(x)
        dims = range(labels.ndim) if dim is None or isinstance(dim, bool) else (dim,) if isinstance(dim, int) else dim
        self.sliced(labels, tuple(dims))
        compact = _compact(labels)
        low, high = (bound(tuple(dims), keepdim=True) for bound in (compact.amin, compact.amax))
        if self.name in ("var", "std", "logsumexp") or (low != high).any():
            self.units.scaled(compact)
        shape = [1 if d in {d % labels.ndim for d in dims} else n for d, n in enumerate(labels.shape)]
        return torch.where(low == high, high, INVARIANT).expand(shape).reshape(result.shape)

    def sliced(self, labels: Tensor, dims: tuple[int, ...]) -> None:
        """Units in different slices along some dimensions are not interchangeable."""
        compact = _compact(labels)
        mixed = compact.amin(dims, keepdim=True) != compact.amax(dims, keepdim=True)
        slices = torch.arange(mixed.numel()).reshape(mixed.shape)
        self.units.mark(torch.where(mixed, compact, INVARIANT), slices, f"{self.node} treats them in separate parts")

    def linear(self, result: Tensor, x: _Value, weight: _Value, bias: _Value | None = None) -> Tensor | None:
        """x W^T + b over the last dimension."""
        if not _named(weight, bias) or weight.value.ndim != 2:
            return None
        self.units.bind(self.units.axis(weight.name, 1, incoming=False), self.along(x, -1))
        return self.computed(result, weight, bias, -1)

    def convolution(
        self,
        result: Tensor,
        x: _Value,
        weight: _Value,
        bias: _Value | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        """A convolution; the inputs and outputs of each of its groups, where there are several, become one unit."""
        if not _named(weight, bias):
            return None
        channel = 1 - weight.value.ndim
        inputs = self.along(x, channel)
        if groups == 1:
            self.units.bind(self.units.axis(weight.name, 1, incoming=False), inputs)
        else:
            both = [labels.reshape(groups, -1) for labels in (inputs, self.units.axis(weight.name, 0))]
            self.units.scaled(self.merged(torch.cat(both, dim=1), [1]))
        return self.computed(result, weight, bias, channel)

    def computed(self, result: Tensor, weight: _Value, bias: _Value | None, dim: int) -> Tensor:
        """Labels of the outputs of a weight (out, ...), which stand along a dimension of the result."""
        outputs = self.units.axis(weight.name, 0)
        if bias is not None and bias.value is not None:
            self.units.tie(self.units.axis(bias.name, 0), outputs)
        return _spread(outputs, result, dim)

    def channel_norm(
        self,
        result: Tensor,
        x: _Value,
        mean: Any = None,
        var: Any = None,
        weight: Any = None,
        bias: Any = None,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        """Every channel has its own shift and scale."""
        return self.normed(result, self.along(x, 1), 1, mean, var, weight, bias)

    def group_norm(
        self, result: Tensor, x: _Value, groups: int, weight: Any = None, bias: Any = None, eps: float = 0
    ) -> Tensor:
        """Groups of several channels become one unit each, unless one group holds them all."""
        channels = self.along(x, 1)
        if groups > 1:
            self.merged(channels.reshape(groups, -1), [1])
        return self.normed(result, channels, 1, weight, bias)

    def prelu(self, result: Tensor, x: _Value, weight: _Value) -> Tensor:
        """Slopes of each channel."""
        return self.normed(result, self.along(x, min(1, x.value.ndim - 1)), min(1, x.value.ndim - 1), weight)

    def normed(self, result: Tensor, channels: Tensor, dim: int, *tensors: _Value | None) -> Tensor:
        """Labels of a result whose channels meet numbers of their own."""
        self.units.scaled(channels)
        return _spread(self.joined(_Value(channels, channels), *tensors).expand(len(channels)), result, dim)

    def layer_norm(
        self, result: Tensor, x: _Value, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Any = None
    ) -> Tensor:
        """The last dimensions are normalised together; then each number has its own shift and scale."""
        labels = self.labels(x)
        self.sliced(labels, tuple(range(-len(normalized_shape), 0)))
        self.units.scaled(_compact(labels))
        return self.joined(x, weight, bias).expand(result.shape)

    def softmax(self, result: Tensor, x: _Value, dim: int | None = None, *args: Any, **kwargs: Any) -> Tensor | None:
        """Numbers along one dimension are normalised together."""
        if dim is None:
            return None
        labels = self.labels(x)
        self.sliced(labels, (dim,))
        self.units.scaled(_compact(labels))
        return labels

    def matrix_product(self, result: Tensor, a: _Value, b: _Value) -> Tensor | None:
        """Everything along the dimension that is summed over becomes one unit, for each matrix of a batch."""
        if not (self.has_units(a) or self.has_units(b)):
            return _constant(result)
        if min(a.value.ndim, b.value.ndim) < 2 or not (self.has_units(a) and self.has_units(b)):
            return None
        rows, columns = self.merged(self.labels(a), [-1]), self.merged(self.labels(b), [-2])
        labels = self.joined(_Value(rows, rows), _Value(columns, columns))
        self.units.scaled(labels)
        return labels.expand(result.shape)

    def attention(
        self, result: Tensor, query: _Value, key: _Value, value: _Value, attn_mask: Any = None, *_: Any, **kwargs: Any
    ) -> Tensor | None:
        """Each head becomes one unit."""
        if kwargs.get("enable_gqa"):
            return None
        heads = [self.merged(self.labels(part), [-2, -1]) for part in (query, key, value)]
        labels = self.joined(*(_Value(part, part) for part in heads))
        self.units.scaled(labels)
        if attn_mask is not None:
            self.joined(_Value(labels, labels), attn_mask)
        return labels.expand(result.shape)

    def packed_attention(
        self, result: tuple, module: nn.MultiheadAttention, query: _Value, key: _Value, value: _Value, **kwargs: Any
    ) -> tuple | None:
        """torch's attention: three blocks of rows of one weight and the columns of another belong to the heads."""
        mask, path = kwargs.get("attn_mask"), self.node.target
        weight, bias, out, out_bias = (
            self.state_value(f"{path}.{name}")
            for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        )
        special = module.bias_k is not None or (mask is not None and mask.value.ndim > 2) or result[1] is not None
        if special or not _named(weight, bias) or not _named(out, out_bias):
            return None
        for part in (query, key, value):
            self.units.bind(self.units.axis(weight.name, 1, incoming=False), self.along(part, -1))
        parts = self.units.axis(weight.name, 0).reshape(3, module.num_heads, -1)
        columns = self.units.axis(out.name, 1, incoming=False).reshape(1, module.num_heads, -1)
        heads = self.merged(torch.cat([parts, columns]), [0, 2])
        self.units.scaled(heads)
        if bias.value is not None:
            self.units.tie(self.units.axis(bias.name, 0).reshape(parts.shape), heads)
        return self.computed(result[0], out, out_bias, -1), None


def _takes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether a function can be called with such arguments."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _constant(value: Any) -> Any:
    """Labels of tensors that no permutation changes; None for other values."""
    return map_aggregate(value, lambda v: torch.zeros((), dtype=torch.int64).expand(v.shape) if _is_tensor(v) else None)


def _compact(labels: Tensor) -> Tensor:
    """Labels without the copies along dimensions that were expanded, which have size 1 then."""
    return labels[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in labels.stride())]


def _spread(units: Tensor, result: Tensor, dim: int) -> Tensor:
    """Labels of a result whose units stand along one dimension."""
    shape = [1] * result.ndim
    shape[dim] = -1
    return units.reshape(shape).expand(result.shape)


def _named(weight: _Value | None, bias: _Value | None) -> bool:
    """Whether weight and bias, if there is one, are tensors of the state dict as they are."""
    return (
        weight is not None and weight.name is not None and (bias is None or bias.value is None or bias.name is not None)
    )


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a module itself, with names."""
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_plain(value: Any) -> bool:
    """Whether a value holds no tensor."""
    return isinstance(value, _Value) and value.labels is None


def _plain(values: Any) -> Any:
    """Nested values without their labels."""
    return map_aggregate(values, lambda v: v.value if isinstance(v, _Value) else v)


def leaves(nested: Any) -> list:
    """What stands in nested tuples, lists, dicts and slices."""
    found: list = []
    map_aggregate(nested, found.append)
    return found


def _labelled(nested: Any) -> list[_Value]:
    """The values that hold tensors."""
    return [leaf for leaf in leaves(nested) if isinstance(leaf, _Value) and leaf.labels is not None]
