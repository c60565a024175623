"""Small networks: those that the paper trains from scratch, and smaller ones for small images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdiff.errors import UserError


def mlp(*, classes: int, channels: int, image_size: int, hidden: int = 32) -> nn.Module:
    """One hidden layer; 2 410 parameters on 8 x 8 digits."""
    inputs = channels * image_size**2
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def mlp_deep(*, classes: int, channels: int, image_size: int) -> nn.Module:
    """Two hidden layers of 32; 3 466 parameters on 8 x 8 digits."""
    inputs = channels * image_size**2
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, classes)
    )


def cnn_small(*, classes: int, channels: int, image_size: int) -> nn.Module:
    """Two convolutions with BatchNorm; 1 946 parameters and 48 running statistics on 8 x 8 digits."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Linear(16 * (image_size // 4) ** 2, classes),
    )


def cnn_medium(*, classes: int, channels: int, image_size: int) -> nn.Module:
    """The paper's CNN for MNIST and SVHN, 3 x 32 x 32; 10 853 parameters with 10 classes."""
    if image_size != 32:
        raise UserError(f"network.architecture cnn_medium needs dataset.image_size 32, but got {image_size}")
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 3), nn.MaxPool2d(2), nn.LeakyReLU()),
        *(nn.Conv2d(16, 32, 3), nn.MaxPool2d(2), nn.LeakyReLU()),
        *(nn.Conv2d(32, 15, 3), nn.MaxPool2d(2), nn.LeakyReLU()),
        nn.Flatten(),
        *(nn.Linear(60, 20), nn.LeakyReLU()),
        nn.Linear(20, classes),
    )


