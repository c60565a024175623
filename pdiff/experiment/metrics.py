"""The one table of metrics: what each measures, on which images, whether more is better, and how people read it.

The terminal, the report, the leaderboard, `compare` and sweeps all read METRICS: a new metric is one entry. One with
`measure` is taken of every network: it becomes a column of `evaluation.csv` and of the evaluation table, and the
metrics `<name>/<group>_<statistic>` of the run. One with `of_group` is taken of a group as a whole: it becomes the
metrics `<name>/<group><suffix>`.

This module imports neither torch nor pandas, so that commands which only look up a name start at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from math import nan
from operator import methodcaller
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pdiff.networks.evaluators import VOTE_SIZES

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from pdiff.experiment.measures import Evaluated

MISSING = "–"  # shown where nothing was measured
_SIZE = re.compile(r"_[\d.e+-]+$")  # the size or scale at the end of the name of a null arm


@dataclass(frozen=True)
class Metric:
    """One metric, or a family such as `test_accuracy/<group>_<statistic>`.

    Attributes:
        quantity: what is measured: accuracy, similarity, loss. Metrics of one quantity differ in their `part`.
        part: the images that it is measured on; empty where it needs none, or where that differs from run to run.
        heading: short name in tables; the label where empty.
        unit: "%" for a fraction that is written in percent, "IoU", "s", "MB"; empty for a plain number.
        better: which values are better, if either.
        digits: after the decimal point, in the unit.
        measure: values of the networks of a group, (N,), or None where they cannot be measured.
        statistics: names in STATISTICS, logged of every group.
        columns: names in STATISTICS that the evaluation table shows; "mean ± std" puts two into one column.
        of_group: suffix -> value of a group as a whole; missing or NaN where it cannot be measured.
        suffixes: all that it may have.
    """

    quantity: str
    part: Literal["validation", "test", ""] = ""
    heading: str = ""
    unit: str = ""
    better: Literal["higher", "lower", ""] = ""
    digits: int = 3
    measure: Callable[[Evaluated], Tensor | None] | None = None
    statistics: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    of_group: Callable[[Evaluated], Mapping[str, float]] | None = None
    suffixes: tuple[str, ...] = ("",)

    @property
    def label(self) -> str:
        """The full name, such as "validation accuracy"."""
        return f"{self.part} {self.quantity}".strip()

    @property
    def hint(self) -> str:
        """What a reader of a table may want to know: "test accuracy, higher is better"."""
        return f"{self.label}, {self.better} is better" if self.better else self.label

    @property
    def scale(self) -> int:
        """What a value is multiplied by to be in the unit."""
        return 100 if self.unit == "%" else 1

    def title(self, column: str = "mean") -> str:
        """The heading of a column of the evaluation table: "test %" for the mean, "max test" for the maximum."""
        heading = self.heading or self.label
        if column.startswith("mean"):
            return f"{heading} %" if self.unit == "%" else heading
        return f"{column} {heading}"

    def text(self, value: float, *, sign: str = "") -> str:
        """A value in the unit, a dash for NaN; with `sign` "+" positive numbers have a sign, too."""
        return MISSING if value != value else f"{self.scale * value:{sign}.{self.digits}f}"


STATISTICS: dict[str, Callable[[pd.Series], float]] = {
    "mean": methodcaller("mean"),
    "max": methodcaller("max"),
    "min": methodcaller("min"),
    "std": methodcaller("std", ddof=0),
    "median": methodcaller("median"),
}
"""Statistics over the networks of a group; missing values are left out, std is that of the whole population."""

ACCURACY: dict[str, Any] = {"quantity": "accuracy", "unit": "%", "better": "higher", "digits": 2}
OF_NETWORKS: dict[str, Any] = ACCURACY | {"statistics": tuple(STATISTICS), "columns": ("mean ± std", "max")}
OF_PROBABILITIES: dict[str, Any] = {"better": "lower", "digits": 4, "statistics": ("mean", "std", "median")}
LOSS = Metric("loss", better="lower", digits=4)
TAUS = (0.25, 0.5, 1.0)  # the novelty that a network must have to be called novel


def _on_both(name: str, make: Callable[[Literal["validation", "test"]], Metric]) -> dict[str, Metric]:
    """A metric that is measured on validation images, and on test images."""
    return {f"val_{name}": make("validation"), name: make("test")}


def _of_votes(what: str, **known: Any) -> dict[str, Metric]:
    """What soft votes of several networks of a group reach."""
    suffixes = tuple(f"_{size}" for size in VOTE_SIZES)
    return _on_both(
        f"vote_{what}",
        lambda part: Metric(part=part, of_group=lambda group: group.votes(part, what), suffixes=suffixes, **known),
    )


def _of_group(quantity: str, measure: Callable[[Evaluated], float], **known: Any) -> Metric:
    """A number of a group as a whole."""
    return Metric(quantity, of_group=lambda group: {"": measure(group)}, **known)


METRICS: dict[str, Metric] = {
    "val_accuracy": Metric(
        **OF_NETWORKS, part="validation", heading="validation", measure=lambda group: group.accuracy("validation")
    ),
    "test_accuracy": Metric(**OF_NETWORKS, part="test", heading="test", measure=lambda group: group.accuracy("test")),
    "max_similarity": Metric(
        "max similarity", unit="IoU", measure=lambda group: group.max_similarity(), columns=("mean",)
    ),
    "nearest_distance": Metric("nearest distance", measure=lambda group: group.nearest[0], statistics=("mean",)),
    "novelty": Metric("novelty", measure=lambda group: group.novelty(), statistics=("median",), columns=("median",)),
    "nearest_ratio": Metric(
        "nearest ratio",
        measure=lambda group: group.nearest_ratio(),
        of_group=lambda group: {"": group.nearest_ratio().nanquantile(0.5).item()},
    ),
    "outside_span": Metric("outside of the span", measure=lambda group: group.outside_span(), statistics=("mean",)),
    "disagreement": Metric(
        "disagreement", measure=lambda group: group.disagreement(), statistics=("median",), columns=("median",)
    ),
    **_on_both("nll", lambda part: Metric("NLL", part=part, measure=lambda group: group.nll(part), **OF_PROBABILITIES)),
    **_on_both(
        "ece",
        lambda part: Metric("calibration error", part=part, measure=lambda group: group.ece(part), **OF_PROBABILITIES),
    ),
    **_on_both(
        "novel_performant",
        lambda part: Metric(
            "novel and performant",
            part=part,
            unit="%",
            better="higher",
            digits=1,
            of_group=lambda group: group.novel_and_performant(part),
            suffixes=tuple(f"_{tau:g}" for tau in TAUS),
        ),
    ),
    **_of_votes("accuracy", **(ACCURACY | {"quantity": "vote accuracy"})),
    **_of_votes("nll", quantity="vote NLL", better="lower", digits=4),
    **_of_votes("ece", quantity="vote calibration error", better="lower", digits=4),
    "z_u": _of_group("Z_U", lambda group: group.z_u(), digits=1),
    "z_u_predictions": _of_group("Z_U of predictions", lambda group: group.z_u_predictions(), digits=1),
    "dispersion": _of_group("dispersion", lambda group: group.dispersion()),
    "precision": _of_group("precision", lambda group: group.prdc.get("precision", nan), better="higher"),
    "recall": _of_group("recall", lambda group: group.prdc.get("recall", nan), better="higher"),
    "density": _of_group("density", lambda group: group.prdc.get("density", nan), better="higher"),
    "coverage": _of_group("coverage", lambda group: group.prdc.get("coverage", nan), better="higher"),
    "frechet": _of_group("Fréchet distance", lambda group: group.frechet(), better="lower"),
    **_on_both(
        "hypervolume",
        lambda part: Metric(
            "hypervolume",
            part=part,
            better="higher",
            of_group=lambda group: group.hypervolume(part),
            suffixes=("", "_low", "_high"),
        ),
    ),
    "control": Metric("control", part="validation"),
    "warm_start": Metric("warm start", part="validation", better="lower", digits=0),
    "val_similarity": Metric("similarity", part="validation", unit="IoU"),
    "similarity": Metric("similarity", part="test", heading="similarity", unit="IoU"),
    "pretrain/loss": LOSS,
    "pretrain/val_accuracy": Metric(**ACCURACY, part="validation"),
    "collect/loss": LOSS,
    "autoencoder/loss": LOSS,
    "autoencoder/original_val_accuracy": Metric(**ACCURACY, part="validation"),
    "autoencoder/reconstruction_val_accuracy": Metric(**ACCURACY, part="validation"),
    "diffusion/loss": LOSS,
    "diffusion/heldout_loss": Metric("held-out loss", better="lower", digits=4),
    "diffusion/dispersion": Metric("dispersion"),
    "diffusion/nearest_ratio": Metric("nearest ratio"),
    "diffusion/final_dispersion": Metric("dispersion"),
    "diffusion/final_nearest_ratio": Metric("nearest ratio over that of fitted latents"),
    "seconds": Metric("seconds", unit="s", better="lower", digits=1),
    "memory_mb": Metric("memory", unit="MB", better="lower", digits=0),
}
"""Name of a metric, or of a family (what stands before the first slash) -> what is known of it."""

CONTROLLED = "val_accuracy"
"""The condition of which evaluation sees whether networks obey: it is measured on validation images."""

CONTROL = ("control/slope", "control/slope_low", "control/slope_high")
"""Slope of what networks have over what they were asked for, and its 95 % interval."""

STARTS = ("generated", "average", "fresh")
"""Networks that are trained on where warm starts are measured; fresh ones are newly initialised."""

DIAGNOSTICS = ("diffusion/dispersion", "diffusion/nearest_ratio")
"""Metrics of a few samples during a fit; low values are an alarm."""

PAIRS = ("original_original", "generated_generated", "original_generated", "original_generated_max")
"""Similarities between groups: means over pairs, and the mean of each generated network's maximum."""

