"""The service's routes: what they answer is what the scorer says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from hvdrec.scoring import Scorer
from tests.serving.launch import Running

USERS: list[Any] = ["1", "nobody", None, {"age": 30.0, "history": ["10", "20"]}, {"user_id": "2"}]


@pytest.mark.parametrize("user", USERS)
def test_score(client: httpx.Client, scorer: Scorer, user: Any) -> None:
    items = ["40", "10", "unknown", {"item_id": "20", "year": 1999, "genres": ["War"]}, None]
    scene = {"hour": 21, "place": "home", "temperature": 12.5}
    answer = client.post("/v1/score", json={"user": user, "items": items, "scene": scene})
    assert answer.status_code == 200
    assert answer.headers["bundle-version"] == scorer.version
    # Bit for bit: the decimals are the shortest that tell a float32 from all others.
    found = np.array(answer.json()["scores"], dtype=np.float32)
    np.testing.assert_array_equal(found, scorer.score(user, items, scene))


def test_score_without_a_scene_takes_its_defaults(client: httpx.Client, scorer: Scorer) -> None:
    for scene in ({}, {"scene": None}, {"scene": {}}):
        answer = client.post("/v1/score", json={"user": "1", "items": ["10", "20"], **scene})
        assert answer.json()["scores"] == pytest.approx(scorer.score("1", ["10", "20"]).tolist())
    assert client.post("/v1/score", json={"user": "1", "items": []}).json() == {"scores": []}


@pytest.mark.parametrize("user", USERS)
def test_recommend(client: httpx.Client, scorer: Scorer, user: Any) -> None:
    body: dict[str, Any] = {"user": user, "scene": {"hour": 21}, "k": 3, "candidates": 4}
    options: dict[str, Any] = {
        "exclude": ["30"],
        "allowed": {"genres": ["Drama", "War"]},
        "skip_seen": True,
        "diversity": 0.25,
    }
    answer = client.post("/v1/recommend", json={**body, **options})
    assert answer.status_code == 200
    assert answer.headers["bundle-version"] == scorer.version
    expected = scorer.recommend(user, {"hour": 21}, 3, candidates=4, **options)
    found = answer.json()["items"]
    assert [set(item) for item in found] == [
        {"item", "score", "retrieval_score", "title", "source"}
    ] * len(expected)
    for item, wanted in zip(found, expected, strict=True):
        assert (item["item"], item["title"]) == (wanted.item, wanted.title)
        assert (item["score"], item["source"]) == (wanted.score, wanted.source)
        assert item["retrieval_score"] == wanted.retrieval_score


def test_recommend_takes_the_documented_defaults(client: httpx.Client, scorer: Scorer) -> None:
    answer = client.post("/v1/recommend", json={"user": "2"})
    assert [i["item"] for i in answer.json()["items"]] == [r.item for r in scorer.recommend("2")]


def test_tasks_are_told_where_they_are_asked_for(task_service: Running, task_bundle: Path) -> None:
    scorer = Scorer.load(task_bundle)
    user, scene = {"age": 30.0, "history": ["10", "20"]}, {"hour": 21}
    items: list[Any] = ["40", {"item_id": "20", "year": 1999}, None]
    with httpx.Client(base_url=task_service.url, timeout=60) as client:
        assert client.get("/v1/bundle").json()["tasks"] == ["click", "love"]
        body: dict[str, Any] = {"user": user, "items": items, "scene": scene}
        plain = client.post("/v1/score", json=body).json()
        told = client.post("/v1/score", json={**body, "tasks": True}).json()
        assert list(plain) == ["scores"]
        assert list(told) == ["scores", "tasks"] and list(told["tasks"]) == ["click", "love"]
        assert told["scores"] == plain["scores"]
        wanted = scorer.score_tasks(user, items, scene)
        for name, scores in {"score": told["scores"], **told["tasks"]}.items():
            np.testing.assert_array_equal(np.array(scores, np.float32), wanted[name])
        nothing = client.post("/v1/score", json={"user": "1", "items": [], "tasks": True}).json()
        assert nothing == {"scores": [], "tasks": {"click": [], "love": []}}

        body = {"user": user, "scene": scene, "k": 3}
        plain = client.post("/v1/recommend", json=body).json()["items"]
        told = client.post("/v1/recommend", json={**body, "tasks": True}).json()["items"]
        by_task = [item.pop("tasks") for item in told]
        assert told == plain
        wanted = scorer.score_tasks(user, [item["item"] for item in plain], scene)
        for place, of_item in enumerate(by_task):
            assert list(of_item) == ["click", "love"]
            for name, value in of_item.items():
                assert np.float32(value) == wanted[name][place]


def test_keys_of_integers(int_client: httpx.Client) -> None:
    body = {"user": 1, "items": [10, 20], "scene": {"hour": 21}}
    answer = int_client.post("/v1/score", json=body)
    assert len(answer.json()["scores"]) == 2
    # JSON has one kind of number: 21.0 is 21.
    same = '{"user": 1.0, "items": [10.0, 2e1], "scene": {"hour": 21.0}}'
    headers = {"content-type": "application/json"}
    assert int_client.post("/v1/score", content=same, headers=headers).json() == answer.json()
    found = int_client.post("/v1/recommend", json={"user": 1, "k": 1}).json()["items"]
    assert type(found[0]["item"]) is int


def test_bundle(client: httpx.Client, scorer: Scorer) -> None:
    answer = client.get("/v1/bundle")
    assert answer.headers["bundle-version"] == scorer.version
    told = answer.json()
    assert (told["name"], told["version"], told["model"]) == ("tiny", scorer.version, scorer.model)
    assert (told["users"], told["items"]) == (2, 4)
    assert told["user_key"] == {"name": "user_id", "dtype": "string"}
    hour = {"name": "hour", "side": "scene", "dtype": "int", "list": False, "default": 12}
    assert [f for f in told["fields"] if f["name"] == "hour"] == [hour]
    assert told["examples"]["users"] == ["1", "2"]
    assert (told["filters"], told["tasks"]) == (["genres", "year"], [])
    assert set(told["examples"]["items"]) == {"10", "20", "30", "40"}
    assert told["limits"]["max_candidates"] == 100


def test_health(client: httpx.Client, scorer: Scorer) -> None:
    assert client.get("/healthz").json() == {"state": "alive"}
    answer = client.get("/readyz")
    assert answer.json() == {"state": "ready"}
    assert answer.headers["bundle-version"] == scorer.version


def test_openapi_tells_the_bundles_fields_and_its_examples_work(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    scene = schemas["Scene"]
    assert set(scene["properties"]) == {"hour", "place", "temperature"}
    assert scene["properties"]["hour"]["default"] == 12
    assert scene["additionalProperties"] is False
    assert schemas["User"]["properties"]["history"]["type"] == ["array", "null"]
    assert schemas["ItemKey"] == {"type": "string"}
    operations = document["paths"]
    known = {"/v1/score", "/v1/recommend", "/v1/bundle", "/healthz", "/readyz"}
    assert set(operations) == known
    for path in ("/v1/score", "/v1/recommend"):
        content = operations[path]["post"]["requestBody"]["content"]["application/json"]
        assert set(content["examples"]) == {"stored", "features"}
        for example in content["examples"].values():
            assert client.post(path, json=example["value"]).status_code == 200


def test_openapi_of_integer_keys(int_client: httpx.Client) -> None:
    schemas = int_client.get("/openapi.json").json()["components"]["schemas"]
    limits = {"minimum": -(2**63), "maximum": 2**63 - 1}
    assert schemas["UserKey"] == {"type": "integer", **limits}
    assert schemas["User"]["properties"]["history"]["items"]["type"] == ["integer", "null"]


def test_metrics(client: httpx.Client, scorer: Scorer) -> None:
    def read() -> dict[str, float]:
        lines = client.get("/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    score = 'route="/v1/score",status="200"'
    refused = 'route="/v1/score",status="422"'
    client.post("/v1/score", json={"user": "1", "items": ["10"]})
    client.post("/v1/score", json={"user": "1"})
    before = read()
    client.post("/v1/score", json={"user": "1", "items": ["10", "20", "30"]})
    client.post("/v1/score", json={"user": "1"})
    client.get("/not/there/1")
    after = read()
    for labels in (score, refused):
        requests = f"hvdrec_requests_total{{{labels}}}"
        assert after[requests] == before[requests] + 1
        seconds = f"hvdrec_request_seconds_count{{{labels}}}"
        assert after[seconds] == after[requests]
        assert after[f'hvdrec_request_seconds_bucket{{le="+Inf",{labels}}}'] == after[requests]
    candidates = 'hvdrec_candidates_total{route="/v1/score"}'
    assert after[candidates] == before[candidates] + 3
    assert after["hvdrec_requests_in_flight"] == 0
    assert after[f'hvdrec_bundle_info{{name="tiny",version="{scorer.version}"}}'] == 1
    assert after["hvdrec_bundle_reloads_total"] == 0
    # No client makes labels: a path that is no route is counted among the others.
    assert after['hvdrec_requests_total{route="other",status="404"}'] >= 1
    assert not any("/not/there" in name for name in after)


def test_the_page_may_load_nothing_but_itself(client: httpx.Client) -> None:
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert "//" not in answer.text.replace("// Fields", "")
