"""`pdiff new`: somebody's own checkpoints become an experiment. Looks at them, proposes settings, writes the YAML."""

from __future__ import annotations

import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pandas as pd
import torch
import yaml

from pdiff.errors import UserError
from pdiff.experiment import config
from pdiff.files import write_text
from pdiff.method.generators import DiffusionOptions
from pdiff.method.generators.latent_diffusion import heldout_split
from pdiff.networks import datasets
from pdiff.networks.architectures import build
from pdiff.networks.imported.plain import files_of
from pdiff.networks.inspect import Survey, survey
from pdiff.networks.options import Dataset
from pdiff.networks.populations import EVERYTHING, matching

OWN = Path("experiments") / "own"
SUBFOLDERS = ("checkpoint", "checkpoints")  # beside a script that tests them, as the published code lays it out
SCRIPT = "test.py"
MANY_PATTERNS, FEW_NUMBERS = 12, 0.01  # constants stay in if so many patterns would leave out less than this share
LISTED = 50  # files named in a comment
FEW = 50  # checkpoints; the paper collects 200 to 400, its ablation of their number finds 50 nearly as good


class Paper(NamedTuple):
    """What the paper's generator takes for networks of a size."""

    numbers: int
    latent_size: int
    autoencoder_steps: int
    diffusion_steps: int


# Of the published experiments of the groups main and full: medians of their steps for each latent size, which is 128
# for 768 to 5 120 generated numbers, 256 for 10 853, 768 for 24 000 to 80 000; `numbers` lies between these.
PAPERS = (Paper(7_500, 128, 500, 1800), Paper(16_000, 256, 2000, 8000), Paper(80_000, 768, 2000, 8000))


def new(
    tag: str,
    checkpoints: Path,
    *,
    out: Path = OWN,
    dataset: str = "",
    architecture: str = "",
    parameters: Sequence[str] = (),
    command: str = "",
    function: str = "",
    overrides: Mapping[str, str] | None = None,
    force: bool = False,
) -> Path:
    """Write the experiment of a folder of checkpoint files, and print what is in it.

    Args:
        tag: name of the experiment.
        checkpoints: the folder, or one that holds it as `checkpoint/` beside a `test.py`.
        out: where `<tag>.yaml` is written.
        dataset: what the networks were trained on, if pdiff knows it.
        architecture: of the networks, likewise.
        parameters: names or patterns of what to generate; proposed when absent.
        command: measures one checkpoint, see `evaluate.command`.
        function: measures one checkpoint, see `evaluate.function`.
        overrides: further keys of the configuration -> value as text, in YAML.
        force: write over an existing file.

    Returns:
        The file.

    Raises:
        UserError: an unusable folder, tag or option, or a file that is there.
    """
    path = _free(tag, out, force)
    source, home = _places(checkpoints.expanduser())
    found = survey(source)
    chosen = _parameters(found, parameters)
    evaluation = _evaluation(command, function, home, known=bool(dataset))
    tree = _tree(found, chosen, dataset, architecture, evaluation, overrides or {})
    text = _yaml(tag, found, chosen, tree)
    _check(path, text)
    print(_report(found, chosen))
    for line in _mismatches(found, tree):
        print(f"network     {line}")
    write_text(path, text)
    known = config.tags().get(tag)
    named = tag if known and known.resolve() == path.resolve() else path
    print(f"\nwritten     {path}\nnext        pdiff main --tag {shlex.quote(str(named))}")
    return path


def _tree(
    found: Survey,
    chosen: Sequence[str],
    dataset: str,
    architecture: str,
    evaluation: Mapping[str, Any],
    overrides: Mapping[str, str],
) -> dict[str, Any]:
    """The sections of the experiment, without what says nothing."""
    tree: dict[str, Any] = {
        "dataset": {"name": dataset} if dataset else {},
        "network": {"architecture": architecture} if architecture else {},
        "prepare": {
            "source": _written(found.folder),
            "parameters": list(chosen) if len(chosen) > 1 else chosen[0],
            "exclude": [escape(name) for name in found.unusable],
        },
        "autoencoder": {"latent_size": "auto"},
        "diffusion": {"steps": DiffusionOptions().steps},
        "evaluate": dict(evaluation),
    }
    for key, text in overrides.items():
        config.put(tree, {}, key, text)
    tree = {section: _without_empty(values) for section, values in tree.items()}
    if bool(tree["dataset"]) != bool(tree["network"]):
        raise UserError("--dataset and --architecture belong together: one is given without the other")
    return tree


def _without_empty(values: Any) -> Any:
    """A section without the values that say nothing."""
    return {k: v for k, v in values.items() if v not in ("", [])} if isinstance(values, dict) else values


def _free(tag: str, out: Path, force: bool) -> Path:
    """The file of a new tag."""
    if not re.fullmatch(r"\w[\w.-]*", tag) or tag.endswith((".yaml", ".yml")):
        raise UserError(f"{tag!r} cannot be a tag, expected letters, digits, _, - and .")
    path = out.expanduser() / f"{tag}.yaml"
    other = config.tags().get(tag)
    if other and other.resolve() != path.resolve():
        raise UserError(f"the tag {tag} is taken by {other}; choose another one")
    if path.exists() and not force:
        raise UserError(f"{path} is there already; --force writes over it")
    return path