COMPARED = {
    "original mean": "test_accuracy/original_mean",
    "original max": "test_accuracy/original_max",
    "original min": "test_accuracy/original_min",
    "generated mean": "test_accuracy/generated_mean",
    "generated max": "test_accuracy/generated_max",
    "generated min": "test_accuracy/generated_min",
    "average": "test_accuracy/average_mean",
    "original-original": "similarity/original_original",
    "generated-generated": "similarity/generated_generated",
    "original-generated (max)": "similarity/original_generated_max",
}
"""Label -> metric of a run, of those that `compare` and the end of a sweep show: test accuracy, then similarity."""

OFF_BOARD = ("original max", "original min", "generated min", "average")
"""Labels in COMPARED that the leaderboard, which shows each metric three times, has no room for."""

FIT_SECONDS = ("seconds/autoencoder", "seconds/diffusion", "seconds/gaussian")
"""How long the parts of a fit took; no generator has all of them."""

FAMILIES: dict[str, tuple[str, ...]] = {
    "original": ("original",),
    "heldout": ("heldout",),
    "generated": ("generated",),
    "named": (),
    "noise": ("noise_0.001", "noise_0.05", "noise_0.15", "noise_matched"),
    "averages": ("average", "average_2", "average_4", "average_16", "midpoint", "convex"),
    "gaussians": ("gaussian_diagonal", "gaussian", "swag", "kde"),
    "mixtures": ("mixed", "recombined_2", "recombined_4", "recombined_32"),
    "reconstruction": ("reconstruction",),
}
"""Family -> its groups, in the order of tables and figures; "named" are the generators that a user gave names to."""
_FAMILY = {
    key: name for name, members in FAMILIES.items() for group in members for key in (group, _SIZE.sub("_", group))
}

