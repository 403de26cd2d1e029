"""A user's mistakes: one line, exit code 2, and nothing that stood before is harmed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from hvdrec.storage.artifacts import read_manifest, verify_artifact, write_manifest
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


def test_missing_column(small_config: Write) -> None:
    config = small_config(('user = "user_id"', 'user = "member"'))
    refused(
        hvdrec("samples", config),
        "shown.parquet: column 'member' (samples.user) is missing",
        "[user_id, item_id, shown_at, shop, clicked]",
    )


def test_missing_feature_column(small_config: Write) -> None:
    config = small_config(('name = "tags"', 'name = "marks"'))
    refused(hvdrec("samples", config), "column 'marks' (feature 'marks') is missing")


def test_wrong_type_of_a_feature(small_config: Write) -> None:
    config = small_config(('name = "shop"', 'name = "title"'))
    refused(hvdrec("samples", config), "items.parquet: column 'title' is string", "'int' takes")


def test_float_user_ids(small_config: Write) -> None:
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


def test_null_keys(small_config: Write) -> None:
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


def test_label_that_is_not_0_or_1(small_config: Write) -> None:
    config = small_config(('label = "clicked"', 'label = "clicked + 1"'))
    refused(
        hvdrec("samples", config),
        "samples.label = 'clicked + 1': is neither 0 nor 1 in 3",
        "of 6000 rows of",
        "shown.parquet, for example 2; write a condition",
    )


def test_label_that_is_no_sql(small_config: Write) -> None:
    config = small_config(('label = "clicked"', 'label = "clickd > 0"'))
    refused(hvdrec("samples", config), "samples.label = 'clickd > 0'", "clickd")


def test_empty_split(small_config: Write) -> None:
    config = small_config(
        ('label = "clicked"', 'label = "clicked"\n[samples.split]\nboundaries = [5.0, 1e12]\n')
    )
    refused(
        hvdrec("samples", config),
        "samples.split.boundaries = [5.0, 1000000000000.0]: the train split is empty",
    )


def test_no_parquet(small_config: Write) -> None:
    config = small_config()
    (config.parent / "raw/shown.parquet").write_bytes(b"user_id,item_id\n1,2\n")
    refused(hvdrec("samples", config), "shown.parquet: not a readable Parquet file (")


def test_missing_table(small_config: Write) -> None:
    config = small_config(("users.csv", "people.csv"))
    refused(hvdrec("samples", config), "people.csv: no such file; check paths.raw")


def test_two_rows_of_one_key(small_config: Write) -> None:
    config = small_config()
    change(config.parent / "raw/items.parquet", lambda t: pa.concat_tables([t, t.slice(3, 1)]))
    refused(
        hvdrec("samples", config),
        "items.parquet: 2 rows have item_id = 103 (samples.items); keep one row per key",
    )


def test_unknown_key_in_the_toml(small_config: Write) -> None:
    config = small_config(("batch_size = 512", "batchsize = 512"))
    refused(
        hvdrec("train", config),
        "small.toml: train.batchsize: unknown key; known: [",
        "did you mean 'batch_size'?",
    )


def test_wrong_type_in_the_toml(small_config: Write) -> None:
    config = small_config(("batch_size = 512", 'batch_size = "512"'))
    refused(
        hvdrec("train", config), "small.toml: train.batch_size = '512': must be a valid integer"
    )


def test_training_before_preparing(small_config: Write) -> None:
    refused(hvdrec("train", small_config()), "work/features: no features artifact here")


def test_a_taken_directory(small_run: SmallRun) -> None:
    for verb, place in (("samples", "samples"), ("prepare", "features"), ("train", "run")):
        refused(hvdrec(verb, small_run.config), f"work/{place}: already")


def test_scene_field_that_does_not_exist(small_run: SmallRun) -> None:
    done = hvdrec("recommend", small_run.work / "bundle", "--user", "u1", "--scene", "our=3")
    refused(done, "scene.our: unknown field; known: [hour, shop]")


def test_scene_value_of_the_wrong_type(small_run: SmallRun) -> None:
    done = hvdrec("recommend", small_run.work / "bundle", "--user", "u1", "--scene", "hour=late")
    refused(done, "hour = 'late': must be an integer")


def test_user_features_of_the_wrong_type(small_run: SmallRun) -> None:
    done = hvdrec("recommend", small_run.work / "bundle", "--user", '{"user_id": 7}')
    refused(done, 'user_id = 7: must be a string, not int; pass "7"')


def test_no_bundle(tmp_path: Path) -> None:
    done = hvdrec("recommend", tmp_path, "--user", "u1")
    refused(done, "is not a bundle (manifest.json is missing); write one with hvdrec export")


def test_unknown_data_set(tmp_path: Path) -> None:
    done = hvdrec("data", "movielens-2m", "--to", tmp_path / "x")
    refused(done, "data set = 'movielens-2m': unknown; known: [movielens-1m, complete-journey]")


@pytest.mark.parametrize("how", ["truncated", "no parquet at all"])
def test_a_broken_shard(small_run: SmallRun, tmp_path: Path, how: str) -> None:
    work = tmp_path / "work"
    config = tmp_path / "small.toml"
    config.write_text(small_run.config.read_text().replace(str(small_run.work), str(work)))
    succeed("samples", config)
    succeed("prepare", config)
    shard = work / "features/train/shard-00001.parquet"
    whole = shard.read_bytes()
    # Of the same size, so that the manifest's sizes do not catch it first.
    shard.write_bytes(
        whole[:100].ljust(len(whole), b"\0") if how == "truncated" else b"x" * len(whole)
    )
    refused(hvdrec("train", config), "shard-00001.parquet: not a readable Parquet file", "prepare")
    shard.write_bytes(whole[:-10])
    refused(hvdrec("train", config), f"shard-00001.parquet: {len(whole) - 10} bytes")


def test_a_failed_stage_leaves_what_stood_there(small_config: Write) -> None:
    config = small_config()
    succeed("samples", config)
    samples = config.parent / "work/samples"
    before = (samples / "manifest.json").read_bytes()
    config.write_text(config.read_text().replace('label = "clicked"', 'label = "clicked * 3"'))
    refused(hvdrec("samples", config, "--overwrite"), "is neither 0 nor 1 in")
    assert (samples / "manifest.json").read_bytes() == before
    verify_artifact(samples, "samples")
    assert [path.name for path in samples.parent.iterdir()] == ["samples"]


def test_overrides_name_their_choices(small_run: SmallRun) -> None:
    done = hvdrec("train", small_run.config, "--train.objective", "clicks")
    refused(done, "command line: ", "--train.objective", "retrieval", "joint", "clicks")
    refused(hvdrec("train", small_run.config, "--train.speed", "9"), "command line: ", "speed")


def test_a_code_that_no_table_has(small_run: SmallRun, tmp_path: Path) -> None:
    features = tmp_path / "features"
    shutil.copytree(small_run.work / "features", features)
    shard = sorted((features / "train").glob("*.parquet"))[-1]
    table = pq.read_table(shard)
    place = table.column_names.index("shop")
    meta = read_manifest(features, "features").meta
    change(shard, lambda t: t.set_column(place, "shop", pc.add(t["shop"], 90)))
    write_manifest(features, "features", meta)  # as if it had been written so
    done = hvdrec(
        "train", small_run.config, "--paths.features", features, "--paths.run", tmp_path / "run"
    )
    refused(done, f"{shard.name}: column 'shop' holds code 107", "outside table 'shop' of 18 rows")
    assert "run hvdrec prepare again" in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_tables_that_no_memory_holds(small_run: SmallRun, tmp_path: Path) -> None:
    refused(
        hvdrec(
            *("train", small_run.config, "--paths.run", tmp_path / "run"),
            *("--model.dimension", "2000000000"),
        ),
        "(62 rows of width 2000000000, replicated): the tables take",
        "train on more ranks with parallel.placement = 'auto', or narrow it",
    )


def test_a_width_that_a_wished_kernel_cannot_hold(small_run: SmallRun, tmp_path: Path) -> None:
    refused(
        hvdrec(
            *("train", small_run.config, "--paths.run", tmp_path / "run"),
            *("--model.dimension", "6", "--parallel.kernel", "fbgemm"),
        ),
        "parallel.kernel = 'fbgemm': cannot hold table 'user_id': FBGEMM wants widths that are "
        "multiples of 4, not 6; use 'torch' or 'auto'",
    )
