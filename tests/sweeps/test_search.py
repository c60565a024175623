"""Every sampler and pruner: what they sample, when they prune, and which options they take."""

import ast
import functools
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from studies import exhaust, in_memory, made, objective, states

from pdiff.errors import UserError
from pdiff.sweeps import search, trials
from pdiff.sweeps.search import PRUNERS, SAMPLERS
from pdiff.sweeps.storage import QueueEmpty, open_storage


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "gp")) for kind in SAMPLERS])
@pytest.mark.parametrize("objectives", [("value",), ("value", "x")])
def test_every_sampler(kind, objectives):
    if kind == "cmaes" and len(objectives) > 1:
        with pytest.raises(ValueError, match="one objective only"):
            made(in_memory(), sampler=kind, objectives=objectives)
        return
    study = made(in_memory(), sampler=kind, objectives=objectives)
    size = 17 * 3 if kind == "grid" else 15
    trials.plan(study, size)
    exhaust(study)
    found = study.get_trials()
    assert [trial.state for trial in found] == [TrialState.COMPLETE] * size
    sampled = [(trial.params["x"], trial.params["n"]) for trial in found]
    assert all(-1 <= x <= 1 and n in (1, 2, 3) for x, n in sampled)
    assert len(set(sampled)) == size if kind == "grid" else len(set(sampled)) > 5
    best = trials.best(study, 3)
    assert len(best) <= 3 if len(objectives) > 1 else best == [study.best_trial]
    if kind == "grid":
        assert best[0].values[0] == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "tpe", "grid", "qmc"])
def test_no_two_workers_sample_the_same(kind, tmp_path):
    """Two objects of one study take turns; with the same seed in each, they would sample everything twice."""
    storage = open_storage(f"sqlite:///{tmp_path}/s.db")
    pair = [made(storage, sampler=kind), made(storage, sampler=kind)]
    trials.plan(pair[0], 12)
    for k in range(12):
        pair[k % 2].optimize(objective(pair[k % 2]), n_trials=1)
    sampled = [tuple(trial.params.items()) for trial in pair[0].get_trials()]
    assert len(set(sampled)) > 8
    again = made(in_memory(), sampler=kind)
    trials.plan(again, 12)
    exhaust(again)
    assert [tuple(trial.params.items()) for trial in again.get_trials()] == sampled


@pytest.mark.parametrize("kind", PRUNERS)
def test_every_pruner(kind):
    options = {"percentile": {"percentile": 50.0}, "patient": {"patience": 1}, "threshold": {"upper": 10}}.get(kind, {})
    pruner = {"kind": kind, "metric": "diffusion/heldout_loss", "options": options}
    study = made(in_memory(), pruner=pruner)
    trials.plan(study, 20)

    def worse_and_worse(trial):
        for step in range(1, 30):
            trial.report(trial.number * step, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return trial.number

    with pytest.raises(QueueEmpty):
        study.optimize(worse_and_worse)
    assert ("PRUNED" in states(study)) == (kind != "none")
    assert states(study)[0] == "COMPLETE" or kind in ("patient",)


def test_options_are_those_of_optuna(monkeypatch):
    given = {}

    @functools.wraps(SAMPLERS["tpe"])
    def recorded(**options):
        given.update(options)
        return optuna.samplers.TPESampler(**options)

    monkeypatch.setitem(search.SAMPLERS, "tpe", recorded)
    made(in_memory(), sampler="tpe", n_startup_trials=3, multivariate=True)
    assert given["n_startup_trials"] == 3 and given["multivariate"] is True
    for options, hint in (({"n_startup_trial": 3}, "did you mean n_startup_trials"), ({"seed": 1}, "unknown option")):
        with pytest.raises(UserError, match=hint):
            made(in_memory(), sampler="tpe", **options)
    with pytest.raises(UserError, match=r"pruner.options.*percentile"):
        made(in_memory(), pruner={"kind": "percentile", "metric": "m"})
    with pytest.raises(UserError, match="population_size"):
        made(in_memory(), sampler="nsga2", population_size=1)


def private_names(tree: ast.AST) -> set[str]:
    """Names with one leading underscore that a module reads from an object, by a dot or by `getattr` and its like."""
    dotted = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    named = [call.args[1] for call in calls if call.func.id in ("getattr", "setattr") and len(call.args) > 1]
    constant = {node.value for node in named if isinstance(node, ast.Constant)}
    return {name for name in dotted | constant if name.startswith("_") and not name.startswith("__")}


@pytest.mark.parametrize("path", sorted(Path(search.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_optuna_is_used_by_its_public_names(path):
    """A private attribute that a module neither defines nor sets belongs to a library."""
    tree = ast.parse(path.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {getattr(node, "module", None) or alias.name for node in imports for alias in node.names}
    names = {name for node in imports for name in (a.name for a in node.names)} | modules
    assert not [name for name in names if (name.startswith("_") and name != "__future__") or "._" in name]
    stored = [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert private_names(tree) <= functions | set(stored)
    classes = (optuna.Study, optuna.Trial, optuna.storages.RDBStorage, optuna.storages.JournalStorage)
    of_optuna = {name for kind in classes for name in vars(kind) if name.startswith("_") and not name.startswith("__")}
    assert not of_optuna & (functions | set(stored)), "a private method of Optuna's is replaced"
    assert "setattr" not in {getattr(n.func, "id", "") for n in ast.walk(tree) if isinstance(n, ast.Call)}


def test_private_names_are_found():
    source = "study._storage.x; getattr(trial, '_trial_id'); self.public; x.__class__"
    assert private_names(ast.parse(source)) == {"_storage", "_trial_id"}
