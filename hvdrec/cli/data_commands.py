"""Commands from public data or raw logs to encoded shards."""

from __future__ import annotations

import argparse
from pathlib import Path

from hvdrec.cli.command import (
    ALL_FIELDS,
    Answer,
    Command,
    add_config_argument,
    add_overwrite_option,
    add_workers_option,
    load_config,
)
from hvdrec.cli.text_table import table


def _data(options: argparse.Namespace) -> Answer:
    from hvdrec import datasets

    if options.name is None:
        known = datasets.describe()
        rows = [[d["name"], d["description"], d["licence"]] for d in known]
        return Answer(known, table(["name", "what", "licence"], rows))
    out = options.to or Path("data") / options.name
    facts = datasets.download_dataset(options.name, out, overwrite=options.overwrite)
    return Answer({"path": str(out), **facts}, f"wrote {out}")


def _samples(options: argparse.Namespace) -> Answer:
    from hvdrec.samples import make_samples

    result = make_samples(load_config(options), overwrite=options.overwrite)
    rows = [[split, count, result.positives[split]] for split, count in result.rows.items()]
    text = table(["split", "rows", "positives"], rows) + f"\nwrote {result.path}"
    return Answer(result.to_dict(), text)


def _prepare(options: argparse.Namespace) -> Answer:
    from hvdrec.features.prepare import prepare_with
    from hvdrec.parallel.pool import open_pool

    with open_pool(options.workers) as pool:
        if pool is None:  # the first rank of the MPI job answers
            return Answer({}, "")
        result = prepare_with(pool, load_config(options), overwrite=options.overwrite)
    sizes = [[name, size] for name, size in result.sizes.items()]
    shards = [[split, rows, len(result.shards[split])] for split, rows in result.rows.items()]
    text = table(["split", "rows", "shards"], shards) + "\n\n" + table(["table", "codes"], sizes)
    return Answer(result.to_dict(), f"{text}\nwrote {result.path}")


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="name of the data set; omit it to list them")
    parser.add_argument("--to", type=Path, help="directory to write (default data/NAME)")
    add_overwrite_option(parser)


def _add_samples_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_argument(parser)
    add_overwrite_option(parser)


def _add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_argument(parser)
    add_overwrite_option(parser)
    add_workers_option(parser)


COMMANDS = (
    Command(
        "data",
        _data,
        "Download a public data set and write it as plain Parquet tables.",
        "hvdrec data movielens-1m --to data/movielens-1m",
        _add_data_arguments,
    ),
    Command(
        "samples",
        _samples,
        "Make labelled samples, split into train, validation and test.",
        "hvdrec samples configs/movielens-1m.toml",
        _add_samples_arguments,
        ALL_FIELDS,
    ),
    Command(
        "prepare",
        _prepare,
        "Fit the features on the training split and encode all shards.",
        "hvdrec prepare configs/movielens-1m.toml --workers 2",
        _add_prepare_arguments,
        ALL_FIELDS,
    ),
)
