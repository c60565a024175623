"""pdiff: a laboratory for generating neural-network weights.

From state dicts to new networks, and whether they are any good:

    >>> import pdiff, torch
    >>> state_dicts = [torch.nn.Linear(4, 2).state_dict() for _ in range(30)]
    >>> x, labels = torch.randn(50, 4), torch.randint(2, (50,))
    >>> def predict(state):
    ...     return (x @ state["weight"].T + state["bias"]).argmax(1), labels

    >>> collection = pdiff.Collection.stack(state_dicts)
    >>> generator = pdiff.Generator.fit(collection, pdiff.LatentDiffusion(diffusion={"steps": 50}), seed=0)
    >>> networks = generator.sample(100, seed=1)
    >>> report = pdiff.audit(collection, networks, evaluate=predict)
    >>> print(report.verdict.partition("?")[0])
    Better than the originals

`run`, `sweep` and `runs` are the commands `pdiff main`, `pdiff sweep` and `pdiff compare` from Python; nothing else
here imports MLflow. A mistake is a `UserError` of one line. Names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pdiff.errors import UserError
    from pdiff.library import Gaussian, LatentDiffusion, audit, run, runs, sweep
    from pdiff.method.collection import Collection
    from pdiff.method.generators.base import Generator

__version__ = "0.1.0"
__all__ = ["Collection", "Gaussian", "Generator", "LatentDiffusion", "UserError", "audit", "run", "runs", "sweep"]

_MODULES = {
    "Collection": "pdiff.method.collection",
    "Generator": "pdiff.method.generators.base",
    "UserError": "pdiff.errors",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, "pdiff.library")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
