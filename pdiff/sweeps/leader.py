"""Sweeps: one command leads a study and its parent run, its workers and those of other hosts run the trials."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import pandas as pd
from optuna.trial import TrialState
from tqdm.auto import tqdm

from pdiff.errors import UserError
from pdiff.experiment import config, stages
from pdiff.experiment.schema import Experiment
from pdiff.files import write_text
from pdiff.parallel.liveness import alive, this_process
from pdiff.sweeps import report, schema
from pdiff.sweeps.launchers import Job, abandoned, launcher, pdiff
from pdiff.sweeps.objective import Lost, Runner, attend
from pdiff.sweeps.schema import Sweep
from pdiff.sweeps.search import Exhausted, Study, best, fail_dead, make_pruner, make_sampler, requeue, values_text
from pdiff.sweeps.storage import open_storage, without_password
from pdiff.sweeps.workers import STOP_SECONDS, Crew, Display, last_line
from pdiff.tracking import engine, runs, store

POLL = 1.0  # seconds
LEASE = 60.0  # seconds for which a leader of another host is believed to be alive
KEPT = ("val_accuracy/", "val_similarity/", "test_accuracy/", "similarity/", "seconds/")  # metrics over new seeds
FINAL = [f"test_accuracy/{group}_{stat}" for group in ("original", "generated", "average") for stat in ("mean", "max")]
FINAL += ["similarity/original_original", "similarity/generated_generated", "similarity/original_generated_max"]


class Command(NamedTuple):
    """What the user asked for."""

    tag: str
    sweep: str
    overrides: dict[str, str]
    trials: int
    workers: int
    storage: str
    study: str
    launcher: str
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The name of the study."""
        return self.study or f"{Path(self.sweep).stem}-{Path(self.tag).stem}"


class Result(NamedTuple):
    """What a sweep came to."""

    run_id: str
    study: Study
    report: Path | None
    final: pd.DataFrame


def run(command: Command) -> Result:
    """Lead a study to its end, or, where another command leads it, lend it workers until it has none to do.

    Raises:
        UserError: a sweep, a tag, or a storage that cannot be used; a study that was begun with other settings.
    """
    sweep, base, grid = _checked(command)
    storage = open_storage(command.storage)
    study = _study(command, sweep, base, grid, storage)
    if not _claimed(study):
        return _help(study, command)
    label = f"sweep {study.study_name}"
    tags = {
        "pdiff.study": study.study_name,
        "mlflow.note.content": f"Study {study.study_name} in {without_password(command.storage)}.",
    }
    with runs.around("sweep", base, label=label, tags=tags) as run_id:
        _begin(study, command, run_id)
        folder = engine.work_folder() / "sweeps" / study.study_name
        start = _launcher(command, folder, base)
        try:
            _lead(study, Crew(start, _worker(command, "trials"), command.workers), run_id)
        finally:
            study.set_user_attr("leader", ["", 0])
            store.close_dead_runs()
            page = report.write(study, folder / "report")
            runs.record(run_id, **_best(study), files=dict.fromkeys(sorted((folder / "report").iterdir()), ""))
        final = _final(study, start, command, run_id)
    return Result(run_id, study, page, final)


def _checked(command: Command) -> tuple[Sweep, Experiment, dict[str, list[Any]]]:
    """The sweep, the experiment without a trial, and the grid; every mistake that can be seen now is told now."""
    config.load(command.tag, command.overrides)
    sweep = schema.load(command.sweep)
    base = schema.check(command.sweep, sweep, command.tag, command.overrides)
    given, path = config.flat(base), schema.find(command.sweep)
    try:
        grid = sweep.grid(given) if sweep.sampler.kind == "grid" else {}
        study = _rehearsal(sweep, grid)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    refused = []
    for _ in range(20):
        chosen = sweep.suggest(study.ask(), given)
        try:
            config.load(command.tag, {**_fixed(sweep, command), **chosen}, origin=str(path))
            return sweep, base, grid
        except UserError as error:
            refused.append(str(error))
    raise UserError(f"every trial would be refused, such as: {refused[0]}")


def _rehearsal(sweep: Sweep, grid: Mapping[str, list[Any]]) -> optuna.Study:
    """A study of random trials in memory, after the sweep's own sampler and pruner were made once."""
    make_sampler(sweep.sampler, grid)
    make_pruner(sweep.pruner)
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))


def _fixed(sweep: Sweep, command: Command) -> dict[str, str]:
    return {key: schema.as_text(value) for key, value in sweep.set.items()} | command.overrides


