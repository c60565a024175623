"""Docstrings of sections are the documentation of their keys: every key is explained in one."""

from itertools import chain

import pytest

from pdiff.method.autoencoders import AUTOENCODERS
from pdiff.method.denoisers import DENOISERS
from pdiff.method.generators import GENERATORS, DiffusionOptions
from pdiff.method.objectives import OBJECTIVES
from pdiff.networks.evaluators import EVALUATORS
from pdiff.networks.imported.select import SourceSelect
from pdiff.networks.options import Dataset, Network, Pretrain, TrajectoryOptions

REGISTRIES = (AUTOENCODERS, DENOISERS, GENERATORS, OBJECTIVES, EVALUATORS)
SECTIONS = {kind for registry in REGISTRIES for kind in registry.values()} | {DiffusionOptions}
SECTIONS |= {kind.sampling for kind in GENERATORS.values()} | {
    part for kind in GENERATORS.values() for part in (*kind.extras, *chain(*kind.sections.values()))
}
SECTIONS |= {TrajectoryOptions, Dataset, Network, Pretrain, SourceSelect}


@pytest.mark.parametrize("section", sorted(SECTIONS, key=lambda kind: f"{kind.__module__}.{kind.__name__}"))
def test_every_key_is_explained(section: type) -> None:
    explained = "\n".join(kind.__doc__ or "" for kind in section.__mro__ if hasattr(kind, "model_fields"))
    assert [name for name in section.model_fields if f"`{name}" not in explained] == []
