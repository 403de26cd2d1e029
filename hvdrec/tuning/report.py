"""What people see of a trial."""

from __future__ import annotations

from hvdrec.tuning.search import Search, Trial
from hvdrec.tuning.space import as_overrides


def told(search: Search, trial: Trial) -> str:
    """Return one line on a trial that has ended."""
    best = search.best
    against = "" if best is None else f"; best {best.value:.5f} of trial {best.number}"
    found = "" if trial.value is None else f" {search.metric} {trial.value:.5f}"
    reason = f" ({trial.reason})" if trial.reason else ""
    what = as_overrides(trial.values)
    return f"trial {trial.number} {trial.state}{found}{reason}: {what}{against}"
