"""The state of a search: the trials so far, and the values that Optuna proposes for the next one.

A *trial* is one training run with certain values of the searched fields. `Search` holds the whole
state and is stored as ``trials.json``. For each proposal, Optuna's study is built again from this
state. So a proposal depends only on the earlier trials, and an interrupted search continues as if
it had not been interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from hvdrec.config import Config
from hvdrec.config.stored import without_retired
from hvdrec.config.structure import from_dict, to_dict
from hvdrec.errors import invalid_file
from hvdrec.storage.checksums import sealed, unsealed
from hvdrec.storage.drafts import write_text
from hvdrec.tuning.space import (
    Space,
    as_overrides,
    as_toml,
    flatten,
    parse_space,
    size,
    value_of,
    values_of,
)

FILE = "trials.json"
ATTEMPTS = 1000
"""The search ends if this many proposals in a row were all tried before."""
STUCK = 3
"""A trial fails if it starts this many times in a row from the same step."""

State = Literal["running", "complete", "pruned", "failed"]
STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


@dataclass(frozen=True)
class Validation:
    """The validation metric after an epoch; epochs are counted from 0."""

    epoch: int
    value: float


@dataclass(frozen=True)
class Trial:
    """One trial of a search: a training run with certain values of the searched fields.

    Attributes:
        number: Number of the trial, from 0.
        values: The values of the searched fields, by dotted name.
        state: Whether the trial is running, complete, pruned (stopped early) or failed.
        value: The best validation metric.
        step: The training step with the best validation metric.
        seconds: Time that the trial has taken.
        validations: The validation metric of each epoch.
        starts: The training steps from which the trial was started or resumed.
        reason: Why the trial failed; empty if it did not.
    """

    number: int
    values: dict[str, Any]
    state: State = "running"
    value: float | None = None
    step: int = 0
    seconds: float = 0.0
    validations: tuple[Validation, ...] = ()
    starts: tuple[int, ...] = ()
    reason: str = ""

    @property
    def name(self) -> str:
        """The name of the trial's directory."""
        return f"trial-{self.number:03d}"

    def validated(self, epoch: int, value: float) -> Trial:
        """Return the trial with the metric of an epoch, without the metrics of later epochs."""
        before = tuple(each for each in self.validations if each.epoch < epoch)
        return replace(self, validations=(*before, Validation(epoch, value)))

    def started(self, step: int) -> Trial:
        """Return the trial with one more start; it fails if it starts too often from this step."""
        starts = (*self.starts, step)
        if starts[-STUCK:] == (step,) * STUCK:
            reason = f"was started {STUCK} times from step {step} without progress"
            return replace(self, starts=starts, state="failed", reason=reason)
        return replace(self, starts=starts)


@dataclass(frozen=True)
class TuneResult:
    """The trials of a search.

    Attributes:
        path: The file ``trials.json``, which holds all trials.
        metric: Name of the validation metric by which trials are compared.
        trials: All trials, by number.
    """

    path: str
    metric: str
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial | None:
        """The best complete trial; ``best.values`` are overrides for `hvdrec.load_config`."""
        return best_trial(self.trials, self.metric)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        best = describe_best(self.trials, self.metric)
        trials = to_dict(self.trials)
        return {"path": self.path, "metric": self.metric, "best": best, "trials": trials}


@dataclass(frozen=True)
class Search:
    """The whole state of a search.

    Attributes:
        config: The configuration that the search starts from; the first trial uses it unchanged.
        features: Identity of the features on which all trials train: a hash of their content.
        space: The searched fields, as texts for `parse_space`.
        metric: Name of the validation metric.
        is_loss: True if a lower metric is better.
        trials: All trials, by number.
    """

    config: Config
    features: str
    space: tuple[str, ...]
    metric: str
    is_loss: bool = False
    trials: tuple[Trial, ...] = ()

    def with_trial(self, trial: Trial) -> Search:
        """Return the search with a trial added, or replaced if its number exists."""
        before, after = self.trials[: trial.number], self.trials[trial.number + 1 :]
        return replace(self, trials=(*before, trial, *after))

    def save(self, folder: Path) -> None:
        """Write ``trials.json``, which also says how to use the best trial."""
        plain = {**to_dict(self), "best": describe_best(self.trials, self.metric)}
        write_text(folder / FILE, sealed(plain))


