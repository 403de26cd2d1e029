"""Train with the recipes; print their metrics on the test split with published ones to compare."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from driver import Failed, make_environment

from hvdrec.config import load_config

PEERS = ("fuxictr", "lightgbm")
REPOSITORY = Path(__file__).resolve().parents[2]
EPILOG = """\
examples:
  scripts/accuracy                                      every row, three seeds: hours
  scripts/accuracy --only retrieval --seed 1            one row, one seed
  scripts/accuracy --only ranking-random ranking-random-full --json > accuracy.json

Each run is kept under --work: what is there already is not made again. The test split is read once
a run; every choice in the recipes was made on validation. Exit code: 0; 1 if a stage failed; 2 for
a mistake in the arguments.
"""


@dataclass(frozen=True)
class Row:
    """A row of the table.

    config: file in configs/; data: name of the public data set; metrics: names in the report, with
    their targets; others: figures from elsewhere, with their source; redraws: the seed also redraws
    the split; full: the ranker gets every feature and there are no towers; without_scene: the scene
    features are left out.
    """

    config: str
    data: str
    section: str
    metrics: Mapping[str, float | None]
    others: str
    redraws: bool = False
    full: bool = False
    without_scene: bool = False


RANDOM_OTHERS = (
    "FuxiCTR 2.3.10: DNN 0.8998 and 0.9013, DCN-V2 0.9007, DeepFM 0.9001; LightGBM 0.884"
)
TEMPORAL_OTHERS = "FuxiCTR 2.3.10: DeepFM 0.8497, DCN-V2 0.8461, DNN 0.8454; LightGBM 0.831"
JOURNEY_OTHERS = "LightGBM 0.721 (not converged); FuxiCTR 2.3.10: DNN 0.699, DeepFM 0.699"
RETRIEVAL_OTHERS = (
    "published: LightGCN 0.186/0.254, XSimGCL 0.212/0.275; on redraws: EASE 0.210-0.216/"
    "0.281-0.288, iALS 0.209/0.268, RecBole BPR 0.171/0.238"
)
FULL = "the same with every feature in the ranker and no towers"

ROWS = {
    "retrieval": Row(
        "movielens-1m-retrieval",
        "movielens-1m",
        "retrieval",
        {"recall@10": 0.216, "ndcg@10": 0.288},
        RETRIEVAL_OTHERS,
        redraws=True,
    ),
    "ranking-random": Row(
        "movielens-1m-ranking", "movielens-1m", "ranking", {"auc": 0.906}, RANDOM_OTHERS
    ),
    "ranking-random-full": Row(
        "movielens-1m-ranking", "movielens-1m", "ranking", {"auc": None}, FULL, full=True
    ),
    "ranking-temporal": Row(
        "movielens-1m", "movielens-1m", "ranking", {"auc": 0.856}, TEMPORAL_OTHERS
    ),
    "ranking-temporal-full": Row(
        "movielens-1m", "movielens-1m", "ranking", {"auc": None}, FULL, full=True
    ),
    "complete-journey": Row(
        "complete-journey-ranking", "complete-journey", "ranking", {"auc": 0.760}, JOURNEY_OTHERS
    ),
    "complete-journey-full": Row(
        "complete-journey-ranking", "complete-journey", "ranking", {"auc": None}, FULL, full=True
    ),
    "complete-journey-no-scene": Row(
        "complete-journey-ranking",
        "complete-journey",
        "ranking",
        {"auc": None},
        "the same without store, time, display and mailer",
        without_scene=True,
    ),
}


def without_scene(text: str) -> str:
    """Remove the scene features from a configuration's text."""
    block = re.compile(r"^\[\[features\]\]\n(?:(?!\[).*\n?)*", re.MULTILINE)
    return block.sub(lambda m: "" if re.search(r'^side = "scene"', m[0], re.M) else m[0], text)


