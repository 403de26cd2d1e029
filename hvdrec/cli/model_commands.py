"""The commands that make and evaluate a model: train, tune, plan, evaluate, export."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path

from hvdrec.cli.command import (
    ALL_FIELDS,
    CHECKPOINT,
    CONFIG,
    OVERWRITE,
    RUN,
    WORKERS,
    Answer,
    argument,
    command,
    load_config,
    load_config_on_all,
)
from hvdrec.cli.reports import render_evaluation, render_plan, render_search
from hvdrec.parallel.progress import is_first_rank

EXPORT_FIELDS = ("export.", "evaluate.seen", "tasks.N.share", "model.ranker.combine")
"""Prefixes of the configuration fields that ``hvdrec export`` may change after training."""
TUNE_NOTES = """\
ranges and choices:
  train.learning_rate=log:1e-4:1e-2     logarithmic, both ends included
  model.ranker.dropout=0:0.4            uniform; 0:0.4:0.1 in steps
  model.dimension=16,32,64              choices of any type
  'model.ranker.hidden=[256,128],[400,400,400]'

Fields of [model] and [train], loader.shuffle_rows, parallel.synchronization and
parallel.average_every can be searched: they do not change the features, which all trials share.
Run it alone, or under horovodrun or mpirun: then all ranks train each trial together. The first
trial is the configuration as it is, with the overrides of the command line (--train.epochs 3). The
objective is train.metric on the validation split; the test split is not read.

Results are in WORK/tune: trials.json, a log per trial, and the checkpoints of the best trial
(hvdrec evaluate WORK/tune/trial-NNN). Rerun the command to resume an interrupted search, in the
middle of a trial if that has a checkpoint. Raise --trials for more trials, or start over with
--overwrite.

