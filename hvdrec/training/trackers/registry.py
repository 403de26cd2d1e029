"""The registry of trackers by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from hvdrec.config import Config
from hvdrec.errors import invalid_value, unknown_name
from hvdrec.training.trackers.tracker import Tracker

TrackerFactory = Callable[[Config, Path], Tracker]
"""Function that opens a tracker, given the configuration and the directory of a run."""
_TRACKERS: dict[str, tuple[TrackerFactory, str]] = {}


def register_tracker(name: str, factory: TrackerFactory, package: str = "") -> None:
    """Register a tracker that ``train.trackers = [name]`` chooses.

    It replaces an earlier tracker with the same name.

    Args:
        name: Name of the tracker.
        factory: Function that opens the tracker.
        package: The package that the tracker needs. hvdrec's extra `name` must install it.
    """
    _TRACKERS[name] = (factory, package)


def check_trackers(names: Sequence[str]) -> None:
    """Check that the trackers exist and that their packages are installed.

    Raises:
        UserError: A tracker is unknown, or its package is not installed.
    """
    for name in names:
        if name not in _TRACKERS:
            raise unknown_name("train.trackers", name, sorted(_TRACKERS))
        package = _TRACKERS[name][1]
        if package and find_spec(package) is None:
            problem = f"needs the package {package}"
            remedy = f"pip install 'hvdrec[{name}]'"
            raise invalid_value("train.trackers", name, problem, remedy)


def open_trackers(config: Config, run: Path) -> list[Tracker]:
    """Open the trackers of ``train.trackers``; raise UserError like `check_trackers`."""
    check_trackers(config.train.trackers)
    return [_TRACKERS[name][0](config, run) for name in config.train.trackers]


def _tensorboard(config: Config, run: Path) -> Tracker:
    from hvdrec.training.trackers.tensorboard import TensorBoardTracker

    return TensorBoardTracker(config, run)


def _mlflow(config: Config, run: Path) -> Tracker:
    from hvdrec.training.trackers.mlflow import MlflowTracker

    return MlflowTracker(config, run)


register_tracker("tensorboard", _tensorboard, "tensorboard")
register_tracker("mlflow", _mlflow, "mlflow")
