"""Functions in files of the user, referred to as `path/to/file.py:function`."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from pdiff.errors import UserError


def is_reference(name: str) -> bool:
    """Whether a name has the form `path/to/file.py:function`."""
    return ".py:" in name


def source(name: str) -> Path:
    """The file of such a name; relative paths start in the current folder."""
    return Path(os.path.expanduser(name.rpartition(":")[0]))


def load_function(name: str, key: str) -> Callable[..., Any]:
    """The function that `path/to/file.py:function` names; the file can import modules beside it.

    Args:
        name: file and function.
        key: of the configuration, for messages.

    Raises:
        UserError: no such file or function, or an exception while the file runs.
    """
    path, function = source(name), name.rpartition(":")[2]
    if not path.is_file():
        raise UserError(f"{key}: {path} is not a file")
    found = getattr(_imported(path.resolve(), key), function, None)
    if not callable(found):
        raise UserError(f"{key}: {path} has no function {function!r}")
    return found


def call(name: str, key: str, **options: Any) -> Any:
    """Call such a function with those of the options that it accepts.

    Raises:
        UserError: as `load_function`; or an exception in the function.
    """
    function = load_function(name, key)
    try:
        parameters = inspect.signature(function).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        return function(**{n: value for n, value in options.items() if takes_all or n in parameters})
    except (Exception, SystemExit) as error:
        raise UserError(f"{key}: {name} failed: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """An exception of the user's code on one line: type, message, and where it was raised."""
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = "".join(f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in where)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"


def _imported(path: Path, key: str) -> ModuleType:
    """Run a file as a module, with its folder first in `sys.path`, as Python does for a script."""
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    name = f"_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"  # two files may have one name
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise UserError(f"{key}: {path} cannot be run: {describe(error)}") from error
    return module
