"""Verify artifacts: compare checksums, read Parquet files, check that artifacts belong together."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hvdrec.errors import invalid_file
from hvdrec.scoring.bundle import GRAPHS, read_bundle
from hvdrec.scoring.graph_limits import check_graph
from hvdrec.scoring.verify import verify_arrays
from hvdrec.storage.artifacts import (
    MANIFEST,
    REMEDIES,
    REWRITE,
    Manifest,
    fetch_artifact,
    manifest_kind,
    read_manifest,
)
from hvdrec.storage.checksums import sha256, unsealed
from hvdrec.storage.urls import Location, Url
from hvdrec.training.pointers import POINTERS, find_checkpoint

DOCUMENTS = ("config.json", "trials.json")
"""JSON files that are not part of an artifact and contain their own checksum."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Verified:
    """An artifact whose files match its manifest."""

    path: Location
    """Directory or URL of the artifact."""
    manifest: Manifest = field(repr=False)
    """Manifest of the artifact."""

    @property
    def size(self) -> int:
        """Size of all files, in bytes."""
        return sum(facts["bytes"] for facts in self.manifest.files.values())


def find_artifacts(path: Location) -> list[Location]:
    """Return the artifact at a path, or all artifacts below it, such as the checkpoints of a run.

    If there are runs below the path, their ``latest``, ``best`` and ``config.json`` are checked.

    Raises:
        UserError: There is no artifact, or one of these files is damaged.
    """
    if isinstance(path, Url) or (path / MANIFEST).exists():
        return [path]
    found: list[Location] = []
    for file in sorted(path.rglob("*")):
        if any(part.startswith(".") for part in file.relative_to(path).parts):
            continue  # an unfinished artifact
        if file.name == MANIFEST:
            found.append(file.parent)
        elif file.name in DOCUMENTS and not (file.parent / MANIFEST).exists():
            _check_document(file)
        elif file.name in POINTERS:
            find_checkpoint(file.parent, "latest" if file.name == "latest" else "best")
    if not found:
        problem = f"no artifact here or below ({MANIFEST} is missing)"
        raise invalid_file(path, problem, "give a directory that an hvdrec command wrote")
    return found


def verify(path: Location, progress: Progress = lambda done, total: None) -> Verified:
    """Verify one artifact.

    Args:
        path: Directory or URL of the artifact.
        progress: Called with the number of bytes that have been read, and the number of all bytes.

    Raises:
        UserError: A file is damaged or missing.
        BundleError: A file of a bundle is damaged or missing.
    """
    kind = manifest_kind(path)
    manifest = read_manifest(path, kind)
    if kind == "bundle":
        _verify_bundle(path)
        return Verified(path, manifest)
    remedy = REMEDIES.get(kind, REWRITE)
    total = sum(facts["bytes"] for facts in manifest.files.values())
    done = 0
    for name, facts in manifest.files.items():
        with tempfile.TemporaryDirectory(prefix="hvdrec-") as folder:
            file = _local(path / name, Path(folder))
            try:
                digest = sha256(file)
            except OSError as error:
                problem = f"cannot be read ({error.strerror})"
                raise invalid_file(path / name, problem, remedy) from None
            if digest != facts["sha256"]:
                raise invalid_file(path / name, f"contents differ from {MANIFEST}", remedy)
            if name.endswith(".parquet"):
                _check_parquet(path / name, file, remedy)
        done += facts["bytes"]
        progress(done, total)
    return Verified(path, manifest)


def other_sources(artifacts: Sequence[Verified]) -> Iterator[str]:
    """Yield a line for each artifact that was made from another source than the one beside it.

    For example, features are reported if the samples in their work directory were written again
    with other contents. Only artifacts in the same work directory are compared.
    """
    for artifact in artifacts:
        beside = [each for each in artifacts if _work(each.path) == _work(artifact.path)]
        for kind in dict.fromkeys(each.manifest.kind for each in beside):
            recorded = artifact.manifest.made_from(kind)
            # A run has several checkpoints, so there may be several sources of this kind.
            sources = {e.manifest.identity: e.path for e in beside if e.manifest.kind == kind}
            if recorded and recorded not in sources:
                now, path = next(iter(sources.items()))
                yield (
                    f"{artifact.path}: was made from {kind} {recorded}, but {path} now holds "
                    f"{kind} {now}; run the stages after hvdrec {_STAGES.get(kind, kind)} again"
                )


_STAGES = {"features": "prepare", "checkpoint": "train"}


def _work(path: Location) -> str:
    """Return the work directory of an artifact: the parent of samples, features, bundle and run."""
    parts = str(path).rstrip("/").split("/")
    return "/".join(parts[:-3] if parts[-2:-1] == ["checkpoints"] else parts[:-1])


def _verify_bundle(path: Location) -> None:
    with tempfile.TemporaryDirectory(prefix="hvdrec-") as folder:
        if isinstance(path, Url):
            fetch_artifact(path, Path(folder) / "bundle", "bundle")
            path = Path(folder) / "bundle"
        info = read_bundle(path, verify=True)
        verify_arrays(info)
        for name in GRAPHS:
            check_graph(info.path, name, info.manifest["files"])


def _local(file: Location, folder: Path) -> Path:
    if isinstance(file, Path):
        return file
    file.download(folder / file.name)
    return folder / file.name


def _check_parquet(shown: Location, file: Path, remedy: str) -> None:
    import pyarrow as pa  # not at the top: the slim install lacks it and verifies only bundles
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as opened:
            for batch in opened.iter_batches():
                del batch
    except (OSError, pa.ArrowException) as error:
        raise invalid_file(shown, f"is not readable as Parquet ({error})", remedy) from None


def _check_document(file: Path) -> None:
    try:
        unsealed(file.read_bytes())
    except (OSError, ValueError) as error:
        raise invalid_file(file, str(error), "run the command that wrote it again") from None
