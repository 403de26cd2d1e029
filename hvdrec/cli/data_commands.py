"""The commands that prepare data: data, samples, delay, prepare."""

from __future__ import annotations

import argparse
from pathlib import Path

from hvdrec.cli.command import (
    ALL_FIELDS,
    CONFIG,
    OVERWRITE,
    WORKERS,
    Answer,
    argument,
    command,
    load_config,
)
from hvdrec.cli.text_table import table


@command(
    argument("name", nargs="?", help="name of the data set; omit it to list them"),
    argument("--to", type=Path, help="directory to write (default data/NAME)"),
    OVERWRITE,
    example="hvdrec data movielens-1m --to data/movielens-1m",
)
def data(options: argparse.Namespace) -> Answer:
    """Download a public data set and write it as plain Parquet tables."""
    from hvdrec import datasets

    if options.name is None:
        known = datasets.describe()
        rows = [[d["name"], d["description"], d["licence"]] for d in known]
        return Answer(known, table(["name", "what", "licence"], rows))
    out = options.to or Path("data") / options.name
    facts = datasets.download_dataset(options.name, out, overwrite=options.overwrite)
    return Answer({"path": str(out), **facts}, f"wrote {out}")


@command(
    CONFIG,
    OVERWRITE,
    argument(
        "--engine",
        choices=("duckdb", "spark"),
        default="duckdb",
        help="duckdb (default) works in this process; spark joins and labels the rows in the "
        "executors that Spark's own settings name; both write the same samples",
    ),
    example="hvdrec samples configs/movielens-1m.toml",
    fields=ALL_FIELDS,
)
def samples(options: argparse.Namespace) -> Answer:
    """Make labelled samples, split into train, validation and test."""
    from hvdrec.samples import make_samples

    config = load_config(options)
    result = make_samples(config, engine=options.engine, overwrite=options.overwrite)
    rows = [[split, count, result.positives[split]] for split, count in result.rows.items()]
    text = table(["split", "rows", "positives"], rows) + f"\nwrote {result.path}"
    return Answer(result.to_dict(), "\n".join([text, *(f"warning: {w}" for w in result.warnings)]))


@command(
    CONFIG,
    argument(
        "--share",
        type=float,
        default=0.95,
        help="share of the positives that the window must catch (default: 0.95)",
    ),
    argument(
        "--within",
        default="",
        metavar="DURATION",
        help="longest window to examine, such as 7d (default: ten times the configured one, as far "
        "as the log reaches)",
    ),
    argument("--html", type=Path, metavar="FILE", help="also write a page with the curves"),
    example="hvdrec delay shop.toml --share 0.95 --within 7d --html delays.html",
    notes="The configuration needs [[samples.feedback]]; see docs/label-join.md.\n\n",
    fields=("paths", "samples"),
)
def delay(options: argparse.Namespace) -> Answer:
    """Measure how late feedback comes, and recommend a label window for each action."""
    from hvdrec.cli.delay_text import render_delays
    from hvdrec.errors import write_errors_named
    from hvdrec.samples.delay import measure_delays
    from hvdrec.samples.delay_html import render_html

    result = measure_delays(load_config(options), share=options.share, within=options.within)
    text = render_delays(result)
    if options.html:
        with write_errors_named(options.html):
            options.html.write_text(render_html(result), encoding="utf-8")
        text += f"\nwrote {options.html}"
    return Answer(result.to_dict(), text)


@command(
    CONFIG,
    argument(
        "--from",
        dest="start_from",
        metavar="FEATURES",
        help="earlier features to go on from: known values keep their codes, new ones get further "
        "codes; see [grow]",
    ),
    OVERWRITE,
    WORKERS,
    argument(
        "--engine",
        choices=("duckdb", "spark"),
        default="duckdb",
        help="duckdb (default) works in this process and its workers, spark in the executors that "
        "Spark's own settings name; both write the same shards",
    ),
    example="hvdrec prepare configs/movielens-1m.toml --workers 2",
    fields=ALL_FIELDS,
)
def prepare(options: argparse.Namespace) -> Answer:
    """Fit the features on the training split and encode all shards."""
    from hvdrec.features.prepare import open_workers, prepare_with

    with open_workers(options.engine, options.workers) as pool:
        if pool is None:  # the first rank of the MPI job answers
            return Answer({}, "")
        result = prepare_with(
            pool,
            load_config(options),
            start_from=options.start_from,
            overwrite=options.overwrite,
        )
    head, sizes = ["table", "codes"], [[name, size] for name, size in result.sizes.items()]
    if result.growth:
        head += ["admitted", "evicted", "free"]
        unchanged = {"admitted": 0, "evicted": 0, "free": 0}
        sizes = [[*row, *result.growth.get(str(row[0]), unchanged).values()] for row in sizes]
    shards = [[split, rows, len(result.shards[split])] for split, rows in result.rows.items()]
    text = table(["split", "rows", "shards"], shards) + "\n\n" + table(head, sizes)
    return Answer(result.to_dict(), f"{text}\nwrote {result.path}")
