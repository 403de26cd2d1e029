"""Check features and run directory before training; create the directory if all is well."""

from __future__ import annotations

import shutil
from pathlib import Path

from hvdrec.config import Config
from hvdrec.config.schema import Feature
from hvdrec.config.structure import from_dict, to_dict
from hvdrec.errors import UserError, invalid_file
from hvdrec.features.sample_checks import check_task_labels
from hvdrec.models.losses import retrieval_loss
from hvdrec.parallel.ranks import World
from hvdrec.storage.artifacts import Manifest, read_manifest
from hvdrec.storage.checksums import sealed
from hvdrec.storage.drafts import remove_leftovers, write_text
from hvdrec.training.checkpoint import CONFIG_FILE, read_config, require_features
from hvdrec.training.pointers import FOLDER, find_checkpoint, has_checkpoint


def check_features(config: Config) -> Manifest:
    """Check that the encoded features match the configuration, and that the loss is known.

    Returns:
        The manifest of the features.

    Raises:
        UserError: The features are missing, or were encoded with other features or tasks; or the
            retrieval loss is unknown.
    """
    retrieval_loss(config.train.retrieval_loss)
    features = config.paths.of("features")
    manifest = read_manifest(features, "features")
    # An earlier version may have stored fewer fields for each feature; the rest get defaults.
    stored = [from_dict(Feature, feature) for feature in manifest.meta["config"]["features"]]
    if stored != list(config.features):
        raise invalid_file(
            features,
            "was encoded with other [[features]] than the configuration has now",
            "run hvdrec prepare with --overwrite",
        )
    check_task_labels(features, manifest, config.tasks, "hvdrec samples and hvdrec prepare")
    return manifest


def check_run(config: Config, run: Path, *, resume: bool, overwrite: bool) -> bool:
    """Check the run directory; return True if training resumes from a checkpoint.

    Only the first rank calls this. The reason is network file systems: if a rank looks for a file
    before another rank writes it, the file may stay invisible to it for a while afterwards.

    Raises:
        UserError: Both options are given; the directory holds a run, and neither option is given;
            or the run to resume was trained with other values of fields that determine the model or
            the order of rows.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other; give one of them")
    if has_checkpoint(run) and resume:
        _check_same(run, read_config(run), config)
        require_features(find_checkpoint(run, "latest"), config.paths.of("features"))
        return True
    if run.exists() and any(run.iterdir()) and not overwrite and not resume:
        raise invalid_file(
            run, "already holds a run", "pass --resume to continue it or --overwrite to replace it"
        )
    return False


def _check_same(run: Path, before: Config, now: Config) -> None:
    fields: list[tuple[str, object, object]] = [
        ("seed", before.seed, now.seed),
        ("loader.shuffle_rows", before.loader.shuffle_rows, now.loader.shuffle_rows),
        ("train.objective", before.train.objective, now.train.objective),
        ("train.retrieval_loss", before.train.retrieval_loss, now.train.retrieval_loss),
        (
            "train.embedding_optimizer",
            before.train.embedding_optimizer,
            now.train.embedding_optimizer,
        ),
        ("model", to_dict(before.model), to_dict(now.model)),
        ("tasks", [task.name for task in before.tasks], [task.name for task in now.tasks]),
    ]
    for field, old, new in fields:
        if old != new:
            raise UserError(
                f"{run}: was trained with {field} = {old}, the configuration says {new}; "
                "resume with the former or pass --overwrite to replace the run",
                field=field,
                value=new,
            )


def create_run_directory(run: Path, config: Config, world: World, *, overwrite: bool) -> None:
    """Create the run directory and write the configuration to it, on the first rank.

    Raises:
        UserError: The directory to overwrite is not a run.
    """
    if not world.is_first:
        return
    if overwrite and run.exists():
        if not (run / CONFIG_FILE).is_file() and any(run.iterdir()):
            raise invalid_file(run, "is not a run of hvdrec", "choose another directory")
        shutil.rmtree(run)
    # Remove unfinished checkpoints of a killed job. Later checkpoints would not remove them: each
    # removes only leftovers of its own name, which contains the step.
    for folder in (run, run / FOLDER):
        remove_leftovers(folder)
    write_text(run / CONFIG_FILE, sealed(to_dict(config)))
