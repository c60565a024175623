"""What to generate from a folder of inspected checkpoint files, and with which settings."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from pdiff.errors import UserError, printable
from pdiff.experiment.schema import Prepare
from pdiff.method.generators import DiffusionOptions
from pdiff.networks.patterns import EVERYTHING, literal, matching

if TYPE_CHECKING:
    from pdiff.networks.inspect import Inspection

MANY_PATTERNS, FEW_NUMBERS = 12, 0.01  # constants stay in if so many patterns would leave out less than this share
MANY_TENSORS = 1000  # constants stay in, too: patterns are searched in a time that grows with the square
LISTED = 50  # files named in a list
FEW = 50  # checkpoints; the paper collects 200 to 400, its ablation of their number finds 50 nearly as good


class Paper(NamedTuple):
    """The settings of the paper's generator for networks of up to so many generated numbers."""

    numbers: int
    latent_size: int
    autoencoder_steps: int
    diffusion_steps: int


# Of the published experiments of the groups main and full: medians of their steps for each latent size, which is 128
# for 768 to 5 120 generated numbers, 256 for 10 853, 768 for 24 000 to 80 000; `numbers` lies between these.
PAPERS = (Paper(7_500, 128, 500, 1800), Paper(16_000, 256, 2000, 8000), Paper(80_000, 768, 2000, 8000))


def paper_settings(numbers: int) -> Paper:
    """The paper's settings for so many generated numbers; beyond what it published those of the largest."""
    return next((row for row in PAPERS if numbers <= row.numbers), PAPERS[-1])


@dataclass(frozen=True)
class Proposal:
    """What to generate, and how.

    Attributes:
        found: the files.
        parameters: patterns of what is generated.
    """

    found: Inspection
    parameters: tuple[str, ...]

    @classmethod
    def of(cls, found: Inspection, asked: Sequence[str] = ()) -> Proposal:
        """Generate what is asked for, or else everything but what is constant, if few patterns can say so.

        Raises:
            UserError: a pattern that matches nothing, or nothing that varies.
        """
        for pattern in asked:
            if tuple(asked) != EVERYTHING and not matching(found.roles, [pattern]):
                raise UserError(f"--parameters: {pattern!r} matches none of the files' {len(found.roles)} tensors")
        if asked:
            if "generated" not in [found.roles[name] for name in matching(found.roles, asked)]:
                raise UserError(f"--parameters: {' '.join(asked)} matches nothing that can be generated and varies")
            return cls(found, tuple(asked))
        patterns = patterns_of(found.roles)
        few = found.count("constant") < FEW_NUMBERS * (found.count("constant") + found.count())
        return cls(found, EVERYTHING if few and len(patterns) > MANY_PATTERNS else tuple(patterns))

    @property
    def numbers(self) -> int:
        """D: how many numbers of a checkpoint are generated."""
        layout, roles = self.found.layout, self.found.roles
        names = [name for name in matching(roles, self.parameters) if roles[name] in ("generated", "constant")]
        return sum(prod(layout[name][0]) for name in names)

    def settings(self) -> list[str]:
        """The settings of the generator, and why."""
        from pdiff.method.collection import heldout_split

        fast, count, paper = DiffusionOptions(), len(self.found.used), paper_settings(self.numbers)
        originals = len(heldout_split(count, Prepare().heldout, seed=0)[0])
        fitted = len(heldout_split(originals, fast.heldout_fraction, seed=0)[0])
        most = min(fitted - 1, self.numbers)
        lines = [
            f"the fast generator: latent_size auto, the components of 99.9 % of the variance, at most {most}",
            f"... and {fast.steps} steps, fewer when the {originals - fitted} checkpoints not trained on say so",
            f"{count - originals} checkpoints are held out from everything, for the evaluation to compare with",
            f"the paper's, for {self.numbers} numbers: latent_size {paper.latent_size}, {paper.autoencoder_steps} "
            f"steps of the autoencoder, {paper.diffusion_steps} of the diffusion",
        ]
        if self.numbers > PAPERS[-1].numbers:
            lines[-1] += f" (published for up to {PAPERS[-1].numbers})"
        if count < FEW:
            lines.append(f"{count} checkpoints are few: the paper collects 200 to 400")
        return lines

    def text(self) -> str:
        """The tensors as a table, what is in the files, and the settings."""
        import pandas as pd

        found, chosen = self.found, set(matching(self.found.roles, self.parameters))
        rows = [
            {
                "tensor": printable(name),
                "shape": " x ".join(map(str, shape)) or "-",
                "type": str(dtype).removeprefix("torch."),
                "numbers": prod(shape),
                "role": found.roles[name] if name in chosen or found.roles[name] != "generated" else "left out",
            }
            for name, (shape, dtype) in found.layout.items()
        ]
        types = Counter(str(dtype)[6:] for _, dtype in found.layout.values() if dtype.is_floating_point)
        counted = next(iter(types)) if len(types) == 1 else ", ".join(f"{name} ({n})" for name, n in types.items())
        total = sum(row["numbers"] for row in rows)
        folder, count = printable(str(found.folder)), len(found.used)
        lines = [
            pd.DataFrame(rows).to_string(index=False),
            "",
            f"format      {found.format}{_networks(found)}",
            f"files       {count} of {count + len(found.unusable)} in {folder} can be used",
            f"types       {counted}",
            f"generated   {self.numbers:,} of {total:,} numbers; {printable(', '.join(self.parameters))}",
            f"constant    {found.count('constant'):,} numbers are the same in all files",
            *listed("left out", found.unusable),
            *listed("suspicious", found.reported),
        ]
        return "\n".join([*lines, *(f"proposal    {line}" for line in self.settings())])


