"""The denoiser of tokens against its messages written out as loops, and what it must and must not see."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdiff.method.denoisers import GraphDenoiserOptions
from pdiff.method.denoisers.graph import GraphDenoiser
from pdiff.method.tokens import Layout

LAYOUT = Layout(((3, 4), (2, 0), (4, 2)), ((0, 1, 2), (1, 1, 1), (0, 2, 3)), 5)


def graph(*, random: bool = True, **options: int) -> GraphDenoiser:
    torch.manual_seed(0)
    denoiser = GraphDenoiser(LAYOUT.config(), **{"width": 8, "blocks": 2, "heads": 2, "edge_width": 4} | options).eval()
    for parameter in denoiser.parameters() if random else ():
        nn.init.normal_(parameter, std=0.3)
    return denoiser


def rows(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, LAYOUT.size, generator=generator), 1000 * torch.rand(count, generator=generator)


def test_messages_against_loops() -> None:
    layer = graph().blocks[0].messages[0]
    edge, a, b = torch.randn(1, 3, 2, 4), torch.randn(1, 3, 8), torch.randn(1, 2, 8)
    updated, to_a, to_b = layer(edge, a, b)
    messages = torch.empty(3, 2, 8)
    for i in range(3):
        for j in range(2):
            seen = layer.edge(layer.norm(edge[0, i, j])) + layer.a(a[0, i]) + layer.b(b[0, j])
            messages[i, j] = F.silu(seen)
            torch.testing.assert_close(updated[0, i, j], edge[0, i, j] + layer.update(messages[i, j]))
    for i in range(3):
        torch.testing.assert_close(to_a[0, i], layer.to_a((messages[i, 0] + messages[i, 1]) / 2))
    for j in range(2):
        torch.testing.assert_close(to_b[0, j], layer.to_b(messages[:, j].sum(0) / 3))


def test_rows_do_not_see_each_other_and_every_number_counts() -> None:
    denoiser, (z, t) = graph(), rows(5)
    out = denoiser(z, t)
    assert out.shape == z.shape and not torch.allclose(out, denoiser(z, t + 100))
    torch.testing.assert_close(out[2:3], denoiser(z[2:3], t[2:3]), rtol=1e-3, atol=1e-4)
    z = z[:1].requires_grad_()
    for k in (0, LAYOUT.size - 1):  # a number of a unit, and one of none
        (gradient,) = torch.autograd.grad(denoiser(z, t[:1])[0, k], z)
        assert (gradient != 0).all()


def test_it_begins_as_zero_and_every_parameter_is_trained() -> None:
    denoiser, (z, t) = graph(random=False, conditions=2), rows(3)
    assert torch.equal(denoiser(z, t), torch.zeros_like(z))
    for layer in denoiser.outputs:
        nn.init.normal_(layer.linear.weight)
    denoiser(z, t, torch.tensor([[1.0, torch.nan], [0.5, 2.0], [torch.nan, 0.0]])).square().sum().backward()
    unused = {name for name, p in denoiser.named_parameters() if p.numel() and (p.grad is None or not p.grad.any())}
    assert unused == {f"outputs.1.norm.modulation.{kind}" for kind in ("weight", "bias")}  # units without numbers


def test_unknown_conditions_are_those_of_nobody() -> None:
    denoiser, (z, t) = graph(conditions=2), rows(4)
    known = torch.tensor([[0.5, -1.0]]).expand(4, 2)
    out = denoiser(z, t, known)
    assert not torch.allclose(out, denoiser(z, t)) and not torch.allclose(out, denoiser(z, t, known + 0.1))
    assert torch.equal(denoiser(z, t), denoiser(z, t, torch.full((4, 2), torch.nan)))
    half = torch.tensor([[0.5, torch.nan]]).expand(4, 2)
    assert not torch.allclose(denoiser(z, t, half), out) and not torch.allclose(denoiser(z, t, half), denoiser(z, t))


def test_conditions_are_hidden_from_a_tenth_of_a_batch_in_training() -> None:
    denoiser = graph(conditions=1)
    z, t, condition = torch.zeros(4000, LAYOUT.size), torch.zeros(4000), torch.ones(4000, 1)
    with torch.no_grad():
        hidden = denoiser(z[:1], t[:1])
        torch.manual_seed(0)
        found = denoiser.train()(z, t, condition)
    share = torch.isclose(found, hidden, rtol=1e-4, atol=1e-4).all(1).float().mean().item()
    assert share == pytest.approx(0.1, abs=0.02)


def test_heads_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"heads must divide width, but got \(3, 128\)"):
        GraphDenoiserOptions(heads=3)