# The "bright" and "muted" schemes of Paul Tol, which colour-blind readers can tell apart.
COLORS = {
    "original": "#4477AA",
    "heldout": "#228833",
    "generated": "#EE6677",
    "noise": "#999999",
    "averages": "#999933",
    "gaussians": "#44AA99",
    "mixtures": "#AA4499",
    "reconstruction": "#882255",
}
"""Family -> colour."""
OTHER_COLORS = ("#CCBB44", "#66CCEE", "#AA3377", "#EE7733", "#009988", "#332288")
"""Colours of generators with names, in turn."""
SYMBOLS = {"circle": "●", "square": "■", "diamond": "◆", "triangle-up": "▲", "cross": "+", "x": "×", "star": "★"}
"""Symbol of a figure -> the character that looks like it, for tables. The groups of a family take them in turn."""
FIRST_SYMBOL = {"heldout": 1, "generated": 2, "named": 3}
"""Family -> where its turn begins, so that these four differ without colour, too."""


class Style(NamedTuple):
    """How a group looks in every figure: its colour, and a key of SYMBOLS."""

    color: str
    symbol: str


class Alarm(NamedTuple):
    """What a metric of a generator warns of below a limit, and what may help: section of the configuration -> words."""

    tag: str
    metric: str
    limit: float
    remedies: Mapping[str, tuple[str, ...]]


COPIES = 0.25  # networks of less novelty are copies, even where too few are held out for a test
COPYING = -3.0  # Z_U below it: nearer to the fitted networks than held-out ones, beyond chance
FEWER = {
    "autoencoder": ("a lower autoencoder.latent_size",),
    "diffusion": ("a lower diffusion.learning_rate", "more diffusion.steps"),
}
NEWER = {"diffusion": ("fewer diffusion.steps", "diffusion.stop_on memorising"), "prepare": ("more checkpoints",)}
ALARMS = (
    Alarm("collapsed", "diffusion/final_dispersion", 0.8, FEWER),
    Alarm("collapsed", "dispersion/{group}", 0.8, FEWER),
    Alarm("memorising", "diffusion/final_nearest_ratio", 0.5, NEWER),
    Alarm("memorising", "z_u/{group}", COPYING, NEWER),
    Alarm("memorising", "novelty/{group}_median", COPIES, NEWER),
)
"""What a run is tagged with: samples hardly differ from each other; samples are near copies of fitted networks."""


