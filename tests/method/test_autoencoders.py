"""Autoencoders against the singular value decomposition, hand counts and torch.distributions."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA as SklearnPCA
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from pdiff.method import vectors
from pdiff.method.activations import ELU
from pdiff.method.autoencoders.convolutional import ConvAutoencoder
from pdiff.method.autoencoders.pca import PCA


def low_rank(count: int = 20, size: int = 50, rank: int = 6) -> Tensor:
    """Rows of a given rank around a centre, with a falling spectrum, (count, size)."""
    g = torch.Generator().manual_seed(0)
    factors = torch.randn(count, rank, generator=g) * 2.0 ** -torch.arange(rank)
    return factors @ torch.randn(rank, size, generator=g) + torch.randn(size, generator=g)


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
@pytest.mark.parametrize("latent_size", [1, 4])
def test_components_are_the_singular_vectors(shape: tuple[int, int], latent_size: int) -> None:
    x = low_rank(*shape)
    pca = PCA.fit(x, latent_size=latent_size)
    right = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:latent_size]
    assert torch.allclose(pca.components.T @ pca.components, right.T @ right, atol=1e-4)  # the same subspace
    assert torch.allclose((pca.components * right).sum(1).abs(), torch.ones(latent_size), atol=1e-4)  # in this order
    assert torch.allclose(pca.components @ pca.components.T, torch.eye(latent_size), atol=1e-5)


def test_reconstruction_is_that_of_sklearn() -> None:
    x, new = low_rank(rank=15), torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    pca, other = PCA.fit(x, latent_size=5), SklearnPCA(5, svd_solver="full").fit(x.double().numpy())
    for rows in (x, new):
        expected = torch.from_numpy(other.inverse_transform(other.transform(rows.double().numpy()))).float()
        assert torch.allclose(pca(rows), expected, atol=1e-4)
        assert torch.allclose(
            pca.encode(rows).abs(), torch.from_numpy(other.transform(rows.numpy())).abs().float(), atol=1e-4
        )


@pytest.mark.parametrize("variance", [0.5, 0.9, 0.99, 0.999])
def test_automatic_size_is_the_smallest_that_explains_the_variance(variance: float) -> None:
    x = low_rank(rank=15)
    shares = SklearnPCA().fit(x.double().numpy()).explained_variance_ratio_.cumsum()
    latent_size = PCA.fit(x, variance=variance).latent_size
    assert shares[latent_size - 1] >= variance and (latent_size == 1 or shares[latent_size - 2] < variance)


@pytest.mark.parametrize("options", [{"latent_size": 128}, {"variance": 1.0}])
def test_no_more_components_than_directions(options: dict) -> None:
    x = low_rank(rank=6)
    pca = PCA.fit(x, **options)
    assert pca.latent_size <= 7 and torch.allclose(pca(x), x, atol=1e-4)


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
def test_blocks_change_nothing(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    x = low_rank(*shape)
    expected = PCA.fit(x, latent_size=5)
    monkeypatch.setattr(vectors, "BLOCK_BYTES", 7 * 8 * min(shape))
    assert torch.allclose(PCA.fit(x, latent_size=5)(x), expected(x), atol=1e-5)


def test_the_smaller_matrix_is_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, decompose = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: sizes.append(len(matrix)) or decompose(matrix))
    for shape in ((20, 50), (50, 20)):
        PCA.fit(low_rank(*shape), latent_size=3)
    assert sizes == [20, 20]


@pytest.mark.parametrize("count", [1, 9])
def test_identical_checkpoints_reconstruct(count: int) -> None:
    x = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).repeat(count, 1)
    pca = PCA.fit(x)
    assert pca.latent_size == 1 and torch.allclose(pca(x), x, atol=1e-5)
    assert pca.components.isfinite().all()


@pytest.mark.parametrize("size", [1, 63, 64, 65, 2410])
@pytest.mark.parametrize("variational", [False, True])
def test_parameters_of_the_convolutional_autoencoder(size: int, variational: bool) -> None:
    """A hand count of section 3; convolutions a b 7 + b, normalisations 2 b, linear layers a b + b."""
    padded, latent = {1: 64, 63: 64, 64: 64, 65: 128, 2410: 2432}[size], 8
    down = [(1, 64), (64, 128), (128, 256), (256, 256), (256, 32)]
    up = [(32, 256), (256, 256), (256, 128), (128, 64), (64, 64)]
    expected = sum(a * b * 7 + 3 * b for a, b in down + up) + 64 * 7 + 1
    expected += padded * latent + latent + (latent * latent + latent) * (1 + variational) + latent * padded + padded
    autoencoder = ConvAutoencoder(size, latent, variational=variational)
    assert sum(p.numel() for p in autoencoder.parameters()) == expected


@pytest.mark.parametrize("size", [1, 63, 64, 65, 2410])
def test_shapes_of_the_convolutional_autoencoder(size: int) -> None:
    autoencoder, x = ConvAutoencoder(size, 5).eval(), torch.randn(3, size)
    z = autoencoder.encode(x)
    assert z.shape == (3, 5) and autoencoder.decode(z).shape == (3, size) == autoencoder(x).shape
    assert autoencoder.encoder[:-1](F.pad(x, (0, -size % 64))[:, None]).shape == (3, 32, -(-size // 64) * 2)


def test_the_convolutional_autoencoder_is_that_of_the_method() -> None:
    """Section 3 in training mode, written out with the functions of torch."""
    torch.manual_seed(0)
    autoencoder, x = ConvAutoencoder(100, 6), torch.randn(4, 100)
    p = dict(autoencoder.named_parameters())

    def normalised(h: Tensor, name: str) -> Tensor:
        h = (h - h.mean((0, 2), keepdim=True)) / (h.var((0, 2), unbiased=False, keepdim=True) + 1e-5).sqrt()
        return h * p[f"{name}.weight"][:, None] + p[f"{name}.bias"][:, None]

    h = torch.cat([x, torch.zeros(4, 28)], 1)[:, None]
    for k in range(5):
        name = f"encoder.{k}"
        h = normalised(F.conv1d(h, p[f"{name}.0.weight"], p[f"{name}.0.bias"], stride=2, padding=3), f"{name}.1")
        h = torch.where(h > 0, h, 0.01 * h)
    z = h.flatten(1) @ p["to_latent.weight"].T + p["to_latent.bias"]
    z = z @ p["mean.weight"].T + p["mean.bias"]
    assert torch.allclose(autoencoder.encode(x), z, atol=1e-4)
    h = (z @ p["decoder.0.weight"].T + p["decoder.0.bias"]).reshape(4, 32, 4)
    for k in range(2, 7):
        weight, bias = p[f"decoder.{k}.0.weight"], p[f"decoder.{k}.0.bias"]
        h = F.conv_transpose1d(h, weight, bias, stride=2, padding=3, output_padding=1)
        h = normalised(h, f"decoder.{k}.1")
        h = torch.where(h > 0, h, h.exp() - 1)
    h = F.conv1d(h, p["decoder.7.weight"], p["decoder.7.bias"], padding=3)
    assert torch.allclose(autoencoder.decode(z), h[:, 0, :100], atol=1e-3)


def test_vectors_are_padded_with_zeros() -> None:
    torch.manual_seed(0)
    small, large = ConvAutoencoder(50, 5).eval(), ConvAutoencoder(64, 5).eval()
    large.load_state_dict(small.state_dict())
    x = torch.randn(3, 50)
    assert torch.equal(small.encode(x), large.encode(torch.cat([x, torch.zeros(3, 14)], 1)))
    assert torch.equal(small(x), large(torch.cat([x, torch.zeros(3, 14)], 1))[:, :50])


def test_loss_without_noise_is_the_reconstruction_error() -> None:
    torch.manual_seed(0)
    autoencoder, x = ConvAutoencoder(100, 6), torch.randn(5, 100)
    expected = (autoencoder.decode(autoencoder.encode(x)) - x).square().mean()
    assert torch.allclose(autoencoder.loss(x, parameter_noise=0.0, latent_noise=0.0), expected)


def test_loss_with_noise_is_that_of_the_method() -> None:
    torch.manual_seed(0)
    autoencoder, x = ConvAutoencoder(100, 6), torch.randn(5, 100)
    torch.manual_seed(1)
    noisy = x + 0.3 * torch.randn(5, 100)
    z = autoencoder.encode(noisy) + 0.7 * torch.randn(5, 6)
    expected = (autoencoder.decode(z) - noisy).square().mean()
    torch.manual_seed(1)
    assert torch.allclose(autoencoder.loss(x, parameter_noise=0.3, latent_noise=0.7), expected)


def test_the_variational_loss_adds_the_divergence() -> None:
    torch.manual_seed(0)
    autoencoder, x = ConvAutoencoder(100, 6, variational=True), torch.randn(5, 100)
    losses = []
    for weight in (0.0, 3.0):
        torch.manual_seed(1)
        losses.append(autoencoder.loss(x, parameter_noise=0.0, latent_noise=0.0, kl_weight=weight))
    hidden = autoencoder.hidden(x)
    posterior = Normal(autoencoder.mean(hidden), autoencoder.log_variance(hidden).exp().sqrt())
    assert torch.allclose(losses[1] - losses[0], 3 * kl_divergence(posterior, Normal(0.0, 1.0)).mean(), rtol=1e-4)
    torch.manual_seed(1)
    torch.randn(5, 100)  # the noise of the parameters comes first
    z = posterior.mean + posterior.stddev * torch.randn(5, 6)
    assert torch.allclose(losses[0], (autoencoder.decode(z) - x).square().mean(), rtol=1e-4)


def test_elu_is_that_of_pytorch() -> None:
    """Values and derivatives, which are exact to rounding; at 0 and far from it, too."""
    x = torch.cat([torch.linspace(-5, 5, 1001), torch.tensor([0.0, -0.0, 1e-9, -1e-9, 200.0, -200.0])])
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = ELU()(ours), F.elu(theirs)
    for y in (found, expected):
        (y * torch.arange(1.0, len(x) + 1)).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1.2e-7)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-4)
    assert torch.autograd.gradcheck(ELU(), torch.linspace(-2, 2.1, 20, dtype=torch.float64, requires_grad=True))
