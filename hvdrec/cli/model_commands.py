"""From shards to a bundle: plan, train, evaluate, export."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from hvdrec.cli.answer import Answer, load_config, notify
from hvdrec.cli.reports import render_evaluation, render_plan, render_search
from hvdrec.errors import UserError

if TYPE_CHECKING:
    from hvdrec.config import Config
    from hvdrec.parallel.pool import Workers

UNTRAINED = re.compile(
    r"--(export\.|tasks\.\d+\.share(=|$)|model\.ranker\.combine(=|$)|fields-help$)"
)
"""Options for fields that can be other ones after training."""


def train(options: argparse.Namespace, rest: list[str]) -> Answer:
    config = _load_config_together(options, rest)
    from hvdrec.training.loop import train

    facts = train(config, resume=options.resume, overwrite=options.overwrite)
    best = ", ".join(f"{name} {value}" for name, value in facts["validation"].items())
    return Answer(
        facts,
        f"{facts['steps']} steps on {facts['world_size']} ranks; best {best}\nwrote {facts['run']}",
    )


def tune(options: argparse.Namespace, rest: list[str]) -> Answer:
    config = _load_config_together(options, rest)
    from hvdrec.config.structure import to_dict
    from hvdrec.tuning.run import FOLDER, Options, tune
    from hvdrec.tuning.search import FILE, told_best

    search = tune(
        config,
        Options(tuple(options.search), options.trials, options.prune, options.overwrite),
        notify,
    )
    file = Path(config.paths.work) / FOLDER / FILE
    facts = {
        "path": str(file),
        "metric": search.metric,
        "best": told_best(search),
        "trials": to_dict(search.trials),
    }
    return Answer(facts, render_search(search, str(file)))


def plan(options: argparse.Namespace, rest: list[str]) -> Answer:
    config = load_config(options, rest)
    from dataclasses import asdict

    from hvdrec.parallel import ranks
    from hvdrec.planner.plan import Cluster
    from hvdrec.planner.planning import (
        CONSTANTS_FILE,
        calibrate,
        constants_for,
        make_plan,
        parse_quantity,
    )

    for name in ("ranks", "ranks_per_host", "cores"):
        if getattr(options, name) < 0:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} {getattr(options, name)}: must not be negative")
    bits = {"Gbit": 1e9, "Mbit": 1e6, "Tbit": 1e12}
    sizes = {"GB": 1e9, "MB": 1e6, "TB": 1e12}
    memory = parse_quantity(options.memory, sizes, "--memory") if options.memory else 0.0
    bandwidth = parse_quantity(options.bandwidth, bits, "--bandwidth") if options.bandwidth else 0.0
    if options.calibrate:
        world = ranks.init()
        constants = ranks.together(lambda: calibrate(config))
        if world.is_first:
            constants.save(Path(config.paths.work) / CONSTANTS_FILE)
    else:
        constants = constants_for(config, options.constants)
    count = options.ranks or ranks.current().size
    cluster = Cluster(count, options.ranks_per_host or count, memory, bandwidth, options.cores)
    planned = make_plan(config, cluster, constants)
    plan = planned.plan
    facts = {
        "cluster": asdict(cluster),
        "constants": asdict(constants),
        "tables": [asdict(each) for each in plan.tables],
        "memory_per_rank": plan.memory,
        "fits": plan.fits,
        "smallest_ranks": planned.smallest,
        "bytes_sent_per_step": {**plan.bytes_sent, "total": plan.total_bytes},
        "seconds_per_step": {**plan.seconds, "total": plan.step_seconds},
        "rows_per_second": config.train.batch_size / plan.step_seconds,
    }
    return Answer(facts, render_plan(config, planned))


def evaluate(options: argparse.Namespace, rest: list[str]) -> Answer:
    if options.ease_items < 0:
        raise UserError(f"--ease-items {options.ease_items}: must not be negative")
    from hvdrec.parallel import ranks
    from hvdrec.parallel.watchdog import watched

    ranks.init()
    with watched():
        return _evaluate(options)


def _evaluate(options: argparse.Namespace) -> Answer:
    from hvdrec.config.structure import to_dict
    from hvdrec.evaluation.evaluate import evaluate
    from hvdrec.evaluation.report import jsonable
    from hvdrec.parallel import ranks
    from hvdrec.storage.artifacts import write_text
    from hvdrec.training.checkpoint import load_model, load_model_and_tables, read_config
    from hvdrec.training.machine import pick_device, set_threads

    world = ranks.current()
    config = ranks.together(lambda: read_config(options.run))
    ranks.agree_on_config(to_dict(config))
    ranks.agree_on_files(config.paths.of("features"), "evaluate the same features everywhere")
    set_threads(config, world)
    device = ranks.together(lambda: pick_device(config, world))
    rows_of = None
    if world.size == 1:
        model, name = load_model(options.run, config, options.checkpoint)
        model.to(device)
    else:
        model, tables, name = load_model_and_tables(options.run, config, options.checkpoint, device)
        ranks.agree_on_files(options.run / "checkpoints" / name, "evaluate the same run everywhere")
        rows_of = tables.rows_of
    report = evaluate(
        model,
        config,
        options.split,
        with_baselines=options.baselines,
        ease_items=options.ease_items,
        rows_of=rows_of,
    )
    report = {"run": str(options.run), "checkpoint": name, **report}
    facts = jsonable(report)
    if options.output is not None and world.is_first:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.output, json.dumps(facts, indent=1) + "\n")
    return Answer(facts, render_evaluation(report))


def export(options: argparse.Namespace, rest: list[str]) -> Answer:
    from hvdrec.parallel.rank_pool import open_workers

    with open_workers(options.workers) as workers:
        # The other ranks of an MPI job have then done their part.
        return Answer({}, "") if workers is None else _export(options, rest, workers)


def _export(options: argparse.Namespace, rest: list[str], workers: Workers) -> Answer:
    from dataclasses import replace

    from hvdrec.evaluation.report import jsonable
    from hvdrec.exporting.writer import export
    from hvdrec.training.checkpoint import checkpoint_metrics, load_model, read_config

    config = _with_export_fields(read_config(options.run), options, rest)
    if options.to is not None:
        config = replace(config, paths=replace(config.paths, bundle=str(options.to)))
    if options.parity_rows is not None:
        config = replace(config, export=replace(config.export, parity_rows=options.parity_rows))
    model, name = load_model(options.run, config, options.checkpoint)
    meta = export(
        config,
        model,
        checkpoint=name,
        metrics=checkpoint_metrics(options.run, options.checkpoint),
        overwrite=options.overwrite,
        notify=notify,
        workers=workers,
    )
    out = config.paths.of("bundle")
    parity = meta["parity"]
    lines = [
        f"{meta['users']} users, {meta['items']} items; {parity['rows']} scores of held-out rows "
        f"are within {parity['largest_difference']:.2g} of torch"
    ]
    if "precision" in meta:
        cost = meta["precision"]
        lines.append(
            f"embeddings {cost['embeddings']}, ranker {cost['ranker']}: validation AUC "
            f"{cost['auc']:.5f}, {cost['auc_loss']:.2g} less than in float32"
        )
    text = "\n".join([*lines, f"wrote {out}"])
    kept = (
        "name",
        "checkpoint",
        "users",
        "items",
        "user_width",
        "item_width",
        "parity",
        "precision",
        "metrics",
    )
    told = {key: meta[key] for key in kept if key in meta}
    return Answer(jsonable({"path": str(out), **told}), text)


def _load_config_together(options: argparse.Namespace, rest: list[str]) -> Config:
    """Return the configuration; in a job of several ranks, none goes on where one has none."""
    from hvdrec.parallel.environment import is_launched

    config: Config
    if is_launched():
        from hvdrec.parallel import ranks

        ranks.init()
        config = ranks.together(lambda: load_config(options, rest))
    else:
        config = load_config(options, rest)
    return config


def _with_export_fields(config: Config, options: argparse.Namespace, rest: list[str]) -> Config:
    """Return a run's configuration with fields that need no training from the command line."""
    from hvdrec.config import override

    fields = [argument for argument in rest if argument.startswith("--")]
    for field in fields:
        if not UNTRAINED.match(field):
            raise UserError(
                f"command line: {field}: of a trained run only the fields of [export] and what the "
                "score is made of can be given anew (--export.embeddings int8, --tasks.0.share 2, "
                "--model.ranker.combine sum)"
            )
    if not rest:
        return config
    arguments = ["--help" if argument == "--fields-help" else argument for argument in rest]
    return override(config, arguments, f"hvdrec export {options.run}")