def _networks(found: Inspection) -> str:
    """From how many trainings the checkpoints come, where that is known."""
    networks = {checkpoint.known.get("network") for checkpoint in found.used} - {None}
    return f": {len(found.used)} checkpoints of {len(networks)} networks" if networks else ""


def listed(title: str, files: Mapping[str, str]) -> list[str]:
    """A title, and below it the files with what is wrong with each; nothing if there are none."""
    lines = ["  " + printable(" ".join(f"{name}: {why}".split())) for name, why in list(files.items())[:LISTED]]
    more = [f"  and {len(files) - LISTED} more"] if len(files) > LISTED else []
    return [title, *lines, *more] if files else []


def patterns_of(roles: Mapping[str, str]) -> list[str]:
    """Few patterns that match every generated tensor and no constant one: ["all"] where there is no constant, or where
    there are very many tensors.

    Greedy: of the patterns made of the names' beginnings, ends and numbers, each time the one that matches the most.

    Args:
        roles: name of a tensor -> its role, see `Inspection`.
    """
    wanted = {name for name, role in roles.items() if role == "generated"}
    constant = [name for name, role in roles.items() if role == "constant"]
    if not constant or len(roles) > MANY_TENSORS:
        return list(EVERYTHING)
    candidates: dict[str, None] = {}
    for name in sorted(wanted):
        parts = [literal(part) for part in name.split(".")]
        starts = [".".join([*parts[:k], "*"]) for k in range(1, len(parts))]
        ends = [".".join(["*", *parts[k:]]) for k in range(1, len(parts))]
        candidates |= dict.fromkeys([*starts, *_numbered(parts), *ends, ".".join(parts)])
    matched = defaultdict(set)
    for pattern in candidates:
        if not any(fnmatchcase(name, pattern) for name in constant):
            matched[pattern] = {name for name in wanted if fnmatchcase(name, pattern)}
    found = []
    while wanted:
        best = max(matched, key=lambda pattern: len(matched[pattern] & wanted))
        found.append(best)
        wanted -= matched[best]
    return found


def _numbered(parts: Sequence[str]) -> list[str]:
    """A name with the number of one of its parts left open: layer4.1.bn*.weight of layer4.1.bn2.weight, and all that
    begins so: layer4.1.bn*.*"""
    opened = [part.rstrip("0123456789") + "*" if part[-1:].isdigit() else part for part in parts]
    numbered = [k for k in range(len(parts)) if opened[k] != parts[k]]
    whole = [".".join([*parts[:k], opened[k], "*"]) for k in numbered if k < len(parts) - 1]
    return whole + [".".join([*parts[:k], opened[k], *parts[k + 1 :]]) for k in numbered]
