"""The search itself: trials one after the other, on all ranks together."""

from __future__ import annotations

import fcntl
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hvdrec.config import Config, with_fields
from hvdrec.config.structure import from_dict, to_dict
from hvdrec.errors import UserError, invalid_value
from hvdrec.parallel import checks, ranks
from hvdrec.parallel.agreement import digest
from hvdrec.parallel.progress import print_line
from hvdrec.parallel.watchdog import watched
from hvdrec.training.checkpoint import has_checkpoint, latest_meta
from hvdrec.training.loop import check_features, metric_name, train
from hvdrec.tuning.search import (
    FILE,
    Search,
    State,
    Trial,
    TuneResult,
    describe_trial,
    first_difference,
    is_hopeless,
    load,
    next_values,
)
from hvdrec.tuning.space import EXAMPLE, parse_space

__all__ = ["TuneResult", "tune"]

FOLDER = "tune"


def tune(
    config: Config,
    search: Sequence[str] = (),
    *,
    trials: int = 20,
    prune: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> TuneResult:
    """Search for field values that give the best validation metric.

    Each trial trains on the prepared features in its own directory, ``WORK/tune/trial-NNN``. The
    first trial is the configuration as it is. Only the best trial keeps its checkpoints. Rerun the
    call to resume an interrupted search, in the middle of a trial if it has a checkpoint. The test
    split is never read. On a Horovod job all ranks train each trial together.

    Args:
        config: The run; its features must be prepared.
        search: Fields with a range or choices, such as ``train.learning_rate=log:1e-4:1e-2`` (see
            `space.parse_space`). May be empty when a search is resumed.
        trials: Number of trials in all, with those of earlier calls.
        prune: Stop a trial that is worse than the median of the complete ones at the same epoch.
        overwrite: Remove an earlier search first.
        progress: Print a line for each trial on standard error, on the first rank.

    Raises:
        UserError: The features are missing, a field cannot be searched, or the search that would
            be resumed is a different one; nothing is written.
    """
    world = ranks.init()
    checks.require_same_config(to_dict(config))
    if trials < 1:
        raise invalid_value("trials", trials, "must be at least 1")
    ranks.run_on_all(lambda: check_features(config))
    folder = Path(config.paths.work) / FOLDER
    with watched(), _held(folder):
        plain = ranks.broadcast_object(
            ranks.run_on_all(
                lambda: (
                    to_dict(_begin(config, tuple(search), folder, overwrite=overwrite))
                    if world.is_first
                    else None
                )
            )
        )
        state = from_dict(Search, plain)
        while (trial := _next_trial(state, trials)) is not None:
            state = _run(state.with_trial(trial), trial, folder, prune=prune, progress=progress)
    return state.result(str(folder / FILE))


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Let the first rank hold a search's folder; raises UserError where another job does."""

    def take() -> Any:
        if not ranks.current().is_first:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / "lock").open("w")
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another hvdrec tune is at work here") from None
        return opened

    lock = ranks.run_on_all(take)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _begin(config: Config, space: tuple[str, ...], folder: Path, *, overwrite: bool) -> Search:
    """Return the search to go on with, or a new one; for the first rank alone."""
    if overwrite:
        (folder / FILE).unlink(missing_ok=True)
        for each in folder.glob("trial-*"):
            shutil.rmtree(each)
    metric = metric_name(config)
    features = digest(config.paths.of("features"))
    before = load(folder)
    if before is None:
        if not space:
            raise UserError(f"--search: give at least one field with a range: {EXAMPLE}")
        parse_space(space, config)
        return Search(config, features, space, metric, is_loss=metric == "log_loss")
    other = first_difference(before.config, config)
    if other is None and space and set(space) != set(before.space):
        other = f"--search {' '.join(before.space)}, now {' '.join(space)}"
    if other is None and before.features != features:
        other = "other features"
    if other is not None:
        raise UserError(f"{folder}: was begun with {other}; go on with that, or pass --overwrite")
    return before


