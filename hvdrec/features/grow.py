"""Fit features that go on from earlier ones: old codes stay, new values get further codes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hvdrec.config.data_sections import Grow
from hvdrec.config.schema import Feature, Schema
from hvdrec.errors import invalid_value
from hvdrec.features.duckdb_split import open_duckdb_split
from hvdrec.features.fit import Fitted, OpenSplit, checked, shared
from hvdrec.features.kinds.kind import FittedFeature, kind_of
from hvdrec.features.kinds.training_split import TrainingSplit
from hvdrec.features.sample_checks import check_columns
from hvdrec.features.vocabulary import Growth

FIXED_FIELDS = ("side", "kind", "dtype", "dimension", "transform", "buckets", "shares", "columns")
"""Fields of a feature that decide what its codes mean or how wide its vectors are."""


def grow(
    samples: Path,
    schema: Schema,
    before: Fitted,
    options: Grow,
    open_split: OpenSplit = open_duckdb_split,
) -> Fitted:
    """Go on from fitted features with the training split of new samples.

    Args:
        samples: Directory that `hvdrec samples` wrote.
        schema: The features now. Those that `before` lacks are fitted from the beginning.
        before: The earlier features, loaded with ``to_grow``.
        options: The ``[grow]`` section.
        open_split: Opens the training split.

    Raises:
        UserError: The samples cannot be used; a feature has changed so that its codes would mean
            something else; or ``evict_days`` is set, but the samples have no times.
    """
    check_columns(samples / "train", schema)
    for feature in schema.features:
        if feature.name in before.features:
            _check_same(before.features[feature.name].feature, feature)
    learned: dict[str, FittedFeature] = {}
    with open_split(samples, schema) as split:
        growth = _growth(split, before, options)
        for feature in schema.features:
            if schema.vocabulary_of(feature) != feature.name:
                continue
            kind, known = kind_of(feature), before.features.get(feature.name)
            if known is not None:
                learned[feature.name] = kind.grow(known, feature, split, growth)
            else:
                fitted = kind.fit(feature, split)
                learned[feature.name] = replace(fitted, since=growth.generation)
    features = shared(schema, learned)
    return checked(Fitted(schema, features, growth.generation, growth.now))


def growth_facts(fitted: Fitted) -> dict[str, dict[str, int]]:
    """Return table -> the numbers of admitted values, of evicted values and of free codes."""
    facts: dict[str, dict[str, int]] = {}
    for name in fitted.sizes if fitted.generation else ():
        vocabulary = fitted.features[name].vocabulary
        if vocabulary is not None:
            admitted = vocabulary.admitted(fitted.generation)
            if fitted.features[name].since == fitted.generation:
                admitted = len(vocabulary.values)
            numbers = (admitted, vocabulary.evicted, vocabulary.free)
            facts[name] = dict(zip(("admitted", "evicted", "free"), numbers, strict=True))
    return facts


def _growth(split: TrainingSplit, before: Fitted, options: Grow) -> Growth:
    newest = split.newest_day
    if options.evict_days and newest is None:
        problem = "the samples have no times"
        raise invalid_value(
            "grow.evict_days",
            options.evict_days,
            problem,
            "set samples.time, run hvdrec samples again, or set grow.evict_days = 0",
        )
    days = [day for day in (newest, before.newest_day) if day is not None]
    return Growth(
        generation=before.generation + 1,
        counted=before.newest_day if newest is not None else None,
        now=max(days, default=None),
        evict_days=options.evict_days,
        follows=options.statistics == "follow",
    )


def _check_same(before: Feature, now: Feature) -> None:
    for name in FIXED_FIELDS:
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            raise invalid_value(
                f"features.{now.name}.{name}",
                list(new) if isinstance(new, tuple) else new,
                f"the earlier features have {old!r}",
                "keep it, or rename the feature, which then starts from the beginning",
            )
