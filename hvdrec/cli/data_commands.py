"""From public data or raw logs to encoded shards."""

from __future__ import annotations

import argparse
from pathlib import Path

from hvdrec.cli.answer import Answer, load_config
from hvdrec.cli.text_table import table
from hvdrec.parallel.progress import print_line


def doctor(options: argparse.Namespace, rest: list[str]) -> Answer:
    from hvdrec.cli.reports import render_checks
    from hvdrec.cluster.doctor import diagnose

    report = diagnose()
    return Answer(report.as_dict(), render_checks(report.checks), report.exit_status)


def data(options: argparse.Namespace, rest: list[str]) -> Answer:
    from hvdrec import datasets

    if options.name is None:
        known = datasets.describe()
        rows = [[d["name"], d["description"], d["licence"]] for d in known]
        return Answer(known, table(["name", "what", "licence"], rows))
    out = options.to or Path("data") / options.name
    facts = datasets.prepare(options.name, out, overwrite=options.overwrite, notify=print_line)
    return Answer({"path": str(out), **facts}, f"wrote {out}")


def samples(options: argparse.Namespace, rest: list[str]) -> Answer:
    from hvdrec.samples import make_samples

    config = load_config(options, rest)
    result = make_samples(config, overwrite=options.overwrite)
    rows = [[split, count, result.positives[split]] for split, count in result.rows.items()]
    text = table(["split", "rows", "positives"], rows) + f"\nwrote {result.path}"
    return Answer(result.to_dict(), text)


def prepare(options: argparse.Namespace, rest: list[str]) -> Answer:
    from hvdrec.features.prepare import prepare_with
    from hvdrec.parallel.pool import open_pool

    with open_pool(options.workers) as pool:
        if pool is None:  # the first rank of the MPI job answers
            return Answer({}, "")
        result = prepare_with(pool, load_config(options, rest), overwrite=options.overwrite)
    sizes = [[name, size] for name, size in result.sizes.items()]
    shards = [[split, rows, len(result.shards[split])] for split, rows in result.rows.items()]
    text = table(["split", "rows", "shards"], shards) + "\n\n" + table(["table", "codes"], sizes)
    return Answer(result.to_dict(), f"{text}\nwrote {result.path}")
