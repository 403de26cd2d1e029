"""The command line: one verb per stage. Thin: parse, call, print."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from hvdrec import __version__
from hvdrec.cli import data_commands as data
from hvdrec.cli import host_commands as hosts
from hvdrec.cli import model_commands as model
from hvdrec.cli import serve_commands as bundle
from hvdrec.cli.answer import Answer
from hvdrec.errors import SharedError, UserError
from hvdrec.parallel.progress import is_first_rank
from hvdrec.scoring.errors import ScoringError
from hvdrec.serving import add_arguments

Verb = Callable[[argparse.Namespace, list[str]], Answer]

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
hvdrec tune CONFIG searches for better settings (hvdrec tune --help).
Any field of a configuration can be overridden: hvdrec train CONFIG --train.batch-size 4096
(hvdrec train CONFIG --help lists them all)."""

TUNE_EPILOG = """\
ranges and choices:
  train.learning_rate=log:1e-4:1e-2     by its logarithm, both ends included
  model.ranker.dropout=0:0.4            evenly; 0:0.4:0.1 in steps
  model.dimension=16,32,64              choices, of any type
  'model.ranker.hidden=[256,128],[400,400,400]'

for example:
  hvdrec tune configs/movielens-1m.toml --trials 30 --prune \\
      --search train.embedding-learning-rate=log:0.05:0.8 model.ranker.dropout=0:0.4

Searched are fields of [model] and [train], loader.shuffle_rows, parallel.synchronization and
parallel.average_every: nothing that would change the samples or features, which all trials share.
Run it alone, or under horovodrun or mpirun: then all ranks train each trial together.
The first trial is the configuration as it stands, with what the command line overrides
(--train.epochs 3). What counts is train.metric on the validation split; the test split is not read.

Everything is in WORK/tune: trials.json, a log for each trial, and the checkpoints of the best one
(hvdrec evaluate WORK/tune/trial-NNN). A search that was interrupted goes on with the same command,
in the middle of a trial if it has a checkpoint; more trials are a larger --trials; --overwrite
starts anew."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 a check failed, 2 a mistake in what was given."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    known, rest = parser.parse_known_args(_without_help(given))
    if rest and not known.takes_overrides:
        parser.error(f"unknown argument '{rest[0]}'; see hvdrec {known.verb_name} --help")
    try:
        _refuse_urls(known)
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
    if is_first_rank():
        print(json.dumps(answer.facts, allow_nan=False) if known.json else answer.text)
    sys.exit(answer.status)


def _refuse_urls(known: argparse.Namespace) -> None:
    """Raise UserError for a URL in place of a directory; Path has taken a stroke from it."""
    for name in ("bundle", "run"):
        scheme, mark, rest = str(getattr(known, name, "")).partition(":/")
        if mark and scheme.isalnum():
            remedy = "hvdrec fetch copies a bundle" if name == "bundle" else "copy it"
            raise UserError(
                f"{scheme}://{rest}: must be a directory of this machine; {remedy} to one"
            )


def _fail(line: str, *, is_shared: bool = False) -> NoReturn:
    """Tell a mistake in one line: the first rank for all, or else the rank that met it."""
    if is_first_rank():
        print(f"hvdrec: error: {' '.join(line.splitlines())}", file=sys.stderr, flush=True)
    elif not is_shared:
        rank = sys.modules["hvdrec.parallel.ranks"].current().rank
        text = f"rank {rank}: {' '.join(line.splitlines())}"
        print(f"hvdrec: error: {text}", file=sys.stderr, flush=True)
    sys.exit(2)


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

    sub = verb(
        "doctor", data.doctor, "Show what this machine can do, and how to mend what is wrong."
    )

    sub = verb(
        "hosts",
        hosts.hosts,
        "Check hosts before a launch: ssh without a password, the same versions and files, clocks, "
        "and the network back to this host. One line for each problem.",
    )
    sub.add_argument(
        "-H",
        dest="hosts",
        required=True,
        metavar="HOST:SLOTS,...",
        help="hosts, as horovodrun and mpirun take them",
    )
    sub.add_argument(
        "paths",
        nargs="*",
        type=Path,
        help="what every host must see alike: a configuration and with it its features, or any "
        "other file or directory",
    )

    sub = verb(
        "data", data.data, "Download a public data set and write it as plain Parquet tables."
    )
    sub.add_argument("name", nargs="?", help="name of the data set; without it, list them")
    sub.add_argument("--to", type=Path, help="directory to write (default data/NAME)")
    _overwrite(sub)

    for name, run, text in (
        ("samples", data.samples, "Make labelled samples, split into train, validation and test."),
        ("prepare", data.prepare, "Fit the features on the training split and encode all shards."),
        ("train", model.train, "Train; run it alone, or under horovodrun or mpirun on many ranks."),
    ):
        sub = verb(name, run, text, overrides=True)
        sub.add_argument("config", type=Path, help="TOML file of the run")
        _overwrite(sub)
        if name == "prepare":
            _workers(sub)
        if name == "train":
            sub.add_argument(
                "--resume", action="store_true", help="go on from the latest checkpoint, if any"
            )

    sub = verb(
        "tune",
        model.tune,
        "Search for the settings that give the best validation metric, with Optuna.",
        overrides=True,
    )
    sub.formatter_class = argparse.RawDescriptionHelpFormatter
    sub.epilog = TUNE_EPILOG
    sub.add_argument("config", type=Path, help="TOML file of a run whose features are prepared")
    sub.add_argument(
        "--search",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=RANGE",
        help="what to search; may be left out when a search goes on",
    )
    sub.add_argument(
        "--trials",
        type=int,
        default=20,
        metavar="N",
        help="trials in all, with those of before (default 20)",
    )
    sub.add_argument(
        "--prune",
        action="store_true",
        help="end a trial that is worse than the median of the complete ones after as many epochs "
        "(once there are five)",
    )
    _overwrite(sub)

    sub = verb(
        "plan",
        model.plan,
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

    sub = verb(
        "evaluate", model.evaluate, "Evaluate a run beside its baselines; ranks share the work."
    )
    sub.add_argument("run", type=Path, help="directory of a run (WORK/run)")
    sub.add_argument("--split", choices=["validation", "test"], default="test")
    sub.add_argument("--checkpoint", choices=["best", "latest"], default="best")
    sub.add_argument(
        "--baselines",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="popularity, means, item-item co-occurrence and EASE beside the model, fitted on the "
        "training rows, their settings chosen on validation (default); or the model alone",
    )
    sub.add_argument(
        "--ease-items",
        type=int,
        default=10_000,
        metavar="N",
        help="largest catalogue for which EASE is fitted (default 10000, which takes 1.6 GB and "
        "minutes; twice the items take four times the memory and eight times the time; 0: never)",
    )
    sub.add_argument("--output", type=Path, help="also write the JSON report to this file")

    sub = verb(
        "export",
        model.export,
        "Write the bundle of a run, once it scores as torch does. The fields of [export] can be "
        "given anew, for example --export.embeddings int8, and what the score of several labels is "
        "made of (--tasks.0.share 2, --model.ranker.combine sum); --fields-help lists them.",
        overrides=True,
    )
    sub.add_argument("run", type=Path, help="directory of a run (WORK/run)")
    sub.add_argument("--to", help="directory or URL of the bundle (default paths.bundle)")
    sub.add_argument("--checkpoint", choices=["best", "latest"], default="best")
    sub.add_argument("--parity-rows", type=int, help="held-out rows to compare with torch")
    _workers(sub)
    _overwrite(sub)

    sub = verb(
        "fetch",
        bundle.fetch,
        "Copy a bundle from a URL into a directory, where it is served: verified, whole or not "
        "at all. A bundle that is there already is left as it is.",
    )
    sub.add_argument("source", help="URL or directory of a bundle: s3://bucket/name")
    sub.add_argument("to", type=Path, help="directory to write")
    _overwrite(sub)

    sub = verb("recommend", bundle.recommend, "Retrieve and rank items for a user in a scene.")
    sub.add_argument("bundle", type=Path)
    sub.add_argument(
        "--user", required=True, help="key of a user, or a JSON object of raw features"
    )
    sub.add_argument("--scene", nargs="*", default=[], metavar="FIELD=VALUE", help="the scene")
    sub.add_argument("-k", type=int, default=10, help="how many (default 10)")
    sub.add_argument("--candidates", type=int, default=500, help="items to rank (default 500)")
    sub.add_argument("--exclude", nargs="*", default=[], metavar="ITEM", help="items to leave out")
    sub.add_argument(
        "--allowed",
        nargs="*",
        default=[],
        metavar="FIELD=VALUE",
        help="only items with one of these values (fields of export.filters)",
    )
    sub.add_argument("--skip-seen", action="store_true", help="leave out what the user met before")
    sub.add_argument(
        "--diversity",
        type=float,
        default=0.0,
        help="from 0 (off) to below 1: prefer items unlike those before them",
    )

    sub = verb(
        "score", bundle.score, "Score the rows of a Parquet file of raw values, into another."
    )
    sub.add_argument("bundle", type=Path)
    sub.add_argument("input", type=Path, help="Parquet file with raw user, item and scene columns")
    sub.add_argument("output", type=Path, help="Parquet file: the input's columns and `score`")

    sub = verb(
        "serve",
        bundle.serve,
        "Serve a bundle over HTTP until SIGTERM or SIGINT; a new bundle at its path is taken.",
    )
    add_arguments(sub)

    sub = verb(
        "publish",
        bundle.publish,
        "Write a bundle's embeddings to a Redis that many services share, as a new version.",
    )
    sub.add_argument("bundle", type=Path)
    sub.add_argument("--redis", metavar="URL", help="the server (default: $HVDREC_REDIS)")
    sub.add_argument("--prefix", default="hvdrec", help="of the keys (default hvdrec)")
    sub.add_argument(
        "--keep",
        type=float,
        default=600.0,
        help="seconds that the version before stays (default 600)",
    )
    return parser


def _overwrite(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--overwrite", action="store_true", help="replace what an earlier run wrote")


def _workers(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that share the work, where it is not run under mpirun (default: one for "
        "each core, at most 8); what is written does not depend on them",
    )


def _without_help(given: list[str]) -> list[str]:
    """Let ``VERB CONFIG --help`` pass to the overrides' help, which lists the configuration."""
    asks = any(argument in ("-h", "--help") for argument in given)
    has_config = any(argument.endswith(".toml") for argument in given)
    if asks and has_config:
        return ["--fields-help" if a in ("-h", "--help") else a for a in given]
    return given
