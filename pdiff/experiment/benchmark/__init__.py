"""The benchmark: what the parts of pdiff cost on this machine, against the most that the machine can do.

PARTS lists what is measured. Importing this file imports no torch; the parts themselves are in `parts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from pdiff.errors import UserError

SCALING = "scaling"  # beside the parts: how seconds grow with D and N
MODULE = "pdiff.experiment.benchmark.parts"


@dataclass(frozen=True)
class Part:
    """Something that is timed.

    Attributes:
        what: it is, in a few words.
        unit: of the work that `seconds` are per.
        make: prepares it, "module:function": (sizes, device, folder) -> `Work`.
    """

    what: str
    unit: str
    make: str


PARTS: dict[str, Part] = {
    "paper_autoencoder": Part("training of the paper's autoencoder", "step", f"{MODULE}:paper_autoencoder"),
    "paper_denoiser": Part("training of the paper's denoiser", "step", f"{MODULE}:paper_denoiser"),
    "fast_pca": Part("fit of the principal components", "fit", f"{MODULE}:fast_pca"),
    "fast_denoiser": Part("training of the MLP denoiser", "step", f"{MODULE}:fast_denoiser"),
    "fast_sampling": Part("sampling with the MLP denoiser, 20 calls", "network", f"{MODULE}:fast_sampling"),
    "seeds": Part("training of networks from independent seeds", "step of a network", f"{MODULE}:seeds"),
    "alignment": Part("weight matching to one network", "network", f"{MODULE}:alignment"),
    "evaluation": Part("predictions of all networks", "network and image", f"{MODULE}:evaluation"),
    "similarity": Part("similarity of errors", "pair", f"{MODULE}:similarity"),
    "distances": Part("the audit's distances", "pair", f"{MODULE}:distances"),
    "load": Part("reading a collection", "network", f"{MODULE}:load"),
}


@dataclass(frozen=True)
class Sizes:
    """How large the benchmark is.

    Attributes:
        networks: N of the parts.
        inputs: of the MLPs of the parts, whose 32 hidden units and 10 classes make D = 32 inputs + 362.
        latent_size: L.
        images: that networks predict.
        seconds: for which a part is repeated, about.
        megabytes: of the copy and of the file that measure bandwidths.
        scaled_size: values of D, at N = `few`.
        scaled_count: values of N, at the first D.
        few: networks, where D is scaled.
        repeats: of every point, and of programs that are compared.
    """

    networks: int
    inputs: int
    latent_size: int
    images: int
    seconds: float
    megabytes: int
    scaled_size: tuple[int, ...]
    scaled_count: tuple[int, ...]
    few: int
    repeats: int


SIZES: dict[str, Sizes] = {
    "quick": Sizes(20, 4, 16, 100, 0.0, 8, (512, 1024, 2048), (20, 40, 80), 20, 1),
    "default": Sizes(300, 64, 128, 1500, 3.0, 256, (2048, 16_384, 131_072, 1_048_576), (100, 300, 1000, 3000), 100, 3),
    "full": Sizes(
        *(300, 64, 128, 1500, 15.0, 512),
        (2048, 16_384, 131_072, 1_048_576, 11_173_962),  # the last: ResNet-18
        *((100, 300, 1000, 3000, 10_000), 100, 3),
    ),
}
"""Name -> sizes: for tests; about two minutes; up to 11 million numbers and 10 000 networks."""


def chosen(names: str) -> list[str]:
    """The parts that a text names, SCALING among them, separated by commas or spaces; all where it is empty.

    Raises:
        UserError: there is no such part.
    """
    found, known = names.replace(",", " ").split(), [*PARTS, SCALING]
    for name in found:
        if name not in known:
            close = get_close_matches(name, known, 1)
            raise UserError(
                f"--parts {name}: no such part; "
                + (f"did you mean {close[0]}?" if close else f"expected some of {', '.join(known)}")
            )
    return list(dict.fromkeys(found)) or known
