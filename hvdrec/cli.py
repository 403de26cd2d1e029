"""The command line: one verb per stage. Thin: parse, call, print."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hvdrec import __version__
from hvdrec.errors import SharedError, UserError
from hvdrec.scoring.errors import ScoringError
from hvdrec.text import table

Verb = Callable[[argparse.Namespace, list[str]], "Answer"]

EPILOG = """\
from a log to ranked items:
  hvdrec data movielens-1m                            raw tables
  hvdrec samples configs/movielens-1m.toml            labelled, split samples
  hvdrec prepare configs/movielens-1m.toml            features fitted, shards encoded
  horovodrun -np 2 hvdrec train configs/movielens-1m.toml
  hvdrec evaluate runs/movielens-1m/run               metrics beside the baselines
  hvdrec export runs/movielens-1m/run                 the bundle that is served
  hvdrec recommend runs/movielens-1m/bundle --user 1 --scene hour=21 weekday=4 -k 10

Every verb takes --json and then prints one JSON object on standard output.
Any field of a configuration can be overridden: hvdrec train CONFIG --train.batch-size 4096
(hvdrec train CONFIG --help lists them all)."""


class Answer:
    """What a verb came to: facts for machines, lines for people, and the exit status."""

    def __init__(self, facts: Any, text: str, status: int = 0) -> None:
        self.facts = facts
        self.text = text
        self.status = status


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 a check failed, 2 a mistake in what was given."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    known, rest = parser.parse_known_args(_without_help(given))
    if rest and not known.takes_overrides:
        parser.error(f"unknown argument '{rest[0]}'; see hvdrec {known.verb_name} --help")
    try:
        answer: Answer = known.verb(known, rest)
    except (UserError, ScoringError) as error:
        _fail(str(error), is_shared=isinstance(error, SharedError))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "hvdrec":
            raise
        _fail(f"{error.name}: not installed; this verb needs the extra 'train' (scripts/install)")
    except BrokenPipeError:
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    if _is_first_rank():
        print(json.dumps(answer.facts, allow_nan=False) if known.json else answer.text)
    sys.exit(answer.status)


def _fail(line: str, *, is_shared: bool = False) -> NoReturn:
    """Tell a mistake in one line: the first rank for all, or else the rank that met it."""
    if _is_first_rank():
        print(f"hvdrec: error: {' '.join(line.splitlines())}", file=sys.stderr, flush=True)
    elif not is_shared:
        rank = sys.modules["hvdrec.parallel.ranks"].current().rank
        text = f"rank {rank}: {' '.join(line.splitlines())}"
        print(f"hvdrec: error: {text}", file=sys.stderr, flush=True)
    sys.exit(2)


def _is_first_rank() -> bool:
    """Whether this process talks; asks only what is already loaded."""
    module = sys.modules.get("hvdrec.parallel.ranks")
    return module is None or bool(module.current().is_first)


def _notify(line: str) -> None:
    if _is_first_rank():
        print(line, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------- the parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hvdrec",
        description="Train, export and serve recommenders.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hvdrec {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True, dest="verb_name")

    def verb(
        name: str, run: Verb, text: str, *, overrides: bool = False
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text, allow_abbrev=False, add_help=True)
        sub.set_defaults(verb=run, takes_overrides=overrides)
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        return sub

    sub = verb("doctor", _doctor, "Show what this machine can do, and how to mend what is wrong.")

    sub = verb("data", _data, "Download a public data set and write it as plain Parquet tables.")
    sub.add_argument("name", nargs="?", help="name of the data set; without it, list them")
    sub.add_argument("--to", type=Path, help="directory to write (default data/NAME)")
    _overwrite(sub)

    for name, run, text in (
        ("samples", _samples, "Make labelled samples, split into train, validation and test."),
        ("prepare", _prepare, "Fit the features on the training split and encode all shards."),
        ("train", _train, "Train; run it alone, or under horovodrun or mpirun on many ranks."),
    ):
        sub = verb(name, run, text, overrides=True)
        sub.add_argument("config", type=Path, help="TOML file of the run")
        _overwrite(sub)
        if name == "train":
            sub.add_argument(
                "--resume", action="store_true", help="go on from the latest checkpoint, if any"
            )

    sub = verb(
        "plan",
        _plan,
        "Predict memory, bytes and time of a training step on any number of ranks.",
        overrides=True,
    )
    sub.add_argument("config", type=Path, help="TOML file of a run whose features are prepared")
    sub.add_argument("--ranks", type=int, default=0, help="ranks of the job (default: of this job)")
    sub.add_argument("--ranks-per-host", type=int, default=0, help="default: all on one host")
    sub.add_argument("--memory", default="", help="of each rank, e.g. 80GB")
    sub.add_argument("--bandwidth", default="", help="out of each host, e.g. 200Gbit")
    sub.add_argument(
        "--cores", type=int, default=0, help="CPU cores of a host, shared by its ranks; 0: enough"
    )
    sub.add_argument(
        "--calibrate",
        action="store_true",
        help="measure this machine first (under horovodrun or mpirun its messages, too) and keep "
        "the figures in WORK/plan.json",
    )
    sub.add_argument("--constants", type=Path, help="figures of another machine (a plan.json)")

    sub = verb("evaluate", _evaluate, "Evaluate a run beside its baselines; ranks share the work.")
    sub.add_argument("run", type=Path, help="directory of a run (WORK/run)")
    sub.add_argument("--split", choices=["validation", "test"], default="test")
    sub.add_argument("--checkpoint", choices=["best", "latest"], default="best")
    sub.add_argument("--no-baselines", action="store_true", help="the model alone")
    sub.add_argument("--output", type=Path, help="also write the JSON report to this file")

    sub = verb("export", _export, "Write the bundle of a run, once it scores as torch does.")
    sub.add_argument("run", type=Path, help="directory of a run (WORK/run)")
    sub.add_argument("--to", type=Path, help="directory of the bundle (default paths.bundle)")
    sub.add_argument("--checkpoint", choices=["best", "latest"], default="best")
    sub.add_argument("--parity-rows", type=int, help="held-out rows to compare with torch")
    _overwrite(sub)

    sub = verb("recommend", _recommend, "Retrieve and rank items for a user in a scene.")
    sub.add_argument("bundle", type=Path)
    sub.add_argument(
        "--user", required=True, help="key of a user, or a JSON object of raw features"
    )
    sub.add_argument("--scene", nargs="*", default=[], metavar="FIELD=VALUE", help="the scene")
    sub.add_argument("-k", type=int, default=10, help="how many (default 10)")
    sub.add_argument("--candidates", type=int, default=500, help="items to rank (default 500)")
    sub.add_argument("--exclude", nargs="*", default=[], metavar="ITEM", help="items to leave out")

    sub = verb("score", _score, "Score the rows of a Parquet file of raw values, into another.")
    sub.add_argument("bundle", type=Path)
    sub.add_argument("input", type=Path, help="Parquet file with raw user, item and scene columns")
    sub.add_argument("output", type=Path, help="Parquet file: the input's columns and `score`")
    return parser


def _overwrite(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--overwrite", action="store_true", help="replace what an earlier run wrote")


def _without_help(given: list[str]) -> list[str]:
    """Let ``VERB CONFIG --help`` pass to the overrides' help, which lists the configuration."""
    asks = any(argument in ("-h", "--help") for argument in given)
    has_config = any(argument.endswith(".toml") for argument in given)
    if asks and has_config:
        return ["--fields-help" if a in ("-h", "--help") else a for a in given]
    return given


