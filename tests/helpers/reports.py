"""A small evaluation, the tables of a whole audit, and a parser of pages: what tests of figures and reports need."""

from collections.abc import Mapping
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pandas as pd

from pdiff.experiment import board

MEASURES = ["val_accuracy", "test_accuracy", "max_similarity", "nearest_distance"]
ACCURACIES = {
    "original": [0.90, 0.92, 0.94],
    "generated": [0.93, 0.95],
    "noise_0.05": [0.80, 0.85, 0.87],
    "average": [0.945],
    "gaussian": [0.91, 0.97],
}


def evaluation() -> pd.DataFrame:
    """Five groups; on test images every accuracy is lower by 0.01."""
    rows = [
        (group, index, accuracy, accuracy - 0.01, accuracy - 0.1, 2.5)
        for group, accuracies in ACCURACIES.items()
        for index, accuracy in enumerate(accuracies)
    ]
    return pd.DataFrame(rows, columns=["group", "index", *MEASURES])


def history(steps: int = 5) -> pd.DataFrame:
    """A falling loss and a held-out loss of one part, a loss of another that reaches 0, and no loss."""
    names = ["diffusion/loss", "diffusion/heldout_loss", "autoencoder/loss", "pretrain/val_accuracy"]
    rows = [(n, s, 1 - s / (steps - 1) + (n != "autoencoder/loss")) for n in names for s in range(steps)]
    return pd.DataFrame(rows, columns=["name", "step", "value"])


def trajectory() -> pd.DataFrame:
    """Two samples at three timesteps."""
    rows = [(t, index, 0.9 - t / 10 - index / 10, 0.8 - t / 10) for t in (2.0, 1.0, 0.0) for index in (0, 1)]
    return pd.DataFrame(rows, columns=["timestep", "index", "val_accuracy", "test_accuracy"])


# group -> networks, points of accuracy above the originals, novelty, spread of the latents over that of the fitted
AUDITED = {
    "original": (300, 0.0, 0.9, 1.0),
    "heldout": (60, -0.1, 1.0, 1.02),
    "generated": (200, -0.4, 0.93, 0.9),
    "noise_0.001": (300, 0.0, 0.02, 1.0),
    "noise_0.05": (300, -0.3, 0.35, 1.05),
    "noise_0.15": (300, -12.0, 1.3, 1.4),
    "noise_matched": (200, -3.1, 0.93, 1.2),
    "average": (1, 0.4, 0.71, float("nan")),
    "average_2": (200, 0.1, 0.72, 0.71),
    "average_4": (200, 0.3, 0.7, 0.5),
    "average_16": (200, 0.4, 0.7, 0.25),
    "midpoint": (200, 0.1, 0.73, 0.7),
    "convex": (200, 0.4, 0.7, 0.1),
    "gaussian_diagonal": (200, -25.0, 1.35, 1.0),
    "gaussian": (200, -0.2, 0.95, 1.0),
    "swag": (200, -0.7, 0.85, 0.8),
    "kde": (200, -0.1, 0.4, 1.05),
    "mixed": (200, -0.2, 0.7, 1.0),
    "recombined_2": (200, -1.5, 0.75, 1.0),
    "recombined_4": (200, -2.5, 0.9, 1.0),
    "recombined_32": (200, -6.0, 1.05, 1.0),
    "reconstruction": (300, -0.2, 0.15, 0.95),
}
FEW = {name: (4, *AUDITED[name][1:]) for name in ("original", "heldout", "generated", "average_16", "gaussian", "swag")}
"""The same, of few networks."""
PARTS = {"validation": "val_", "test": ""}


def audited_networks(groups: Mapping[str, tuple] = AUDITED, *, seed: int = 0) -> pd.DataFrame:
    """The table `evaluation` of an audit: one row a network, all measures."""
    rng, frames = np.random.default_rng(seed), []
    for group, (count, gain, novelty, _) in groups.items():
        accuracy = 0.9 + gain / 100 + 0.004 * rng.standard_normal(count)
        columns = {"group": group, "index": range(count)}
        for part, sign in {"val": 1, "test": 0}.items():
            columns[f"{part}_accuracy"] = accuracy + sign * 0.002 * rng.standard_normal(count)
        for prefix in ("val_", ""):
            columns[f"{prefix}nll"] = 3.2 * (1 - accuracy) + 0.01 * rng.random(count)
            columns[f"{prefix}ece"] = 0.4 * (1 - accuracy) + 0.004 * rng.random(count)
        columns["novelty"] = novelty * np.exp(0.08 * rng.standard_normal(count))
        columns["nearest_distance"] = 0.31 * columns["novelty"]
        columns["nearest_ratio"] = np.minimum(1, 0.3 + 0.7 * columns["novelty"])
        columns["max_similarity"] = np.clip(1 - 0.3 * columns["novelty"] + 0.02 * rng.standard_normal(count), 0, 1)
        columns["outside_span"] = 0.9 * rng.random(count) if group.startswith("noise") else 0.0
        columns["disagreement"] = columns["novelty"] * (0.9 + 0.1 * rng.random(count))
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def with_front(points: pd.DataFrame) -> pd.DataFrame:
    """The points of groups, with the null arms marked that no other one beats in both accuracy and novelty."""
    arms = points[~points["group"].isin(["original", "heldout", "generated"])]
    beaten = [
        ((of.accuracy > arm.accuracy) & (of.novelty > arm.novelty)).any()
        for arm in arms.itertuples()
        for of in [arms[arms["part"] == arm.part]]
    ]
    return points.assign(on_front=points.index.isin(arms.index[~np.array(beaten)]))


