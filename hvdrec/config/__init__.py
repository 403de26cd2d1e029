"""The configuration of a run: its sections and features, how it is loaded, and overrides."""

from hvdrec.config.checks_section import Checks
from hvdrec.config.data_sections import (
    Encode,
    Grow,
    History,
    Join,
    Loader,
    Negatives,
    Paths,
    Samples,
    Split,
    TableFormat,
    Task,
)
from hvdrec.config.loading import load_config, with_fields
from hvdrec.config.root import Config
from hvdrec.config.schema import Feature, Schema
from hvdrec.config.sections import (
    Evaluate,
    Export,
    Model,
    Parallel,
    Promote,
    Ranker,
    Tower,
    Train,
    WarmStart,
)
from hvdrec.config.stored import from_stored

__all__ = [
    "Checks",
    "Config",
    "Encode",
    "Evaluate",
    "Export",
    "Feature",
    "Grow",
    "History",
    "Join",
    "Loader",
    "Model",
    "Negatives",
    "Parallel",
    "Paths",
    "Promote",
    "Ranker",
    "Samples",
    "Schema",
    "Split",
    "TableFormat",
    "Task",
    "Tower",
    "Train",
    "WarmStart",
    "from_stored",
    "load_config",
    "with_fields",
]