# -------------------------------------------------------------------------------------- the verbs


def _doctor(options: argparse.Namespace, rest: list[str]) -> Answer:
    from hvdrec.doctor import diagnose

    report = diagnose()
    return Answer(report.as_dict(), report.render(), report.exit_status)


def _data(options: argparse.Namespace, rest: list[str]) -> Answer:
    from hvdrec import datasets

    if options.name is None:
        known = datasets.describe()
        rows = [[d["name"], d["description"], d["licence"]] for d in known]
        return Answer(known, table(["name", "what", "licence"], rows))
    out = options.to or Path("data") / options.name
    facts = datasets.prepare(options.name, out, overwrite=options.overwrite, notify=_notify)
    return Answer({"path": str(out), **facts}, f"wrote {out}")


def _load(options: argparse.Namespace, rest: list[str]) -> Any:
    from hvdrec import config

    loaded = config.load(options.config)
    if not rest:
        return loaded
    prog = f"hvdrec {options.verb_name} {options.config}"
    arguments = ["--help" if argument == "--fields-help" else argument for argument in rest]
    return config.override(loaded, arguments, prog)


def _samples(options: argparse.Namespace, rest: list[str]) -> Answer:
    from hvdrec import samples

    config = _load(options, rest)
    meta = samples.make(config, overwrite=options.overwrite, notify=_notify)
    path = config.paths.of("samples")
    rows = [[split, meta["rows"][split], meta["positives"][split]] for split in meta["rows"]]
    facts = {"path": str(path), **{k: meta[k] for k in ("rows", "positives", "users", "items")}}
    return Answer(facts, table(["split", "rows", "positives"], rows) + f"\nwrote {path}")


