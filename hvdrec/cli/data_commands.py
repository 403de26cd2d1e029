"""From public data or raw logs to encoded shards."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hvdrec.cli.answer import Answer, load_config, notify
from hvdrec.cli.text_table import table

if TYPE_CHECKING:
    from hvdrec.parallel.pool import Workers


def doctor(options: argparse.Namespace, rest: list[str]) -> Answer:
    from hvdrec.cluster.doctor import diagnose

    report = diagnose()
    return Answer(report.as_dict(), report.render(), report.exit_status)


def data(options: argparse.Namespace, rest: list[str]) -> Answer:
    from hvdrec import datasets

    if options.name is None:
        known = datasets.describe()
        rows = [[d["name"], d["description"], d["licence"]] for d in known]
        return Answer(known, table(["name", "what", "licence"], rows))
    out = options.to or Path("data") / options.name
    facts = datasets.prepare(options.name, out, overwrite=options.overwrite, notify=notify)
    return Answer({"path": str(out), **facts}, f"wrote {out}")


def samples(options: argparse.Namespace, rest: list[str]) -> Answer:
    from hvdrec import samples

    config = load_config(options, rest)
    meta = samples.make(config, overwrite=options.overwrite, notify=notify)
    path = config.paths.of("samples")
    rows = [[split, meta["rows"][split], meta["positives"][split]] for split in meta["rows"]]
    facts = {"path": str(path), **{k: meta[k] for k in ("rows", "positives", "users", "items")}}
    return Answer(facts, table(["split", "rows", "positives"], rows) + f"\nwrote {path}")


def prepare(options: argparse.Namespace, rest: list[str]) -> Answer:
    from hvdrec.parallel.rank_pool import open_workers

    with open_workers(options.workers) as workers:
        # The other ranks of an MPI job have then done their part.
        return Answer({}, "") if workers is None else _prepare(options, rest, workers)


def _prepare(options: argparse.Namespace, rest: list[str], workers: Workers) -> Answer:
    from tqdm import tqdm

    from hvdrec.features.encode import encode

    config = load_config(options, rest)
    out = config.paths.of("features")
    with tqdm(unit="row", unit_scale=True, leave=False, disable=None) as bar:
        meta = encode(
            config.paths.of("samples"),
            out,
            config,
            overwrite=options.overwrite,
            notify=notify if bar.disable else bar.set_description,
            progress=bar.update,
            workers=workers,
        )
    sizes = [[name, size] for name, size in meta["sizes"].items()]
    shards = [[split, meta["rows"][split], len(meta["shards"][split])] for split in meta["rows"]]
    facts = {"path": str(out), **{k: meta[k] for k in ("rows", "sizes", "shards")}}
    text = table(["split", "rows", "shards"], shards) + "\n\n" + table(["table", "codes"], sizes)
    return Answer(facts, f"{text}\nwrote {out}")