def audit(groups: Mapping[str, tuple] = AUDITED, *, seed: int = 0) -> dict[str, pd.DataFrame]:
    """All tables of an audit of 300 networks of 40 tensors, as `report` takes them."""
    rng, networks = np.random.default_rng(seed + 1), audited_networks(groups, seed=seed)
    front, found, votes, calibration, latents, spectrum, layers = ([] for _ in range(7))
    components = np.arange(1, 300)
    fitted = rng.normal(0, 0.05, 40), rng.uniform(0.01, 0.4, 40)
    for group, (count, gain, novelty, spread) in groups.items():
        for part, prefix in PARTS.items():
            accuracy = networks.query("group == @group")["val_accuracy" if prefix else "test_accuracy"].mean()
            front.append((group, count, part, accuracy, accuracy - 0.003, accuracy + 0.003))
            front[-1] += (novelty, novelty * 0.97, novelty * 1.03)
            for against in ("original", "generated"):
                if group != against and group not in ("original", "generated"):
                    verdict = "no difference" if abs(gain) < 0.35 else "better" if gain > 0 else "worse"
                    question = "originals" if against == "original" else "null arms"
                    row = (question, group, against, part, gain / 100, gain / 100 - 0.0035, gain / 100 + 0.0035)
                    found.append((*row, 0.0 if verdict != "no difference" else 0.7, verdict))
            for m in (1, 2, 4, 8, 16, 32):
                gained = 0.004 * novelty * np.log2(m)
                if m <= count:
                    votes.append((group, part, m, accuracy + gained, 0.3 - 10 * gained, 0.04 - gained))
            for k in range(15):
                confidence = (k + 0.5) / 15
                calibration.append((group, part, confidence, confidence**1.2 + gain / 500, 40 * k))
        latents += [(group, k, *rng.normal(0, 1, 2) * np.nan_to_num(spread)) for k in range(count)]
        spectrum += [(group, k, 0.2 * 0.8**k, spread * k**-0.03) for k in components if spread == spread]
        for k, (mean, std) in enumerate(zip(*fitted, strict=True)):
            layers.append(
                (group, f"layer{k // 10}.{k % 10}.bn.weight", mean + 0.002 * novelty, std * (0.9 + spread / 10))
            )
    costs = [
        ("pretrain", 61.5, 812, 1),
        ("prepare", 45.2, 933, 300),
        ("train", 33.1, 1204, 1),
        ("generate", 2.4, 640, 200),
    ]
    costs += [("evaluate", 214.0, 2105, 4661), ("training as many originals", 12300.0, float("nan"), 200)]
    asked = rng.uniform(0.5, 0.9, 100)
    measured = ["accuracy", "accuracy_low", "accuracy_high", "novelty", "novelty_low", "novelty_high"]
    question = ["question", "group", "against", "part", "difference", "low", "high", "p", "verdict"]
    means = {f"test_accuracy/{group}_mean": 0.9 + gain / 100 for group, (_, gain, *_) in groups.items()}
    return {
        "board": board.board(means, groups, ["generated"]),
        "evaluation": networks,
        "front": with_front(pd.DataFrame(front, columns=["group", "networks", "part", *measured])),
        "comparisons": pd.DataFrame(found, columns=question).sort_values("question", kind="stable"),
        "votes": pd.DataFrame(votes, columns=["group", "part", "networks", "accuracy", "nll", "ece"]),
        "calibration": pd.DataFrame(calibration, columns=["group", "part", "confidence", "accuracy", "count"]),
        "latents": pd.DataFrame(latents, columns=["group", "index", "component_1", "component_2"]),
        "spectrum": pd.DataFrame(spectrum, columns=["group", "component", "variance_share", "rms_ratio"]),
        "layers": pd.DataFrame(layers, columns=["group", "tensor", "mean", "std"]),
        "control": pd.DataFrame({"asked": asked, "obtained": 0.1 + 0.85 * asked}),
        "warm_start": pd.DataFrame(
            {"group": ["generated"] * 2 + ["fresh"] * 2, "steps": [0, 10] * 2, "accuracy": [0.89, 0.9, 0.1, 0.8]}
        ),
        "costs": pd.DataFrame(costs, columns=["stage", "seconds", "memory_mb", "networks"]).assign(
            seconds_per_network=lambda frame: frame["seconds"] / frame["networks"],
            note=["", "", "", "", "", "estimated from prepare"],
        ),
    }


VERDICT = (
    "The generator is not worth its cost: at the same novelty, the null arm gaussian is as accurate.",
    "Generated networks reach 89.6 % test accuracy (originals 90.0 %), at 0.93 of the distance of held-out networks.",
    "Eight that vote gain 1.1 points; drawing 200 took 2.4 s, training as many originals would take 3 h 25 min.",
)


def downloads(page: "Page") -> list[str]:
    """The text of every CSV file that a page holds."""
    start = "data:text/csv;charset=utf-8,"
    links = [value for name, value in page.attributes if name == "href" and value.startswith(start)]
    return [unquote(link.removeprefix(start)) for link in links]


class Page(HTMLParser):
    """What a page consists of: its tags with their attributes, and the text inside each kind of tag."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)
