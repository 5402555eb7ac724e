"""On PYTHONPATH, this makes installed packages look as if they were not there, in a Python and all that it starts.

HIDDEN_PACKAGES holds names, separated by commas: of what is imported, and of distributions. Importing one raises
ModuleNotFoundError, `importlib.util.find_spec` returns None and `importlib.metadata` knows no version, as on a machine
without it, so that the checks of other libraries for what is installed are misled too.
"""

import os
import re
import sys
from importlib.machinery import PathFinder

HIDDEN = frozenset(filter(None, os.environ.get("HIDDEN_PACKAGES", "").split(",")))


def canonical(name):
    """A distribution's name as package indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


class Bare(PathFinder):
    """`PathFinder` without what is hidden."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        """None for what is hidden, whichever of its modules is asked for."""
        return None if fullname.partition(".")[0] in HIDDEN else PathFinder.find_spec(fullname, path, target)

    @classmethod
    def find_distributions(cls, *arguments, **options):
        """Those of `PathFinder` that are not hidden."""
        found = PathFinder.find_distributions(*arguments, **options)
        return (entry for entry in found if canonical(entry.metadata["Name"] or "") not in HIDDEN)


if HIDDEN:
    sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
