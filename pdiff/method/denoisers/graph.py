"""A denoiser of networks as graphs: units are nodes, the weights between two units an edge; it knows no positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdiff.method.denoisers.embedding import SINUSOIDS, sinusoids
from pdiff.method.tokens import Layout

DROPPED = 0.1  # share of a batch whose conditions are hidden in training (Ho and Salimans 2022, arXiv 2207.12598)
EXPANSION = 4  # of the hidden layer of an MLP of nodes, in widths


class GraphDenoiser(nn.Module):
    """A transformer over the units of a network, after message passing along the edges between them.

    Permuting the units of a group permutes its predictions: units of a group share all weights, and nothing says which
    is which. In every block, edges read their two nodes, nodes read the mean of their edges, on both sides (Lim et al.
    2023, arXiv 2312.04501; Kofinas et al. 2024, arXiv 2403.12143), and then all nodes attend to all. Where there is
    one group, there are no edges, and it is a set transformer. The numbers of no unit are one more node. Timesteps, and
    conditions, scale and shift every block (Peebles and Xie 2023, arXiv 2212.09748). It begins as the prediction 0.

    Args:
        layout: of the rows (B, L), as `Layout.config` gives it.
        width: of a node.
        blocks: how many.
        heads: of attention; they divide the width.
        edge_width: of an edge.
        conditions: C, how many numbers of a network it is conditioned on.
    """

    def __init__(
        self,
        layout: dict,
        *,
        width: int = 128,
        blocks: int = 4,
        heads: int = 4,
        edge_width: int = 32,
        conditions: int = 0,
    ) -> None:
        super().__init__()
        self.options = {"layout": layout, "width": width, "blocks": blocks, "heads": heads}
        self.options |= {"edge_width": edge_width, "conditions": conditions}
        self.layout, self.conditions = Layout.from_config(layout), conditions
        self.time = nn.Sequential(nn.Linear(SINUSOIDS, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = nn.Linear(2 * conditions, width) if conditions else None
        widths = [(shape[-1], edge_width if len(shape) == 3 else width) for shape in self.layout.shapes]
        self.inputs = nn.ModuleList(nn.Linear(size, hidden) for size, hidden in widths)
        self.blocks = nn.ModuleList(_Block(self.layout, width, heads, edge_width) for _ in range(blocks))
        self.outputs = nn.ModuleList(_Output(size, hidden, width) for size, hidden in widths)

    def forward(self, z: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Predict from z (B, L) at timesteps t (B,), and from conditions (B, C), where NaN is unknown."""
        embedding = F.silu(self.time(sinusoids(t)) + self._conditions(condition, len(z)))
        parts = self.layout.split(z)
        hidden = [layer(part) for layer, part in zip(self.inputs, parts, strict=True)]
        nodes = torch.cat([*hidden[: len(self.layout.nodes)], hidden[-1][:, None]], dim=1)
        edges = hidden[len(self.layout.nodes) : -1]
        for block in self.blocks:
            nodes, edges = block(nodes, edges, embedding)
        *units, rest = nodes.split([*(count for count, _ in self.layout.nodes), 1], dim=1)
        hidden = [*units, *edges, rest[:, 0]]
        found = (layer(h, part, embedding) for layer, h, part in zip(self.outputs, hidden, parts, strict=True))
        return torch.cat([part.flatten(1) for part in found], dim=1)

    def _conditions(self, condition: Tensor | None, count: int) -> Tensor | float:
        if self.condition is None:
            return 0.0
        if condition is None:
            condition = self.condition.weight.new_full((count, self.conditions), torch.nan)
        if self.training:
            hidden = torch.rand_like(condition[:, :1]) < DROPPED
            condition = condition.masked_fill(hidden, torch.nan)
        unknown = condition.isnan()
        return self.condition(torch.cat([condition.masked_fill(unknown, 0.0), unknown.to(condition.dtype)], dim=1))


