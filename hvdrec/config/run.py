"""A run's whole configuration: read from TOML, overridden on the command line, and checked."""

from __future__ import annotations

import contextlib
import io
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdrec.config.schema import Feature, Schema
from hvdrec.config.sections import (
    Encode,
    Evaluate,
    Export,
    Loader,
    Model,
    Parallel,
    Paths,
    Samples,
    Task,
    Train,
)
from hvdrec.config.structure import from_dict, to_dict
from hvdrec.errors import UserError, choices, invalid_value
from hvdrec.storage.urls import is_url


@dataclass(frozen=True)
class Config:
    """One run, from raw tables to a bundle."""

    name: str
    """Name of the run, for people."""
    features: tuple[Feature, ...]
    """The features; see schema.Feature."""
    seed: int = 0
    """Seed of initial weights, order and dropout."""
    paths: Paths = Paths()
    """Directories."""
    samples: Samples = Samples()
    """Raw tables to samples."""
    tasks: tuple[Task, ...] = ()
    """Several labels for the ranker. None: samples.label alone."""
    encode: Encode = Encode()
    """Samples to shards."""
    loader: Loader = Loader()
    """Shards to batches."""
    model: Model = Model()
    """The model."""
    train: Train = Train()
    """Training."""
    parallel: Parallel = Parallel()
    """Ranks."""
    evaluate: Evaluate = Evaluate()
    """Evaluation."""
    export: Export = Export()
    """Export."""

    def __post_init__(self) -> None:
        for requirement, text in _requirements(self):
            if not requirement:
                raise UserError(text)
        _ = self.schema

    @property
    def schema(self) -> Schema:
        """The features with the keys of users and items."""
        return Schema(self.features, self.samples.user, self.samples.item)

    @property
    def task_columns(self) -> tuple[str, ...]:
        """The columns of the tasks' labels, in the order of the tasks."""
        return tuple(task.column for task in self.tasks)


