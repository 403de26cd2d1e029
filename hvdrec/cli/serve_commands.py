"""What is done with a bundle."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hvdrec.cli.answer import Answer
from hvdrec.cli.text_table import table
from hvdrec.errors import UserError


def fetch(options: argparse.Namespace, rest: list[str]) -> Answer:
    from hvdrec.storage.artifacts import fetch_artifact
    from hvdrec.storage.urls import as_location

    source, to = as_location(options.source), options.to
    is_new = fetch_artifact(source, to, "bundle", overwrite=options.overwrite)
    facts = {"path": str(to), "source": str(source), "fetched": is_new}
    return Answer(facts, f"wrote {to}" if is_new else f"{to}: holds this bundle already")


def recommend(options: argparse.Namespace, rest: list[str]) -> Answer:
    from hvdrec.cli.request_text import parse_allowed, parse_key, parse_scene, parse_user
    from hvdrec.scoring import Scorer

    scorer = Scorer.load(options.bundle)
    user, scene = parse_user(scorer, options.user), parse_scene(scorer, options.scene)
    found = scorer.recommend(
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
        told = scorer.score_tasks(user, [r.item for r in found], scene)
        by_task = {task: told[task].tolist() for task in scorer.tasks}
    rows = [
        [i + 1, r.item, r.title or "", f"{r.score:.4f}", *(f"{p[i]:.4f}" for p in by_task.values())]
        for i, r in enumerate(found)
    ]
    text = table(["", "item", "title", "score", *by_task], rows)
    if found and found[0].source == "trending":
        text += "\nnothing is known of this user: these are the trending items"
    facts = {
        "user": options.user,
        "scene": scene,
        "items": [
            {
                "item": r.item,
                "title": r.title,
                "score": r.score,
                "retrieval_score": r.retrieval_score,
                "source": r.source,
                **({"tasks": {task: p[i] for task, p in by_task.items()}} if by_task else {}),
            }
            for i, r in enumerate(found)
        ],
    }
    return Answer(facts, text)


def score(options: argparse.Namespace, rest: list[str]) -> Answer:
    from hvdrec.exporting.score_file import score_table

    facts = score_table(options.bundle, options.input, options.output)
    return Answer(facts, f"scored {facts['rows']} rows\nwrote {options.output}")


def publish(options: argparse.Namespace, rest: list[str]) -> Answer:
    from dataclasses import asdict

    from hvdrec.scoring.stores.redis.publish import publish as write

    url = options.redis or os.environ.get("HVDREC_REDIS", "")
    if not url:
        raise UserError("--redis: give the server's URL, or set HVDREC_REDIS (redis://HOST:6379/0)")
    with _progress() as progress:
        done = write(
            options.bundle, url, prefix=options.prefix, keep=options.keep, progress=progress
        )
    text = (
        f"{done.users} users, {done.items} items as version {done.version} of model {done.model}\n"
        f"published to {done.server} in {done.seconds:.1f} s"
    )
    return Answer(asdict(done), text)


def serve(options: argparse.Namespace, rest: list[str]) -> Answer:
    from hvdrec.serving import from_arguments
    from hvdrec.serving import serve as run

    run(from_arguments(options))
    return Answer({}, "stopped")


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Yield what shows how many rows of how many are done; shows nothing where there is no tqdm."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:  # the slim install has none
        yield lambda rows, total: None
        return
    with tqdm(unit="row", unit_scale=True, leave=False, disable=None) as bar:

        def show(rows: int, total: int) -> None:
            bar.total = total
            bar.update(rows - bar.n)

        yield show
