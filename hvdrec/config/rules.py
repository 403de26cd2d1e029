"""The rules between fields of a configuration; each field declares its own range.

Each rule is a generator that yields the mistakes of one topic.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hvdrec.errors import UserError, choices, invalid_value, unknown_name
from hvdrec.storage.urls import is_url

if TYPE_CHECKING:
    from hvdrec.config.root import Config

Mistakes = Iterator[UserError]


def check_rules(config: Config) -> None:
    """Check the rules between fields.

    Raises:
        UserError: A rule is broken; the error describes the first mistake.
    """
    _ = config.schema  # checks the features
    for rule in RULES:
        for mistake in rule(config):
            raise mistake


def _paths(config: Config) -> Mistakes:
    for key in ("work", "samples", "run"):
        path = getattr(config.paths, key)
        if is_url(path):
            problem = "must be a directory; only paths.raw, features and bundle may be URLs"
            yield invalid_value(f"paths.{key}", path, problem)


def _samples(config: Config) -> Mistakes:
    split = config.samples.split
    fractions, boundaries = list(split.fractions), list(split.boundaries)
    if min(fractions) <= 0 or abs(sum(fractions) - 1) >= 1e-9:
        yield invalid_value("samples.split.fractions", fractions, "must be positive and sum to 1")
    if len(boundaries) not in (0, 2):
        yield invalid_value("samples.split.boundaries", boundaries, "must hold two values or none")
    if split.after is not None and split.method != "temporal":
        problem = f"needs samples.split.method = 'temporal', which is '{split.method}'"
        yield invalid_value("samples.split.after", split.after, problem, "remove it")


def _tables(config: Config) -> Mistakes:
    paths = [table.path for table in config.samples.tables]
    for i, table in enumerate(config.samples.tables):
        key = f"samples.tables[{i}]"
        if paths.count(table.path) > 1:
            yield invalid_value(f"{key}.path", table.path, "has several formats", "keep one")
        try:
            codecs.lookup(table.encoding)
            "".encode(table.encoding)
        except LookupError:
            problem = "is not the name of a text encoding"
            remedy = "use 'utf-8', 'latin-1', 'cp1252', 'utf-16' or another one that Python knows"
            yield invalid_value(f"{key}.encoding", table.encoding, problem, remedy)
        if len(table.delimiter.encode()) > 4 or set(table.delimiter) & {"\n", "\r", '"'}:
            problem = "must be one to four bytes long, without quotes and line breaks"
            yield invalid_value(f"{key}.delimiter", table.delimiter, problem)


def _feedback(config: Config) -> Mistakes:
    samples = config.samples
    names = [feedback.name for feedback in samples.feedback]
    for i, feedback in enumerate(samples.feedback):
        key = f"samples.feedback[{i}]"
        if not feedback.name.isidentifier() or names.count(feedback.name) > 1:
            problem = "must be unique letters, digits and underscores"
            yield invalid_value(f"{key}.name", feedback.name, problem)
        if not samples.time:
            problem = "needs samples.time, which is empty"
            yield invalid_value(f"{key}.name", feedback.name, problem, "set samples.time")
        if not all(left and right for left, right in feedback.pairs):
            problem = "must name columns, such as 'item_id' or 'item_id = asset'"
            yield invalid_value(f"{key}.on", list(feedback.on), problem)
    if samples.exposures.unsettled and not names:
        problem = "needs [[samples.feedback]]"
        unsettled = samples.exposures.unsettled
        yield invalid_value("samples.exposures.unsettled", unsettled, problem, "remove it")


def _seen(config: Config) -> Mistakes:
    if config.evaluate.seen == "shown" and config.samples.negatives.per_positive:
        problem = "samples.negatives adds rows that no user was shown"
        yield invalid_value("evaluate.seen", "shown", problem, "use 'taken'")


def _histories(config: Config) -> Mistakes:
    sequences = [f.column or f.name for f in config.features if f.is_sequence]
    singles = [
        feature.name
        for feature in config.features
        if feature.has_vocabulary and not feature.is_list and feature.column in ("", feature.name)
    ]
    for i, history in enumerate(config.samples.history):
        key = f"samples.history[{i}]"
        if history.name not in sequences:
            problem = f"must name a feature of kind 'sequence'; known: {choices(sequences)}"
            yield invalid_value(f"{key}.name", history.name, problem)
        if history.column not in ("", *singles):
            problem = f"must name a feature of kind 'categorical'; known: {choices(singles)}"
            yield invalid_value(f"{key}.column", history.column, problem)


def _model(config: Config) -> Mistakes:
    lists = [feature.name for feature in config.features if feature.is_list]
    for name in config.model.pooling:
        if name not in lists:
            yield unknown_name("model.pooling", name, lists)
    sided = {feature.name for feature in config.features if feature.side != "scene"}
    is_ranking = config.train.objective == "ranking"
    if config.model.tower.output == 0 and not (
        is_ranking and sided == set(config.model.ranker.direct)
    ):
        yield invalid_value(
            "model.tower.output",
            0,
            "without towers, train.objective must be 'ranking' and model.ranker.direct must name "
            "every user and item feature",
        )


def _ranker(config: Config) -> Mistakes:
    ranker, output = config.model.ranker, config.model.tower.output
    sided = [feature.name for feature in config.features if feature.side != "scene"]
    for name in ranker.direct:
        if name not in sided:
            problem = f"must name user or item features; known: {choices(sided)}"
            yield invalid_value("model.ranker.direct", name, problem)
    if ranker.matches and not config.schema.matched(ranker.direct):
        yield invalid_value(
            "model.ranker.matches",
            True,
            "no user and item feature of model.ranker.direct = "
            f"{choices(ranker.direct)} share a table",
            "add a history and the item key there",
        )
    if ranker.heads and (output == 0 or output % ranker.heads):
        problem = f"must divide model.tower.output = {output} into equal parts"
        yield invalid_value("model.ranker.heads", ranker.heads, problem)


def _train(config: Config) -> Mistakes:
    train = config.train
    if train.epochs == 0 and not train.warm_start.history:
        problem = "must be greater than 0 (or 0 with train.warm_start)"
        yield invalid_value("train.epochs", train.epochs, problem)
    if train.uniform_negatives and train.accumulate != 1:
        yield invalid_value(
            "train.uniform_negatives",
            train.uniform_negatives,
            f"needs train.accumulate = 1, which is {train.accumulate}",
            "reset one of them",
        )


def _ranks(config: Config) -> Mistakes:
    train, how = config.train, config.parallel.synchronization
    if train.average_decay and how == "average":
        yield invalid_value(
            "train.average_decay",
            train.average_decay,
            "needs ranks with equal weights, but parallel.synchronization = 'average' lets them "
            "differ",
            "reset one of them",
        )
    if train.clip_norm and how != "step":
        yield invalid_value(
            "train.clip_norm",
            train.clip_norm,
            f"needs parallel.synchronization = 'step', which is '{how}'",
            "reset one of them",
        )


def _warm_start(config: Config) -> Mistakes:
    history, model, key = config.train.warm_start.history, config.model, config.samples.item
    if not history:
        return
    field, output = "train.warm_start.history", model.tower.output
    sequences = [f.name for f in config.features if f.is_sequence and not f.shares]
    if history not in sequences:
        problem = f"must name a sequence feature over '{key}'; known: {choices(sequences)}"
        yield invalid_value(field, history, problem)
    if model.tower.hidden or model.tower.normalize or output == 0:
        problem = "needs linear towers: model.tower.hidden = [], normalize = false, output > 0"
        yield invalid_value(field, history, problem)
    if model.pooling.get(history, "mean") not in ("mean", "sqrt"):
        problem = f"needs model.pooling.{history} = 'mean' or 'sqrt'"
        yield invalid_value(field, history, problem)
    if config.train.objective == "ranking":
        problem = "needs retrieval, but train.objective is 'ranking'"
        yield invalid_value(field, history, problem, "remove train.warm_start")
    item = next((feature for feature in config.features if feature.name == key), None)
    dimension = (item.dimension if item else 0) or model.dimension
    if dimension < 2 * output:
        yield invalid_value(
            field,
            history,
            f"stores two vectors of model.tower.output = {output} per item: the dimension of "
            f"'{key}' must be at least {2 * output}, not {dimension}",
        )


def _teacher(config: Config) -> Mistakes:
    teacher = config.train.teacher
    if teacher and config.train.objective == "retrieval":
        problem = "teaches a ranker, but train.objective = 'retrieval' trains none"
        yield invalid_value("train.teacher", teacher, problem, "remove it")
    if teacher and config.tasks:
        problem = "does not work with [[tasks]]"
        yield invalid_value("train.teacher", teacher, problem, "remove one of them")


def _export(config: Config) -> Mistakes:
    index, filters = config.export.index, config.export.filters
    kinds = ("categorical", "categorical_list", "hashed")
    allowed = [column.name for column in config.schema.columns("item") if column.kind in kinds]
    for name in filters:
        if name not in allowed or filters.count(name) > 1:
            problem = f"must name different item features with codes; known: {choices(allowed)}"
            yield invalid_value("export.filters", name, problem)
    carried = [f.name for side in ("user", "item") for f in config.schema.carried(side)]
    if carried and config.export.embeddings != "float32":
        yield invalid_value(
            "export.embeddings",
            config.export.embeddings,
            f"the codes of {choices(carried)} are stored next to the embeddings, because scene "
            "features combine them, and need 'float32'",
        )
    if index != "none" and config.train.objective == "ranking":
        yield invalid_value(
            "export.index",
            index,
            "needs towers trained for retrieval",
            "set train.objective = 'joint' or 'retrieval', or export.index = 'none'",
        )


def _no_tasks(config: Config) -> Mistakes:
    if config.tasks:
        return
    ranker, remedy = config.model.ranker, "add [[tasks]] or remove it"
    if ranker.sharing != "bottom":
        problem = "no [[tasks]] are declared that could share layers"
        yield invalid_value("model.ranker.sharing", ranker.sharing, problem, remedy)
    if ranker.task_hidden:
        problem = "no [[tasks]] are declared"
        yield invalid_value("model.ranker.task_hidden", list(ranker.task_hidden), problem, remedy)
    if config.train.metric == "task_auc":
        yield invalid_value("train.metric", "task_auc", "needs [[tasks]]", "use 'auc'")


def _tasks(config: Config) -> Mistakes:
    if not config.tasks:
        return
    ranker, names = config.model.ranker, [task.name for task in config.tasks]
    for i, task in enumerate(config.tasks):
        name = task.name
        if not name.isidentifier() or name == "score" or names.count(name) > 1:
            problem = "must be unique letters, digits and underscores, and not 'score'"
            yield invalid_value(f"tasks[{i}].name", name, problem)
    if not any(task.share for task in config.tasks):
        yield invalid_value("tasks[0].share", 0.0, "at least one task must have a share above 0")
    if config.train.objective == "retrieval":
        problem = "[[tasks]] need a ranker"
        yield invalid_value("train.objective", "retrieval", problem, "use 'ranking' or 'joint'")
    if not ranker.hidden:
        yield invalid_value("model.ranker.hidden", [], "tasks share at least one hidden layer")
    if ranker.sharing == "mmoe" and ranker.experts < 2:
        yield invalid_value("model.ranker.experts", ranker.experts, "mmoe needs at least 2")


RULES = (
    _paths,
    _samples,
    _tables,
    _feedback,
    _seen,
    _histories,
    _model,
    _ranker,
    _train,
    _ranks,
    _warm_start,
    _teacher,
    _export,
    _no_tasks,
    _tasks,
)
