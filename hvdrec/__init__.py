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
    from hvdrec.checks.check_run import check
    from hvdrec.checks.findings import CheckResult
    from hvdrec.config import Config, load_config
    from hvdrec.errors import UserError
    from hvdrec.exporting.export_run import ExportResult, export
    from hvdrec.features.prepare import PrepareResult, prepare
    from hvdrec.planner.plan import PlanResult, plan
    from hvdrec.promotion.promote import PromoteResult, promote
    from hvdrec.reporting.report import ReportResult, report
    from hvdrec.samples import SamplesResult, make_samples
    from hvdrec.samples.delay import DelayResult, measure_delays
    from hvdrec.scoring import Scorer
    from hvdrec.training.evaluate_run import EvaluationResult, evaluate
    from hvdrec.training.trainer import TrainResult, train
    from hvdrec.tuning.tune import TuneResult, tune

__version__ = "0.1.0"

# Unless this is set before its import, onnxruntime 1.31 and later store a device id in the user's
# home directory and report usage. To allow that, set the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "CheckResult",
    "Config",
    "DelayResult",
    "EvaluationResult",
    "ExportResult",
    "PlanResult",
    "PrepareResult",
    "PromoteResult",
    "ReportResult",
    "SamplesResult",
    "Scorer",
    "TrainResult",
    "TuneResult",
    "UserError",
    "__version__",
    "check",
    "evaluate",
    "export",
    "load_config",
    "make_samples",
    "measure_delays",
    "plan",
    "prepare",
    "promote",
    "report",
    "train",
    "tune",
]

_EXPORTS = {
    "hvdrec.config": ("Config", "load_config"),
    "hvdrec.errors": ("UserError",),
    "hvdrec.checks.check_run": ("check",),
    "hvdrec.checks.findings": ("CheckResult",),
    "hvdrec.samples": ("SamplesResult", "make_samples"),
    "hvdrec.samples.delay": ("DelayResult", "measure_delays"),
    "hvdrec.features.prepare": ("PrepareResult", "prepare"),
    "hvdrec.training.trainer": ("TrainResult", "train"),
    "hvdrec.training.evaluate_run": ("EvaluationResult", "evaluate"),
    "hvdrec.exporting.export_run": ("ExportResult", "export"),
    "hvdrec.promotion.promote": ("PromoteResult", "promote"),
    "hvdrec.tuning.tune": ("TuneResult", "tune"),
    "hvdrec.planner.plan": ("PlanResult", "plan"),
    "hvdrec.reporting.report": ("ReportResult", "report"),
    "hvdrec.scoring": ("Scorer",),
}
"""Module -> the public names that it provides."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    module = next((each for each, names in _EXPORTS.items() if name in names), None)
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
