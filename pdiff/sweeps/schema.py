"""Sweep files: objectives, parameters, sampler, and when a trial is not worth continuing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from pdiff.errors import UserError
from pdiff.experiment import config, documents, metrics
from pdiff.experiment.keys import known_keys
from pdiff.method.options import Positive, Section, Several

FIRST = "first_batch/"  # prefix of the metrics of the first networks
GRID = 100_000  # points of a grid, at most
Direction = Literal["maximize", "minimize"]
Scalar = None | bool | int | float | str


def _not_on_test(metric: str) -> str:
    """The metric, unless it would select on test images."""
    name = metric.removeprefix(FIRST)
    if metrics.on_test(name):
        rule = "is measured on test images, and nothing is ever selected on those; expected a metric such as"
        raise ValueError(f"{metric} {rule} {metrics.on_validation(name)}")
    return metric


class Objective(Section):
    """What to maximise or minimise: a metric, or the sum of several."""

    direction: Direction
    sum: tuple[str, ...] = ()

    @field_validator("sum")
    @classmethod
    def _once(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        if twice := [metric for metric in metrics if metrics.count(metric) > 1]:
            raise ValueError(f"{twice[0]} stands twice")
        return metrics


Known = Mapping[str, tuple[Any, ...]]  # configuration key, or parameter -> what conditions may call its value


def meets(names: tuple[Any, ...], wanted: tuple[Scalar, ...]) -> bool:
    """Whether a value is one of those that a condition wants."""
    return any(name in wanted for name in names)


class Parameter(Section):
    """One dimension of the search.

    It sets the configuration key of its name, or all `keys`. `choices` are values, or label -> value where a value
    is not a scalar. It is searched only where every key of `when` (a configuration key, or a parameter above it) has
    one of the values listed there.
    """

    kind: Literal["float", "int", "categorical"]
    low: float | None = None
    high: float | None = None
    step: Annotated[float, Field(gt=0)] | None = None
    log: bool = False
    choices: dict[str, Any] = {}
    keys: Annotated[tuple[str, ...], Several] = ()
    when: dict[str, Annotated[tuple[Scalar, ...], Several, Field(min_length=1)]] = {}

    @field_validator("choices", mode="before")
    @classmethod
    def _label(cls, choices: Any) -> Any:
        values = list(choices.values() if isinstance(choices, dict) else choices if isinstance(choices, list) else ())
        texts = [documents.as_text(value) for value in values]
        if twice := [text for text in texts if texts.count(text) > 1]:
            raise ValueError(f"{twice[0]} stands twice")
        return dict(zip(texts, values, strict=True)) if isinstance(choices, list) else choices

    @model_validator(mode="after")
    def _check(self) -> Parameter:
        if self.kind == "categorical":
            if not self.choices or self.log or not self.low is self.high is self.step is None:
                raise ValueError("kind categorical needs choices, and neither low, high, step nor log")
            return self
        if self.low is None or self.high is None or self.choices:
            raise ValueError(f"kind {self.kind} needs low and high, and no choices")
        if self.low >= self.high:
            raise ValueError(f"low < high must hold, but got (low={self.low:g}, high={self.high:g})")
        if self.step and self.step > self.high - self.low:
            raise ValueError(
                f"step <= high - low must hold, but got (step={self.step:g}, low={self.low:g}, high={self.high:g})"
            )
        if self.log and (self.low <= 0 or self.step):
            raise ValueError(f"log needs low > 0 and no step, but got (low={self.low:g}, step={self.step})")
        if self.kind == "int" and not all(float(x or 0).is_integer() for x in (self.low, self.high, self.step)):
            raise ValueError("kind int needs integers as low, high and step")
        return self

    def suggest(self, trial: Any, name: str) -> Any:
        """The value, or the label of one, that Optuna's `trial` suggests."""
        if self.kind == "categorical":
            return trial.suggest_categorical(name, list(self.choices))
        if self.kind == "int":
            options = {"step": int(self.step or 1), "log": self.log}
            return trial.suggest_int(name, int(self.low), int(self.high), **options)
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)

    def grid(self) -> list[Any]:
        """All values, or labels of them; none where they are too many to list."""
        if self.kind == "categorical":
            return list(self.choices)
        step = self.step or 1
        count = int((self.high - self.low) / step + 1e-9) + 1
        if self.log or (self.kind == "float" and not self.step) or count > GRID:
            return []
        values = [self.low + k * step for k in range(count)]
        return [int(value) for value in values] if self.kind == "int" else values

    def extremes(self) -> list[Any]:
        """Values at the ends of the range, or all choices."""
        ends = [self.low, self.high]
        return list(self.choices) or ([int(end) for end in ends] if self.kind == "int" else ends)

    def value(self, suggested: Any) -> Any:
        """The value that a label stands for, or the suggested value itself."""
        return self.choices.get(suggested, suggested) if self.choices else suggested

    def settings(self, name: str, suggested: Any) -> dict[str, str]:
        """Configuration key -> value as text, of a suggested value."""
        return dict.fromkeys(self.keys or (name,), documents.as_text(self.value(suggested)))

    def known(self, name: str, suggested: Any) -> Known:
        """What conditions may call a suggested value."""
        value = self.value(suggested)
        return {name: (suggested, value), **dict.fromkeys(self.keys, (value,))}

    def suggested_as(self, value: Scalar) -> list[Any]:
        """The suggested values, at most one, that a condition means by a value."""
        if self.choices:
            return [label for label, choice in self.choices.items() if value in (label, choice)]
        if not isinstance(value, int | float) or not self.low <= value <= self.high:
            return []
        step = self.step or int(self.kind == "int")
        steps = (value - self.low) / step if step else 0
        return [value] if math.isclose(steps, round(steps), abs_tol=1e-9) else []

    def applies(self, known: Known) -> bool:
        """Whether its conditions are met."""
        return all(meets(known.get(key, (None,)), wanted) for key, wanted in self.when.items())