class _Output(nn.Module):
    """Numbers (B, ..., size) from hidden ones (B, ..., hidden), plus the noisy numbers times a function of t.

    The second term carries noise past the width of a node, which may be smaller than its numbers.
    """

    def __init__(self, size: int, hidden: int, width: int) -> None:
        super().__init__()
        self.norm, self.linear, self.skip = _Norm(hidden, width), nn.Linear(hidden, size), nn.Linear(width, size)
        for layer in (self.linear, self.skip):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, h: Tensor, z: Tensor, embedding: Tensor) -> Tensor:
        return self.linear(self.norm(h, embedding)) + _along(self.skip(embedding), z) * z


class _Norm(nn.Module):
    """Layer normalisation (B, ..., size), scaled and shifted by the embedding (B, width)."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size, self.modulation = size, nn.Linear(width, 2 * size)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = (_along(part, h) for part in self.modulation(embedding).chunk(2, dim=1))
        return torch.addcmul(shift, F.layer_norm(h, (self.size,)), 1 + scale)


class _Block(nn.Module):
    """Messages along the edges, attention among the nodes, an MLP of each node; each is added to its input."""

    def __init__(self, layout: Layout, width: int, heads: int, edge_width: int) -> None:
        super().__init__()
        self.layout, self.heads = layout, heads
        self.norms = nn.ModuleList(_Norm(width, width) for _ in range(3 if layout.edges else 2))
        self.messages = nn.ModuleList(_Messages(width, edge_width) for _ in layout.edges)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, EXPANSION * width), nn.GELU(), nn.Linear(EXPANSION * width, width))

    def forward(self, nodes: Tensor, edges: list[Tensor], embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
        attention, mlp, *messages = self.norms
        if edges:
            nodes, edges = self._pass(nodes, edges, messages[0](nodes, embedding))
        parts = self.qkv(attention(nodes, embedding)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # (B, heads, units, width of a head) each
        mixed = F.scaled_dot_product_attention(query, key, value)
        nodes = nodes + self.out(mixed.transpose(1, 2).flatten(2))
        return nodes + self.mlp(mlp(nodes, embedding)), edges

    def _pass(self, nodes: Tensor, edges: list[Tensor], seen: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Edges that have read their nodes, as the messages see them, and nodes that have read their edges."""
        counts = [*(count for count, _ in self.layout.nodes), 1]
        units, updated, seen = list(nodes.split(counts, dim=1)), [], seen.split(counts, dim=1)
        for (a, b, _), layer, edge in zip(self.layout.edges, self.messages, edges, strict=True):
            edge, to_a, to_b = layer(edge, seen[a], seen[b])
            units[a], updated = units[a] + to_a, [*updated, edge]
            units[b] = units[b] + to_b
        return torch.cat(units, dim=1), updated


class _Messages(nn.Module):
    """One kind of edges (B, m, n, edge_width) between nodes (B, m, width) and (B, n, width)."""

    def __init__(self, width: int, edge_width: int) -> None:
        super().__init__()
        hidden = 2 * edge_width
        self.norm = nn.LayerNorm(edge_width)
        self.edge, self.a = nn.Linear(edge_width, hidden), nn.Linear(width, hidden)
        self.b = nn.Linear(width, hidden)
        self.update = nn.Linear(hidden, edge_width)
        self.to_a, self.to_b = nn.Linear(hidden, width), nn.Linear(hidden, width)

    def forward(self, edge: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The edges, and what is added to either kind of nodes."""
        message = F.silu(self.edge(self.norm(edge)) + self.a(a)[:, :, None] + self.b(b)[:, None])
        return edge + self.update(message), self.to_a(message.mean(2)), self.to_b(message.mean(1))


def _along(part: Tensor, h: Tensor) -> Tensor:
    """(B, size) -> (B, 1, ..., size), with the dimensions of h."""
    return part.unflatten(1, [*[1] * (h.ndim - 2), -1])