def _study(
    command: Command,
    sweep: Sweep,
    base: Experiment,
    grid: Mapping[str, list[Any]],
    storage: optuna.storages.BaseStorage,
) -> Study:
    """The study, created where there is none.

    Raises:
        UserError: there is one of this name that searches something else.
    """
    directions = [objective.direction for objective in sweep.objectives.values()]
    plain = optuna.create_study(study_name=command.name, storage=storage, directions=directions, load_if_exists=True)
    dumped = sweep.model_dump(mode="json")
    searched = {name: dumped[name] for name in ("objectives", "parameters", "set", "prune_if", "first_batch")}
    searched["experiment"] = stages.all_digests(base)["evaluate"]
    before = plain.user_attrs.get("searched", searched)
    if changed := [name for name in searched if before.get(name) != searched[name]]:
        raise UserError(
            f"study {command.name} in {without_password(command.storage)} was begun with other settings "
            f"({', '.join(changed)}); --study NAME begins another one"
        )
    plain.set_user_attr("searched", searched)
    plain.set_metric_names(list(sweep.objectives))
    return Study(command.name, storage, sweep, grid)


def _claimed(study: Study) -> bool:
    """Become the leader of a study, unless it has one that lives."""
    process, until = study.user_attrs.get("leader", ["", 0])
    if process and alive(process) and time.time() < until:
        return False
    _lease(study)
    time.sleep(0.5)  # another command may have done the same: the last one leads
    return study.user_attrs["leader"][0] == this_process()


def _lease(study: Study) -> None:
    study.set_user_attr("leader", [this_process(), time.time() + LEASE])


def _begin(study: Study, command: Command, run_id: str) -> None:
    """Plan the trials; those of earlier commands move to this one's parent run."""
    sweep = study.sweep
    order = {"tag": command.tag, "overrides": command.overrides, "sweep": sweep.model_dump(mode="json")}
    deadline = time.time() + sweep.timeout if sweep.timeout else None
    for key, value in {"order": order, "run": run_id, "stopped": "", "deadline": deadline}.items():
        study.set_user_attr(key, value)
    fail_dead(study)
    store.disown(requeue(study))
    size = 1
    for values in study.grid.values():
        size *= len(values)
    trials = command.trials or sweep.trials
    study.plan(min(trials, size) if study.grid else trials)
    earlier = [trial.user_attrs["run"] for trial in study.get_trials(deepcopy=False) if "run" in trial.user_attrs]
    store.move(earlier, run_id)


def _launcher(command: Command, folder: Path, base: Experiment) -> Callable[..., Job]:
    return launcher(command.launcher, command.workers, folder, command.options, pinned=base.device == "auto")


def _worker(command: Command, role: str) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of a worker; the storage, which may hold a password, is in the latter."""
    variables = {"PDIFF_STORAGE": command.storage, "MLFLOW_TRACKING_URI": store.address()}
    return pdiff("work", "--study", command.name, "--role", role), variables


def _lead(study: Study, crew: Crew, run_id: str) -> None:
    """Keep the workers busy until every planned trial has ended, or the time is up."""
    try:
        with Display(study) as display:
            while True:
                _lease(study)
                fail_dead(study)
                store.disown(requeue(study))
                if stopped := study.user_attrs["stopped"]:
                    raise UserError(stopped)
                waiting, running, finished = display.update()
                if display.improved:
                    runs.record(run_id, metrics=_best(study)["metrics"])
                waiting = 0 if _late(study) else waiting
                if not waiting and not running:
                    break
                crew.keep(waiting, finished)
                time.sleep(POLL)
            crew.wait()
    except BaseException:
        crew.stop()
        fail_dead(study)
        raise


def _help(study: Study, command: Command) -> Result:
    """Lend workers to a study that another command leads."""
    tqdm.write(f"study {study.study_name}: another command leads it; {command.workers} workers join")
    while "run" not in study.user_attrs or not study.get_trials(deepcopy=False):  # it has only just begun
        time.sleep(POLL)
    folder = engine.work_folder() / "sweeps" / study.study_name
    base = config.load(command.tag, _fixed(study.sweep, command))
    crew = Crew(_launcher(command, folder, base), _worker(command, "trials"), command.workers)
    try:
        with Display(study) as display:
            while True:
                fail_dead(study)
                waiting, _, finished = display.update()
                if _late(study) or study.user_attrs["stopped"] or not waiting:
                    break
                crew.keep(waiting, finished)
                time.sleep(POLL)
            while any(job.running() for job in crew.jobs.values()):
                display.update()
                time.sleep(POLL)
    except BaseException:
        crew.stop()
        raise
    return Result(study.user_attrs["run"], study, None, pd.DataFrame())


def _late(study: optuna.Study) -> bool:
    return (study.user_attrs["deadline"] or float("inf")) < time.time()


def _best(study: Study) -> dict[str, dict[str, Any]]:
    """Metrics and parameters of the best trial: the best value of each objective, the parameters of the first's."""
    found = best(study)
    if not found:
        return {"metrics": {}, "parameters": {}}
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    metrics = {"trials": len(complete)}
    for k, (name, objective) in enumerate(study.sweep.objectives.items()):
        choose = max if objective.direction == "maximize" else min
        metrics[f"best/{name}"] = choose(trial.values[k] for trial in complete)
    parameters = {f"best.{name}": value for name, value in found[0].params.items()} | {"best.trial": found[0].number}
    return {"metrics": metrics, "parameters": parameters}


