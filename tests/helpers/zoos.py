"""Tiny zoos of other people, each in the format in which it is published."""

import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]


def small_cnn(seed: int) -> State:
    """A network as the CNNs of ModelZoos are named, only narrower."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"module_list.0": (2, 1, 3, 3), "module_list.3": (3, 2)}
    state = {f"{name}.weight": torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return state | {f"{name}.bias": torch.randn(shape[0], generator=g) for name, shape in shapes.items()}


def ray_tune(
    folder: Path, *, trials: int = 2, epochs: Sequence[int] = (0, 25, 50), config: str = "params.json"
) -> Path:
    """Trials with checkpoints whose files have no extension; the first one was measured before its first epoch, too."""
    for k in range(trials):
        trial = folder / f"NN_tune_trainable_{k:05d}_{k}_seed={k}_2021-08-01_12-00-00"
        for epoch in epochs:
            place = trial / f"checkpoint_{epoch:06d}"
            place.mkdir(parents=True)
            torch.save(small_cnn(100 * k + epoch), place / "checkpoints")
            torch.save({"state": {}, "param_groups": []}, place / "optimizer")
        settings = {"model::type": "CNN", "model::o_dim": 17, "model::nlin": ["relu", "tanh"][k % 2], "seed": k}
        (trial / config).write_text(json.dumps({**settings, "training::data": {"path": "x"}}))
        lines = [
            {
                "training_iteration": n,
                "train_acc": 0.2 + 0.01 * n + 0.1 * k,
                "test_acc": 0.1,
                "pid": 7,
                "config": settings,
            }
            for n in range(k % 2, 51)
        ]
        (trial / "result.json").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "experiment_state-2021.json").write_text("{}")
    return folder


LAYOUT = {  # name -> shape, in TensorFlow's order of dimensions, as the zoo has it
    "sequential/conv2d/bias:0": (2,),
    "sequential/conv2d/kernel:0": (3, 3, 1, 2),
    "sequential/dense/bias:0": (3,),
    "sequential/dense/kernel:0": (2, 3),
}
STEPS = (0, 20, 86)


def small_cnn_zoo(folder: Path, *, networks: int = 2) -> np.ndarray:
    """Networks with checkpoints at STEPS; returns the matrix."""
    folder.mkdir(parents=True)
    sizes = {name: int(np.prod(shape)) for name, shape in LAYOUT.items()}
    matrix = np.random.default_rng(0).normal(size=(networks * len(STEPS), sum(sizes.values()))).astype(np.float32)
    np.save(folder / "weights.npy", matrix)
    with (folder / "layout.csv").open("w", newline="") as file:
        writer, start = csv.writer(file), 0
        writer.writerow(["varname", "shape", "size", "start_idx", "end_idx"])
        for name, shape in LAYOUT.items():
            writer.writerow([name, str(shape), sizes[name], start, start + sizes[name]])
            start += sizes[name]
    with gzip.open(folder / "metrics.csv.gz", "wt", newline="") as file:
        writer = csv.writer(file)
        names = ["config.activation", "config.learning_rate", "modeldir", "step", "test_accuracy", "train_accuracy"]
        writer.writerow(["", *names])
        for row in range(len(matrix)):
            k, step = row // len(STEPS), STEPS[row % len(STEPS)]
            writer.writerow([row, ["relu", "tanh"][k % 2], 0.003, f"/x/{k}", step, 0.5, 0.1 + step / 100 + k / 100])
    return matrix


def bert(seed: int) -> State:
    g = torch.Generator().manual_seed(seed)
    return {f"encoder.{k}.{part}": torch.randn(3, 2, generator=g) for k in range(2) for part in ("query", "key")}


def hugging_face(folder: Path, kinds: Sequence[str] = ("safetensors", "bin", "sharded")) -> Path:
    """Independent seeds as sibling folders, each stored in another way."""
    for k, kind in enumerate(kinds):
        model = folder / f"multiberts-seed_{k}"
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 2, "architectures": ["B"]}))
        if kind == "safetensors":
            save_file(bert(k), model / "model.safetensors", {"format": "pt"})
        elif kind == "bin":
            torch.save(bert(k), model / "pytorch_model.bin")
        else:
            parts = {f"model-{n + 1:05d}-of-00002.safetensors": f"encoder.{n}." for n in range(2)}
            where = {name: file for file, start in parts.items() for name in bert(k) if name.startswith(start)}
            for file in parts:
                save_file({n: t for n, t in bert(k).items() if where[n] == file}, model / file, {"format": "pt"})
            index = {"metadata": {"total_size": 96}, "weight_map": where}
            (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


LORA = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj"],
    "base_model_name_or_path": "org/base",
    "task_type": "CAUSAL_LM",
}
MODULES = [f"base_model.model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj")]


def adapter(seed: int) -> State:
    g = torch.Generator().manual_seed(seed)
    state = {}
    for module in MODULES:
        state[f"{module}.lora_A.weight"] = torch.randn(2, 6, generator=g)
        state[f"{module}.lora_B.weight"] = torch.randn(5, 2, generator=g)
    return state


def lora(folder: Path, adapters: Sequence[State] | None = None) -> Path:
    for k, state in enumerate(adapters or [adapter(0), adapter(1)]):
        place = folder / f"seed_{k}"
        place.mkdir(parents=True)
        (place / "adapter_config.json").write_text(json.dumps(LORA, indent=2))
        (place / "README.md").write_text("an adapter")
        save_file(state, place / "adapter_model.safetensors", {"format": "pt"})
    return folder
