"""The verdict on generated networks: better than the originals? than null arms as new as they are? new, or copied?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan, nan

import pandas as pd
import torch

from pdiff.experiment.measures import Evaluated
from pdiff.experiment.metrics import COPIES, COPYING, find
from pdiff.experiment.summary import GENERATED, ORIGINALS
from pdiff.method.statistics import Comparison, Replicates, holm, pareto_front

AS_NEW = 0.95  # a null arm is as new as a generator from this share of its novelty on
UNJUDGED = ("reconstruction", "trajectory")  # neither generators nor null arms


def null_arms(groups: Mapping[str, Evaluated], generated: Sequence[str] = GENERATED) -> list[str]:
    """The groups that need no generator."""
    return [name for name in groups if name not in (*ORIGINALS, *generated, *UNJUDGED)]


def front_table(groups: Mapping[str, Evaluated], evaluation: pd.DataFrame, generated: Sequence[str]) -> pd.DataFrame:
    """Accuracy and novelty of every group, with 95 % intervals; and whether it is on the front of the null arms."""
    part = groups["original"].last_part
    if part is None or "novelty" not in evaluation:
        return pd.DataFrame()
    table = pd.DataFrame(
        {
            "group": name,
            "networks": len(group.networks),
            "part": part,
            **_with_interval("accuracy", group.mean_accuracy),
            **_with_interval("novelty", group.median_novelty),
        }
        for name, group in groups.items()
    )
    arms = table["group"].isin(null_arms(groups, generated))
    points = torch.tensor(table.loc[arms, ["novelty", "accuracy"]].to_numpy())
    table["on_front"] = False
    table.loc[arms, "on_front"] = pareto_front(points).numpy()
    return table


def comparisons_table(
    groups: Mapping[str, Evaluated], evaluation: pd.DataFrame, generated: Sequence[str]
) -> pd.DataFrame:
    """Every generator against the originals, and against the null arms that are at least as new.

    Differences of mean accuracy, with 95 % intervals of the bootstrap over networks and images; the p-values are
    adjusted by Holm's method for all comparisons together.
    """
    part = groups["original"].last_part
    columns = ["question", "group", "against", "part", "difference", "low", "high", "p", "verdict"]
    if part is None:
        return pd.DataFrame(columns=columns)
    novelty = _medians(evaluation, "novelty")
    rows = []
    for name in generated:
        against = [("originals", other) for other in ORIGINALS if other in groups]
        as_new = [
            other
            for other in null_arms(groups, generated)
            if isnan(novelty.get(name, nan)) or novelty[other] >= AS_NEW * novelty[name]
        ]
        for question, other in against + [("null arms", other) for other in as_new]:
            found = groups[name].mean_accuracy.compare(groups[other].mean_accuracy)
            rows.append((question, name, other, part, found.difference, found.low, found.high, found.p))
    table = pd.DataFrame(rows, columns=columns[:-1])
    table["p"] = holm(table["p"].tolist())
    adjusted = table[list(Comparison._fields)].itertuples(index=False, name=None)
    table["verdict"] = [Comparison(*row).verdict() for row in adjusted]
    return table


def verdict(
    groups: Mapping[str, Evaluated],
    evaluation: pd.DataFrame,
    comparisons: pd.DataFrame,
    metrics: Mapping[str, float],
    generated: Sequence[str] = GENERATED,
) -> list[str]:
    """Three sentences on every generator, with numbers."""
    sentences = []
    for name in generated:
        subject = "the generated networks" if name in GENERATED else f"the networks of {name}"
        found = comparisons[comparisons["group"] == name]
        sentences += [
            _on_originals(groups, found, name, subject),
            _on_null_arms(groups, evaluation, found, name, subject, generated),
            _on_copying(groups, metrics, name, subject),
        ]
    return sentences


def _on_originals(groups: Mapping[str, Evaluated], found: pd.DataFrame, name: str, subject: str) -> str:
    """Whether a generator is better than what it was fitted on."""
    rows = found[found["against"] == "original"]
    if rows.empty:
        return "Better than the originals? That cannot be said: accuracy was not measured."
    (row,) = rows.to_dict("records")
    ours, theirs = (_mean(groups[group], row["part"]) for group in (name, "original"))
    return (
        f"Better than the originals? {row['verdict'].capitalize()}: on {row['part']} images {subject} reach {ours} on "
        f"average, the originals {theirs} ({_difference(row)})."
    )


def _on_null_arms(
    groups: Mapping[str, Evaluated],
    evaluation: pd.DataFrame,
    found: pd.DataFrame,
    name: str,
    subject: str,
    generated: Sequence[str],
) -> str:
    """Whether a generator is better than the best of the null arms that are as new."""
    begin = "Better than the best null arm that is as new?"
    arms, novelty = found[found["question"] == "null arms"], _medians(evaluation, "novelty")
    if found.empty:
        return f"{begin} That cannot be said: accuracy was not measured."
    if arms.empty:
        newest = max((novelty[arm] for arm in null_arms(groups, generated) if arm in novelty), default=nan)
        if isnan(newest):
            return f"{begin} That cannot be said: no null arm was evaluated."
        return (
            f"{begin} No null arm is as new: the novelty of {subject} is {novelty[name]:.2f}, "
            f"that of the newest null arm {newest:.2f}."
        )
    best = max(arms.to_dict("records"), key=lambda row: -row["difference"])
    matched = f"{len(arms)} null arms that are at least as new"
    if name not in novelty:
        matched = f"{len(arms)} null arms (without held-out networks novelty is unknown)"
    return (
        f"{begin} {best['verdict'].capitalize()}: the best of the {matched} is {best['against']} with "
        f"{_mean(groups[best['against']], best['part'])} ({_difference(best)})."
    )


def _on_copying(groups: Mapping[str, Evaluated], metrics: Mapping[str, float], name: str, subject: str) -> str:
    """Whether a generator's networks are new."""
    novelty, z_u = (metrics.get(key, nan) for key in (f"novelty/{name}_median", f"z_u/{name}"))
    if isnan(novelty):
        return "New, or copied? That cannot be said: there are no held-out networks to compare with."
    if novelty < COPIES:
        answer = "copies"
    elif z_u < COPYING:
        answer = "nearer to the fitted networks than held-out ones are"
    else:
        answer = (
            "as new as held-out networks"
            if z_u <= -COPYING
            else "further from the fitted networks than held-out ones are"
        )
    text = (
        f"New, or copied? {subject[0].upper()}{subject[1:]} are {answer}: their distance to the nearest fitted network "
        f"is {novelty:.2f} of that of held-out ones (Z_U {z_u:.1f})"
    )
    shares = [metrics.get(f"{metric}/{name}_0.5") for metric in ("novel_performant", "val_novel_performant")]
    share = next((share for share in shares if share is not None), None)
    if share is not None:
        text += f"; {share:.0%} of them are as accurate as held-out networks and at least half as new"
    return text + "."


def _with_interval(name: str, found: Replicates) -> dict[str, float]:
    low, high = found.interval()
    return {name: found.value, f"{name}_low": low, f"{name}_high": high}


def _medians(evaluation: pd.DataFrame, column: str) -> dict[str, float]:
    """Group -> median of a column; nothing where that was not measured."""
    return evaluation.groupby("group")[column].median().dropna().to_dict() if column in evaluation else {}


def _mean(group: Evaluated, part: str) -> str:
    return f"{find('test_accuracy').text(group.accuracy(part).mean().item())} %"


def _difference(row: Mapping[str, float]) -> str:
    text = find("test_accuracy").text
    return (
        f"{text(row['difference'], sign='+')} points, "
        f"95 % interval {text(row['low'], sign='+')} to {text(row['high'], sign='+')}"
    )