def _final(study: Study, start: Callable[..., Job], command: Command, run_id: str) -> pd.DataFrame:
    """Let a worker run the best trials again on test images; their metrics over the new seeds, one row each."""
    final, folder = study.sweep.final, engine.work_folder() / "sweeps" / study.study_name
    path = folder / "final.csv"
    if not final.seeds or not best(study):
        return pd.DataFrame()
    path.unlink(missing_ok=True)
    tqdm.write(f"the best on test images, with {final.seeds} new seeds each:")
    job = start(*_worker(command, "final"), 0)
    try:
        while job.running():
            _lease(study)
            time.sleep(POLL)
    except BaseException:
        job.stop()
        job.wait(STOP_SECONDS)
        raise
    finally:
        study.set_user_attr("leader", ["", 0])
        store.close_dead_runs()
    if not path.exists():
        raise UserError(f"the best trials could not be run again; the last words of {job.log}: {last_line(job.log)}")
    frame = pd.read_csv(path)
    first = frame[frame.trial == frame.trial.iloc[0]].set_index("metric")
    metrics = {f"final/{name}": row["mean"] for name, row in first.iterrows()}
    metrics |= {f"final_std/{name}": row["std"] for name, row in first.iterrows()}
    runs.record(run_id, metrics=metrics, files={path: ""})
    return frame


def work(name: str, url: str) -> None:
    """Run trials of a study until none waits, its time is up, or it was stopped."""
    study, order = attend(name, url)
    with store.connected():
        runner = Runner(study, order)
        while not (study.user_attrs["stopped"] or _late(study) or abandoned()):
            try:
                study.optimize(runner, n_trials=1, catch=(Exception,))
            except Lost as lost:
                tqdm.write(str(lost))
            except Exhausted:
                return


def finish(name: str, url: str) -> None:
    """Run the best trials again with seeds that selected nothing, and look at test images for the first time."""
    study, order = attend(name, url)
    rows = []
    with store.connected():
        for trial in best(study, study.sweep.final.trials):
            overrides = order.fixed | trial.user_attrs["overrides"] | {"evaluate.test": "true"}
            experiment = config.load(order.tag, overrides)
            tags = {"pdiff.study": name, "pdiff.trial": str(trial.number)}
            label = f"final of trial {trial.number}"
            with runs.around("final", experiment, label=label, tags=tags, parent=order.run) as run_id:
                metrics = _over_seeds(order.tag, overrides, experiment, study.sweep.final.seeds)
                runs.record(run_id, metrics=metrics["mean"].to_dict())
                runs.record(run_id, metrics={f"std/{key}": value for key, value in metrics["std"].items()})
            rows.append(metrics.rename_axis("metric").reset_index().assign(trial=trial.number))
    path = engine.work_folder() / "sweeps" / name / "final.csv"
    write_text(path, pd.concat(rows).to_csv(index=False))


def _over_seeds(tag: str, overrides: Mapping[str, str], experiment: Experiment, seeds: int) -> pd.DataFrame:
    """Metric -> mean and sample standard deviation over whole pipelines of new seeds."""
    columns = []
    for k in range(1, seeds + 1):
        new = {"seed": str(experiment.seed + k), "generate.seed": str(experiment.generate.seed + k)}
        metrics = engine.main(config.load(tag, {**overrides, **new}), store.MLflowStore()).metrics
        columns.append({name: value for name, value in metrics.items() if name.startswith(KEPT)})
    frame = pd.DataFrame(columns)
    return pd.DataFrame({"mean": frame.mean(), "std": frame.std(ddof=1)})


def best_text(study: Study) -> str:
    """The best trials for people, one line each."""
    lines = [
        f"trial {trial.number}: {values_text(study, trial.values)} with {trial.params}"
        for trial in best(study, study.sweep.final.trials)
    ]
    return "\n           ".join(lines) or "no trial completed"


def final_text(final: pd.DataFrame) -> str:
    """What the best trials reach on test images: mean and standard deviation over new seeds."""
    shown = final[final.metric.isin(FINAL)]
    text = shown.apply(lambda row: f"{row['mean']:.4f} ± {row['std']:.4f}", axis=1)
    return shown.assign(text=text).pivot(index="metric", columns="trial", values="text").to_string()
