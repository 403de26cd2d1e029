"""Train, export and serve recommenders: two towers and a DNN ranker on Horovod.

>>> import hvdrec
>>> hvdrec.__version__
'0.1.0'

A run in Python, from raw tables to ranked items::

    config = hvdrec.load_config("configs/movielens-1m.toml", {"train.epochs": 3})
    hvdrec.make_samples(config)
    hvdrec.prepare(config)
    result = hvdrec.train(config)
    print(hvdrec.evaluate(result.run).ranking)
    scorer = hvdrec.Scorer.load(hvdrec.export(result.run).path)

Names are imported when they are first used: ``import hvdrec`` loads no other package, and
``hvdrec.Scorer`` needs only numpy and onnxruntime. The other names need the extra ``train``.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvdrec.config import Config, load_config
    from hvdrec.errors import UserError
    from hvdrec.exporting.export_run import ExportResult, export
    from hvdrec.features.prepare import PrepareResult, prepare
    from hvdrec.planner.plan import PlanResult, plan
    from hvdrec.samples import SamplesResult, make_samples
    from hvdrec.scoring import Scorer
    from hvdrec.training.evaluate_run import EvaluationResult, evaluate
    from hvdrec.training.trainer import TrainResult, train
    from hvdrec.tuning.run import TuneResult, tune

__version__ = "0.1.0"

# onnxruntime 1.31 and later store a device id in the user's home and report usage unless this is
# set before the import. Set the variable to 0 to allow that.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "Config",
    "EvaluationResult",
    "ExportResult",
    "PlanResult",
    "PrepareResult",
    "SamplesResult",
    "Scorer",
    "TrainResult",
    "TuneResult",
    "UserError",
    "__version__",
    "evaluate",
    "export",
    "load_config",
    "make_samples",
    "plan",
    "prepare",
    "train",
    "tune",
]

_MODULES = {
    "Config": "hvdrec.config",
    "load_config": "hvdrec.config",
    "UserError": "hvdrec.errors",
    "make_samples": "hvdrec.samples",
    "SamplesResult": "hvdrec.samples",
    "prepare": "hvdrec.features.prepare",
    "PrepareResult": "hvdrec.features.prepare",
    "evaluate": "hvdrec.training.evaluate_run",
    "EvaluationResult": "hvdrec.training.evaluate_run",
    "export": "hvdrec.exporting.export_run",
    "ExportResult": "hvdrec.exporting.export_run",
    "plan": "hvdrec.planner.plan",
    "PlanResult": "hvdrec.planner.plan",
    "train": "hvdrec.training.trainer",
    "TrainResult": "hvdrec.training.trainer",
    "tune": "hvdrec.tuning.run",
    "TuneResult": "hvdrec.tuning.run",
    "Scorer": "hvdrec.scoring",
}
"""The module that defines each public name."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module 'hvdrec' has no attribute '{name}'")
    try:
        value = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "hvdrec":
            raise
        raise ModuleNotFoundError(
            f"hvdrec.{name} needs '{error.name}', which is not installed; install the extra "
            "'train' (scripts/install)",
            name=error.name,
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names for completion, whether or not they are imported yet."""
    return sorted({*globals(), *__all__})