class Sampler(Section):
    """How parameters are sampled; `options` are those of Optuna's sampler."""

    kind: Literal["tpe", "gp", "random", "grid", "cmaes", "nsga2", "qmc"] = "tpe"
    seed: Annotated[int, Field(ge=0)] = 0
    options: dict[str, Any] = {}


class Pruner(Section):
    """Which trials end early: values of one `metric` are compared among trials at equal steps; `options` are those of
    Optuna's pruner, `direction: auto` is that in which the metric is better."""

    kind: Literal["none", "median", "percentile", "hyperband", "successive_halving", "patient", "threshold"] = "none"
    metric: str = ""
    direction: Direction | Literal["auto"] = "auto"
    options: dict[str, Any] = {}

    _metric = field_validator("metric")(_not_on_test)

    @model_validator(mode="after")
    def _check(self) -> Pruner:
        if self.kind != "none" and not self.metric:
            raise ValueError(f"kind {self.kind} needs a metric, such as diffusion/heldout_loss")
        return self

    @property
    def goal(self) -> Direction:
        """The direction; "minimize" where nothing says which values of the metric are better."""
        better = metrics.find(self.metric.removeprefix(FIRST)).better
        return self.direction if self.direction != "auto" else "maximize" if better == "higher" else "minimize"


class Threshold(Section):
    """A trial ends as pruned when a metric is `below` or `above` a limit, or NaN, at `from_step` or later."""

    metric: str
    below: float | None = None
    above: float | None = None
    from_step: Annotated[int, Field(ge=0)] = 0

    _metric = field_validator("metric")(_not_on_test)

    @model_validator(mode="after")
    def _check(self) -> Threshold:
        if (self.below is None) == (self.above is None):
            raise ValueError("either below or above is needed")
        return self

    def prunes(self, name: str, value: float, step: int) -> bool:
        """Whether a value of a metric ends the trial."""
        passes = value >= self.below if self.below is not None else value <= self.above
        return name == self.metric and step >= self.from_step and not passes

    def __str__(self) -> str:
        return f"below {self.below:g}" if self.below is not None else f"above {self.above:g}"


class Final(Section):
    """What is evaluated on test images in the end: the best `trials`, each run again with so many new `seeds`."""

    seeds: Annotated[int, Field(ge=0)] = 3
    trials: Positive = 3