"""


@command(
    CONFIG,
    argument(
        "--from",
        dest="start_from",
        type=Path,
        metavar="RUN",
        help="earlier run to start from: its best checkpoint goes on with weights, table rows and "
        "optimizer state on features that hvdrec prepare --from made",
    ),
    OVERWRITE,
    argument(
        "--resume", action="store_true", help="continue from the latest checkpoint, if there is one"
    ),
    argument(
        "--log-format",
        choices=["text", "json"],
        default="text",
        help="what is shown on standard error: text, or the JSON lines of WORK/run/log.jsonl",
    ),
    argument(
        "--horovod-timeline",
        type=Path,
        metavar="FILE",
        help="write Horovod's timeline of all messages to this JSON file; training is slower",
    ),
    argument(
        "--profile",
        type=Path,
        metavar="DIR",
        help="record steps 11 to 30 with the profiler of torch, a trace for each rank",
    ),
    example="horovodrun -np 2 hvdrec train configs/movielens-1m.toml --train.epochs 3",
    fields=ALL_FIELDS,
)
def train(options: argparse.Namespace) -> Answer:
    """Train a model in one process, or on many ranks under horovodrun or mpirun."""
    if options.horovod_timeline is not None:
        from hvdrec.parallel.environment import record_timeline

        record_timeline(options.horovod_timeline)
    config = load_config_on_all(options)
    from hvdrec.training.trainer import train

    result = train(
        config,
        start_from=options.start_from,
        resume=options.resume,
        overwrite=options.overwrite,
        log_format=options.log_format,
        profile=options.profile,
    )
    best = "no validation metric"
    if result.best is not None:
        best = f"best validation {result.metric} {result.best:.4f} at step {result.best_step}"
    ranks = f"{result.world_size} rank" + ("" if result.world_size == 1 else "s")
    text = f"{result.steps} steps on {ranks}; {best}\nwrote {result.run}"
    return Answer(result.to_dict(), text)


@command(
    CONFIG,
    OVERWRITE,
    argument(
        "--search",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=RANGE",
        help="what to search; optional for a search that is resumed",
    ),
    argument(
        "--trials",
        type=int,
        default=20,
        metavar="N",
        help="number of trials, including those already done (default 20)",
    ),
    argument(
        "--prune",
        action="store_true",
        help="stop a trial that is worse than the median of the complete trials after the same "
        "number of epochs (from five complete trials on)",
    ),
    notes=TUNE_NOTES,
    example="hvdrec tune configs/movielens-1m.toml --trials 30 --prune \\\n"
    "    --search train.embedding-learning-rate=log:0.05:0.8 model.ranker.dropout=0:0.4",
    fields=ALL_FIELDS,
)
def tune(options: argparse.Namespace) -> Answer:
    """Search for the field values that give the best validation metric, with Optuna."""
    config = load_config_on_all(options)
    from hvdrec.tuning.tune import tune

    result = tune(
        config,
        options.search,
        trials=options.trials,
        prune=options.prune,
        overwrite=options.overwrite,
    )
    return Answer(result.to_dict(), render_search(result))


@command(
    CONFIG,
    argument("--ranks", type=int, default=0, help="ranks of the job (default: of this job)"),
    argument("--ranks-per-host", type=int, default=0, help="default: all ranks on one host"),
    argument("--memory", default="", help="memory of a rank, such as 80GB"),
    argument("--bandwidth", default="", help="network bandwidth of a host, such as 200Gbit"),
    argument(
        "--cores", type=int, default=0, help="CPU cores of a host, shared by its ranks; 0: enough"
    ),
    argument(
        "--calibrate",
        action="store_true",
        help="measure this machine first, under horovodrun or mpirun also its messages, and store "
        "the result in WORK/plan.json",
    ),
    argument("--constants", type=Path, help="measurements of another machine (a plan.json)"),
    example="hvdrec plan configs/movielens-1m.toml --ranks 16 --ranks-per-host 8 "
    "--bandwidth 25Gbit",
    fields=ALL_FIELDS,
)
def plan(options: argparse.Namespace) -> Answer:
    """Predict memory, network traffic and time of a training step on any number of ranks."""
    from hvdrec.planner.plan import plan

    config = load_config(options)
    result = plan(
        config,
        ranks=options.ranks,
        ranks_per_host=options.ranks_per_host,
        memory=options.memory,
        bandwidth=options.bandwidth,
        cores=options.cores,
        calibrate=options.calibrate,
        constants=options.constants,
    )
    return Answer(asdict(result), render_plan(result))


@command(
    RUN,
    argument("--split", choices=["validation", "test"], default="test", help="default: test"),
    CHECKPOINT,
    argument(
        "--baselines",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also evaluate popularity, means, item-item co-occurrence and EASE, fitted on the "
        "training rows with settings chosen on validation (default), or only the model",
    ),
    argument(
        "--ease-items",
        type=int,
        default=10_000,
        metavar="N",
        help="largest catalogue for which EASE is fitted (default 10000, which takes 1.6 GB and "
        "minutes; twice the items take four times the memory and eight times the time; 0: never)",
    ),
    argument("--output", type=Path, help="also write the JSON report to this file"),
    example="hvdrec evaluate runs/movielens-1m/run --output report.json",
    fields=("evaluate.",),
)
def evaluate(options: argparse.Namespace) -> Answer:
    """Evaluate a run and its baselines; under horovodrun or mpirun, ranks share the work."""
    from hvdrec.storage.drafts import write_text
    from hvdrec.storage.json_text import json_text
    from hvdrec.training.evaluate_run import evaluate

    result = evaluate(
        options.run,
        split=options.split,
        checkpoint=options.checkpoint,
        baselines=options.baselines,
        ease_items=options.ease_items,
        overrides=options.overrides,
    )
    facts = result.to_dict()
    if options.output is not None and is_first_rank():
        write_text(options.output, json_text(facts, indent=1) + "\n")
    return Answer(facts, render_evaluation(facts))


@command(
    RUN,
    argument("--to", help="directory or URL of the bundle (default paths.bundle)"),
    CHECKPOINT,
    argument("--parity-rows", type=int, help="held-out rows to compare with torch"),
    argument(
        "--allow-worse",
        action="store_true",
        help="export a model that is worse than the base rate, the means or popularity on the "
        "validation split",
    ),
    WORKERS,
    OVERWRITE,
    example="hvdrec export runs/movielens-1m/run --export.embeddings int8",
    fields=EXPORT_FIELDS,
)
def export(options: argparse.Namespace) -> Answer:
    """Write the bundle of a run, if it gives the same scores as the PyTorch model.

    Options can change the fields of [export], and how the score combines several labels.
    """
    from hvdrec.config import with_fields
    from hvdrec.exporting.export_run import export_with
    from hvdrec.parallel.pool import open_pool
    from hvdrec.training.checkpoint import read_config

    with open_pool(options.workers) as pool:
        if pool is None:  # only the first rank of the MPI job prints a result
            return Answer({}, "")
        config = with_fields(read_config(options.run), options.overrides)
        if options.to is not None:
            config = replace(config, paths=replace(config.paths, bundle=str(options.to)))
        if options.parity_rows is not None:
            config = replace(config, export=replace(config.export, parity_rows=options.parity_rows))
        result = export_with(
            pool,
            options.run,
            config,
            checkpoint=options.checkpoint,
            overwrite=options.overwrite,
            allow_worse=options.allow_worse,
        )
    lines = [
        f"{result.users} users, {result.items} items; {result.parity['rows']} scores of held-out "
        f"rows are within {result.parity['largest_difference']:.2g} of torch"
    ]
    if result.precision is not None:
        cost = result.precision
        lines.append(
            f"embeddings {cost['embeddings']}, ranker {cost['ranker']}: validation AUC "
            f"{cost['auc']:.5f}, {cost['auc_loss']:.2g} less than in float32"
        )
    return Answer(result.to_dict(), "\n".join([*lines, f"wrote {result.path}"]))
