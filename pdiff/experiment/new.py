"""`pdiff new`: an experiment of existing checkpoint files. It inspects them, proposes settings, writes the YAML."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pdiff.errors import UserError, printable
from pdiff.experiment import command_options, config, documents
from pdiff.experiment.proposal import Proposal, listed, paper_settings
from pdiff.files import write_text
from pdiff.method.generators import DiffusionOptions
from pdiff.networks.imported.files import files_of
from pdiff.networks.options import Dataset, Network
from pdiff.networks.patterns import literal

if TYPE_CHECKING:
    from pdiff.networks.inspect import Inspection

FOLDER = Path("experiments") / "own"
SUBFOLDERS = ("checkpoint", "checkpoints")  # beside a script that tests them, as the published code lays it out
SCRIPT = "test.py"
MISMATCHES = 6  # tensors that do not fit and are named


def new(
    tag: str,
    checkpoints: Path,
    *,
    out: Path = FOLDER,
    dataset: str = "",
    architecture: str = "",
    parameters: Sequence[str] = (),
    command: str = "",
    function: str = "",
    overrides: Mapping[str, str] | None = None,
    force: bool = False,
) -> Path:
    """Write the experiment of a folder of checkpoint files, and print what the files contain.

    Args:
        tag: name of the experiment.
        checkpoints: the folder, or one that contains it as `checkpoint/` beside a `test.py`.
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
        UserError: an unusable folder, tag or option, a file that exists, or a network that the files do not fit.
    """
    path = _free(tag, out, force)
    source, home = _places(checkpoints.expanduser())
    given = {
        "dataset": {"name": dataset},
        "network": {"architecture": architecture},
        "prepare": {"source": command_options.written(source)},
        "autoencoder": {"latent_size": "auto"},
        "diffusion": {"steps": DiffusionOptions().steps},
        "evaluate": _evaluation(command, function, home, known=bool(dataset)),
    }
    tree = command_options.tree(given, overrides or {})  # mistakes are reported before reading, which may take long
    settings = command_options.experiment(tag, tree, place="pdiff new").prepare
    from pdiff.networks.inspect import inspect_folder

    found = inspect_folder(source, settings.format, settings.source_select)
    if found.format != "plain":
        given["prepare"]["format"] = found.format
    proposal = Proposal.of(found, parameters)
    chosen = proposal.parameters
    given["prepare"]["parameters"] = list(chosen) if len(chosen) > 1 else chosen[0]
    given["prepare"]["exclude"] = [literal(name) for name in found.unusable]
    tree = command_options.tree(given, overrides or {})
    text = _yaml(tag, proposal, tree)
    _check(path, text)
    print(proposal.text())
    if tree["network"]:
        _check_network(found, tree)
    write_text(path, text)
    known = config.tags().get(tag)
    named = tag if known and known.resolve() == path.resolve() else path
    print(f"\nwritten     {path}\nnext        pdiff main --tag {shlex.quote(str(named))}")
    return path


# -- the arguments


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
    """The folder of the checkpoint files, and that in which a script that tests them may be."""
    if not folder.is_dir():
        raise UserError(f"--checkpoints: {folder} is not a folder")
    inner = [folder / name for name in SUBFOLDERS if files_of(folder / name)]
    return (inner[0] if inner and not files_of(folder) else folder), folder


def _evaluation(command: str, function: str, home: Path, *, known: bool) -> dict[str, Any]:
    """How the networks are measured: as asked for; without a known data set, by the script beside the files."""
    if not (command or function or known) and (home / SCRIPT).is_file():
        command = f"python {SCRIPT} {{checkpoint}}"
    words = command_options.words(command)
    there = any((home / word).is_file() and (word == SCRIPT or not Path(word).is_file()) for word in words)
    return command_options.evaluation(command, function) | {"folder": command_options.written(home) if there else ""}


# -- the file


def _yaml(tag: str, proposal: Proposal, tree: Mapping[str, Any]) -> str:
    """The file: what differs from the defaults, and comments."""
    found, paper = proposal.found, paper_settings(proposal.numbers)
    few = isinstance(tree["evaluate"], dict) and "noise" in tree["evaluate"]
    comments = {
        "prepare": [
            *listed("Cannot be used, and left out:", found.unusable),
            *listed("Used, but worth a look (prepare.exclude leaves them out):", found.reported),
        ],
        "evaluate": ["Every network is one run of the command: few are compared."] if few else [],
        "autoencoder": [
            *proposal.settings(),
            "To take the paper's, put these lines in the place of the sections autoencoder and diffusion:",
            "extends: paper",
            f"autoencoder: {{latent_size: {paper.latent_size}, steps: {paper.autoencoder_steps}}}",
            f"diffusion: {{steps: {paper.diffusion_steps}}}",
        ],
    }
    head = [
        f"{len(found.used)} checkpoints, {proposal.numbers} generated numbers in each; written by `pdiff new`.",
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
            lines += [documents.dump({section: values}, allow_unicode=True, width=110).rstrip()]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> str:
    """One line of comment; names of files cannot break out of it."""
    return f"# {'  ' if text.startswith('  ') else ''}{' '.join(text.split())}"


def _check(path: Path, text: str) -> None:
    """Load the experiment as it will be loaded."""
    with TemporaryDirectory() as folder:
        trial = Path(folder) / path.name
        trial.write_text(text, encoding="utf-8")
        try:
            config.load(str(trial))
        except UserError as error:
            raise UserError(str(error).replace(str(trial), "pdiff new")) from None


def _check_network(found: Inspection, tree: Mapping[str, Any]) -> None:
    """Print how the tensors of the files fit those of the experiment's network.

    Raises:
        UserError: they do not, or the network cannot be made: `pdiff main` would fail.
    """
    import torch

    from pdiff.experiment.prepare import misfits
    from pdiff.networks.architectures import build

    settings, sizes = Network(**tree["network"]), _sizes(Dataset(**tree["dataset"]))
    with torch.device("meta"):
        network = build(settings.architecture, pretrained=False, **sizes)
        state = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in found.layout.items()}
    reasons = misfits(network, state, complete=not settings.pretrained)
    more = [f"and {len(reasons) - MISMATCHES} more such tensors"] if len(reasons) > MISMATCHES else []
    for reason in [*reasons[:MISMATCHES], *more]:
        print(f"network     does not fit: {printable(reason)}")
    if reasons:
        where = f"--architecture {settings.architecture} with --dataset {tree['dataset']['name']}"
        raise UserError(f"{where}: the files in {found.folder} do not fit: {reasons[0]}; nothing was written")
    ours = network.state_dict()
    every = "all" if len(state) == len(ours) else f"{len(state)} of"
    print(f"network     fits: {every} {len(ours)} tensors")


def _sizes(settings: Dataset) -> dict[str, int]:
    """Classes, channels and image size of a data set: as far as they are known, or else as its images show."""
    from pdiff.networks import datasets

    sizes = datasets.known_sizes(settings)
    if all(sizes.values()):
        return sizes
    images = datasets.load(settings)
    return {name: getattr(images, name) for name in sizes}