def load(path: Path) -> Config:
    """Read a run's configuration from a TOML file.

    Raises UserError, with the file's name in front, for a file that cannot be read, that is no
    TOML, or that holds an unknown key, a wrong type or a value that is not allowed.
    """
    try:
        raw = tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the TOML file of a run") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: no valid TOML: {error}") from None
    try:
        return from_dict(Config, raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def load_config(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a run's configuration from a TOML file.

    Args:
        path: The TOML file.
        overrides: Values that replace those of the file, by dotted name: ``{"train.epochs": 3}``.

    Raises:
        UserError: The file cannot be read, or a key, type or value is not allowed.
    """
    return with_fields(load(Path(path)), overrides or {})


def with_fields(config: Config, values: Mapping[str, Any]) -> Config:
    """Return the configuration with fields replaced, by dotted name: ``tasks.0.share``.

    Raises:
        UserError: A field does not exist, or a value is not allowed.
    """
    if not values:
        return config
    raw = to_dict(config)
    for field, value in values.items():
        *tables, name = field.split(".")
        table: Any = raw
        for each in tables:
            is_item = isinstance(table, list) and each.isdecimal() and int(each) < len(table)
            if not is_item and not (isinstance(table, dict) and each in table):
                raise invalid_value(field, value, f"there is no '{each}'")
            table = table[int(each) if is_item else each]
        if not isinstance(table, dict):
            raise invalid_value(field, value, "is not a field of a table")
        table[name] = to_dict(value)
    return from_dict(Config, raw)


def override(config: Config, arguments: Sequence[str], prog: str) -> Config:
    """Return the configuration with command-line overrides such as ``--train.batch-size 8192``.

    Raises UserError, in one line, for an option that is no field or a value that does not fit;
    exits after ``--help``, which lists all fields.
    """
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                Config,
                default=config,
                args=list(arguments),
                prog=prog,
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit as ended:
        if not ended.code:
            raise
        # The library draws a box of several lines around what is wrong.
        words = re.sub(r"[\u2500-\u257f]+", " ", said.getvalue()).split()
        raise UserError(f"command line: {' '.join(words)}") from None


def _warm_start_requirements(config: Config) -> list[tuple[bool, str]]:
    warm, model = config.train.warm_start, config.model
    if not warm.history:
        return []
    key, where = config.samples.item, f"train.warm_start.history = '{warm.history}'"
    sequences = [f.name for f in config.features if f.kind == "sequence" and not f.shares]
    item = next((f for f in config.features if f.name == key), None)
    width = (item.dimension if item else 0) or model.dimension
    return [
        (
            warm.history in sequences,
            f"{where}: is no sequence feature over '{key}'; known: {choices(sequences)}",
        ),
        (
            not model.tower.hidden and not model.tower.normalize and model.tower.output > 0,
            f"{where}: needs linear towers: model.tower.hidden = [], normalize = false, output > 0",
        ),
        (
            model.pooling.get(warm.history, "mean") in ("mean", "sqrt"),
            f"{where}: needs model.pooling.{warm.history} = 'mean' or 'sqrt'",
        ),
        (
            config.train.objective != "ranking",
            f"{where}: is for retrieval; train.objective = 'ranking' has none: leave it out",
        ),
        (
            width >= 2 * model.tower.output,
            f"{where}: the table of '{key}' holds two vectors of model.tower.output = "
            f"{model.tower.output} for an item; its dimension must be at least "
            f"{2 * model.tower.output}, is {width}",
        ),
    ]


def _requirements(config: Config) -> list[tuple[bool, str]]:
    """List what must hold between values, each with the line that says so."""
    train, split, loader = config.train, config.samples.split, config.loader
    ranker = config.model.ranker
    positive: list[tuple[str, float]] = [
        ("train.batch_size", train.batch_size),
        ("train.learning_rate", train.learning_rate),
        ("train.embedding_learning_rate", train.embedding_learning_rate),
        ("train.accumulate", train.accumulate),
        ("parallel.average_every", config.parallel.average_every),
        ("train.temperature", train.temperature),
        ("train.patience", train.patience),
        ("train.average_steps", train.average_steps),
        ("train.log_every", train.log_every),
        ("train.keep", train.keep),
        ("encode.shard_rows", config.encode.shard_rows),
        ("encode.row_group_rows", config.encode.row_group_rows),
        ("loader.shuffle_rows", loader.shuffle_rows),
        ("loader.workers", loader.workers),
        ("loader.prefetch", loader.prefetch),
        ("loader.cache_gb", loader.cache_gb),
        ("model.dimension", config.model.dimension),
        ("model.initial_deviation", config.model.initial_deviation),
        ("evaluate.batch_size", config.evaluate.batch_size),
        ("evaluate.beta", config.evaluate.beta),
        ("export.parity_rows", config.export.parity_rows),
        ("export.trending_days", config.export.trending_days),
        *((f"evaluate.k[{i}]", k) for i, k in enumerate(config.evaluate.k)),
        *((f"samples.history[{i}].length", h.length) for i, h in enumerate(config.samples.history)),
        *((f"model.tower.hidden[{i}]", w) for i, w in enumerate(config.model.tower.hidden)),
        *((f"model.ranker.hidden[{i}]", w) for i, w in enumerate(config.model.ranker.hidden)),
        *((f"model.ranker.task_hidden[{i}]", w) for i, w in enumerate(ranker.task_hidden)),
        *((f"tasks[{i}].weight", task.weight) for i, task in enumerate(config.tasks)),
    ]
    shares: list[tuple[str, float]] = [
        ("model.unknown_rate", config.model.unknown_rate),
        ("train.warm_start.dropout", train.warm_start.dropout),
        ("train.teacher_weight", train.teacher_weight),
        ("train.average_decay", train.average_decay),
        ("train.schedule_end", train.schedule_end),
        ("model.tower.dropout", config.model.tower.dropout),
        ("model.tower.input_dropout", config.model.tower.input_dropout),
        ("model.ranker.dropout", config.model.ranker.dropout),
    ]
    not_negative: list[tuple[str, float]] = [
        ("train.weight_decay", train.weight_decay),
        ("train.embedding_weight_decay", train.embedding_weight_decay),
        ("train.embedding_initial_accumulator", train.embedding_initial_accumulator),
        ("model.tower.output", config.model.tower.output),
        ("parallel.shard_from_mb", config.parallel.shard_from_mb),
        ("train.warmup_steps", train.warmup_steps),
        ("train.clip_norm", train.clip_norm),
        ("train.retrieval_weight", train.retrieval_weight),
        ("train.warm_start.l2", train.warm_start.l2),
        ("train.warm_start.user_power", train.warm_start.user_power),
        ("train.uniform_negatives", train.uniform_negatives),
        ("train.hard_negatives", train.hard_negatives),
        ("train.checkpoint_every", train.checkpoint_every),
        ("train.threads", train.threads),
        ("model.ranker.cross_layers", config.model.ranker.cross_layers),
        ("model.ranker.heads", config.model.ranker.heads),
        *((f"tasks[{i}].share", task.share) for i, task in enumerate(config.tasks)),
        ("samples.negatives.per_positive", config.samples.negatives.per_positive),
    ]
    listed = ("categorical", "categorical_list", "hashed")
    filters = [f.name for f in config.features if f.side == "item" and f.kind in listed]
    names = [feature.name for feature in config.features]
    lists = [feature.name for feature in config.features if feature.is_list]
    singles = [f.name for f in config.features if f.kind == "categorical"]
    paths = [(key, getattr(config.paths, key)) for key in ("raw", "work", "samples", "run")]
    sided = [feature.name for feature in config.features if feature.side != "scene"]
    return [
        (bool(config.features), "features: none are declared; add at least one [[features]] table"),
        *((value > 0, f"{key} = {value}: must be greater than 0") for key, value in positive),
        *((value >= 0, f"{key} = {value}: must not be negative") for key, value in not_negative),
        *((0 <= value < 1, f"{key} = {value}: must be in [0, 1)") for key, value in shares),
        *(
            (
                not is_url(path),
                f"paths.{key} = '{path}': must be a directory; only paths.features and "
                "paths.bundle may be URLs",
            )
            for key, path in paths
        ),
        (
            0 <= config.evaluate.threshold <= 1,
            f"evaluate.threshold = {config.evaluate.threshold}: must be in [0, 1]",
        ),
        (bool(config.evaluate.k), "evaluate.k = []: give at least one cut-off"),
        (
            not train.average_decay or config.parallel.synchronization != "average",
            f"train.average_decay = {train.average_decay}: ranks must be in step, "
            "parallel.synchronization = 'average' lets them drift; leave one of them out",
        ),
        (
            config.model.tower.output % max(config.model.ranker.heads, 1) == 0
            and (config.model.tower.output > 0 or not config.model.ranker.heads),
            f"model.ranker.heads = {config.model.ranker.heads}: must divide model.tower.output = "
            f"{config.model.tower.output} into equal parts",
        ),
        (
            train.epochs >= (0 if train.warm_start.history else 1),
            f"train.epochs = {train.epochs}: must be greater than 0 (with train.warm_start: 0 or "
            "greater)",
        ),
        *_warm_start_requirements(config),
        (
            not train.teacher or train.objective != "retrieval",
            f"train.teacher = '{train.teacher}': teaches a ranker, train.objective = 'retrieval' "
            "has none; leave it out",
        ),
        (
            not (train.teacher and config.tasks),
            f"train.teacher = '{train.teacher}': does not go with [[tasks]]; leave one of them out",
        ),
        *(
            (
                name in lists,
                f"model.pooling.{name}: is no list or sequence feature; known: {choices(lists)}",
            )
            for name in config.model.pooling
        ),
        (
            train.accumulate == 1 or not train.uniform_negatives,
            f"train.uniform_negatives = {train.uniform_negatives}: goes with train.accumulate = 1 "
            f"alone, which is {train.accumulate}; set one of them back",
        ),
        (
            all(share > 0 for share in split.fractions) and abs(sum(split.fractions) - 1) < 1e-9,
            f"samples.split.fractions = {list(split.fractions)}: must be positive and sum to 1",
        ),
        (
            len(split.boundaries) in (0, 2),
            f"samples.split.boundaries = {list(split.boundaries)}: give two values or none",
        ),
        *(
            (
                name in sided,
                f"model.ranker.direct: '{name}' is no user or item feature; "
                f"known: {choices(sided)}",
            )
            for name in config.model.ranker.direct
        ),
        (
            not ranker.matches
            or (set(ranker.direct) <= set(sided) and bool(config.schema.matched(ranker.direct))),
            "model.ranker.matches: no user's and item's feature of model.ranker.direct share a "
            f"table; it is {choices(ranker.direct)}: name a history and the item's key there",
        ),
        *(
            (
                name in filters and config.export.filters.count(name) == 1,
                f"export.filters: '{name}' is no item feature of values, or is there twice; "
                f"known: {choices(filters)}",
            )
            for name in config.export.filters
        ),
        (
            config.export.index == "none" or train.objective != "ranking",
            f"export.index = '{config.export.index}': an index is over towers that were trained to "
            "retrieve; set train.objective = 'joint' or 'retrieval', or leave it at 'none'",
        ),
        (
            config.model.tower.output > 0
            or (train.objective == "ranking" and set(sided) == set(config.model.ranker.direct)),
            "model.tower.output = 0: without towers the objective must be 'ranking' and "
            "model.ranker.direct must name every user and item feature",
        ),
        (
            train.clip_norm == 0 or config.parallel.synchronization == "step",
            f"train.clip_norm = {train.clip_norm}: ranks clip alike only with "
            "parallel.synchronization = 'step'; set one of them back",
        ),
        *(
            (
                history.name in names and config.schema[history.name].kind == "sequence",
                f"samples.history: no feature of kind 'sequence' is named '{history.name}'",
            )
            for history in config.samples.history
        ),
        *(
            (
                history.column in ["", *singles],
                f"samples.history '{history.name}': column = '{history.column}' is no feature of "
                f"one value a row; known: {choices(singles)}",
            )
            for history in config.samples.history
        ),
        *_requirements_of_tasks(config),
    ]


def _requirements_of_tasks(config: Config) -> list[tuple[bool, str]]:
    """List what must hold of several labels and of the layers that they share."""
    ranker, tasks = config.model.ranker, config.tasks
    names = [task.name for task in tasks]
    taken = {config.samples.user, config.samples.item, *(f.name for f in config.features)}
    if not tasks:
        return [
            (
                ranker.sharing == "bottom" and not ranker.task_hidden,
                f"model.ranker: sharing = '{ranker.sharing}', task_hidden = "
                f"{list(ranker.task_hidden)}: there are no [[tasks]] to share layers; add some or "
                "leave both out",
            ),
            (
                config.train.metric != "task_auc",
                "train.metric = 'task_auc': there are no [[tasks]]; take 'auc'",
            ),
        ]
    return [
        *(
            (
                name.isidentifier() and name != "score" and names.count(name) == 1,
                f"tasks[{i}].name = '{name}': must be letters, digits and underscores, not "
                "'score', and occur once",
            )
            for i, name in enumerate(names)
        ),
        *(
            (
                column not in taken,
                f"tasks[{i}].name = '{task.name}': its '{column}' is the name of a feature or key; "
                "rename the task",
            )
            for i, task in enumerate(tasks)
            for column in (task.column, task.output)
        ),
        (
            any(task.share > 0 for task in tasks),
            "tasks: every share is 0; give one a part in the served score",
        ),
        (
            config.train.objective != "retrieval",
            "tasks: train.objective = 'retrieval' trains no ranker, which alone has tasks; take "
            "'ranking' or 'joint'",
        ),
        (
            bool(ranker.hidden),
            "model.ranker.hidden = []: tasks share hidden layers; give at least one width",
        ),
        (
            ranker.sharing == "bottom" or ranker.experts > 1,
            f"model.ranker.experts = {ranker.experts}: mmoe needs at least 2",
        ),
    ]
