"""`SampleSpec`: the parts of a configuration that define the samples."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from hvdrec.config import Config
from hvdrec.config.data_sections import Samples, Task
from hvdrec.config.schema import Column, RawType, Schema, Side
from hvdrec.errors import invalid_value
from hvdrec.samples.columns import cast
from hvdrec.samples.split import RANDOM


@dataclass(frozen=True)
class SampleSpec:
    """The section ``[samples]``, the raw columns of all features, and the tasks (labels)."""

    samples: Samples
    schema: Schema
    features: tuple[Column, ...]
    tasks: tuple[Task, ...]

    @staticmethod
    def of(config: Config) -> SampleSpec:
        """Take these parts from a configuration."""
        return SampleSpec(config.samples, config.schema, config.schema.columns(), config.tasks)

    @property
    def raw_features(self) -> list[Column]:
        """The features that are columns of the raw tables; histories are not."""
        histories = {history.name for history in self.samples.history}
        return [feature for feature in self.features if feature.name not in histories]

    @property
    def columns(self) -> list[str]:
        """Names of the keys and the raw features, without repetition."""
        names = [self.samples.user, self.samples.item, *(f.name for f in self.raw_features)]
        return list(dict.fromkeys(names))

    @property
    def declared(self) -> dict[str, RawType]:
        """Raw column -> the type that its feature or key declares; keys are strings by default."""
        dtypes: dict[str, RawType] = dict.fromkeys((self.samples.user, self.samples.item), "string")
        dtypes |= {feature.name: feature.dtype for feature in self.features}
        return {name: t for name, t in dtypes.items() if name not in self.samples.derive}

    def side_features(self, side: Side) -> list[Column]:
        """Return the raw features of one side: "user", "item" or "scene"."""
        return [feature for feature in self.raw_features if feature.side == side]

    def feature(self, name: str) -> Column | None:
        """Return the feature that reads a column; None if no feature does."""
        return next((feature for feature in self.features if feature.name == name), None)

    def cast(self, name: str, array: pa.Array, where: str) -> pa.Array:
        """Cast a key or feature to its declared type; keys are strings by default.

        `where` is the file or configuration key that the column comes from, for error messages.
        """
        feature = self.feature(name)
        if feature is None:
            return cast(array, "string", where=where, name=name, purpose="a key")
        purpose = f"feature '{name}'"
        lists = feature.is_list
        return cast(array, feature.dtype, where=where, name=name, purpose=purpose, lists=lists)

    def require_time(self) -> None:
        """Raise UserError if a split or history needs times that are not configured.

        Also raise it for histories of a scope that the split does not allow.
        """
        samples, split = self.samples, self.samples.split
        by_column = split.method == "temporal" and split.column
        remedy = "name the column of the time"
        if split.method in ("temporal", "leave-last-out") and not (samples.time or by_column):
            also = " or samples.split.column" if split.method == "temporal" else ""
            problem = f"needs samples.time{also}, which is empty"
            remedy += " or use method = 'random'"
            raise invalid_value("samples.split.method", split.method, problem, remedy)
        for i, history in enumerate(samples.history):
            field = f"samples.history[{i}]"
            if not samples.time and (history.scope == "before" or history.within):
                problem = "needs samples.time, which is empty"
                raise invalid_value(f"{field}.name", history.name, problem, remedy)
            if history.scope == "others" and split.method not in RANDOM:
                problem = (
                    f"contains later rows, which samples.split.method = '{split.method}' forbids"
                )
                raise invalid_value(f"{field}.scope", "others", problem, "use scope = 'before'")
            for option, value, default in (
                ("repeats", history.repeats, True),
                ("within", history.within, ""),
            ):
                if history.scope == "others" and value != default:
                    problem = "works only with scope = 'before'"
                    raise invalid_value(f"{field}.{option}", value, problem, "leave it out")
