"""Check that this tree gives the same results as another commit, bit for bit.

Both trees run samples, prepare, train (on one rank and on two) and export in the same environment.
The script compares samples, shards, checkpoints, bundles and scores, and reads with this tree what
the other commit wrote. It prints one line per comparison.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_file, save

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
EPILOG = """\
examples:
  scripts/same_results 2f6a359 --raw data/movielens-1m --new-args='--train.cpu-layers onednn'
  scripts/same_results main --config /tmp/small.toml --work /tmp/same-results

Both sides train with torch's kernels for embedding rows, because the automatic choice depends on
timing; so does this tree's choice of CPU layers: name the ones that COMMIT uses. --work keeps the
results of COMMIT, and the next call reuses them. Exit code: 0; 1 if a comparison differs; 2 if a
command fails or an argument is wrong.
"""


@dataclass(frozen=True)
class Side:
    """One of the two trees, and the directory of its results."""

    tree: Path
    work: Path
    train_options: tuple[str, ...]

    def hvdrec(self, *words: object, ranks: int = 1) -> str:
        """Run a command of this tree's hvdrec; return its standard output."""
        launcher = ["horovodrun", "--gloo", "--network-interfaces", "lo", "-np", str(ranks)]
        command = [*(launcher if ranks > 1 else []), "hvdrec", *map(str, words)]
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PYTHONPATH": str(self.tree), "PATH": path}
        environment["OMP_NUM_THREADS"] = "1"
        print(f"+ [{self.work.name}] {shlex.join(command)}", file=sys.stderr, flush=True)
        done = subprocess.run(
            command, env=environment, cwd=self.work, stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            print(f"scripts/same_results: exit code {done.returncode}: {command}", file=sys.stderr)
            raise SystemExit(2)
        return done.stdout

    def run_stages(self, config: Path, raw: Path | None) -> None:
        """Run all stages, except if an earlier call completed them."""
        complete = self.work / "complete"
        if complete.exists():
            return
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        options: list[object] = [self.tree / config, "--paths.work", self.work]
        options += ["--paths.raw", raw.resolve()] if raw else []
        self.hvdrec("samples", *options)
        self.hvdrec("prepare", *options)
        options += ["--parallel.kernel", "torch", *self.train_options]
        for ranks in (1, 2):
            run = self.work / f"run-{ranks}"
            self.hvdrec("train", *options, "--paths.run", run, ranks=ranks)
        self.hvdrec("export", self.work / "run-1", "--to", self.work / "bundle")
        complete.touch()

    def score(self, bundle: Path, folder: str) -> Path:
        """Score this side's test rows with a bundle; return the directory of the scores."""
        scores = self.work / folder
        scores.mkdir(exist_ok=True)
        for file in sorted((self.work / "samples" / "test").glob("*.parquet")):
            self.hvdrec("score", bundle, file, scores / file.name)
        return scores


def same_files(old: Path, new: Path, pattern: str) -> bool:
    """Return True if two directories hold the same files of a pattern with the same values."""

    def contents(folder: Path) -> dict[Path, bytes]:
        return {file.relative_to(folder): values(file) for file in folder.rglob(pattern)}

    old_contents = contents(old)
    return bool(old_contents) and old_contents == contents(new)


def values(file: Path) -> bytes:
    """Return a file's values as bytes: equal tables and tensors give equal bytes, NaN included."""
    if file.suffix == ".safetensors":
        return save(load_file(file))
    if file.suffix == ".parquet":
        buffer = pa.BufferOutputStream()
        table = pq.read_table(file, partitioning=None).replace_schema_metadata(None)
        pq.write_table(table, buffer)
        return bytes(buffer.getvalue().to_pybytes())
    return file.read_bytes()


def comparisons(old: Side, new: Side) -> Iterator[tuple[str, bool]]:
    """Yield the name of each comparison and whether the two sides agree."""
    for stage in ("samples", "features"):
        yield f"{stage}: tables", same_files(old.work / stage, new.work / stage, "*.parquet")
    for ranks in (1, 2):
        run, new_run = (side.work / f"run-{ranks}" for side in (old, new))
        yield f"checkpoints, ranks {ranks}: tensors", same_files(run, new_run, "*.safetensors")
        command = ("evaluate", run, "--no-baselines", "--json")
        metrics = [json.loads(side.hvdrec(*command)) for side in (old, new)]
        yield f"checkpoint of COMMIT, ranks {ranks}: metrics of both", metrics[0] == metrics[1]
    bundle, new_bundle = old.work / "bundle", new.work / "bundle"
    yield "bundles: arrays", same_files(bundle, new_bundle, "*.npy")
    scores = old.score(bundle, "scores")
    new_scores = new.score(new_bundle, "scores")
    yield "bundles: scores of the test rows", same_files(scores, new_scores, "*.parquet")
    new_scores = new.score(bundle, "scores-of-old-bundle")
    yield "bundle of COMMIT: scores of both", same_files(scores, new_scores, "*.parquet")


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[tuple[str, Path]]:
    """Check out a commit into a temporary worktree; yield its hash and its directory."""
    git = ("git", "-C", str(REPOSITORY), "worktree")
    with tempfile.TemporaryDirectory(prefix="hvdrec-commit-") as folder:
        tree = Path(folder) / "tree"
        add = [*git, "add", "--quiet", "--detach", tree, commit]
        if subprocess.run(add, check=False).returncode:
            raise SystemExit(2)  # git has said why
        head = subprocess.check_output(["git", "-C", tree, "rev-parse", "HEAD"], text=True)
        try:
            yield head.strip(), tree
        finally:
            subprocess.run([*git, "remove", "--force", tree], check=True)


def main() -> int:
    """Run both trees and print the comparisons; return 1 if one differs."""
    parser = argparse.ArgumentParser(
        prog="scripts/same_results",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("commit", metavar="COMMIT", help="the commit to compare with")
    config_help = "a relative path is one in each tree (default: %(default)s)"
    add("--config", type=Path, default="configs/movielens-1m.toml", help=config_help)
    add("--raw", type=Path, help="directory of the raw tables (default: the configuration's)")
    add("--work", type=Path, help="directory for the results (default: a temporary one)")
    add("--old-args", default="", metavar="OPTIONS", help="train options of COMMIT alone")
    add("--new-args", default="", metavar="OPTIONS", help="train options of this tree alone")
    options = parser.parse_args()
    old_args, new_args = (tuple(shlex.split(text)) for text in (options.old_args, options.new_args))
    with contextlib.ExitStack() as stack:
        work = (options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve()
        commit, tree = stack.enter_context(checked_out(options.commit))
        shutil.rmtree(work / "this-tree", ignore_errors=True)
        old = Side(tree, work / commit[:12], old_args)
        new = Side(REPOSITORY, work / "this-tree", new_args)
        for side in (old, new):
            side.run_stages(options.config, options.raw)
        agree = True
        for name, same in comparisons(old, new):
            print(f"{'same' if same else 'DIFFERS':8} {name}", flush=True)
            agree = agree and same
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
