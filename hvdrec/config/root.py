"""`Config`: the whole configuration of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import MinLen

from hvdrec.config.checks_section import Checks
from hvdrec.config.data_sections import Encode, Grow, Loader, Paths, Samples, Task
from hvdrec.config.rules import check_rules
from hvdrec.config.schema import Feature, Schema
from hvdrec.config.sections import Evaluate, Export, Model, Parallel, Promote, Train

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    from hvdrec.config.structure import dataclass


@dataclass(frozen=True)
class Config:
    """The configuration of one run, from raw tables to a bundle.

    Raises:
        UserError: A value has the wrong type, is out of range or contradicts another value.
    """

    name: str
    """Name of the run, for display."""
    features: Annotated[tuple[Feature, ...], MinLen(1)]
    """The features: [[features]] tables."""
    seed: int = 0
    """Seed of initial weights, row order and dropout."""
    paths: Paths = Paths()
    """Directories that the stages read and write."""
    samples: Samples = Samples()
    """How raw tables become labelled samples."""
    tasks: tuple[Task, ...] = ()
    """The labels that the ranker predicts. Empty: only samples.label."""
    grow: Grow = Grow()
    """How features continue those of an earlier preparation."""
    checks: Checks = Checks()
    """Limits of the checks before training."""
    encode: Encode = Encode()
    """How samples become shards."""
    loader: Loader = Loader()
    """How shards become batches."""
    model: Model = Model()
    """Shape of the model."""
    train: Train = Train()
    """How the model is trained."""
    parallel: Parallel = Parallel()
    """How ranks share the work."""
    evaluate: Evaluate = Evaluate()
    """What evaluation reports."""
    export: Export = Export()
    """How the bundle is made."""
    promote: Promote = Promote()
    """When a new model may serve."""

    def __post_init__(self) -> None:
        """Check the rules between fields."""
        check_rules(self)

    @property
    def schema(self) -> Schema:
        """The features, and which of them are the keys of users and items."""
        return Schema(self.features, self.samples.user, self.samples.item)

    @property
    def task_columns(self) -> tuple[str, ...]:
        """The label columns of the tasks, in the order of the tasks."""
        return tuple(self.schema.own_name(task.column) for task in self.tasks)
