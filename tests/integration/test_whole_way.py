"""The command line from raw tables to ranked items, on small data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from hvdrec.scoring import Scorer
from hvdrec.storage.artifacts import verify_artifact
from tests.integration.conftest import SmallRun, hvdrec, succeed


def test_every_stage_writes_a_complete_artifact(small_run: SmallRun) -> None:
    for name, kind in (("samples", "samples"), ("features", "features"), ("bundle", "bundle")):
        manifest = verify_artifact(small_run.work / name, kind)
        assert manifest.meta["config"]["name"] == "small"
        leftovers = [p.name for p in small_run.work.iterdir() if p.name.startswith(".")]
        assert leftovers == []


def test_shards_are_even_and_hold_every_sample(small_run: SmallRun) -> None:
    meta = verify_artifact(small_run.work / "features", "features").meta
    assert sum(meta["shards"]["train"]) == meta["rows"]["train"] == 4800
    assert max(meta["shards"]["train"]) - min(meta["shards"]["train"]) <= 1
    groups = pq.read_metadata(small_run.work / "features/train/shard-00000.parquet")
    assert max(groups.row_group(i).num_rows for i in range(groups.num_row_groups)) <= 300


def test_the_model_beats_the_mean_baselines(small_run: SmallRun) -> None:
    report = small_run.report
    means = ("popularity", "item_mean", "user_item_mean")
    best = max(report["baselines"][name]["ranking"]["auc"] for name in means)
    assert report["ranking"]["auc"] > best + 0.03
    assert {"recall@5", "ndcg@10", "coverage@10"} <= report["retrieval"].keys()
    assert report["baselines"].keys() == {
        "popularity",
        "item_mean",
        "user_item_mean",
        "cooccurrence",
        "ease",
    }


def test_events_are_measured_as_the_scorer_answers_them(small_run: SmallRun) -> None:
    scorer = Scorer.load(small_run.work / "bundle")
    splits = ("train", "validation", "test")
    rows = [
        {**row, "split": number}
        for number, split in enumerate(splits)
        for row in pq.read_table(small_run.work / "samples" / split).to_pylist()
    ]
    catalogue = pq.read_table(small_run.work / "samples/items.parquet")["item_id"].to_pylist()
    width = 8  # of the towers' outputs; the inputs that only the ranker reads follow
    items = scorer.embed_items(catalogue)[:, :width]
    ranks = []
    for row in rows:
        if row["split"] < 2 or not row["label"]:
            continue
        seen = {
            other["item_id"]
            for other in rows
            if other["user_id"] == row["user_id"] and other["label"] and other["time"] < row["time"]
        }
        if row["item_id"] not in seen:
            user = scorer.embed_user({name: row[name] for name in ("user_id", "clicks", "age")})
            order = [catalogue[i] for i in np.argsort(-(items @ user[:width]))]
            ranks.append([item for item in order if item not in seen].index(row["item_id"]) + 1)
    rank = np.array(ranks)
    report = small_run.report["events"]
    assert report["events"] == len(rank)
    for k in (5, 10):
        assert report[f"hit_rate@{k}"] == pytest.approx((rank <= k).mean())
        gains = np.where(rank <= k, 1 / np.log2(rank + 1), 0)
        assert report[f"ndcg@{k}"] == pytest.approx(gains.mean())
    baselines = small_run.report["baselines"]
    assert {name for name, each in baselines.items() if "events" in each} == {
        "popularity",
        "cooccurrence",
        "ease",
    }


def test_baseline_settings_are_chosen_on_validation(small_run: SmallRun) -> None:
    notes = small_run.report["notes"]
    for name, setting in (("cooccurrence", "neighbours"), ("ease", "l2")):
        found = small_run.report["baselines"][name]
        assert {"auc", "gauc"} < found["ranking"].keys()
        assert "log_loss" not in found["ranking"]
        assert found["retrieval"].keys() == small_run.report["retrieval"].keys()
        chosen = found["chosen"]
        assert chosen["ranking"].keys() == {setting, "auc"}
        assert chosen["retrieval"].keys() == {setting, "recall@5"}
        assert chosen["events"].keys() == {setting, "ndcg@5"}
        value = chosen["retrieval"][setting]
        assert any(n.startswith(f"{name}: {setting} = ") and f"{value:g} for" in n for n in notes)
    # A report on validation shows the very metrics by which the choice was made.
    again = succeed("evaluate", small_run.work / "run", "--split", "validation")["baselines"]
    for name in ("cooccurrence", "ease"):
        for kind, metric in (("ranking", "auc"), ("retrieval", "recall@5")):
            assert again[name]["chosen"] == small_run.report["baselines"][name]["chosen"]
            assert again[name][kind][metric] == again[name]["chosen"][kind][metric]


def test_a_note_says_that_the_catalogue_is_too_large_for_ease(small_run: SmallRun) -> None:
    done = hvdrec("evaluate", small_run.work / "run", "--ease-items", "39")
    assert done.returncode == 0, done.stderr
    (note,) = [line for line in done.stdout.splitlines() if line.startswith("ease: left out")]
    assert "0.0 GB for 40 items" in note
    assert "--ease-items 40" in note
    (header,) = [line for line in done.stdout.splitlines() if line.startswith("retrieval ")]
    assert header.split() == ["retrieval", "model", "popularity", "item_mean", "cooccurrence"]


def test_the_bundle_scores_like_torch(small_run: SmallRun) -> None:
    parity = small_run.export["parity"]
    assert parity["rows"] == 3 * 600
    assert parity["largest_difference"] <= 1e-5


def test_recommend_ranks_by_score_and_depends_on_the_scene(small_run: SmallRun) -> None:
    bundle = small_run.work / "bundle"
    night = succeed("recommend", bundle, "--user", "u1", "--scene", "hour=23", "-k", "7")
    noon = succeed("recommend", bundle, "--user", "u1", "--scene", "hour=12", "-k", "7")
    assert [len(night["items"]), len(noon["items"])] == [7, 7]
    assert all(item["title"].startswith("Item ") for item in night["items"])
    scores = [item["score"] for item in night["items"]]
    assert scores == sorted(scores, reverse=True)
    assert scores != [item["score"] for item in noon["items"]]
    default = succeed("recommend", bundle, "--user", "u1", "-k", "7")
    assert default["items"] == noon["items"]  # the declared default of hour is 12


def test_excluded_items_are_not_recommended(small_run: SmallRun) -> None:
    bundle = small_run.work / "bundle"
    first = succeed("recommend", bundle, "--user", "u1", "-k", "3")["items"]
    gone = [item["item"] for item in first]
    later = succeed("recommend", bundle, "--user", "u1", "-k", "40", "--exclude", *gone)["items"]
    assert len(later) == 37
    assert not {item["item"] for item in later} & set(gone)


def test_the_text_table_has_one_title_per_row(small_run: SmallRun) -> None:
    done = hvdrec("recommend", small_run.work / "bundle", "--user", "u1", "-k", "2")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["item", "title", "score"]
    assert len(lines) == 4


def test_score_a_parquet_file_of_raw_rows(small_run: SmallRun, tmp_path: Path) -> None:
    source = next((small_run.work / "samples/test").glob("*.parquet"))
    facts = succeed("score", small_run.work / "bundle", source, tmp_path / "scored.parquet")
    scored = pq.read_table(tmp_path / "scored.parquet")
    assert facts["rows"] == scored.num_rows == 600
    row = scored.slice(17, 1).to_pylist()[0]
    alone = Scorer.load(small_run.work / "bundle").score(
        user={name: row[name] for name in ("user_id", "clicks", "age")},
        items=[{name: row[name] for name in ("item_id", "tags", "price")}],
        scene={name: row[name] for name in ("hour", "shop")},
    )
    assert np.isclose(row["score"], alone[0], atol=1e-6)


def test_training_writes_a_json_line_per_logging_step(small_run: SmallRun) -> None:
    lines = (small_run.work / "run/log.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert [e["step"] for e in events if e["event"] == "step"] == [5, 10, 15, 20]
    assert [e["event"] for e in events if e["event"] == "validation"] == ["validation"] * 2
    assert events[0]["event"] == "start"


def test_top_shows_a_finished_run_from_its_files(small_run: SmallRun) -> None:
    facts = succeed("top", small_run.work / "run")
    assert (facts["state"], facts["step"], facts["total_steps"]) == ("finished", 20, 20)
    assert facts["best"] == small_run.train["validation"]["auc"]
    assert sum(facts["time_shares"].values()) == pytest.approx(1)
    assert "finished after" in hvdrec("top", small_run.work / "run").stdout


def test_history_has_only_clicks_strictly_before_the_sample(small_run: SmallRun) -> None:
    raw = pq.read_table(small_run.work.parent / "raw/shown.parquet").to_pylist()
    clicks: dict[str, list[tuple[int, str]]] = {}
    for row in sorted(raw, key=lambda row: row["shown_at"]):
        if row["clicked"]:
            clicks.setdefault(row["user_id"], []).append((row["shown_at"], str(row["item_id"])))
    samples = pq.read_table(small_run.work / "samples/test").to_pylist()
    assert any(sample["clicks"] for sample in samples)
    for sample in samples:
        before = [item for time, item in clicks[sample["user_id"]] if time < sample["time"]]
        assert sample["clicks"] == before[-8:]


def test_the_split_is_strictly_temporal(small_run: SmallRun) -> None:
    times = {
        split: pq.read_table(small_run.work / "samples" / split)["time"].to_numpy()
        for split in ("train", "validation", "test")
    }
    assert times["train"].max() < times["validation"].min()
    assert times["validation"].max() < times["test"].min()
