"""Everything fitted on a collection: standardizer, autoencoder, denoiser. Fit, sample, save, load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pdiff.errors import UserError
from pdiff.files import read_json, read_tensors, write_json, write_tensors
from pdiff.method.autoencoders import PCA, ConvAutoencoder
from pdiff.method.collection import Collection, not_finite
from pdiff.method.denoisers import ConvDenoiser, MLPDenoiser
from pdiff.method.diffusion import Diffusion, gaussian
from pdiff.method.log import Log, Point
from pdiff.method.options import Autoencoder, DiffusionSettings
from pdiff.method.standardize import Slot, Standardizer
from pdiff.method.training import Best, Trainer, follow, shuffled
from pdiff.parallel import ranks

FORMAT = 1
HELDOUT_BLOCKS = 4
Batches = Callable[[int], Iterable[Tensor]]  # step -> endless batches from that step on
AUTOENCODERS: dict[str, type[nn.Module]] = {"conv": ConvAutoencoder, "pca": PCA}
DENOISERS: dict[str, type[nn.Module]] = {"conv": ConvDenoiser, "mlp": MLPDenoiser}


@dataclass
class Generator:
    """A distribution over networks.

    Attributes:
        standardizer: checkpoints <-> vectors (N, D).
        autoencoder: vectors (N, D) <-> latents (N, L).
        latent_mean: subtracted from latents before diffusion, (L,).
        latent_std: latents are divided by it, (L,).
        denoiser: predicts in latent space; without one, latents are drawn from N(0, 1).
        diffusion: what it predicts.
    """

    standardizer: Standardizer
    autoencoder: nn.Module
    latent_mean: Tensor
    latent_std: Tensor
    denoiser: nn.Module | None
    diffusion: Diffusion

    @torch.inference_mode()
    def sample(
        self,
        seeds: Sequence[int],
        *,
        sampler: str,
        steps: int,
        device: torch.device | str = "cpu",
        progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
        visit: Callable[[float, Tensor], object] = lambda t, z: None,
    ) -> Collection:
        """Draw one network for each seed; the options are those of `Diffusion.sample`."""
        if self.denoiser is None:
            latents = gaussian(len(self.latent_mean), [torch.Generator().manual_seed(seed) for seed in seeds])
        else:
            options = {"sampler": sampler, "steps": steps, "device": device, "progress": progress, "visit": visit}
            denoiser = self.denoiser.to(device).eval()
            latents = self.diffusion.sample(denoiser, len(self.latent_mean), seeds, **options)
        return self.decode(latents.to(device))

    @torch.inference_mode()
    def trajectory(self, seeds: Sequence[int], *, every: int, **options: Any) -> list[tuple[float, Collection]]:
        """The draws of `sample` on their way: their timestep, and the networks that noisy latents decode to.

        Args:
            seeds: one for each network.
            every: denoiser calls between two looks; the draws themselves, at timestep 0, come last.
            options: those of `sample`.
        """
        passed: list[tuple[float, Tensor]] = []
        drawn = self.sample(seeds, visit=lambda t, z: passed.append((t, z.clone())), **options)
        looks = dict(passed[::every])  # Heun's method meets most timesteps twice
        return [*((t, self.decode(z)) for t, z in looks.items()), (0.0, drawn)]

    def decode(self, latents: Tensor) -> Collection:
        """The networks of latents as the denoiser has them, (N, L)."""
        device = latents.device
        autoencoder = self.autoencoder.to(device).eval()
        return self.standardizer.decode(
            autoencoder.decode(latents * self.latent_std.to(device) + self.latent_mean.to(device)).cpu()
        )

    def save(self, folder: Path) -> None:
        """Write `generator.safetensors` and `generator.json`: all that sampling needs."""
        tensors = {"latent_mean": self.latent_mean, "latent_std": self.latent_std}
        for part in ("autoencoder", "denoiser"):
            state = getattr(self, part).state_dict() if getattr(self, part) else {}
            tensors |= {f"{part}.{name}": t for name, t in state.items()}
        tensors |= {f"constant.{name}": t for name, t in self.standardizer.constants.items()}
        write_tensors(folder / "generator.safetensors", tensors)
        description = {
            "format": FORMAT,
            "order": self.standardizer.order,
            "slots": [asdict(slot) for slot in self.standardizer.slots],
            "autoencoder": _describe(AUTOENCODERS, self.autoencoder),
            "denoiser": self.denoiser and _describe(DENOISERS, self.denoiser),
            "diffusion": self.diffusion.options,
        }
        write_json(folder / "generator.json", description)

    @classmethod
    def load(cls, folder: Path) -> Generator:
        """Read what `save` wrote.

        Raises:
            UserError: a damaged file, another format, or tensors that do not fit the description.
        """
        path = folder / "generator.json"
        description, tensors = read_json(path), read_tensors(folder / "generator.safetensors")
        if not isinstance(description, dict) or description.get("format") != FORMAT:
            raise UserError(f"{path}: not a generator of format {FORMAT}")
        if name := not_finite(tensors):
            raise UserError(f"{folder / 'generator.safetensors'}: {name} holds NaN or infinity")
        try:
            slots = [Slot(**{**slot, "shape": tuple(slot["shape"])}) for slot in description["slots"]]
            autoencoder = _make(AUTOENCODERS, description["autoencoder"], _under("autoencoder.", tensors))
            described = description["denoiser"]
            denoiser = described and _make(DENOISERS, described, _under("denoiser.", tensors))
            standardizer = Standardizer(slots, _under("constant.", tensors), description["order"])
            if sorted(standardizer.order) != sorted([*standardizer.constants, *(slot.name for slot in slots)]):
                raise ValueError("its order names other tensors than its slots and the constants")
            if {tensors["latent_mean"].shape, tensors["latent_std"].shape} != {(autoencoder.latent_size,)}:
                raise ValueError(f"latent_mean and latent_std do not hold {autoencoder.latent_size} numbers")
            if standardizer.size != autoencoder.size:
                raise ValueError(f"its slots hold {standardizer.size} numbers, its autoencoder {autoencoder.size}")
            return cls(
                standardizer,
                autoencoder,
                tensors["latent_mean"],
                tensors["latent_std"],
                denoiser,
                Diffusion(**description["diffusion"]),
            )
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: does not fit generator.safetensors: {str(error).splitlines()[0]}") from None


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _describe(kinds: dict[str, type[nn.Module]], module: nn.Module) -> dict[str, Any]:
    """Kind and sizes of a module, enough to build it again."""
    (kind,) = (kind for kind, of in kinds.items() if type(module) is of)
    return {"kind": kind, **module.options}


def _make(kinds: dict[str, type[nn.Module]], description: dict[str, Any], state: dict) -> nn.Module:
    """The module that `_describe` described, with its tensors."""
    options = dict(description)
    module = kinds[options.pop("kind")](**options)
    module.load_state_dict(state)
    return module.eval()


def fit_autoencoder(
    vectors: Tensor,
    settings: Autoencoder,
    *,
    seed: int,
    log: Log,
    device: torch.device | str = "cpu",
    path: Path | None = None,
) -> nn.Module:
    """An autoencoder of vectors (N, D), in evaluation mode: fitted exactly (pca), or trained (conv)."""
    if settings.kind == "pca":
        fixed = None if settings.latent_size == "auto" else settings.latent_size
        pca = PCA.fit(vectors, latent_size=fixed, variance=settings.variance).to(device)
        residual = (pca(vectors.to(device)) - vectors.to(device)).square().mean().item()
        log(Point("autoencoder/loss", residual))
        return pca.eval()
    torch.manual_seed(seed)
    autoencoder = make_autoencoder(vectors.shape[1], settings).to(device).train()
    batches = shuffled_rows(vectors.to(device), settings.batch_size, seed)
    trainer = autoencoder_trainer(autoencoder, batches, settings, seed=seed)
    for _ in follow(trainer, "autoencoder/loss", log, path=path):
        pass
    return autoencoder.eval()


def fit_denoiser(
    diffusion: Diffusion,
    latents: Tensor,
    heldout: Tensor,
    settings: DiffusionSettings,
    *,
    seed: int,
    log: Log,
    device: torch.device | str = "cpu",
    path: Path | None = None,
) -> nn.Module:
    """Train a denoiser on latents (N, L), watched on held-out ones (M, L), M may be 0.

    Returns:
        The denoiser in evaluation mode: averaged, and the best one on the held-out latents where `patience` is set.
    """
    torch.manual_seed(seed)
    denoiser = make_denoiser(latents.shape[1], settings).to(device).train()
    latents, heldout = latents.to(device), heldout.to(device)
    batches = shuffled_rows(latents, settings.batch_size, seed)
    trainer = denoiser_trainer(denoiser, diffusion, batches, settings, seed=seed)
    best = Best()
    for step in follow(trainer, "diffusion/loss", log, path=path, beside=(best,)):
        if len(heldout) and step.number % settings.evaluate_every == 0:
            loss = ranks.mean(diffusion.heldout_loss(trainer.averaged.eval(), heldout))  # all stop alike
            log(Point("diffusion/heldout_loss", loss, step.number))
            denoiser.train()
            best.update(-loss, trainer.averaged)
            if settings.patience and best.misses >= settings.patience:
                break
    fitted = trainer.averaged
    if settings.patience:
        best.restore(fitted)
    return fitted.eval()


def make_diffusion(settings: DiffusionSettings) -> Diffusion:
    """The diffusion of some settings."""
    return Diffusion(**settings.model_dump(include={"prediction", "timesteps", "beta_start", "beta_end"}))


def make_autoencoder(size: int, settings: Autoencoder) -> ConvAutoencoder:
    """The autoencoder that settings of kind conv describe, of vectors (B, size), untrained."""
    return ConvAutoencoder(size, int(settings.latent_size), variational=settings.kl_weight > 0)


def autoencoder_trainer(autoencoder: ConvAutoencoder, batches: Batches, settings: Autoencoder, *, seed: int) -> Trainer:
    """Trains an autoencoder on batches of vectors (B, D)."""
    options = settings.model_dump(include={"parameter_noise", "latent_noise", "kl_weight"})
    loss = partial(autoencoder.loss, count=settings.batch_size, **options)
    return Trainer(autoencoder, loss, batches, settings, steps=settings.steps, seed=seed, autocast=True)


def make_denoiser(latent_size: int, settings: DiffusionSettings) -> nn.Module:
    """The denoiser that settings describe, of latents (B, latent_size), untrained."""
    sizes = {"width": settings.width, "blocks": settings.blocks} if settings.denoiser == "mlp" else {}
    return DENOISERS[settings.denoiser](latent_size, **sizes)


def denoiser_trainer(
    denoiser: nn.Module, diffusion: Diffusion, batches: Batches, settings: DiffusionSettings, *, seed: int
) -> Trainer:
    """Trains a denoiser on batches of latents (B, L)."""
    loss = partial(diffusion.loss, denoiser, count=settings.batch_size)
    options = {"steps": settings.steps, "seed": seed, "ema": settings.ema, "autocast": True}
    return Trainer(denoiser, loss, batches, settings, **options)


def shuffled_rows(rows: Tensor, batch_size: int, seed: int) -> Batches:
    """Endless shuffled batches of rows; of each, those of this process."""
    own = ranks.rows()
    return lambda start: (rows[i[own].to(rows.device)] for i in shuffled(len(rows), batch_size, seed=seed, start=start))


def heldout_split(count: int, fraction: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of checkpoints to fit on and of those held out, both ascending; at least two to fit on, if there are.

    Held out are a few blocks of consecutive checkpoints: neighbours on a trajectory are nearly copies of each other,
    so that single held-out checkpoints would not tell a generator that memorises from one that generalises.
    """
    held = min(round(count * fraction), max(count - 2, 0))
    blocks = min(HELDOUT_BLOCKS, max(held, 1))
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(count, dtype=torch.bool)
    for block in range(blocks):
        start, end = block * count // blocks, (block + 1) * count // blocks
        length = (block + 1) * held // blocks - block * held // blocks
        first = start + int(torch.randint(end - start - length + 1, (), generator=generator))
        mask[first : first + length] = True
    return (~mask).nonzero()[:, 0], mask.nonzero()[:, 0]


def latent_scale(latents: Tensor, *, standardize: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every component of latents (N, L), (L,) each; 0 and 1 if not standardised."""
    if not standardize:
        return torch.zeros(latents.shape[1]), torch.ones(latents.shape[1])
    std = latents.std(dim=0, correction=int(len(latents) > 1))
    return latents.mean(dim=0).cpu(), torch.where(std > 1e-8, std, 1.0).cpu()