def _places(folder: Path) -> tuple[Path, Path]:
    """Where the checkpoint files lie, and where the script that tests them may lie."""
    inner = [folder / name for name in SUBFOLDERS if files_of(folder / name)]
    return (inner[0] if inner and not files_of(folder) else folder), folder


def _written(path: Path) -> str:
    """A path as the YAML has it: relative inside the current folder, absolute outside."""
    path, here = path.resolve(), Path.cwd().resolve()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else str(path)


def _evaluation(command: str, function: str, home: Path, *, known: bool) -> dict[str, Any]:
    """How the networks are measured: as asked for; by the script that lies there, where no data set is known."""
    if function:
        file, colon, name = function.rpartition(":")
        if not colon or not name.isidentifier() or not Path(file).expanduser().is_file():
            raise UserError(f"--function: {function!r} is not path/to/file.py:function of a file that exists")
        return {"function": f"{_written(Path(file).expanduser())}:{name}", "command": command}
    if not command and not known and (home / SCRIPT).is_file():
        command = f"python {SCRIPT} {{checkpoint}}"
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"--command: {command!r} cannot be split into words: {error}") from None
    there = any((home / word).is_file() and (word == SCRIPT or not Path(word).is_file()) for word in words)
    few = {"noise": [0.05], "noise_count": 20} if command else {}  # every network is a run of the command
    return {"command": command, "folder": _written(home) if there else "", **few}


def _parameters(found: Survey, asked: Sequence[str]) -> list[str]:
    """What to generate: as asked for, else everything but what is constant, where few patterns say so."""
    for pattern in asked:
        if tuple(asked) != EVERYTHING and not matching(found.roles, [pattern]):
            raise UserError(f"--parameters: {pattern!r} matches none of the files' {len(found.roles)} tensors")
    if asked:
        if "generated" not in [found.roles[name] for name in matching(found.roles, asked)]:
            raise UserError(f"--parameters: {' '.join(asked)} matches nothing that can be generated and varies")
        return list(asked)
    patterns = patterns_of(found.roles)
    small = found.count("constant") < FEW_NUMBERS * (found.count("constant") + found.count())
    return list(EVERYTHING) if small and len(patterns) > MANY_PATTERNS else patterns


def patterns_of(roles: Mapping[str, str]) -> list[str]:
    """Few patterns that match every generated tensor and no constant one: ["all"] where there is no constant.

    Greedy: of the patterns made of the names' beginnings, ends and numbers, each time the one that matches the most.
    """
    wanted = {name for name, role in roles.items() if role == "generated"}
    constant = [name for name, role in roles.items() if role == "constant"]
    if not constant:
        return ["all"]
    candidates: dict[str, None] = {}
    for name in sorted(wanted):
        parts = [escape(part) for part in name.split(".")]
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


def _numbers(found: Survey, chosen: Sequence[str]) -> int:
    """D: how many numbers of a checkpoint are generated."""
    names = set(matching(found.roles, chosen))
    return sum(torch.Size(found.layout[n][0]).numel() for n in names if found.roles[n] in ("generated", "constant"))


def _types(found: Survey) -> str:
    """The floating types of the tensors, with their numbers where there are several."""
    types = Counter(str(dtype)[6:] for _, dtype in found.layout.values() if dtype.is_floating_point)
    return next(iter(types)) if len(types) == 1 else ", ".join(f"{name} ({count})" for name, count in types.items())


def _report(found: Survey, chosen: Sequence[str]) -> str:
    """What is in the files, as text."""
    names = set(matching(found.roles, chosen))
    rows = [
        {
            "tensor": name,
            "shape": " x ".join(map(str, shape)) or "-",
            "type": str(dtype)[6:],
            "numbers": torch.Size(shape).numel(),
            "role": found.roles[name] if name in names or found.roles[name] != "generated" else "left out",
        }
        for name, (shape, dtype) in found.layout.items()
    ]
    total = sum(row["numbers"] for row in rows)
    lines = [
        pd.DataFrame(rows).to_string(index=False),
        "",
        f"files       {len(found.used)} of {len(found.used) + len(found.unusable)} in {found.folder} can be used",
        f"types       {_types(found)}",
        f"generated   {_numbers(found, chosen):,} of {total:,} numbers; {', '.join(chosen)}",
        f"constant    {found.count('constant'):,} numbers are the same in all files",
    ]
    lines += _named("left out", found.unusable) + _named("suspicious", found.reported)
    return "\n".join([*lines, *(f"proposal    {line}" for line in _proposal(found, chosen))])


def _fitted(found: Survey) -> int:
    """Checkpoints that the generator is fitted on; the others are held out."""
    return len(heldout_split(len(found.used), DiffusionOptions().heldout_fraction, seed=0)[0])


def paper_settings(numbers: int) -> Paper:
    """What the paper takes for as many generated numbers; beyond what it published the settings of the largest."""
    return next((row for row in PAPERS if numbers <= row.numbers), PAPERS[-1])


