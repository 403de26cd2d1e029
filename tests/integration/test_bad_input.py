"""A user's mistake ends in one line and exit code 2, and leaves existing output unchanged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from hvdrec.storage.artifacts import read_manifest, verify_artifact, write_manifest
from hvdrec.storage.parquet import write_checksums
from tests.integration.conftest import Result, SmallRun, hvdrec, succeed

Write = Callable[..., Path]


def refused(done: Result, *parts: str) -> None:
    """Check exit code 2 and one line on standard error that holds all parts."""
    assert done.returncode == 2, done.stdout + done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("hvdrec: error: "), done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in line


def change(file: Path, edit: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(edit(pq.read_table(file)), file)


def test_refuses_a_missing_column(small_config: Write) -> None:
    config = small_config(('user = "user_id"', 'user = "member"'))
    refused(
        hvdrec("samples", config),
        "shown.parquet: column 'member' (samples.user) is missing",
        "[user_id, item_id, shown_at, shop, clicked]",
    )


def test_refuses_a_feature_without_a_column(small_config: Write) -> None:
    config = small_config(('name = "tags"', 'name = "marks"'))
    refused(hvdrec("samples", config), "column 'marks' (feature 'marks') is missing")


def test_refuses_a_feature_of_the_wrong_type(small_config: Write) -> None:
    config = small_config(('name = "shop"', 'name = "title"'))
    refused(hvdrec("samples", config), "items.parquet: column 'title' is string", "'int' takes")


def test_refuses_float_user_ids(small_config: Write) -> None:
    config = small_config(
        ('users = "users.csv"\n', ""),
        ('name = "age"', 'name = "shown_at"'),
        ('direct = ["age", "price"]', "direct = []"),
    )
    file = config.parent / "raw/shown.parquet"
    numbers = pa.array([1.5] * 6000)
    change(file, lambda t: t.set_column(0, "user_id", numbers))
    refused(
        hvdrec("samples", config),
        "shown.parquet: key column 'user_id' is float",
        "[string, integer]",
    )


def test_refuses_null_keys(small_config: Write) -> None:
    config = small_config()
    change(
        config.parent / "raw/shown.parquet",
        lambda t: t.set_column(0, "user_id", pc.if_else(pc.equal(t["clicked"], 1), None, t[0])),
    )
    refused(
        hvdrec("samples", config),
        "shown.parquet: key column 'user_id' is null or empty in 3",
        "rows",
    )


def test_refuses_a_label_other_than_0_and_1(small_config: Write) -> None:
    config = small_config(('label = "clicked"', 'label = "clicked + 1"'))
    refused(
        hvdrec("samples", config),
        "samples.label = 'clicked + 1': is neither 0 nor 1 in 3",
        "of 6000 rows of",
        "shown.parquet, for example 2; write a condition",
    )


def test_refuses_a_label_that_is_not_sql(small_config: Write) -> None:
    config = small_config(('label = "clicked"', 'label = "clickd > 0"'))
    refused(hvdrec("samples", config), "samples.label = 'clickd > 0'", "clickd")


def test_refuses_an_empty_split(small_config: Write) -> None:
    config = small_config(
        ('label = "clicked"', 'label = "clicked"\n[samples.split]\nboundaries = [5.0, 1e12]\n')
    )
    refused(
        hvdrec("samples", config),
        "samples.split.boundaries = [5.0, 1000000000000.0]: the train split is empty",
    )


def test_refuses_a_table_that_is_not_parquet(small_config: Write) -> None:
    config = small_config()
    (config.parent / "raw/shown.parquet").write_bytes(b"user_id,item_id\n1,2\n")
    refused(hvdrec("samples", config), "shown.parquet: not a readable Parquet file (")


def test_refuses_a_missing_table(small_config: Write) -> None:
    config = small_config(("users.csv", "people.csv"))
    refused(hvdrec("samples", config), "people.csv: no such file; check paths.raw")


def test_refuses_two_rows_with_one_key(small_config: Write) -> None:
    config = small_config()
    change(config.parent / "raw/items.parquet", lambda t: pa.concat_tables([t, t.slice(3, 1)]))
    refused(
        hvdrec("samples", config),
        "items.parquet: 2 rows have item_id = 103 (samples.items); keep one row per key",
    )


def test_refuses_an_unknown_key(small_config: Write) -> None:
    config = small_config(("batch_size = 512", "batchsize = 512"))
    refused(
        hvdrec("train", config),
        "small.toml: train.batchsize: unknown key; known: [",
        "did you mean 'batch_size'?",
    )


def test_refuses_a_value_of_the_wrong_type(small_config: Write) -> None:
    config = small_config(("batch_size = 512", 'batch_size = "512"'))
    refused(
        hvdrec("train", config), "small.toml: train.batch_size = '512': must be a valid integer"
    )


def test_refuses_to_train_before_prepare(small_config: Write) -> None:
    refused(hvdrec("train", small_config()), "work/features: no features artifact here")


def test_refuses_to_overwrite_output(small_run: SmallRun) -> None:
    for verb, place in (("samples", "samples"), ("prepare", "features"), ("train", "run")):
        refused(hvdrec(verb, small_run.config), f"work/{place}: already")


def test_refuses_an_unknown_scene_field(small_run: SmallRun) -> None:
    done = hvdrec("recommend", small_run.work / "bundle", "--user", "u1", "--scene", "our=3")
    refused(done, "scene.our: unknown field; known: [hour, shop]")


def test_refuses_a_scene_value_of_the_wrong_type(small_run: SmallRun) -> None:
    done = hvdrec("recommend", small_run.work / "bundle", "--user", "u1", "--scene", "hour=late")
    refused(done, "hour = 'late': must be an integer")


def test_refuses_a_user_feature_of_the_wrong_type(small_run: SmallRun) -> None:
    done = hvdrec("recommend", small_run.work / "bundle", "--user", '{"user_id": 7}')
    refused(done, 'user_id = 7: must be a string, not an integer; pass "7"')


def test_refuses_a_directory_without_a_bundle(tmp_path: Path) -> None:
    done = hvdrec("recommend", tmp_path, "--user", "u1")
    refused(done, "is not a bundle (manifest.json is missing); write one with hvdrec export")


def test_refuses_an_unknown_data_set(tmp_path: Path) -> None:
    done = hvdrec("data", "movielens-2m", "--to", tmp_path / "x")
    refused(done, "data set = 'movielens-2m': unknown; known: [movielens-1m, complete-journey]")


@pytest.mark.parametrize("damage", ["zeros", "not Parquet"])
def test_refuses_a_damaged_shard(small_run: SmallRun, tmp_path: Path, damage: str) -> None:
    work = tmp_path / "work"
    config = tmp_path / "small.toml"
    config.write_text(small_run.config.read_text().replace(str(small_run.work), str(work)))
    succeed("samples", config)
    succeed("prepare", config)
    shard = work / "features/train/shard-00001.parquet"
    content = shard.read_bytes()
    # Keep the size, or the manifest's check of sizes would find it first.
    shard.write_bytes(
        content[:100].ljust(len(content), b"\0") if damage == "zeros" else b"x" * len(content)
    )
    refused(hvdrec("train", config), "shard-00001.parquet: is damaged", "prepare with --overwrite")
    shard.write_bytes(content[:-10])
    refused(hvdrec("train", config), f"shard-00001.parquet: {len(content) - 10} bytes")


def test_a_failed_stage_leaves_existing_output_unchanged(small_config: Write) -> None:
    config = small_config()
    succeed("samples", config)
    samples = config.parent / "work/samples"
    before = (samples / "manifest.json").read_bytes()
    config.write_text(config.read_text().replace('label = "clicked"', 'label = "clicked * 3"'))
    refused(hvdrec("samples", config, "--overwrite"), "is neither 0 nor 1 in")
    assert (samples / "manifest.json").read_bytes() == before
    verify_artifact(samples, "samples")
    assert [path.name for path in samples.parent.iterdir()] == ["samples"]


def test_refuses_wrong_options_for_fields(small_run: SmallRun) -> None:
    done = hvdrec("train", small_run.config, "--train.objective", "clicks")
    refused(done, "--train.objective = 'clicks'", "retrieval", "joint")
    refused(hvdrec("train", small_run.config, "--train.speed", "9"), "--train.speed: unknown")


def test_refuses_a_code_outside_its_table(small_run: SmallRun, tmp_path: Path) -> None:
    features = tmp_path / "features"
    shutil.copytree(small_run.work / "features", features)
    shard = sorted((features / "train").glob("*.parquet"))[-1]
    table = pq.read_table(shard)
    position = table.column_names.index("shop")
    meta = read_manifest(features, "features").meta
    change(shard, lambda t: t.set_column(position, "shop", pc.add(t["shop"], 90)))
    write_checksums(features / "train")  # so that the checksums match
    write_manifest(features, "features", meta)
    done = hvdrec(
        "train", small_run.config, "--paths.features", features, "--paths.run", tmp_path / "run"
    )
    refused(done, f"{shard.name}: column 'shop' holds code 107", "outside table 'shop' of 18 rows")
    assert "run hvdrec prepare with --overwrite" in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_refuses_tables_larger_than_memory(small_run: SmallRun, tmp_path: Path) -> None:
    refused(
        hvdrec(
            *("train", small_run.config, "--paths.run", tmp_path / "run"),
            *("--model.dimension", "2000000000"),
        ),
        "table 'user_id' (62 rows",
        "GB on each of 1 ranks",
        "train on more ranks with parallel.placement = 'auto'",
    )


def test_refuses_a_width_that_the_kernel_does_not_support(
    small_run: SmallRun, tmp_path: Path
) -> None:
    refused(
        hvdrec(
            *("train", small_run.config, "--paths.run", tmp_path / "run"),
            *("--model.dimension", "6", "--parallel.kernel", "fbgemm"),
        ),
        "parallel.kernel = 'fbgemm'",
        "'user_id'",
        "multiple of 4, not 6",
        "use 'torch' or 'auto'",
    )