def _next_trial(search: Search, count: int) -> Trial | None:
    """Return the trial that was interrupted, or a new one; None at the end. On every rank alike."""
    plain: Any = None
    if ranks.current().is_first:
        trial = next((each for each in search.trials if each.state == "running"), None)
        if trial is None and len(search.trials) < count:
            values = next_values(search)
            trial = None if values is None else Trial(len(search.trials), values)
        plain = None if trial is None else to_dict(trial)
    plain = ranks.broadcast_object(plain)
    return None if plain is None else from_dict(Trial, plain)


class _Running:
    """A trial under way; the first rank writes down what becomes of it."""

    def __init__(self, search: Search, trial: Trial, folder: Path, *, prunes: bool) -> None:
        self.trial = trial
        self._search, self._folder, self._prunes = search, folder, prunes
        self._spent, self._began = trial.seconds, time.monotonic()
        self._is_stopped = False

    @property
    def run(self) -> Path:
        """The trial's directory."""
        return self._folder / self.trial.name

    def note(self, trial: Trial) -> None:
        """Write down how the trial stands."""
        seconds = round(self._spent + time.monotonic() - self._began, 1)
        self.trial = replace(trial, seconds=seconds)
        if ranks.current().is_first:
            self._search.with_trial(self.trial).save(self._folder)

    def train(self) -> Trial:
        """Train; return the trial as it ended. What it fails by ends no other."""
        metric = self._search.metric
        try:
            config = with_fields(self._search.config, self.trial.values)
            config = replace(config, paths=replace(config.paths, run=str(self.run)))
            found = train(config, resume=True, stop=self._stop)["validation"]
        except (UserError, MemoryError, torch.OutOfMemoryError) as error:
            if not isinstance(error, UserError) and ranks.current().size > 1:
                raise  # the other ranks have not met it
            if self.trial.number == 0 and not (self.run / "log.jsonl").is_file():
                # The configuration as it stands cannot be trained: there is no search yet.
                if ranks.current().is_first:
                    (self._folder / FILE).unlink()
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            return replace(self.trial, state="failed", reason=reason)
        if not math.isfinite(found[metric]):
            return replace(self.trial, state="failed", reason=f"{metric} is no number")
        state: State = "pruned" if self._is_stopped else "complete"
        return replace(self.trial, state=state, value=found[metric], step=found["step"])

    def _stop(self, epoch: int, value: float) -> bool:
        """Write a validation down; every rank comes to the first rank's verdict."""
        if not math.isfinite(value):
            return True
        self.note(self.trial.validated(epoch, value))
        first = ranks.current().is_first and self._prunes
        self._is_stopped = ranks.broadcast_object(first and is_hopeless(self._search, self.trial))
        return self._is_stopped


def _run(search: Search, trial: Trial, folder: Path, *, prune: bool, progress: bool) -> Search:
    """Train a trial, all ranks together; return the search with what came of it."""
    is_first = ranks.current().is_first
    running = _Running(search, trial, folder, prunes=prune)
    step = ranks.broadcast_object(_step(running.run) if is_first else None)
    running.note(trial.started(step))
    if running.trial.state == "running":
        running.note(running.train())
    search = search.with_trial(running.trial)
    if is_first:
        _drop_checkpoints(search, folder)
    if progress:
        print_line(describe_trial(search, running.trial))
    return search


def _step(run: Path) -> int:
    """Return from which step a trial goes on."""
    return int(latest_meta(run)["position"]["step"]) if has_checkpoint(run) else 0


def _drop_checkpoints(search: Search, folder: Path) -> None:
    """Remove the checkpoints of all trials that have ended but the best one."""
    for trial in search.trials:
        if trial.state != "running" and trial != search.best:
            run = folder / trial.name
            for pointer in ("latest", "best"):
                (run / pointer).unlink(missing_ok=True)
            shutil.rmtree(run / "checkpoints", ignore_errors=True)