def _prepare(options: argparse.Namespace, rest: list[str]) -> Answer:
    from tqdm import tqdm

    from hvdrec.features.encode import encode

    config = _load(options, rest)
    out = config.paths.of("features")
    with tqdm(unit="row", unit_scale=True, leave=False, disable=None) as bar:
        meta = encode(
            config.paths.of("samples"),
            out,
            config,
            overwrite=options.overwrite,
            notify=_notify if bar.disable else bar.set_description,
            progress=bar.update,
        )
    sizes = [[name, size] for name, size in meta["sizes"].items()]
    shards = [[split, meta["rows"][split], len(meta["shards"][split])] for split in meta["rows"]]
    facts = {"path": str(out), **{k: meta[k] for k in ("rows", "sizes", "shards")}}
    text = table(["split", "rows", "shards"], shards) + "\n\n" + table(["table", "codes"], sizes)
    return Answer(facts, f"{text}\nwrote {out}")


def _train(options: argparse.Namespace, rest: list[str]) -> Answer:
    config = _load(options, rest)
    from hvdrec.training.loop import train

    facts = train(config, resume=options.resume, overwrite=options.overwrite)
    best = ", ".join(f"{name} {value}" for name, value in facts["validation"].items())
    return Answer(
        facts,
        f"{facts['steps']} steps on {facts['world_size']} ranks; best {best}\nwrote {facts['run']}",
    )


def _plan(options: argparse.Namespace, rest: list[str]) -> Answer:
    config = _load(options, rest)
    from dataclasses import asdict

    from hvdrec.parallel import ranks
    from hvdrec.parallel.plan import Cluster
    from hvdrec.training.planning import (
        CONSTANTS_FILE,
        calibrate,
        constants_for,
        make_plan,
        parse_quantity,
        render_plan,
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


def _evaluate(options: argparse.Namespace, rest: list[str]) -> Answer:
    from hvdrec.artifacts import write_text
    from hvdrec.evaluation.evaluate import evaluate
    from hvdrec.evaluation.report import jsonable, render
    from hvdrec.parallel import ranks
    from hvdrec.training.checkpoint import load_model, load_model_and_tables, read_config
    from hvdrec.training.machine import pick_device, set_threads

    world = ranks.init()
    config = ranks.together(lambda: read_config(options.run))
    set_threads(config, world)
    device = pick_device(config, world)
    rows_of = None
    if world.size == 1:
        model, name = load_model(options.run, config, options.checkpoint)
        model.to(device)
    else:
        model, tables, name = load_model_and_tables(options.run, config, options.checkpoint, device)
        rows_of = tables.rows_of
    report = evaluate(
        model,
        config,
        options.split,
        with_baselines=not options.no_baselines,
        rows_of=rows_of,
    )
    report = {"run": str(options.run), "checkpoint": name, **report}
    facts = jsonable(report)
    if options.output is not None and world.is_first:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.output, json.dumps(facts, indent=1) + "\n")
    return Answer(facts, render(report))


def _export(options: argparse.Namespace, rest: list[str]) -> Answer:
    from dataclasses import replace

    from hvdrec.evaluation.report import jsonable
    from hvdrec.export.bundle import export
    from hvdrec.training.checkpoint import checkpoint_metrics, load_model, read_config

    config = read_config(options.run)
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
        notify=_notify,
    )
    out = config.paths.of("bundle")
    parity = meta["parity"]
    text = (
        f"{meta['users']} users, {meta['items']} items; {parity['rows']} scores of held-out rows "
        f"are within {parity['largest_difference']:.2g} of torch\nwrote {out}"
    )
    kept = ("name", "checkpoint", "users", "items", "user_width", "item_width", "parity", "metrics")
    return Answer(jsonable({"path": str(out), **{key: meta[key] for key in kept}}), text)


def _recommend(options: argparse.Namespace, rest: list[str]) -> Answer:
    from hvdrec.scoring import Scorer
    from hvdrec.scoring.command import parse_key, parse_scene, parse_user

    scorer = Scorer.load(options.bundle)
    scene = parse_scene(scorer, options.scene)
    found = scorer.recommend(
        user=parse_user(scorer, options.user),
        scene=scene,
        k=options.k,
        candidates=options.candidates,
        exclude=[parse_key(scorer, "item", key) for key in options.exclude],
    )
    rows = [[i, r.item, r.title or "", f"{r.score:.4f}"] for i, r in enumerate(found, start=1)]
    facts = {
        "user": options.user,
        "scene": scene,
        "items": [
            {
                "item": r.item,
                "title": r.title,
                "score": r.score,
                "retrieval_score": r.retrieval_score,
            }
            for r in found
        ],
    }
    return Answer(facts, table(["", "item", "title", "score"], rows))


def _score(options: argparse.Namespace, rest: list[str]) -> Answer:
    from hvdrec.export.tables import score_table

    facts = score_table(options.bundle, options.input, options.output)
    return Answer(facts, f"scored {facts['rows']} rows\nwrote {options.output}")
