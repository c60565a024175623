"""The dotted keys of configurations: which there are, and which depend on a choice such as `autoencoder.kind`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import get_args

from pydantic import BaseModel

from pdiff.experiment.schema import CHOICES, Choice, Tree, chosen, composed


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The keys of a schema, with those of its sections: dataset, dataset.name, ..."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for kind in (field.annotation, *get_args(field.annotation)):  # a section, or one that may be absent
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from known_keys(kind, f"{prefix}{name}.")


def alternatives() -> Iterator[tuple[Choice, dict[str, list[str]]]]:
    """Every choice, with the keys of an experiment for each of its entries; all other choices are the default."""
    default = chosen({})
    for k, choice in enumerate(CHOICES):
        kinds = {kind: (*default[:k], kind, *default[k + 1 :]) for kind in choice.registry}
        yield choice, {kind: list(known_keys(composed(all_kinds))) for kind, all_kinds in kinds.items()}


def all_keys() -> list[str]:
    """Every key that some experiment can have."""
    return list(dict.fromkeys(key for _, kinds in alternatives() for keys in kinds.values() for key in keys))


def belongs_to(key: str, chosen: Mapping[str, str]) -> tuple[Choice, list[str]]:
    """The choice that keeps a configuration from having a dotted key, and those of its entries that have the key.

    A key of a denoiser depends on the generator, too: of several choices it is the last one, which is the narrowest.

    Args:
        key: which the configuration cannot have.
        chosen: what it chooses, by the name of the choice.
    """
    found = []
    for choice, kinds in alternatives():
        having = [kind for kind, keys in kinds.items() if key in keys]
        if 0 < len(having) < len(kinds) and chosen[choice.name] not in having:
            found.append((choice, having))
    return found[-1]


def without_stale(tree: Tree, after: Tree) -> Tree:
    """A configuration without the options of the entries that are no longer chosen after a layer is laid over it.

    A layer that says `autoencoder.kind: pca` does not inherit the options of kind conv.
    """
    stale = set(known_keys(composed(chosen(tree)))) - set(known_keys(composed(chosen(after))))

    def kept(section: Tree, prefix: str = "") -> Tree:
        return {
            name: kept(value, f"{prefix}{name}.") if isinstance(value, dict) else value
            for name, value in section.items()
            if f"{prefix}{name}" not in stale
        }

    return kept(tree)
