"""Processes that cannot import pdiff, as if it were not installed."""

HIDE = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder


class Elsewhere(PathFinder):
    # Finds pdiff only in folders that are added to sys.path from now on.
    before = list(sys.path)

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        new = [folder for folder in sys.path if folder not in cls.before]
        return super().find_spec(name, new if name == "pdiff" else path, target)


sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Elsewhere]
"""
