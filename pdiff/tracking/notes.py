"""What MLflow's user interface says of a run: its description, as Markdown, and its verdict, in a few words."""

from __future__ import annotations

import re
import shlex

from pdiff.experiment import config, stages
from pdiff.experiment.schema import Experiment

NOTE = "mlflow.note.content"  # the tag that holds it


def note(stage: str, experiment: Experiment, verdict: str = "") -> str:
    """What a run of a stage, or of `main`, did; its verdict, if there is one; and how to go on."""
    there = stages.of(experiment)
    does = stages.STAGES[stage].does if stage in there else "Runs all stages, and holds their metrics."
    changes = ", ".join(f"`{key}={value}`" for key, value in config.changes(experiment).items())
    about = f"{does} Experiment `{experiment.tag}`{f', with {changes}' if changes else ''}."
    after = there[there.index(stage) + 1 :] if stage in there else []
    following = next((name for name in after if not stages.STAGES[name].part_of), "")
    if stage == stages.evaluation(experiment) or not following:
        on = "`report.html` among the artifacts has tables and figures; `pdiff compare` prints all runs of `main`."
    else:
        words = config.words(experiment)
        on = f"`{shlex.join(['pdiff', following, *words])}`" if words else f"the stage `{following}`."
    return "\n\n".join(filter(None, [about, verdict.strip(), f"Next: {on}"]))


def answers(verdict: str) -> str:
    """The answers of a verdict without their reasons, for a column of a table: "No difference; Worse; ..."."""
    return "; ".join(re.findall(r"\? ([^:]+):", verdict))