class Sweep(Section):
    """A sweep: what to search for, where, how, and for how long (`timeout` in seconds, 0 for no limit)."""

    objectives: Annotated[dict[str, Objective], Field(min_length=1)]
    parameters: Annotated[dict[str, Parameter], Field(min_length=1, max_length=100)]
    set: dict[str, Any] = {}
    sampler: Sampler = Sampler()
    pruner: Pruner = Pruner()
    prune_if: tuple[Threshold, ...] = ()
    first_batch: Annotated[int, Field(ge=0)] = 0
    trials: Positive = 30
    timeout: Annotated[float, Field(ge=0)] = 0
    final: Final = Final()

    @field_validator("objectives", mode="before")
    @classmethod
    def _direct(cls, objectives: Any) -> Any:
        if not isinstance(objectives, dict):
            return objectives
        return {name: {"direction": what} if isinstance(what, str) else what for name, what in objectives.items()}

    @model_validator(mode="after")
    def _check(self) -> Sweep:
        for name, objective in self.objectives.items():
            for metric in objective.sum or (name,):
                _not_on_test(metric)
        summed = [sorted(objective.sum or (name,)) for name, objective in self.objectives.items()]
        for name, metrics_of_it in zip(self.objectives, summed, strict=True):
            if summed.count(metrics_of_it) > 1:
                raise ValueError(f"objectives.{name}: {' + '.join(metrics_of_it)} is an objective twice")
        if len(self.objectives) > 1 and self.pruner.kind != "none":
            raise ValueError("pruner: Optuna cannot prune a study of several objectives; prune_if can")
        if len(self.objectives) > 1 and self.sampler.kind == "cmaes":
            raise ValueError("sampler: cmaes takes one objective only; tpe, gp, nsga2, qmc and random take several")
        if self.sampler.kind == "cmaes" and all(p.kind == "categorical" for p in self.parameters.values()):
            raise ValueError("sampler: cmaes samples numbers, but all parameters are categorical, as tpe takes them")
        if self.pruner.metric.startswith(FIRST):
            raise ValueError(f"pruner.metric: {self.pruner.metric} has no steps to compare; prune_if takes it")
        if not self.first_batch and any(metric.startswith(FIRST) for _, metric in self.watched()):
            raise ValueError(f"metrics {FIRST}... need first_batch > 0, a number of networks")
        return self

    @model_validator(mode="after")
    def _check_conditions(self) -> Sweep:
        for name, parameter in self.parameters.items():
            for key, wanted in parameter.when.items():
                self._check_condition(name, key, wanted)
            if self.context(parameter) is None:
                raise ValueError(f"parameters.{name}.when: never met, since its conditions exclude each other")
        return self

    def _check_condition(self, name: str, key: str, wanted: tuple[Scalar, ...]) -> None:
        where, names = f"parameters.{name}.when.{key}", list(self.parameters)
        above = [other for other in self.setters(key) if names.index(other) < names.index(name)]
        if not above and (below := self.setters(key)):
            circle = any(name in self.setters(other) for other in self._needed_by(below[0]))
            reason = "the parameter sets that itself" if name in below else "a circle" if circle else "it stands below"
            raise ValueError(f"{where}: {reason}; expected a key of the configuration, or a parameter above")
        if above and not any(self.parameters[other].when for other in above):  # else the key may have any value
            for value in wanted:
                if not any(self.parameters[other].suggested_as(value) for other in above):
                    raise ValueError(f"{where}: {value!r} is none of the values of {' and '.join(above)}")

    def setters(self, key: str) -> list[str]:
        """The parameters that set a key, or have its name."""
        return [name for name, parameter in self.parameters.items() if key in (name, *parameter.keys)]

    def _needed_by(self, name: str) -> set[str]:
        """Everything that the conditions of a parameter look at, directly or through other parameters."""
        found: set[str] = set()
        todo = [name]
        while todo:
            new = set(self.parameters[todo.pop()].when) - found
            found |= new
            todo += [setter for key in new for setter in self.setters(key)]
        return found

    def watched(self) -> Iterator[tuple[str, str]]:
        """Yield key of the sweep's file and metric, of all metrics that a trial must have."""
        for name, objective in self.objectives.items():
            yield from ((f"objectives.{name}", metric) for metric in objective.sum or (name,))
        yield from ((f"prune_if.{k}.metric", threshold.metric) for k, threshold in enumerate(self.prune_if))
        if self.pruner.kind != "none":
            yield "pruner.metric", self.pruner.metric

    def fixed(self, overrides: Mapping[str, str]) -> dict[str, str]:
        """Configuration key -> value as text, of every trial."""
        return {key: documents.as_text(value) for key, value in self.set.items()} | dict(overrides)

    def suggest(self, trial: Any, given: Mapping[str, Any]) -> dict[str, str]:
        """The configuration of a trial.

        Args:
            trial: a trial of Optuna, which suggests the values.
            given: configuration key -> value of the experiment without a trial.

        Returns:
            Key -> value as text, in YAML, for `config.load`.
        """
        known, chosen = {key: (value,) for key, value in given.items()}, {}
        for name, parameter in self.parameters.items():
            if parameter.applies(known):
                suggested = parameter.suggest(trial, name)
                known |= parameter.known(name, suggested)
                chosen |= parameter.settings(name, suggested)
        return chosen

    def context(self, parameter: Parameter, given: Mapping[str, Any] | None = None) -> dict[str, str] | None:
        """Values of other parameters with which a parameter is searched; None where it never is.

        Args:
            parameter: one of this sweep.
            given: configuration key -> value of the experiment without a trial; when absent, that of any experiment.
        """

        def met(conditions: list[tuple[str, Any]], known: Known, found: dict[str, str]) -> dict[str, str] | None:
            if not conditions:
                return found
            (key, wanted), *rest = conditions
            if key in known:
                return met(rest, known, found) if meets(known[key], wanted) else None
            ways, setters = [], {name: self.parameters[name] for name in self.setters(key)}
            for name, other in setters.items():
                for suggested in (s for value in wanted for s in other.suggested_as(value)):
                    more = known | other.known(name, suggested), found | other.settings(name, suggested)
                    ways.append(([*other.when.items(), *rest], *more))
            # Then the experiment's own value, unless a parameter is always searched, or the key is only its name.
            if all(other.when and not (name == key and other.keys) for name, other in setters.items()):
                base = wanted if given is None else [given.get(key)] if meets((given.get(key),), wanted) else []
                ways += [(rest, known | {key: (value,)}, found) for value in base]
            return next((result for way in ways if (result := met(*way)) is not None), None)

        return met(list(parameter.when.items()), {}, {})

    def grid(self, given: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Parameter -> all its values, of those that apply.

        Raises:
            UserError: a parameter without a step, or one that depends on another.
        """
        found = {}
        for name, parameter in self.parameters.items():
            if not parameter.when.keys().isdisjoint(self.parameters):
                raise UserError(f"parameters.{name}.when: a grid takes no parameter that depends on another")
            if self.context(parameter, given) is not None:
                found[name] = parameter.grid()
                if not found[name]:
                    raise UserError(f"parameters.{name}: a grid needs choices or a step, and at most {GRID} values")
        if (size := math.prod(map(len, found.values()))) > GRID:
            raise UserError(f"parameters: a grid of {size} points, expected at most {GRID}")
        return found


def sweeps() -> dict[str, Path]:
    """Name -> file, of every sweep in `experiments/sweeps`, here or beside the package."""
    paths = (path for folder in reversed(config.FOLDERS) for path in sorted(folder.glob("sweeps/*.yaml")))
    return {path.stem: path for path in paths}


def load(name: str) -> Sweep:
    """The sweep of a name, or of a path to a YAML file.

    Raises:
        UserError: all problems in one message.
    """
    tree = documents.read(find(name))
    try:
        return Sweep.model_validate(tree)
    except ValidationError as error:
        raise UserError("; ".join(config.listed(error, lambda item: _problem(item, find(name))))) from None


def find(name: str) -> Path:
    """The file of a sweep.

    Raises:
        UserError: there is none.
    """
    known = sweeps()
    path = config.expanded(name) if name.endswith((".yaml", ".yml")) else known.get(name)
    if path is None:
        raise UserError(f"unknown sweep {name!r}; {config.nearest(name, list(known))}")
    return path


def _problem(item: Any, path: Path) -> str:
    """One validation error as: file: key: rule, value."""
    key = ".".join(str(part) for part in item["loc"])
    where = f"{path}: {key}".removesuffix(": ")
    if item["type"] == "extra_forbidden":
        known = sorted({name.rpartition(".")[2] for name in known_keys(Sweep)})
        return f"{where}: unknown key; {config.nearest(str(item['loc'][-1]), known)}"
    return f"{where}: {config.rule(item)}"
