"""Fake tensors on a GPU that is not there: an operation on tensors of two devices is an error, as on a real GPU."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pdiff.method.autoencoders.convolutional import ConvAutoencoder
from pdiff.method.autoencoders.pca import PCA
from pdiff.method.collection import Collection
from pdiff.method.denoisers import DENOISERS
from pdiff.method.diffusion import denoising_loss
from pdiff.method.generators.latent_diffusion import LatentDiffusion, encode, reconstruct
from pdiff.method.novelty import nearest_two, squared_distances
from pdiff.method.objectives import OBJECTIVES, Flow
from pdiff.method.standardize import Slot, Standardizer


def standardizer() -> Standardizer:
    return Standardizer([Slot("a", (4, 2), "float32", 0.0, 1.0)], {}, ["a"])


@pytest.mark.parametrize("kind", DENOISERS)
@pytest.mark.parametrize("prediction", OBJECTIVES)
def test_the_loss_is_computed_where_the_latents_are(kind: str, prediction: str) -> None:
    with FakeTensorMode():
        with torch.device("cuda"):
            denoiser, z = DENOISERS[kind]().build(8), torch.zeros(4, 8)
        assert denoising_loss(OBJECTIVES[prediction](), denoiser, z).is_cuda


@pytest.mark.parametrize("variational", [False, True])
def test_the_autoencoder_computes_where_it_is(variational: bool) -> None:
    with FakeTensorMode():
        with torch.device("cuda"):
            autoencoder, x = ConvAutoencoder(8, 3, variational=variational), torch.zeros(4, 8)
        assert autoencoder.loss(x, parameter_noise=0.1, latent_noise=0.1, kl_weight=1.0).is_cuda
        vectors = torch.zeros(4, 8)
        assert not encode(autoencoder, vectors, "cuda").is_cuda
        assert not reconstruct(autoencoder, vectors, "cuda").is_cuda


@pytest.mark.parametrize("shape", [(10, 40), (40, 10)])
def test_principal_components_are_where_the_vectors_are(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "__int__", lambda tensor: 3)  # a fake tensor has no value to choose the rank by
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 0.0)
    with FakeTensorMode():
        x = torch.zeros(*shape, device="cuda")
        pca = PCA.fit(x, latent_size=3)
        assert pca.components.is_cuda and pca.encode(x).is_cuda


def test_what_was_computed_on_a_gpu_becomes_networks_on_the_cpu() -> None:
    with FakeTensorMode():
        generator = LatentDiffusion(standardizer(), PCA(8, 3), torch.zeros(3), torch.ones(3), nn.Identity(), Flow())
        vectors = generator.decode(torch.zeros(2, 3, device="cuda"))
        assert vectors.shape == (2, 8) and not vectors.is_cuda


def test_vectors_and_distances_stay_on_the_gpu() -> None:
    with FakeTensorMode():
        x = standardizer().encode(Collection({"a": torch.zeros(5, 4, 2, device="cuda")}))
        assert x.is_cuda and nearest_two(squared_distances(x, x), same=True)[0].is_cuda
