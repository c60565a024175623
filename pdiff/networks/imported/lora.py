"""LoRA adapters as PEFT stores them, each in a folder; see `zoo.model_folders` for where. Listed without torch.

`adapter_config.json`, and `adapter_model.safetensors` or `adapter_model.bin` with pairs of tensors, A (r, in, ...) and
B (out, r, ...). Only their product counts, so each pair is read in its canonical form (`method.alignment.low_rank`), or
two adapters that are the same would look different.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pdiff.errors import UserError, one_line
from pdiff.networks.imported.zoo import Checkpoint, json_object, model_folders, plain_values, read_text

if TYPE_CHECKING:
    from pdiff.networks.imported.template import Template

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PAIRS = {".lora_A.": ".lora_B.", ".lora_embedding_A": ".lora_embedding_B"}
"""What the names of A contain -> what those of B contain instead."""


def detects(folder: Path) -> bool:
    """Whether a folder is an adapter, or holds adapters."""
    return next(model_folders(folder, _holds), None) is not None


def checkpoints(folder: Path) -> Iterator[Checkpoint]:
    """Every adapter of a folder.

    Raises:
        UserError: a configuration that cannot be read, or an adapter of another kind than LoRA.
    """
    for name, adapter, known in model_folders(folder, _holds):
        config = json_object(read_text(adapter / CONFIG), str(adapter / CONFIG))
        if config.get("peft_type") != "LORA":
            kind = one_line(repr(config.get("peft_type")), 100)
            raise UserError(f"{adapter / CONFIG}: peft_type is {kind}, expected 'LORA'")
        weights = next(adapter / name for name in WEIGHTS if (adapter / name).exists())
        values = known | plain_values(config, "config.")
        yield Checkpoint(name, adapter, partial(_read, weights), (weights, adapter / CONFIG), values)


def _holds(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and any((folder / name).exists() for name in WEIGHTS)


def _read(weights: Path) -> Template:
    from pdiff.method.alignment.low_rank import canonical_pair
    from pdiff.method.collection import not_finite
    from pdiff.networks.imported.template import Template

    found = Template.read(weights)
    state, pairs = dict(found.state), 0
    if name := not_finite(state):
        raise UserError(f"{weights}: {name} holds NaN or infinity, expected finite numbers")
    for name in found.state:
        for first, second in PAIRS.items():
            other = name.replace(first, second)
            if other == name:
                continue
            if other not in state:
                raise UserError(f"{weights}: {name} has no partner {other}")
            if state[name].ndim < 2 or state[other].ndim < 2 or state[name].shape[0] != state[other].shape[1]:
                shapes = f"{tuple(state[name].shape)} and {tuple(state[other].shape)}"
                raise UserError(f"{weights}: {name} and {other} are {shapes}, expected (r, in) and (out, r)")
            state[name], state[other] = canonical_pair(state[name], state[other])
            pairs += 1
    wanted = sum(second in name and not name.endswith(".bias") for name in state for second in PAIRS.values())
    if not pairs or pairs != wanted:
        raise UserError(f"{weights}: holds {pairs} pairs of A and B for {wanted} tensors B, expected one for each")
    return replace(found, state=state).as_folder(WEIGHTS[0], {CONFIG: read_text(weights.with_name(CONFIG))})