def load_search(folder: Path) -> Search | None:
    """Load the search that is stored in a folder; return None if there is none."""
    file = folder / FILE
    try:
        raw = unsealed(file.read_bytes())
        plain = {key: raw[key] for key in raw if key != "best"}
        return from_dict(Search, {**plain, "config": without_retired(plain["config"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        remedy = "--overwrite starts a new search"
        raise invalid_file(file, f"cannot be read ({error})", remedy) from None


def ranked(trials: Sequence[Trial], metric: str) -> list[Trial]:
    """Sort trials: first the complete ones, starting with the best, then all others."""

    def key(trial: Trial) -> tuple[bool, bool, float]:
        value = 0.0 if trial.value is None else trial.value
        cost = value if metric == "log_loss" else -value
        return trial.state != "complete", trial.value is None, cost

    return sorted(trials, key=key)


def best_trial(trials: Sequence[Trial], metric: str) -> Trial | None:
    """Return the best complete trial, the first of equally good ones; None if none is complete."""
    return next((each for each in ranked(trials, metric) if each.state == "complete"), None)


def describe_best(trials: Sequence[Trial], metric: str) -> dict[str, Any] | None:
    """Return the best trial's number, its metric, and its values as options and as TOML."""
    best = best_trial(trials, metric)
    if best is None:
        return None
    return {
        "trial": best.number,
        metric: best.value,
        "overrides": as_overrides(best.values),
        "toml": as_toml(best.values),
    }


def describe_trial(search: Search, trial: Trial) -> str:
    """Return a line for the user about a trial that has ended."""
    best = best_trial(search.trials, search.metric)
    best_so_far = "" if best is None else f"; best {best.value:.5f} of trial {best.number}"
    value = "" if trial.value is None else f" {search.metric} {trial.value:.5f}"
    reason = f" ({trial.reason})" if trial.reason else ""
    overrides = as_overrides(trial.values)
    return f"trial {trial.number} {trial.state}{value}{reason}: {overrides}{best_so_far}"


def first_difference(before: Config, now: Config) -> str | None:
    """Describe the first field that differs between two configurations: ``name = old, now new``."""
    old, new = flatten(to_dict(before)), flatten(to_dict(now))
    for field in dict.fromkeys([*old, *new]):
        if old.get(field) != new.get(field):
            return f"{field} = {json.dumps(old.get(field))}, now {json.dumps(new.get(field))}"
    return None


def next_values(search: Search) -> dict[str, Any] | None:
    """Return values for the next trial that no trial has used; None if all were used.

    The first trial has the values of the configuration. The tree-structured Parzen estimator
    (Bergstra et al., "Algorithms for hyper-parameter optimization", NeurIPS 2011) proposes the
    values of later trials.
    """
    space = parse_space(search.space, search.config)
    if not search.trials:
        return values_of(search.config, space)
    if len(_frozen_trials(search, space)) >= size(space):
        return None
    tried = [trial.values for trial in search.trials]
    study = _study(search, space)
    for attempt in range(ATTEMPTS):
        seed = (search.config.seed * 1_000_003 + len(tried) * 1009 + attempt) % 2**32
        # If the estimator proposes values that were tried, later attempts draw random values.
        sampler = optuna.samplers.RandomSampler if attempt else optuna.samplers.TPESampler
        study.sampler = sampler(seed=seed)
        parameters = study.ask(dict(space)).params
        values = {name: value_of(each, parameters[name]) for name, each in space.items()}
        if values not in tried:
            return values
    return None


def is_hopeless(search: Search, trial: Trial) -> bool:
    """Return True if a running trial is worse than the median of other trials at the same epoch.

    The result is False until five trials are complete (Optuna's MedianPruner).
    """
    study = _study(search, parse_space(search.space, search.config))
    curve = {each.epoch: each.value for each in trial.validations}
    running = create_trial(state=TrialState.RUNNING, intermediate_values=curve)
    return study.pruner.prune(study, running)


def _study(search: Search, space: Space) -> optuna.study.Study:
    """Build an Optuna study in memory from the trials that have ended."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        pruner=optuna.pruners.MedianPruner(),
        direction="minimize" if search.is_loss else "maximize",
    )
    study.add_trials(_frozen_trials(search, space))
    return study


def _frozen_trials(search: Search, space: Space) -> list[FrozenTrial]:
    """Convert the trials that have ended, and whose values the space allows, to Optuna's trials."""
    frozen = []
    for trial in search.trials:
        if trial.state == "running":
            continue
        parameters = {
            name: json.dumps(trial.values[name])
            if isinstance(each, optuna.distributions.CategoricalDistribution)
            else trial.values[name]
            for name, each in space.items()
        }
        try:
            created = create_trial(
                state=STATES[trial.state],
                value=trial.value if trial.state == "complete" else None,
                params=parameters,
                distributions=dict(space),
                intermediate_values={each.epoch: each.value for each in trial.validations},
            )
        except ValueError:
            continue  # the values of the configuration may be outside the ranges
        frozen.append(created)
    return frozen
