"""The benchmark of trials: it times every one of them, tracks what it found, and leaves no study."""

import time

import optuna
import pytest
from tracked import runs

from pdiff.cli.main import main as pdiff


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["sqlite:///optuna.db", "journal:///optuna.log"])
def test_a_benchmark_is_a_run(workspace, capsys, monkeypatch, storage):
    asked, seconds = [], 0.05

    def slow(study, **options):
        time.sleep(seconds)
        asked.append(ask(study, **options))
        return asked[-1]

    ask = optuna.Study.ask
    monkeypatch.setattr(optuna.Study, "ask", slow)
    storage = storage.replace("journal:///", f"journal://{workspace}/")
    begin = time.perf_counter()
    assert pdiff(["overhead", "--storage", storage, "--trials", "4", "--sampler", "random"]) == 0
    wall = time.perf_counter() - begin
    (run,) = runs("overhead")
    metrics = {name: value for name, value in run.data.metrics.items() if name.startswith("seconds/")}
    assert len(asked) == 4 and 4 * metrics["seconds/trial"] >= 4 * seconds
    assert 0 < 4 * sum(metrics.values()) < wall
    shown = {"storage": storage, "trials": "4", "sampler": "random"}
    assert run.data.params == {f"overhead.{name}": value for name, value in shown.items()}
    assert f"{1000 * metrics['seconds/trial']:.1f} ms" in capsys.readouterr().out
    assert pdiff(["studies", "--storage", storage]) == 0
    assert capsys.readouterr().out == "no study\n"


@pytest.mark.slow
def test_mistakes(workspace, capsys):
    assert pdiff(["overhead", "--trials", "0"]) == 2
    assert "--trials 0: expected a positive number" in capsys.readouterr().err
    assert pdiff(["overhead", "--trails", "5"]) == 2
    assert "unknown option --trails" in capsys.readouterr().err
    assert not runs("overhead")
    assert pdiff(["overhead", "--storage", "sqlite:///mlflow.db"]) == 1  # tables of the same name, and not Optuna's
    assert "--storage sqlite:///mlflow.db: cannot be opened" in capsys.readouterr().err
    assert not runs("overhead")
    assert pdiff(["overhead", "--sampler", "grid"]) == 2
    assert "'grid' is not one of 'tpe', 'random'" in capsys.readouterr().err
