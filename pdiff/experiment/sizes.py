"""How many numbers experiments generate, without building their networks: that needs torch, and seconds for each."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from pdiff.errors import UserError
from pdiff.experiment.config import FOLDERS
from pdiff.experiment.schema import Experiment
from pdiff.files import read_json, write_json
from pdiff.networks import user_code
from pdiff.networks.datasets import known_sizes


class Network(NamedTuple):
    """What the generated numbers of an experiment depend on; a row of `experiments/sizes.csv`."""

    architecture: str
    classes: str
    channels: str
    image_size: str
    parameters: str  # patterns, separated by spaces

    @classmethod
    def of(cls, experiment: Experiment) -> Network | None:
        """That of an experiment; None if its data or its network are not known before they are read."""
        if experiment.dataset is None or experiment.network is None:
            return None
        sizes = known_sizes(experiment.dataset)
        if not all(sizes.values()):
            return None
        return cls(experiment.network.architecture, *map(str, sizes.values()), " ".join(experiment.prepare.parameters))


def sizes(experiments: Sequence[Experiment]) -> list[int | None]:
    """How many numbers each experiment generates; None where that is unknown.

    Networks of `experiments/sizes.csv` are looked up there, others in a file of the user's cache; what neither has is
    measured in another process, and kept in the cache until the code that it depends on changes.
    """
    networks = [Network.of(experiment) for experiment in experiments]
    known = table()
    path, cache = _cache()
    keys = {network: _key(network) for network in networks if network and network not in known}
    missing = [network for network, key in keys.items() if key not in cache]
    if missing:
        cache |= zip((keys[network] for network in missing), measured(missing), strict=True)
        with suppress(OSError):
            write_json(path, cache)
    known |= {network: cache[key] for network, key in keys.items()}
    return [known.get(network) for network in networks]


def known(experiment: Experiment) -> int | None:
    """How many numbers an experiment generates, if `experiments/sizes.csv` or the user's cache says so."""
    network = Network.of(experiment)
    return network and (table().get(network) or _cache()[1].get(_key(network)))


def measured(networks: Sequence[Network]) -> list[int | None]:
    """The numbers of some networks, counted by another process, so that this one need not import torch."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return list(pool.map(measure, networks))
    except BrokenProcessPool:
        return [None] * len(networks)


def measure(network: Network) -> int | None:
    """The numbers of a network; None if it cannot be built. It is built without memory."""
    import torch

    from pdiff.networks.architectures import build
    from pdiff.networks.populations import generated_size

    sizes = dict(zip(("classes", "channels", "image_size"), map(int, network[1:4]), strict=True))
    try:
        with torch.device("meta"):
            return generated_size(build(network.architecture, pretrained=False, **sizes), network.parameters.split())
    except UserError:
        return None


def table() -> dict[Network, int]:
    """The networks of `experiments/sizes.csv`."""
    found = {}
    for path in (folder / "sizes.csv" for folder in reversed(FOLDERS)):
        if path.is_file():
            _, *rows = csv.reader(path.read_text(encoding="utf-8").splitlines())
            found |= {Network(*row): int(numbers) for *row, numbers in rows}
    return found


def _cache() -> tuple[Path, dict[str, Any]]:
    """The file of the user's cache, and what it holds; nothing if it is damaged."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pdiff" / "sizes.json"
    try:
        content = read_json(path)
    except UserError:
        content = {}
    return path, content if isinstance(content, dict) else {}


def _key(network: Network) -> str:
    """A network's key in the cache: its description, and the code that makes it."""
    name = network.architecture
    file = user_code.source(name) if user_code.is_reference(name) else Path(find_spec("pdiff.networks.small").origin)
    code = file.read_bytes() if file.is_file() else b""
    return hashlib.sha256(repr((network, version("timm"), version("torch"), code)).encode()).hexdigest()[:32]
