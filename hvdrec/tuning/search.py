"""A search: its trials so far, what to try next, and whether a trial is worth going on with.

All that is known is in this value, which is written to disk whole; Optuna is asked anew each time.
So what it proposes is a function of the trials before, and a search that was interrupted goes on
as if it had not been.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hvdrec.config import Config
from hvdrec.config.stored import without_retired
from hvdrec.config.structure import from_dict, to_dict
from hvdrec.errors import UserError
from hvdrec.storage.artifacts import write_text
from hvdrec.tuning.space import Space, Values, as_overrides, as_toml, parse_space, size, values_of

if TYPE_CHECKING:
    import optuna

FILE = "trials.json"
ATTEMPTS = 1000
"""Draws after which no combination counts as left that was not tried."""
STUCK = 3
"""Starts of a trial from the same step after which it is given up."""

State = Literal["running", "complete", "pruned", "failed"]


@dataclass(frozen=True)
class Validation:
    """The validation metric after an epoch; the first is 0."""

    epoch: int
    value: float


@dataclass(frozen=True)
class Trial:
    """One training of a search.

    values: plain values of the searched fields; value: the best validation metric, reached at
    `step`; seconds: spent on it; starts: from which steps it was started; reason: why it failed.
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
        """The trial's directory."""
        return f"trial-{self.number:03d}"

    def validated(self, epoch: int, value: float) -> Trial:
        """Return the trial with one more validation; later ones, of before, are forgotten."""
        before = tuple(each for each in self.validations if each.epoch < epoch)
        return replace(self, validations=(*before, Validation(epoch, value)))

    def started(self, step: int) -> Trial:
        """Return the trial started (again) from a step; failed if that leads nowhere."""
        starts = (*self.starts, step)
        last = starts[-STUCK:]
        if len(last) == STUCK and len(set(last)) == 1:
            reason = f"was started {STUCK} times from step {step} and got no further"
            return replace(self, starts=starts, state="failed", reason=reason)
        return replace(self, starts=starts)


@dataclass(frozen=True)
class TuneResult:
    """The trials of a search.

    Attributes:
        path: The file ``trials.json``, which holds all trials.
        metric: Name of the validation metric that decides.
        best: The best complete trial; None if there is none. ``best.values`` are overrides for
            `hvdrec.load_config`.
        trials: All trials, by number.
    """

    path: str
    metric: str
    best: Trial | None
    trials: tuple[Trial, ...]

    def ranked(self) -> list[Trial]:
        """Return the complete trials, the best first, then the others."""
        return ranked(self.trials, self.metric)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        return {
            "path": self.path,
            "metric": self.metric,
            "best": describe_best(self.best, self.metric),
            "trials": to_dict(self.trials),
        }


@dataclass(frozen=True)
class Search:
    """A search over a configuration.

    config: that of the first trial; features: what tells the features from others; space: what is
    searched, as it was given; metric: of validation; is_loss: whether lower is better.
    """

    config: Config
    features: str
    space: tuple[str, ...]
    metric: str
    is_loss: bool = False
    trials: tuple[Trial, ...] = field(default=())

    def parsed(self) -> Space:
        """Return what is searched."""
        return parse_space(self.space, self.config)

    @property
    def best(self) -> Trial | None:
        """The best complete trial; the first of equal ones."""
        first = next(iter(ranked(self.trials, self.metric)), None)
        return first if first is not None and first.state == "complete" else None

    def result(self, path: str) -> TuneResult:
        """Return the trials as the result of a search, which is stored at `path`."""
        return TuneResult(path, self.metric, self.best, self.trials)

    def with_trial(self, trial: Trial) -> Search:
        """Return the search with a trial added or replaced."""
        return replace(
            self, trials=(*self.trials[: trial.number], trial, *self.trials[trial.number + 1 :])
        )

    def save(self, folder: Path) -> None:
        """Write ``trials.json``, with what to do with the best one, for other programs."""
        text = json.dumps(
            {**to_dict(self), "best": describe_best(self.best, self.metric)}, indent=1
        )
        write_text(folder / FILE, f"{text}\n")


def load(folder: Path) -> Search | None:
    """Return the search that was begun in a folder, or None."""
    file = folder / FILE
    try:
        raw = json.loads(file.read_text())
        raw["config"] = without_retired(raw["config"])
        return from_dict(Search, {key: raw[key] for key in raw if key != "best"})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); --overwrite starts anew") from None