def alarms(
    metrics: Mapping[str, float], generated: Iterable[str] = ("generated",), *, sections: Collection[str] = ()
) -> dict[str, str]:
    """Tag of a run -> what it warns of, from its metrics: a generator that collapses, or that copies.

    Args:
        metrics: of the run.
        generated: the groups of networks that come from generators.
        sections: of the configuration, in which changes may help; none where the generator is not one of pdiff.
    """
    found: dict[str, str] = {}
    for group in generated:
        of_group: dict[str, str] = {}
        for alarm in ALARMS:
            name = alarm.metric.format(group=group)
            if metrics.get(name, alarm.limit) < alarm.limit:
                text = f"{alarm.tag}: {name} is {metrics[name]:.3g}, expected at least {alarm.limit:g}"
                known = [alarm.remedies[section] for section in alarm.remedies if section in sections]
                helpful = " or ".join(words for changes in known for words in changes)
                of_group.setdefault(alarm.tag, f"{text}; {helpful} may help" if helpful else text)
        found |= {tag: f"{found[tag]}; {text}" if tag in found else text for tag, text in of_group.items()}
    return found


def find(name: str) -> Metric:
    """The entry of a metric: that of its whole name, or of its family; a plain number where there is neither."""
    family = name.partition("/")[0]
    return METRICS.get(name) or METRICS.get(family) or Metric(family.replace("_", " "))


def of_networks() -> dict[str, Metric]:
    """Name -> metric of those that are measured of every network."""
    return {name: metric for name, metric in METRICS.items() if metric.measure}


def in_tables() -> dict[str, Metric]:
    """Name -> metric of those that have a column in the table of groups."""
    return {name: metric for name, metric in METRICS.items() if metric.columns}


def of_evaluation(
    groups: Iterable[str], parts: Collection[str], generated: Iterable[str] = ("generated",)
) -> list[str]:
    """The metrics of a run that evaluates groups of networks, some of them of generators, on parts of the images."""
    measured = {name: metric for name, metric in of_networks().items() if metric.part in ("", *parts)}
    values = [f"{n}/{group}_{s}" for group in groups for n, metric in measured.items() for s in metric.statistics]
    whole = {name: metric for name, metric in METRICS.items() if metric.of_group and metric.part in ("", *parts)}
    values += [f"{n}/{group}{suffix}" for group in groups for n, metric in whole.items() for suffix in metric.suffixes]
    pairs = [pair.replace("generated", name) for name in generated for pair in PAIRS]
    return values + [f"{by_part('similarity')[part]}/{pair}" for part in parts for pair in dict.fromkeys(pairs)]


def by_part(quantity: str) -> dict[str, str]:
    """Part of the images -> name of the family that measures a quantity on it: test -> test_accuracy."""
    return {m.part: name for name, m in METRICS.items() if m.quantity == quantity and m.part and "/" not in name}


def on_test(name: str) -> bool:
    """Whether a metric is measured on test images, so that nothing may be selected by it."""
    return find(name).part == "test"


def is_result(name: str) -> bool:
    """Whether a metric says how good or how alike networks are, or what they cost; not how their training went."""
    metric = find(name)
    return any((metric.measure, metric.of_group)) or metric.quantity in ("similarity", "seconds")


def on_validation(name: str) -> str:
    """The metric that measures on validation images what this one measures on test images."""
    family, slash, rest = name.partition("/")
    return by_part(find(name).quantity).get("validation", family) + slash + rest


def label(name: str) -> str:
    """A metric of a run for people: "test % generated mean"."""
    return f"{find(name).title()} {name.partition('/')[2].replace('_', ' ')}".strip()


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """A table of runs for people: metrics as text in their units, under the labels of COMPARED; short ids."""
    names = [name for name in table if "/" in name]
    cells = {name: table[name].map(find(name).text).astype(str) for name in names}
    labels = {name: label(name) for name in names} | {name: text for text, name in COMPARED.items()}
    return table.assign(**cells, run=table["run"].str[:8]).rename(columns=labels)


def family(group: str) -> str:
    """The family of a group. Arms of other sizes, such as average_8 or noise_0.3, belong to that of their like."""
    return _FAMILY.get(group) or _FAMILY.get(_SIZE.sub("_", group), "named")


def is_null_arm(group: str) -> bool:
    """Whether the networks of a group need no generator, and were not trained."""
    return family(group) not in ("original", "heldout", "generated", "named")


def styles(groups: Iterable[str]) -> dict[str, Style]:
    """Group -> style, in the order of tables and figures; a group that pdiff knows always has the same style."""
    present = {group: family(group) for group in groups}
    found = {}
    for name, known in FAMILIES.items():
        members = [*known, *(group for group, its in present.items() if its == name and group not in known)]
        for k, group in enumerate(members):
            if group in present:
                color = COLORS.get(name) or OTHER_COLORS[k % len(OTHER_COLORS)]
                found[group] = Style(color, list(SYMBOLS)[(k + FIRST_SYMBOL.get(name, 0)) % len(SYMBOLS)])
    return found
