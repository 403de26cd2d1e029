"""From shards to a bundle: plan, train, evaluate, export."""

from __future__ import annotations

import argparse
import json
import re
from typing import TYPE_CHECKING

from hvdrec.cli.answer import Answer, load_config, parse_overrides
from hvdrec.cli.reports import render_evaluation, render_plan, render_search
from hvdrec.errors import UserError
from hvdrec.parallel.progress import is_first_rank

if TYPE_CHECKING:
    from hvdrec.config import Config

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
    from hvdrec.tuning.run import tune

    result = tune(
        config,
        options.search,
        trials=options.trials,
        prune=options.prune,
        overwrite=options.overwrite,
    )
    return Answer(result.to_dict(), render_search(result))


def plan(options: argparse.Namespace, rest: list[str]) -> Answer:
    config = load_config(options, rest)
    from dataclasses import asdict

    from hvdrec.planner.plan import plan

    result = plan(
        config,
        ranks=options.ranks,
        ranks_per_host=options.ranks_per_host,
        memory=options.memory or "",
        bandwidth=options.bandwidth or "",
        cores=options.cores,
        calibrate=options.calibrate,
        constants=options.constants,
    )
    return Answer(asdict(result), render_plan(result, config.train.batch_size))


def evaluate(options: argparse.Namespace, rest: list[str]) -> Answer:
    from hvdrec.storage.artifacts import write_text
    from hvdrec.training.evaluate_run import evaluate

    result = evaluate(
        options.run,
        split=options.split,
        checkpoint=options.checkpoint,
        baselines=options.baselines,
        ease_items=options.ease_items,
    )
    facts = result.to_dict()
    if options.output is not None and is_first_rank():
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.output, json.dumps(facts, indent=1) + "\n")
    return Answer(facts, render_evaluation(facts))


def export(options: argparse.Namespace, rest: list[str]) -> Answer:
    from dataclasses import replace

    from hvdrec.exporting.export_run import export_with
    from hvdrec.parallel.pool import open_pool
    from hvdrec.training.checkpoint import read_config

    with open_pool(options.workers) as pool:
        if pool is None:  # the first rank of the MPI job answers
            return Answer({}, "")
        config = _with_export_fields(read_config(options.run), options, rest)
        if options.to is not None:
            config = replace(config, paths=replace(config.paths, bundle=str(options.to)))
        if options.parity_rows is not None:
            config = replace(config, export=replace(config.export, parity_rows=options.parity_rows))
        result = export_with(
            pool, options.run, config, checkpoint=options.checkpoint, overwrite=options.overwrite
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


def _load_config_together(options: argparse.Namespace, rest: list[str]) -> Config:
    """Return the configuration; in a job of several ranks, none goes on where one has none."""
    from hvdrec.parallel.environment import is_launched

    config: Config
    if is_launched():
        from hvdrec.parallel import ranks

        ranks.init()
        config = ranks.run_on_all(lambda: load_config(options, rest))
    else:
        config = load_config(options, rest)
    return config


def _with_export_fields(config: Config, options: argparse.Namespace, rest: list[str]) -> Config:
    """Return a run's configuration with fields that need no training from the command line."""
    from hvdrec.config import with_fields

    if "--fields-help" in rest:
        from hvdrec.cli.fields import describe_fields

        parser = argparse.ArgumentParser(f"hvdrec export {options.run}")
        describe_fields(parser, config, ("export.", "tasks.N.share", "model.ranker.combine"))
        parser.parse_args(["--help"])
    fields = [argument for argument in rest if argument.startswith("--")]
    for field in fields:
        if not UNTRAINED.match(field):
            raise UserError(
                f"command line: {field}: of a trained run only the fields of [export] and what the "
                "score is made of can be given anew (--export.embeddings int8, --tasks.0.share 2, "
                "--model.ranker.combine sum)"
            )
    return with_fields(config, parse_overrides(rest))
