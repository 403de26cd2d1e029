"""Trackers: other programs that show training runs, such as TensorBoard and MLflow."""

from hvdrec.training.trackers.registry import check_trackers, open_trackers, register_tracker
from hvdrec.training.trackers.tracker import Tracker, Trained

__all__ = ["Tracker", "Trained", "check_trackers", "open_trackers", "register_tracker"]
