"""Start a run from a checkpoint of an earlier run, on the same features or features made from them.

Weights, table rows and their optimizer state are carried over. Table rows of feature values that
are new since the earlier run start from their initial values. In the layers that read an added
feature, its weights start from zero.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from hvdrec.config import Config
from hvdrec.config.sections import Model
from hvdrec.config.structure import to_dict
from hvdrec.embeddings.files import carry_tables
from hvdrec.errors import UserError, invalid_file, invalid_value
from hvdrec.features.fit import Fitted
from hvdrec.models.input_columns import input_axes, moved
from hvdrec.storage.artifacts import Manifest
from hvdrec.storage.lineage import generation_of
from hvdrec.training.build import build_model
from hvdrec.training.checkpoint import (
    AVERAGES_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    Position,
    load_tensors,
    read_config,
)
from hvdrec.training.optimizer import restore_optimizer
from hvdrec.training.pointers import Checkpoint, find_checkpoint
from hvdrec.training.state import TrainState


@dataclass(frozen=True)
class Origin:
    """The checkpoint from which a new run starts.

    Attributes:
        checkpoint: The best checkpoint of the earlier run.
        config: Configuration of the earlier run.
        generation: Generation of the features on which the earlier run was trained; see
            `features.vocabulary`.
    """

    checkpoint: Checkpoint
    config: Config
    generation: int


def find_origin(run: Path, config: Config, features: Manifest) -> Origin:
    """Find the checkpoint to start from, and check that the new run can start from it.

    Args:
        run: Directory of the earlier run.
        config: Configuration of the new run.
        features: Manifest of the features of the new run.

    Raises:
        UserError: There is no earlier run; the earlier run is also the run to write; the new
            features were not made from the earlier ones; or the models differ in more than added or
            removed features.
    """
    if run.resolve() == config.paths.of("run").resolve():
        remedy = "choose another paths.run, or continue this one with --resume"
        raise invalid_value("--from", str(run), "is the run to write", remedy)
    before, checkpoint = read_config(run), find_checkpoint(run, "best")
    trained_on = checkpoint.manifest.made_from("features")
    generation = generation_of(trained_on, features)
    if generation is None:
        problem = (
            f"was trained on features {trained_on or '(not recorded)'}, and the features "
            f"{features.identity} in {config.paths.of('features')} do not go on from them"
        )
        remedy = "run hvdrec prepare with --from and the features of that run, then train"
        raise invalid_file(checkpoint.directory, problem, remedy)
    _check_same(run, before, config)
    return Origin(checkpoint, before, generation)


def start_from(origin: Origin, state: TrainState, fitted: Fitted) -> Position:
    """Load the checkpoint into a new state; return the position at which the new run starts.

    The step number continues from the checkpoint; epochs are counted from 0 again.

    Args:
        origin: The checkpoint.
        state: The new model, with initial values.
        fitted: The features of the new run.
    """
    files, meta = origin.checkpoint.files, origin.checkpoint.manifest.meta
    changed = {
        table: fitted.changed_in(table) > origin.generation
        for group in state.tables.groups
        for table in group.sizes
    }
    carry_tables(files, meta["tables"], state.tables, changed)
    weights = _moved_all(origin, state, load_tensors(files.verified(MODEL_FILE)))
    state.model.load_state_dict({**state.model.state_dict(), **weights})
    optimizer = _moved_all(origin, state, load_tensors(files.verified(OPTIMIZER_FILE)))
    restore_optimizer(state.model, state.optimizer, optimizer)
    if state.averages is not None:
        averages = dict(state.model.named_parameters())
        if AVERAGES_FILE in files:
            stored = load_tensors(files.verified(AVERAGES_FILE))
            averages |= _moved_all(origin, state, stored)  # type: ignore[arg-type]
        for name, value in state.averages.dense.items():
            value.copy_(averages[name].detach())
    return Position(step=int(meta["position"]["step"]))


def _moved_all(origin: Origin, state: TrainState, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adapt stored tensors, by ``PARAMETER`` or ``PARAMETER/STATE``, to inputs of the new model."""
    sizes: dict[str, int] = defaultdict(int)  # the model has no tables, so sizes do not matter
    before = input_axes(build_model(origin.config, sizes, with_tables=False))
    now = input_axes(state.model)
    parameters = dict(state.model.named_parameters())
    fitting: dict[str, Tensor] = {}
    for name, value in tensors.items():
        parameter = name.partition("/")[0]
        if parameter not in parameters:
            continue  # the parameter belongs to a removed feature
        if value.ndim and parameter in now:
            value = moved(value, before[parameter], now[parameter])  # noqa: PLW2901
        if value.ndim and value.shape != parameters[parameter].shape:
            problem = (
                f"'{parameter}' has shape {list(value.shape)}, the configuration gives "
                f"{list(parameters[parameter].shape)}"
            )
            raise invalid_file(origin.checkpoint.directory, problem, "use the same [model]")
        fitting[name] = value
    return fitting


def _check_same(run: Path, before: Config, now: Config) -> None:
    known = {feature.name for feature in before.features} & {f.name for f in now.features}
    fields: list[tuple[str, object, object]] = [
        ("train.objective", before.train.objective, now.train.objective),
        (
            "train.embedding_optimizer",
            before.train.embedding_optimizer,
            now.train.embedding_optimizer,
        ),
        ("model", to_dict(_of_known(before.model, known)), to_dict(_of_known(now.model, known))),
        ("tasks", [task.name for task in before.tasks], [task.name for task in now.tasks]),
    ]
    for field, old, new in fields:
        if old != new:
            raise UserError(
                f"{run}: was trained with {field} = {old}, the configuration says {new}; use the "
                "former, or train from the beginning without --from",
                field=field,
                value=new,
            )


def _of_known(model: Model, names: set[str]) -> Model:
    """Return a ``[model]`` section without its entries for features that are not in `names`."""
    pooling = {name: value for name, value in model.pooling.items() if name in names}
    direct = tuple(name for name in model.ranker.direct if name in names)
    return replace(model, pooling=pooling, ranker=replace(model.ranker, direct=direct))
