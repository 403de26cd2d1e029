"""Make Petastorm importable with current pyarrow and NumPy.

Petastorm imports names that both libraries have removed. Import this module before Petastorm to add
them. The added names are never called, because `hvdrec.data.petastorm` does not use Petastorm's own
reader.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import numpy as np
import pyarrow as pa

MODULES = {
    "pyarrow.filesystem": ("FileSystem", "LocalFileSystem"),
    "pyarrow.hdfs": ("HadoopFileSystem",),
}
"""Module that pyarrow removed in version 16 -> classes that Petastorm imports from it."""
NUMPY_NAMES = {"unicode_": np.str_, "string_": np.bytes_}
"""Name that NumPy removed in version 2 -> the type under its current name."""


def add_missing_names() -> None:
    """Add the removed names; names that exist are not changed."""
    for module, classes in MODULES.items():
        if module not in sys.modules and importlib.util.find_spec(module) is None:
            substitute = ModuleType(module, "Placeholder for a module that pyarrow removed.")
            for name in classes:
                setattr(substitute, name, type(name, (), {}))
            sys.modules[module] = substitute
            setattr(pa, module.partition(".")[2], substitute)
    if not hasattr(pa.lib, "ArrowIOError"):
        pa.lib.ArrowIOError = OSError
    for name, type_ in NUMPY_NAMES.items():
        if not hasattr(np, name):
            setattr(np, name, type_)


add_missing_names()
