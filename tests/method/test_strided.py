"""Fast convolutions of stride 2 against those of PyTorch: outputs, gradients, running statistics, state dicts."""

import copy

import pytest
import torch
from torch import nn

from pdiff.method.autoencoders import strided
from pdiff.method.autoencoders.convolutional import ConvAutoencoder
from pdiff.method.autoencoders.strided import Down, Norm, Up

PLAIN = {Down: nn.Conv1d, Up: nn.ConvTranspose1d, Norm: nn.BatchNorm1d}


def plain(module: nn.Module) -> nn.Module:
    """A copy whose modules are those of PyTorch."""
    module = copy.deepcopy(module)
    for part in module.modules():
        part.__class__ = PLAIN.get(type(part), type(part))
    return module


def results(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, buffers, and gradients by the input and by all parameters."""
    x = x.clone().requires_grad_()
    output = module(x)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((weights * output).sum(), [x, *module.parameters()])
    return [output, *module.buffers(), *gradients]


@pytest.mark.parametrize("windows", [1, 4 << 20])
@pytest.mark.parametrize("inputs", [1, 3])
@pytest.mark.parametrize("kind", [Down, Up])
def test_as_pytorch(kind, inputs, windows, monkeypatch):
    monkeypatch.setattr(strided, "WINDOW_BYTES", windows)
    torch.manual_seed(0)
    module, x = nn.Sequential(kind(inputs, 5, 7), Norm(5), nn.ELU()), torch.randn(4, inputs, 12)
    other = plain(module)  # before the running statistics change
    for ours, theirs in zip(results(module, x), results(other, x), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    assert module.state_dict().keys() == plain(module).state_dict().keys()
    with torch.no_grad():
        assert torch.equal(module.eval()(x), plain(module).eval()(x))


@pytest.mark.parametrize("function", [strided._Down, strided._Up])
def test_gradients_are_those_of_finite_differences(function):
    shape = (4, 3, 7) if function is strided._Down else (3, 4, 7)
    shapes = [(2, 3, 8), shape, (4,)]
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]
    assert torch.autograd.gradcheck(function.apply, given)


def test_the_fast_path_is_taken_in_training(monkeypatch):
    taken = []
    monkeypatch.setattr(
        strided, "_weight_gradient", lambda x, y, k: taken.append(k) or torch.zeros(y.shape[1], x.shape[1], k)
    )
    autoencoder, x = ConvAutoencoder(64, 3), torch.randn(2, 64)
    autoencoder.loss(x, parameter_noise=0.0, latent_noise=0.0).backward()
    assert len(taken) == 9  # all but the first, which has one channel
    with torch.autocast("cpu", torch.bfloat16):
        autoencoder.loss(x, parameter_noise=0.0, latent_noise=0.0).backward()
    assert len(taken) == 9