def mlp_mini(*, classes: int, channels: int, image_size: int) -> nn.Module:
    """The paper's MLP, on grey images of half the size; 66 970 parameters for 3 x 64 x 64 and 10 classes."""
    _needs_multiple("mlp_mini", image_size, 2)
    return nn.Sequential(
        *(nn.AvgPool2d(2), _Grey(), nn.Flatten()),
        *(nn.Linear((image_size // 2) ** 2, 64), nn.LayerNorm(64), nn.LeakyReLU()),
        *(nn.Linear(64, 16), nn.LayerNorm(16), nn.LeakyReLU()),
        nn.Linear(16, classes),
    )


def convnet_mini(*, classes: int, channels: int, image_size: int) -> nn.Module:
    """The paper's CNN for STL-10 and CIFAR-10; 24 262 parameters for 3 x 64 x 64 and 10 classes."""
    _needs_multiple("convnet_mini", image_size, 16)
    half, quarter, eighth = (image_size // k for k in (2, 4, 8))
    return nn.Sequential(
        *(nn.Conv2d(channels, 8, 7, stride=2, padding=3), nn.LayerNorm([8, half, half]), nn.LeakyReLU()),
        nn.MaxPool2d(2),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.LayerNorm([8, quarter, quarter]), nn.LeakyReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 4, 3, padding=1), nn.LayerNorm([4, eighth, eighth]), nn.LeakyReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(4 * (image_size // 16) ** 2, 16), nn.LeakyReLU()),
        nn.Linear(16, classes),
    )


def resnet_mini(*, classes: int, channels: int, image_size: int) -> nn.Module:
    """The paper's small residual network; 25 138 parameters for 3 x 64 x 64 and 10 classes."""
    _needs_multiple("resnet_mini", image_size, 16)
    half, quarter, eighth = (image_size // k for k in (2, 4, 8))
    return nn.Sequential(
        *(nn.Conv2d(channels, 8, 3, stride=2, padding=1), nn.LeakyReLU()),
        *(nn.LayerNorm([8, half, half]), nn.MaxPool2d(2)),
        *(_Bottleneck(8, 4), nn.LayerNorm([8, quarter, quarter]), nn.MaxPool2d(2)),
        *(_Bottleneck(8, 4), nn.LayerNorm([8, eighth, eighth]), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(8 * (image_size // 16) ** 2, 16), nn.LeakyReLU()),
        nn.Linear(16, classes),
    )


def resnet8(*, classes: int, channels: int, image_size: int) -> nn.Module:
    """The residual network for small images of He et al. 2015 (arXiv 1512.03385, section 4.2) with one block in each
    of three stages of half the width; 19 810 parameters and 336 running statistics on grey images with 10 classes."""
    from torchvision.models.resnet import BasicBlock

    def halved(inputs: int, outputs: int) -> nn.Module:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs))
        return BasicBlock(inputs, outputs, stride=2, downsample=shortcut)

    return nn.Sequential(
        *(nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(BasicBlock(8, 8), halved(8, 16), halved(16, 32)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes)),
    )


def vit_mini(*, classes: int, channels: int, image_size: int) -> nn.Module:
    """The paper's small vision transformer, a SimpleViT; 80 714 parameters for 3 x 64 x 64 and 10 classes."""
    _needs_multiple("vit_mini", image_size, 8)
    return SimpleViT(classes=classes, channels=channels, image_size=image_size)


def convnext_mini(*, classes: int, channels: int, image_size: int) -> nn.Module:
    """The paper's small ConvNeXt; 74 970 parameters for 3 channels and 10 classes."""
    from timm.models.convnext import ConvNeXt

    sizes = {"depths": (1, 2, 2, 2), "dims": (16, 32, 32, 32), "ls_init_value": 1e-6}
    return ConvNeXt(in_chans=channels, num_classes=classes, **sizes)


def _needs_multiple(name: str, image_size: int, of: int) -> None:
    if image_size % of or not image_size:
        raise UserError(f"network.architecture {name} needs a multiple of {of} as dataset.image_size, got {image_size}")


class _Grey(nn.Module):
    """The mean over channels, (B, channels, h, w) -> (B, h, w)."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=1)


class _Bottleneck(nn.Module):
    """x plus two convolutions of it, with fewer channels between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, inner, 3, padding=1), nn.Conv2d(inner, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.leaky_relu(self.up(F.leaky_relu(self.down(x))))


class SimpleViT(nn.Module):
    """A vision transformer with fixed positions and without a class token (Beyer et al., arXiv 2205.01580).

    Args:
        classes: logits.
        channels: of the images.
        image_size: side of the images, a multiple of `patch`.
        patch: side of a patch.
        width: of a token.
        depth: number of layers.
        heads: of attention.
        head_width: width of a head.
        hidden: width of the MLP in a layer.
    """

    def __init__(
        self,
        *,
        classes: int,
        channels: int,
        image_size: int,
        patch: int = 8,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        head_width: int = 8,
        hidden: int = 64,
    ) -> None:
        super().__init__()
        inputs = channels * patch**2
        self.patches = nn.Unfold(patch, stride=patch)
        self.embed = nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, width), nn.LayerNorm(width))
        self.register_buffer("positions", positions(image_size // patch, width), persistent=False)
        self.layers = nn.Sequential(*(_Layer(width, heads, head_width, hidden) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, size, size) -> logits (B, classes)."""
        tokens = self.embed(self.patches(images).transpose(1, 2)) + self.positions
        return self.head(self.norm(self.layers(tokens)).mean(dim=1))


def positions(side: int, width: int) -> Tensor:
    """Sines and cosines of the position of each patch, (side * side, width) (arXiv 2205.01580, appendix)."""
    coordinates = torch.arange(side * side) // side, torch.arange(side).repeat(side)
    frequency = 10000 ** -(torch.arange(width // 4) / (width // 4 - 1))
    down, right = (coordinate[:, None] * frequency for coordinate in coordinates)
    return torch.cat([right.sin(), right.cos(), down.sin(), down.cos()], dim=1)


class _Layer(nn.Module):
    """A pre-norm transformer layer: attention and an MLP, each behind a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int, head_width: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * heads * head_width, bias=False)
        self.out = nn.Linear(heads * head_width, width, bias=False)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, patches, width) -> (B, patches, width)."""
        parts = self.qkv(self.norm(tokens)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # (B, heads, patches, head_width) each
        mixed = F.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.out(mixed.transpose(1, 2).flatten(2))
        return tokens + self.mlp(tokens)
