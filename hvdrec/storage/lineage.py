"""Check that artifacts that are read together belong together."""

from __future__ import annotations

from hvdrec.errors import invalid_file
from hvdrec.storage.artifacts import Manifest, read_manifest
from hvdrec.storage.urls import Location

ANCESTORS = "ancestors"
"""Key in the ``meta`` of features that continue earlier features, as their next *generation*. The
value lists the identities of all earlier generations, the oldest first."""


def descent(parent: Manifest) -> list[str]:
    """Return the ancestors of an artifact that continues `parent`."""
    return [*parent.meta.get(ANCESTORS, ()), parent.identity]


def generation_of(recorded: str, manifest: Manifest) -> int | None:
    """Find the identity `recorded` among an artifact and its ancestors; return its generation.

    Returns:
        The generation, from 0 for the oldest; None if `recorded` is not among them.
    """
    generations = descent(manifest)
    return generations.index(recorded) if recorded in generations else None


def require_source(
    path: Location, manifest: Manifest, source: Location, kind: str, remedy: str
) -> bool:
    """Check that an artifact was made from exactly the source that is on disk now.

    Args:
        path: Path of the artifact, for the error message.
        manifest: Manifest of the artifact.
        source: Path of the source, such as the samples that features were made from.
        kind: Kind of the source.
        remedy: What the user can do if the source is another one.

    Returns:
        True if the source is the recorded one; False if the artifact, written by an earlier version
        of hvdrec, does not record its source.

    Raises:
        UserError: The artifact was made from another source, or the source cannot be read.
    """
    now = read_manifest(source, kind).identity
    recorded = manifest.made_from(kind)
    if recorded and recorded != now:
        problem = f"was made from {kind} {recorded}, but {source} now holds {kind} {now}"
        raise invalid_file(path, problem, remedy)
    return bool(recorded)