def run_row(name: str, row: Row, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run the missing stages of one row and seed; return its figures."""
    work: Path = options.work
    raw = work / "data" / row.data
    if not raw.exists():
        hvdrec("data", row.data, "--to", str(raw))
    variant = f"{row.config}{'-no-scene' if row.without_scene else ''}"
    source = REPOSITORY / "configs" / f"{row.config}.toml"
    config = work / f"{variant}.toml"
    text = source.read_text()
    config.write_text(without_scene(text) if row.without_scene else text)
    shared = work / variant / (f"split-{seed}" if row.redraws else "split-0")
    run = work / name / f"seed-{seed}"
    fields = ["--paths.raw", str(raw), "--paths.work", str(shared), "--paths.run", str(run)]
    if row.redraws:
        fields += ["--samples.split.seed", str(seed)]
    fields += ["--seed", str(seed)]
    if row.full:
        features = [f.name for f in load_config(source).features if f.side != "scene"]
        fields += ["--train.objective", "ranking", "--model.tower.output", "0"]
        fields += ["--model.tower.normalize", "False"]
        fields += ["--model.ranker.direct", *features]
    samples = work / row.config / shared.name / "samples"
    fields += ["--paths.samples", str(samples)]
    if not samples.exists():
        hvdrec("samples", str(source), *fields)
    if not (shared / "features").exists():
        hvdrec("prepare", str(config), *fields)
    report = run / "accuracy.json"
    if not report.exists():
        launcher = ["horovodrun", "-np", str(options.ranks)] if options.ranks > 1 else []
        again = ["--resume"] if run.exists() else []
        earlier, began = minutes_before(run), time.monotonic()
        hvdrec("train", str(config), *fields, *again, launcher=launcher)
        minutes = earlier + (time.monotonic() - began) / 60
        found = json.loads(hvdrec("evaluate", str(run), "--json", "--no-baselines"))
        figures = {metric: found[row.section][metric] for metric in row.metrics}
        report.write_text(json.dumps({**figures, "minutes": minutes, **speed(run)}))
    return {"seed": seed, **json.loads(report.read_text())}


def run_peer(
    name: str, row: Row, model: str, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Run FuxiCTR's DNN or LightGBM on the shards of a row; return its figures."""
    folder = (options.peers_dir or options.work / "peers").absolute() / "fuxictr"
    if not (options.peers_dir and (folder / "bin" / "python").exists()):
        try:
            make_environment(folder, "fuxictr")
        except Failed as error:
            raise SystemExit(f"{folder}: {error}") from None
    report = options.work / name / f"{model}-{seed}.json"
    if not report.exists():
        program = REPOSITORY / "scripts" / "benchmarks" / "peers" / "accuracy_peer.py"
        features = options.work / row.config / "split-0" / "features"
        options_of = ["--model", model, "--seed", str(seed)]
        if options.peer_rounds:
            options_of += ["--rounds", str(options.peer_rounds[PEERS.index(model)])]
        command = [str(folder / "bin" / "python"), str(program), str(features), *options_of]
        print("+", *command, file=sys.stderr, flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(1)
        report.write_text(done.stdout.splitlines()[-1])
    return {"seed": seed, **json.loads(report.read_text())}


def minutes_before(run: Path) -> float:
    """Return the minutes that earlier, interrupted parts of a run took, from its log."""
    lines = logged(run)
    ends = [b for b, a in pairwise(lines) if a["event"] == "start"] + lines[-1:]
    return float(sum(line["seconds"] for line in ends)) / 60


def speed(run: Path) -> dict[str, float]:
    """Return the median training speed in a run's log, or None without steps."""
    rates = [line["rows_per_second"] for line in logged(run) if line["event"] == "step"]
    return {"samples_per_second": median(rates)} if rates else {}


def logged(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log; none if the run has not started."""
    file = run / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def hvdrec(*arguments: str, launcher: Sequence[str] = ()) -> str:
    """Run a command and return its standard output; pass its messages on."""
    print("+ hvdrec", *arguments, file=sys.stderr, flush=True)
    program = str(Path(sys.executable).parent / "hvdrec")
    done = subprocess.run(
        [*launcher, program, *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(1)
    return done.stdout


def summary(row: Row, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation over the seeds of each figure."""
    found: dict[str, Any] = {}
    for metric, target in row.metrics.items():
        values = [run[metric] for run in runs]
        spread = stdev(values) if len(values) > 1 else None
        found[metric] = {"mean": mean(values), "deviation": spread, "target": target}
    found["minutes"] = mean(run["minutes"] for run in runs)
    rates = [run["samples_per_second"] for run in runs if "samples_per_second" in run]
    if rates:
        found["samples_per_second"] = mean(rates)
    return found


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the rows as lines of text."""
    lines = [
        f"{'row':26} {'metric':10} {'test split':>18} {'target':>8} {'':12} minutes  samples/s"
    ]
    for name, result in results.items():
        for metric, found in result["figures"].items():
            if not isinstance(found, Mapping):
                continue
            spread = found["deviation"]
            value = f"{found['mean']:.4f}" + ("" if spread is None else f" +- {spread:.4f}")
            target = found["target"]
            holds = "" if target is None or found["mean"] >= target else "falls short"
            rate = result["figures"].get("samples_per_second")
            lines.append(
                f"{name:26} {metric:10} {value:>18} {'-' if target is None else target:>8} "
                f"{holds:12} {result['figures']['minutes']:7.1f}  "
                f"{'-' if rate is None else f'{rate:.0f}':>9}"
            )
        if result["others"]:
            lines.append(f"{'':26} {result['others']}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen rows and print their figures."""
    parser = argparse.ArgumentParser(
        prog="scripts/accuracy",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=list(ROWS), metavar="ROW", help="some rows")
    parser.add_argument(
        "--seed", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/accuracy"), help="directory of the runs"
    )
    parser.add_argument("--ranks", type=int, default=1, help="ranks that train (default 1)")
    parser.add_argument(
        "--peers",
        action="store_true",
        help="also train FuxiCTR's DNN and LightGBM on the shards of the ranking recipes",
    )
    parser.add_argument(
        "--peers-dir",
        type=Path,
        help="virtual environments of these; existing ones are used (default: WORK/peers)",
    )
    parser.add_argument(
        "--peer-rounds",
        type=int,
        nargs=2,
        metavar=("EPOCHS", "TREES"),
        help="of FuxiCTR and LightGBM at most (default: 20 1000, with early stopping, which on "
        "Complete Journey takes hours)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--list", action="store_true", help="list the rows")
    options = parser.parse_args(arguments)
    if options.ranks < 1:
        parser.error(f"--ranks {options.ranks}: must be 1 or more")
    if options.list:
        for name, row in ROWS.items():
            print(f"{name:26} {row.config}: {', '.join(row.metrics)}")
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    for name in options.only or ROWS:
        row = ROWS[name]
        runs = [run_row(name, row, seed, options) for seed in options.seed]
        results[name] = {"figures": summary(row, runs), "runs": runs, "others": row.others}
        if options.peers and row.section == "ranking" and not (row.full or row.without_scene):
            for model in PEERS:
                runs = [run_peer(name, row, model, seed, options) for seed in options.seed]
                figures = summary(replace(row, metrics={"auc": None}), runs)
                results[f"{name}: {model}"] = {"figures": figures, "runs": runs, "others": ""}
    text = table(results)
    if options.json:
        print(text, file=sys.stderr)
        print(json.dumps(results, indent=1))
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
