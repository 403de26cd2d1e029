"""The command ``hvdrec verify``."""

from __future__ import annotations

import argparse
from typing import Any

from hvdrec.cli.command import Answer, argument, command
from hvdrec.cli.progress_bar import progress_bar


@command(
    argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="directory or URL of samples, features, a bundle or a checkpoint, or a directory with "
        "several, such as a run or a work directory",
    ),
    example="hvdrec verify runs/movielens-1m\nhvdrec verify s3://bucket/movielens-1m",
    notes="The exit status is 0 if all is well, 1 if an artifact was made from another version of\n"
    "one beside it, and 2 if a file is damaged.\n\n",
)
def verify(options: argparse.Namespace) -> Answer:
    """Read artifacts completely and compare all their files with the stored checksums."""
    from hvdrec.errors import UserError
    from hvdrec.scoring.errors import ScoringError
    from hvdrec.storage.urls import as_location
    from hvdrec.training import verification

    verified, facts, lines = [], [], []
    errors: list[UserError | ScoringError] = []

    def refuse(path: str, error: UserError | ScoringError) -> None:
        errors.append(error)
        facts.append({"path": path, "ok": False, "file": error.field, "error": str(error)})
        lines.append(f"damaged: {error}")

    for path in options.paths:
        try:
            found = verification.find_artifacts(as_location(path))
        except (UserError, ScoringError) as error:
            refuse(path, error)
            continue
        for each in found:
            try:
                with progress_bar("B") as progress:
                    artifact = verification.verify(each, progress)
            except (UserError, ScoringError) as error:
                refuse(str(each), error)
                continue
            verified.append(artifact)
            facts.append(_facts(artifact))
            lines.append(
                "{path}: ok, {kind} {identity}, {files} files, {bytes:,} bytes".format(**facts[-1])
            )
    if errors and len(facts) == 1:
        raise errors[0]
    sources = list(verification.other_sources(verified))
    answer = {"artifacts": facts, "other_sources": sources}
    return Answer(answer, "\n".join([*lines, *sources]), 2 if errors else int(bool(sources)))


def _facts(artifact: Any) -> dict[str, Any]:
    return {
        "path": str(artifact.path),
        "ok": True,
        "kind": artifact.manifest.kind,
        "identity": artifact.manifest.identity,
        "files": len(artifact.manifest.files),
        "bytes": artifact.size,
    }
