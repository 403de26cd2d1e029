"""The stage ``tune``: run the trials of a search one after the other, each on all ranks."""

from __future__ import annotations

import fcntl
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hvdrec.config import Config, with_fields
from hvdrec.config.structure import from_dict, to_dict
from hvdrec.errors import UserError, invalid_file, invalid_value
from hvdrec.parallel import checks, ranks
from hvdrec.parallel.agreement import digest
from hvdrec.parallel.progress import print_line
from hvdrec.parallel.watchdog import watched
from hvdrec.training.checkpoint import CONFIG_FILE, read_config
from hvdrec.training.labels import metric_name, read_label_facts, with_defined_metric
from hvdrec.training.pointers import has_checkpoint, latest_meta
from hvdrec.training.run_directory import check_features
from hvdrec.training.trainer import train
from hvdrec.tuning.search import (
    FILE,
    Search,
    State,
    Trial,
    TuneResult,
    best_trial,
    describe_trial,
    first_difference,
    is_hopeless,
    load_search,
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

    A trial is one training run with certain values of the searched fields, in a directory
    ``WORK/tune/trial-NNN`` of its own. The first trial uses the values of the configuration. Only
    the best trial keeps its checkpoints. Repeat the call to resume an interrupted search, even in
    the middle of a trial if it has a checkpoint. The test split is never read. In a Horovod job,
    all ranks train each trial together.

    Args:
        config: The configuration of the run; `prepare` must have encoded its features.
        search: Fields with a range or choices, such as ``train.learning_rate=log:1e-4:1e-2`` (see
            `space.parse_space`). May be empty to resume a search.
        trials: Total number of trials, including those of earlier calls.
        prune: Whether to stop a trial that is worse than the median of the complete trials after
            the same number of epochs.
        overwrite: Whether to remove an earlier search first.
        progress: Whether the first rank shows the progress of each training and prints a line when
            a trial ends.

    Raises:
        UserError: The features are missing, a field cannot be searched, or WORK/tune holds another
            search. In these cases nothing is written.
    """
    world = ranks.init()
    checks.require_same_config(to_dict(config))
    if trials < 1:
        raise invalid_value("trials", trials, "must be at least 1")
    features = ranks.run_on_all(lambda: check_features(config)).identity
    config = _with_metric(config)
    folder = Path(config.paths.work) / FOLDER

    def begin() -> Any:
        if not world.is_first:
            return None
        return to_dict(
            _load_or_create(config, features, tuple(search), folder, overwrite=overwrite)
        )

    with watched(), _locked(folder):
        state = from_dict(Search, ranks.broadcast_object(ranks.run_on_all(begin)))
        while (trial := _next_trial(state, trials)) is not None:
            state = state.with_trial(trial)
            trial = _run_trial(state, trial, folder, prune=prune, progress=progress)
            state = state.with_trial(trial)
            if world.is_first:
                _drop_checkpoints(state, folder)
            if progress:
                print_line(describe_trial(state, trial))
    return TuneResult(str(folder / FILE), state.metric, state.trials)


def _with_metric(config: Config) -> Config:
    """Return the configuration with a metric that is defined on the validation split.

    Raises:
        UserError: No metric is defined, or ``train.metric`` is "none".
    """
    chosen, _, lines = with_defined_metric(config, read_label_facts(config))
    for line in lines:
        print_line(line)
    if metric_name(chosen) == "none":
        problem = "a search compares trials by a metric on the validation split"
        raise invalid_value("train.metric", config.train.metric, problem, "change samples.split")
    return chosen if lines else config


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder against other jobs; raise UserError if another job has locked it."""

    def lock() -> Any:
        if not ranks.current().is_first:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = "another hvdrec tune is running here"
            raise invalid_file(folder, problem, "wait for it, or set paths.work") from None
        return file

    file = ranks.run_on_all(lock)
    try:
        yield
    finally:
        if file is not None:
            file.close()


def _load_or_create(
    config: Config, features: str, space: tuple[str, ...], folder: Path, *, overwrite: bool
) -> Search:
    """Load the search that is stored in a folder, or create a new one on these features."""
    if overwrite:
        (folder / FILE).unlink(missing_ok=True)
        for run in folder.glob("trial-*"):
            shutil.rmtree(run)
    metric = metric_name(config)
    before = load_search(folder)
    if before is None:
        if not space:
            raise invalid_value("search", [], "give at least one field with a range", EXAMPLE)
        parse_space(space, config)
        return Search(config, features, space, metric, is_loss=metric == "log_loss")
    difference = first_difference(before.config, config)
    if difference is None and space and set(space) != set(before.space):
        difference = f"search {' '.join(before.space)}, now {' '.join(space)}"
    # Earlier versions recorded a hash of the manifest instead of the identity.
    known = (features, digest(config.paths.of("features")))
    if difference is None and before.features not in known:
        difference = f"features {before.features}, now {features}"
    if difference is not None:
        remedy = "resume it with those, or pass --overwrite"
        raise invalid_file(folder, f"holds a search with {difference}", remedy)
    return before


def _next_trial(search: Search, count: int) -> Trial | None:
    """Return the trial to run, the same on every rank: the interrupted trial or a new one.

    The result is None if the search is complete.
    """
    plain: Any = None
    if ranks.current().is_first:
        trial = next((each for each in search.trials if each.state == "running"), None)
        if trial is None and len(search.trials) < count:
            values = next_values(search)
            trial = None if values is None else Trial(len(search.trials), values)
        plain = None if trial is None else to_dict(trial)
    plain = ranks.broadcast_object(plain)
    return None if plain is None else from_dict(Trial, plain)


def _run_trial(search: Search, trial: Trial, folder: Path, *, prune: bool, progress: bool) -> Trial:
    """Start or resume a trial on all ranks; return the trial in its final state."""
    run, first = folder / trial.name, folder / search.trials[0].name
    step, cpu_layers = 0, search.config.train.cpu_layers
    if ranks.current().is_first:
        if has_checkpoint(run):
            step = int(latest_meta(run)["position"]["step"])
        if (first / CONFIG_FILE).is_file():
            # All trials use the layers that were fastest in the first trial. With other layers,
            # results would differ in the last digits and in dropout.
            cpu_layers = read_config(first).train.cpu_layers
    step, cpu_layers = ranks.broadcast_object([step, cpu_layers])
    recorder = _Recorder(search, folder, trial, prune=prune)
    recorder.record(trial.started(step))
    if recorder.trial.state == "running":
        fields = {**trial.values, "paths.run": str(run), "train.cpu_layers": cpu_layers}
        recorder.record(_train(search.config, fields, recorder, progress=progress))
    return recorder.trial


class _Recorder:
    """Stores each change of a running trial in ``trials.json``; only the first rank writes."""

    def __init__(self, search: Search, folder: Path, trial: Trial, *, prune: bool) -> None:
        self.trial, self.is_pruned = trial, False
        self._search, self._folder, self._prune = search, folder, prune
        self._began = time.monotonic() - trial.seconds

    def record(self, trial: Trial) -> None:
        """Replace the trial by a newer state of it, and store it."""
        self.trial = replace(trial, seconds=round(time.monotonic() - self._began, 1))
        if ranks.current().is_first:
            self._search.with_trial(self.trial).save(self._folder)

    def stop(self, epoch: int, value: float) -> bool:
        """Record the metric of an epoch; return True on all ranks if the trial must stop."""
        if not math.isfinite(value):
            return True
        self.record(self.trial.validated(epoch, value))
        prune = self._prune and ranks.current().is_first and is_hopeless(self._search, self.trial)
        self.is_pruned = ranks.broadcast_object(prune)
        return self.is_pruned


def _train(
    config: Config, fields: Mapping[str, Any], recorder: _Recorder, *, progress: bool
) -> Trial:
    """Train a trial. If an error occurs, the trial fails, but the search continues."""
    run = Path(fields["paths.run"])
    try:
        trial_config = with_fields(config, fields)
        result = train(trial_config, resume=True, progress=progress, stop=recorder.stop)
    except (UserError, MemoryError, torch.OutOfMemoryError) as error:
        if not isinstance(error, UserError) and ranks.current().size > 1:
            raise  # the other ranks still train, so the whole job must end
        if recorder.trial.number == 0 and not (run / "log.jsonl").is_file():
            # The configuration itself cannot be trained, so the new search is removed.
            if ranks.current().is_first:
                (run.parent / FILE).unlink()
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        return replace(recorder.trial, state="failed", reason=reason)
    if result.best is None or not math.isfinite(result.best):
        return replace(
            recorder.trial, state="failed", reason=f"{metric_name(config)} is NaN or infinite"
        )
    state: State = "pruned" if recorder.is_pruned else "complete"
    return replace(recorder.trial, state=state, value=result.best, step=result.best_step)


def _drop_checkpoints(search: Search, folder: Path) -> None:
    """Remove the checkpoints of all trials but the best one."""
    best = best_trial(search.trials, search.metric)
    for trial in search.trials:
        if trial.state != "running" and trial != best:
            run = folder / trial.name
            for pointer in ("latest", "best"):
                (run / pointer).unlink(missing_ok=True)
            shutil.rmtree(run / "checkpoints", ignore_errors=True)