def _proposal(found: Survey, chosen: Sequence[str]) -> list[str]:
    """The settings of the generator, and why."""
    numbers, fitted = _numbers(found, chosen), _fitted(found)
    paper, most, held = paper_settings(numbers), min(fitted - 1, numbers), len(found.used) - fitted
    lines = [
        f"the fast generator: latent_size auto, the components of 99.9 % of the variance, at most {most}",
        f"... and {DiffusionOptions().steps} steps, fewer when the {held} held-out checkpoints say so",
        f"the paper's, for {numbers} numbers: latent_size {paper.latent_size}, {paper.autoencoder_steps} steps of the "
        f"autoencoder, {paper.diffusion_steps} of the diffusion",
    ]
    if numbers > PAPERS[-1].numbers:
        lines[-1] += f" (published for up to {PAPERS[-1].numbers})"
    if len(found.used) < FEW:
        lines.append(f"{len(found.used)} checkpoints are few: the paper collects 200 to 400")
    return lines


def _yaml(tag: str, found: Survey, chosen: Sequence[str], tree: Mapping[str, Any]) -> str:
    """The file: what differs from the defaults, and comments."""
    paper = paper_settings(_numbers(found, chosen))
    few = isinstance(tree["evaluate"], dict) and "noise" in tree["evaluate"]
    comments = {
        "prepare": [
            *_named("Cannot be used, and left out:", found.unusable),
            *_named("Used, but worth a look (prepare.exclude leaves them out):", found.reported),
        ],
        "evaluate": ["Every network is one run of the command: few are compared."] if few else [],
        "autoencoder": [
            *_proposal(found, chosen),
            "To take the paper's, put these lines in the place of the sections autoencoder and diffusion:",
            "extends: paper",
            f"autoencoder: {{latent_size: {paper.latent_size}, steps: {paper.autoencoder_steps}}}",
            f"diffusion: {{steps: {paper.diffusion_steps}}}",
        ],
    }
    head = [
        f"{len(found.used)} checkpoints, {_numbers(found, chosen)} generated numbers in each; written by `pdiff new`.",
        f"`pdiff show {tag}` prints all that can be set. Relative paths start in the folder where pdiff is run.",
    ]
    if not tree["evaluate"] and not tree["dataset"]:
        head += ["Nothing measures these networks yet. Either of these does:"]
        head += ['evaluate: {command: "python test.py {checkpoint}"}  # prints an accuracy such as Acc: 0.93']
        head += ["evaluate: {function: path/to/file.py:predict}  # state dict -> predicted classes, labels"]
    lines = [_comment(line) for line in head]
    for section, values in tree.items():
        if values:
            lines += [_comment(line) for line in comments.get(section, [])]
            lines += [yaml.safe_dump({section: values}, sort_keys=False, allow_unicode=True, width=110).rstrip()]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> str:
    """One line of comment; names of files cannot break out of it."""
    return f"# {'  ' if text.startswith('  ') else ''}{' '.join(text.split())}"


def _named(title: str, files: Mapping[str, str]) -> list[str]:
    """A title and the files below it."""
    lines = ["  " + " ".join(f"{name}: {why}".split()) for name, why in list(files.items())[:LISTED]]
    more = [f"  and {len(files) - LISTED} more"] if len(files) > LISTED else []
    return [title, *lines, *more] if files else []


def _check(path: Path, text: str) -> None:
    """Load the experiment as it will be loaded."""
    with TemporaryDirectory() as folder:
        trial = Path(folder) / path.name
        trial.write_text(text, encoding="utf-8")
        try:
            config.load(str(trial))
        except UserError as error:
            raise UserError(str(error).replace(str(trial), "pdiff new")) from None


def _mismatches(found: Survey, tree: Mapping[str, Any]) -> list[str]:
    """What the network of the experiment has, and the files have not or otherwise; nothing where there is none."""
    if not tree["network"]:
        return []
    try:
        sizes = _sizes(Dataset(**tree["dataset"]))
        with torch.device("meta"):
            network = build(tree["network"]["architecture"], pretrained=False, **sizes)
    except UserError as error:
        return [f"not compared with the files: {error}"]
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    theirs = {name: shape for name, (shape, _) in found.layout.items()}
    lines = [f"{name} is {theirs[name]} in the files, {own.get(name, 'absent')} in the network" for name in theirs]
    lines = [line for name, line in zip(theirs, lines, strict=True) if own.get(name) != theirs[name]]
    lines += [f"{name} is {own[name]} in the network, absent in the files" for name in own if name not in theirs]
    more = [f"and {len(lines) - 6} more such tensors"] if len(lines) > 6 else []
    return [f"does not fit: {line}" for line in [*lines[:6], *more]] or [f"fits: all {len(own)} tensors"]


def _sizes(settings: Dataset) -> dict[str, int]:
    """Classes, channels and image size of a data set, as far as they are known, or else as its images show."""
    sizes = datasets.known_sizes(settings)
    if all(sizes.values()):
        return sizes
    images = datasets.load(settings)
    return {name: getattr(images, name) for name in sizes}
