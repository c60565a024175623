"""Denoisers against the method's description, written out once more."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pdiff.method.denoisers import DENOISERS
from pdiff.method.denoisers.convolutional import ConvDenoiser
from pdiff.method.denoisers.embedding import sinusoids
from pdiff.method.denoisers.mlp import MLPDenoiser


@pytest.mark.parametrize("t", [torch.tensor([0, 1, 999]), torch.tensor([0.25, 640.5])])
def test_sinusoids_against_a_loop(t: Tensor) -> None:
    found = sinusoids(t, 8)
    for row, time in zip(found, t.tolist(), strict=True):
        angles = [time * 10_000 ** (-k / 4) for k in range(4)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert torch.allclose(row, torch.tensor(expected), atol=1e-4)
    assert sinusoids(t).shape == (len(t), 256)


@pytest.mark.parametrize("latent_size", [1, 10, 128])
def test_parameters_of_the_convolutional_denoiser(latent_size: int) -> None:
    """A hand count of section 4."""
    channels = [1, 64, 128, 256, 512, 256, 128, 64, 1]
    convolutions = sum(7 * channels[k] * channels[k + 1] + channels[k + 1] for k in range(8))
    normalisations = 2 * (64 + 128 + 256 + 512 + 256 + 128 + 64)
    time = 256 * latent_size + latent_size + latent_size**2 + latent_size
    denoiser = ConvDenoiser(latent_size)
    assert sum(p.numel() for p in denoiser.parameters()) == convolutions + normalisations + time


def written_out(state: dict[str, Tensor], z: Tensor, t: Tensor) -> Tensor:
    """The paper's denoiser in training mode, one convolution after the other, counted from 1 as there."""

    def convolution(k: int, h: Tensor) -> Tensor:
        h = F.conv1d(h + time, state[f"convolutions.{k - 1}.weight"], state[f"convolutions.{k - 1}.bias"], padding=3)
        if k == 8:
            return h
        h = (h - h.mean((0, 2), keepdim=True)) / (h.var((0, 2), unbiased=False, keepdim=True) + 1e-5).sqrt()
        scale, shift = state[f"activations.{k - 1}.0.weight"], state[f"activations.{k - 1}.0.bias"]
        h = h * scale[:, None] + shift[:, None]
        return torch.where(h > 0, h, h.exp() - 1)

    h = F.linear(sinusoids(t), state["time.0.weight"], state["time.0.bias"])
    time = F.linear(h * h.sigmoid(), state["time.2.weight"], state["time.2.bias"])[:, None]
    one = convolution(1, z[:, None])
    two = convolution(2, one)
    three = convolution(3, two)
    five = convolution(5, convolution(4, three))
    six = convolution(6, five + three)
    seven = convolution(7, six + two)
    return convolution(8, seven + one)[:, 0]


def test_the_convolutional_denoiser_is_that_of_the_method() -> None:
    torch.manual_seed(0)
    denoiser, z, t = ConvDenoiser(12), torch.randn(4, 12), torch.tensor([0, 10, 500, 999])
    for layer in denoiser.activations[:-1]:
        torch.nn.init.normal_(layer[0].weight)
        torch.nn.init.normal_(layer[0].bias)
    assert torch.allclose(denoiser(z, t), written_out(dict(denoiser.named_parameters()), z, t), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", DENOISERS)
@pytest.mark.parametrize("latent_size", [1, 7, 64])
def test_every_denoiser_keeps_the_shape_and_sees_both_inputs(kind: str, latent_size: int) -> None:
    torch.manual_seed(0)
    denoiser = DENOISERS[kind]().build(latent_size)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    z, t = torch.randn(5, latent_size), torch.tensor([0.0, 1.5, 30, 600, 999])
    out = denoiser.eval()(z, t)
    assert out.shape == z.shape and out.isfinite().all()
    assert not torch.allclose(out, denoiser(z, t + 50)) and not torch.allclose(out, denoiser(z + 1, t))
    assert torch.allclose(out[2:3], denoiser(z[2:3], t[2:3]), rtol=1e-3, atol=1e-5)  # rows do not see each other
    assert torch.equal(denoiser(z, t.long()), denoiser(z, t.long().float()))


def test_every_parameter_of_the_mlp_is_trained() -> None:
    torch.manual_seed(0)
    denoiser = MLPDenoiser(6, width=16, blocks=2)
    z, t = torch.randn(4, 6), torch.arange(4)
    assert torch.equal(denoiser(z, t), torch.zeros(4, 6))  # it begins as zero
    torch.nn.init.normal_(denoiser.output.weight)
    denoiser(z, t).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in denoiser.parameters())
