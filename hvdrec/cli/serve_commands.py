"""The commands that use a bundle: fetch, recommend, score, publish, serve."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

from hvdrec.cli.command import BUNDLE, NO_VERIFY, OVERWRITE, Answer, argument, command
from hvdrec.cli.progress_bar import progress_bar
from hvdrec.cli.text_table import table
from hvdrec.errors import UserError
from hvdrec.parallel.progress import print_line
from hvdrec.serving import add_arguments as add_serve_arguments


@command(
    argument("source", help="URL or directory of a bundle, such as s3://bucket/name"),
    argument("to", type=Path, help="directory to write"),
    OVERWRITE,
    example="hvdrec fetch s3://bucket/movielens-1m served/movielens-1m",
)
def fetch(options: argparse.Namespace) -> Answer:
    """Copy a bundle from a URL into a directory and verify it, so that it can be served.

    The directory appears only when the bundle is complete. A bundle that is already there is not
    changed.
    """
    from hvdrec.storage.artifacts import fetch_artifact
    from hvdrec.storage.urls import as_location

    source, to = as_location(options.source), options.to
    is_new = fetch_artifact(source, to, "bundle", overwrite=options.overwrite)
    facts = {"path": str(to), "source": str(source), "fetched": is_new}
    return Answer(facts, f"wrote {to}" if is_new else f"{to}: holds this bundle already")


@command(
    BUNDLE,
    argument("--user", required=True, help="key of a user, or a JSON object of raw features"),
    argument(
        "--scene", nargs="*", default=[], metavar="FIELD=VALUE", help="values of scene fields"
    ),
    argument("-k", type=int, default=10, help="number of items (default 10)"),
    argument("--candidates", type=int, default=500, help="items to rank (default 500)"),
    argument("--exclude", nargs="*", default=[], metavar="ITEM", help="items to leave out"),
    argument(
        "--allowed",
        nargs="*",
        default=[],
        metavar="FIELD=VALUE",
        help="only items with one of these values, of the fields in export.filters",
    ),
    argument("--skip-seen", action="store_true", help="leave out the user's items in the log"),
    argument(
        "--diversity",
        type=float,
        default=0.0,
        help="from 0 (off) to below 1: prefer items unlike those ranked before them",
    ),
    NO_VERIFY,
    example="hvdrec recommend runs/movielens-1m/bundle --user 1 --scene hour=21 weekday=4 -k 10",
)
def recommend(options: argparse.Namespace) -> Answer:
    """Retrieve and rank items for a user in a scene (time, place, device, placement)."""
    from hvdrec.cli.request_text import parse_allowed, parse_key, parse_scene, parse_user
    from hvdrec.scoring import Scorer

    scorer = Scorer.load(options.bundle, verify=options.verify)
    user, scene = parse_user(scorer, options.user), parse_scene(scorer, options.scene)
    items = scorer.recommend(
        user=user,
        scene=scene,
        k=options.k,
        candidates=options.candidates,
        exclude=[parse_key(scorer, "item", key) for key in options.exclude],
        allowed=parse_allowed(scorer, options.allowed) or None,
        skip_seen=options.skip_seen,
        diversity=options.diversity,
    )
    by_task = {}
    if scorer.tasks:
        scores = scorer.score_tasks(user, [item.item for item in items], scene)
        by_task = {task: scores[task].tolist() for task in scorer.tasks}
    rows, facts = [], []
    for i, item in enumerate(items):
        tasks = {task: probabilities[i] for task, probabilities in by_task.items()}
        scores_shown = [f"{score:.4f}" for score in (item.score, *tasks.values())]
        rows.append([i + 1, item.item, item.title or "", *scores_shown])
        facts.append(asdict(item) | ({"tasks": tasks} if tasks else {}))
    text = table(["", "item", "title", "score", *by_task], rows)
    if items and items[0].source == "trending":
        text += "\nnothing is known about this user: these are the trending items"
    return Answer({"user": options.user, "scene": scene, "items": facts}, text)


@command(
    BUNDLE,
    argument("input", type=Path, help="Parquet file with raw user, item and scene columns"),
    argument("output", type=Path, help="Parquet file to write: columns of the input and `score`"),
    argument(
        "--defaults",
        action="store_true",
        help="let missing columns take their defaults, and copy unknown columns",
    ),
    argument(
        "--pass-through",
        nargs="+",
        default=[],
        metavar="COLUMN",
        help="columns to copy and not to read, even if they have the name of a feature",
    ),
    NO_VERIFY,
    example="hvdrec score runs/movielens-1m/bundle pairs.parquet scored.parquet",
)
def score(options: argparse.Namespace) -> Answer:
    """Score the rows of a Parquet file of raw values; write rows and scores to another file."""
    from hvdrec.exporting.score_file import score_table

    facts = score_table(
        options.bundle,
        options.input,
        options.output,
        defaults=options.defaults,
        pass_through=options.pass_through,
        verify=options.verify,
    )
    for line in facts["warnings"]:
        print_line(f"warning: {line}")
    added = ", ".join(facts["columns"])
    return Answer(facts, f"scored {facts['rows']} rows: {added}\nwrote {options.output}")


@command(
    BUNDLE,
    argument("--redis", metavar="URL", help="URL of the server (default: $HVDREC_REDIS)"),
    argument("--prefix", default="hvdrec", help="prefix of the keys (default hvdrec)"),
    argument(
        "--keep",
        type=float,
        default=600.0,
        help="seconds until the previous version expires (default 600)",
    ),
    example="hvdrec publish runs/movielens-1m/bundle --redis redis://localhost:6379/0",
)
def publish(options: argparse.Namespace) -> Answer:
    """Write a bundle's embeddings, as a new version, to a Redis server that many services share."""
    from hvdrec.scoring.stores.redis.publish import publish

    url = options.redis or os.environ.get("HVDREC_REDIS", "")
    if not url:
        raise UserError(
            "--redis: is missing; give the server's URL (redis://HOST:6379/0) or set HVDREC_REDIS",
            field="--redis",
        )
    with progress_bar("row") as progress:
        result = publish(
            options.bundle, url, prefix=options.prefix, keep=options.keep, progress=progress
        )
    text = (
        f"{result.users} users, {result.items} items as version {result.version} of model "
        f"{result.model}\npublished to {result.server} in {result.seconds:.1f} s"
    )
    return Answer(asdict(result), text)


@command(
    add_serve_arguments, example="hvdrec serve runs/movielens-1m/bundle --port 8080 --workers 2"
)
def serve(options: argparse.Namespace) -> Answer:
    """Serve a bundle over HTTP until SIGTERM or SIGINT; reload if another bundle replaces it."""
    from hvdrec.serving import from_arguments, serve

    serve(from_arguments(options))
    return Answer({}, "stopped")
