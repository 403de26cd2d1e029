"""The search itself: trials one after the other, on all ranks together."""

from __future__ import annotations

import fcntl
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hvdrec.config import Config
from hvdrec.config.structure import from_dict, to_dict
from hvdrec.errors import UserError
from hvdrec.parallel import ranks
from hvdrec.parallel.agreement import digest
from hvdrec.parallel.watchdog import watched
from hvdrec.training.checkpoint import has_checkpoint, latest_meta
from hvdrec.training.loop import check_features, metric_name, train
from hvdrec.tuning.report import told
from hvdrec.tuning.search import (
    FILE,
    Search,
    State,
    Trial,
    first_difference,
    is_hopeless,
    load,
    next_values,
)
from hvdrec.tuning.space import EXAMPLE, parse_space, with_values

FOLDER = "tune"
Notify = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What a search was asked for: texts of `space.parse_space`; how many trials in all; whether
    hopeless ones end early; whether to begin anew."""

    space: tuple[str, ...] = ()
    trials: int = 20
    prune: bool = False
    overwrite: bool = False


def tune(config: Config, options: Options, notify: Notify = lambda line: None) -> Search:
    """Search for the values of fields that give the best validation metric; return all trials.

    Each trial trains in a directory of its own, WORK/tune/trial-NNN, on the prepared features; the
    first is the configuration as it stands. Checkpoints are kept of the best trial alone. A search
    that was begun there before goes on until there are `options.trials`; a trial that was
    interrupted goes on from its checkpoint. The test split is never read. Runs alone or on every
    rank of a Horovod job, where all ranks train each trial together.

    Raises UserError before anything is written if the features are missing, if a field cannot be
    searched, or if the search that was begun is another one.
    """
    world = ranks.init()
    ranks.agree_on_config(to_dict(config))
    if options.trials < 1:
        raise UserError(f"--trials {options.trials}: must be at least 1")
    ranks.together(lambda: check_features(config))
    folder = Path(config.paths.work) / FOLDER
    with watched(), _held(folder):
        plain = ranks.broadcast_object(
            ranks.together(
                lambda: to_dict(_begin(config, options, folder)) if world.is_first else None
            )
        )
        search = from_dict(Search, plain)
        while (trial := _next_trial(search, options.trials)) is not None:
            search = _run(search.with_trial(trial), trial, folder, options, notify)
        return search


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

    lock = ranks.together(take)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _begin(config: Config, options: Options, folder: Path) -> Search:
    """Return the search to go on with, or a new one; for the first rank alone."""
    if options.overwrite:
        (folder / FILE).unlink(missing_ok=True)
        for each in folder.glob("trial-*"):
            shutil.rmtree(each)
    metric = metric_name(config)
    features = digest(config.paths.of("features"))
    before = load(folder)
    if before is None:
        if not options.space:
            raise UserError(f"--search: give at least one field with a range: {EXAMPLE}")
        parse_space(options.space, config)
        return Search(config, features, options.space, metric, is_loss=metric == "log_loss")
    other = first_difference(before.config, config)
    if other is None and options.space and set(options.space) != set(before.space):
        other = f"--search {' '.join(before.space)}, now {' '.join(options.space)}"
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
            config = with_values(self._search.config, self.trial.values)
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


def _run(search: Search, trial: Trial, folder: Path, options: Options, notify: Notify) -> Search:
    """Train a trial, all ranks together; return the search with what came of it."""
    is_first = ranks.current().is_first
    running = _Running(search, trial, folder, prunes=options.prune)
    step = ranks.broadcast_object(_step(running.run) if is_first else None)
    running.note(trial.started(step))
    if running.trial.state == "running":
        running.note(running.train())
    search = search.with_trial(running.trial)
    if is_first:
        _drop_checkpoints(search, folder)
    notify(told(search, running.trial))
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
