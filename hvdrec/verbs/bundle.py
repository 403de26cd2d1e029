"""What is done with a bundle."""

from __future__ import annotations

import argparse

from hvdrec.text import table
from hvdrec.verbs import Answer


def recommend(options: argparse.Namespace, rest: list[str]) -> Answer:
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


def score(options: argparse.Namespace, rest: list[str]) -> Answer:
    from hvdrec.export.tables import score_table

    facts = score_table(options.bundle, options.input, options.output)
    return Answer(facts, f"scored {facts['rows']} rows\nwrote {options.output}")