def describe_trial(search: Search, trial: Trial) -> str:
    """Return one line about a trial that has ended."""
    best = search.best
    best_so_far = "" if best is None else f"; best {best.value:.5f} of trial {best.number}"
    value = "" if trial.value is None else f" {search.metric} {trial.value:.5f}"
    reason = f" ({trial.reason})" if trial.reason else ""
    overrides = as_overrides(trial.values)
    return f"trial {trial.number} {trial.state}{value}{reason}: {overrides}{best_so_far}"


def ranked(trials: Sequence[Trial], metric: str) -> list[Trial]:
    """Return the complete trials, the best first, then the others."""

    def key(trial: Trial) -> tuple[bool, bool, float]:
        value = 0.0 if trial.value is None else trial.value
        worse = value if metric == "log_loss" else -value
        return trial.state != "complete", trial.value is None, worse

    return sorted(trials, key=key)


def describe_best(best: Trial | None, metric: str) -> dict[str, Any] | None:
    """Return the best trial's number, metric and values, as options and as TOML."""
    if best is None:
        return None
    return {
        "trial": best.number,
        metric: best.value,
        "overrides": as_overrides(best.values),
        "toml": as_toml(best.values),
    }


def first_difference(before: Config, now: Config) -> str | None:
    """Return the first field that two configurations do not share: ``name = old, now new``."""
    return _first_difference(to_dict(before), to_dict(now))


def next_values(search: Search) -> dict[str, Any] | None:
    """Return what to try next, none of it tried before; None where all has been.

    First the configuration as it stands, then what the tree-structured Parzen estimator proposes
    (Bergstra et al., "Algorithms for hyper-parameter optimization", NeurIPS 2011).
    """
    import optuna

    space = search.parsed()
    if not search.trials:
        return values_of(search.config, space)
    tried = [trial.values for trial in search.trials]
    distributions = {name: each.distribution() for name, each in space.items()}
    inside = [values for values in tried if _parameters(space, values) is not None]
    if len(inside) >= size(space):
        return None
    for attempt in range(ATTEMPTS):
        seed = _seed(search, attempt)
        # Where the estimator insists on what is known already, chance does not.
        sampler: optuna.samplers.BaseSampler = (
            optuna.samplers.RandomSampler(seed=seed)
            if attempt
            else optuna.samplers.TPESampler(seed=seed)
        )
        asked = _study(search, space, sampler).ask(distributions)
        values = {name: each.value_of(asked.params[name]) for name, each in space.items()}
        if values not in tried:
            return values
    return None


def is_hopeless(search: Search, trial: Trial) -> bool:
    """Return whether a running trial is worse, at its best, than the median of the others then.

    Nothing is stopped before five trials are complete (Optuna's MedianPruner).
    """
    import optuna

    space = search.parsed()
    parameters = _parameters(space, trial.values)
    if parameters is None:
        return False
    study = _study(search, space, optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial(parameters)
    asked = study.ask({name: each.distribution() for name, each in space.items()})
    for validation in trial.validations:
        asked.report(validation.value, validation.epoch)
    return asked.should_prune()


def _study(
    search: Search, space: Space, sampler: optuna.samplers.BaseSampler
) -> optuna.study.Study:
    """Return Optuna's view of the trials that have ended, in memory."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        sampler=sampler,
        pruner=optuna.pruners.MedianPruner(),
        direction="minimize" if search.is_loss else "maximize",
    )
    states = {
        "complete": optuna.trial.TrialState.COMPLETE,
        "pruned": optuna.trial.TrialState.PRUNED,
        "failed": optuna.trial.TrialState.FAIL,
    }
    for trial in search.trials:
        parameters = _parameters(space, trial.values)
        if trial.state == "running" or parameters is None:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study.add_trial(
                optuna.trial.create_trial(
                    state=states[trial.state],
                    value=trial.value if trial.state == "complete" else None,
                    params=parameters,
                    distributions={name: each.distribution() for name, each in space.items()},
                    intermediate_values={each.epoch: each.value for each in trial.validations},
                )
            )
    return study


def _parameters(space: Space, values: Values) -> dict[str, Any] | None:
    """Return values as Optuna knows them; None where one of them is outside."""
    found = {name: each.parameter_of(values[name]) for name, each in space.items()}
    return None if any(each is None for each in found.values()) else found


def _seed(search: Search, attempt: int) -> int:
    return (search.config.seed * 1_000_003 + len(search.trials) * 1009 + attempt) % 2**32


def _first_difference(before: Any, now: Any, where: str = "") -> str | None:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            inner = f"{where}.{key}" if where else str(key)
            told = _first_difference(before.get(key), now.get(key), inner)
            if told is not None:
                return told
        return None
    return None if before == now else f"{where} = {json.dumps(before)}, now {json.dumps(now)}"
