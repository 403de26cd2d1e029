"""The routes of the service answer what the scorer returns."""

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
    # Bit for bit: JSON holds the shortest decimals that identify a float32.
    scores = np.array(answer.json()["scores"], dtype=np.float32)
    np.testing.assert_array_equal(scores, scorer.score(user, items, scene))


def test_score_without_a_scene_uses_the_defaults(client: httpx.Client, scorer: Scorer) -> None:
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
    items = answer.json()["items"]
    assert [set(item) for item in items] == [
        {"item", "score", "retrieval_score", "title", "source"}
    ] * len(expected)
    for item, other in zip(items, expected, strict=True):
        assert (item["item"], item["title"]) == (other.item, other.title)
        assert (item["score"], item["source"]) == (other.score, other.source)
        assert item["retrieval_score"] == other.retrieval_score


def test_recommend_uses_the_documented_defaults(client: httpx.Client, scorer: Scorer) -> None:
    answer = client.post("/v1/recommend", json={"user": "2"})
    assert [i["item"] for i in answer.json()["items"]] == [r.item for r in scorer.recommend("2")]


def test_tasks_are_returned_on_request(task_service: Running, task_bundle: Path) -> None:
    scorer = Scorer.load(task_bundle)
    user, scene = {"age": 30.0, "history": ["10", "20"]}, {"hour": 21}
    items: list[Any] = ["40", {"item_id": "20", "year": 1999}, None]
    with httpx.Client(base_url=task_service.url, timeout=60) as client:
        assert client.get("/v1/bundle").json()["tasks"] == ["click", "love"]
        body: dict[str, Any] = {"user": user, "items": items, "scene": scene}
        plain = client.post("/v1/score", json=body).json()
        answer = client.post("/v1/score", json={**body, "tasks": True}).json()
        assert list(plain) == ["scores"]
        assert list(answer) == ["scores", "tasks"]
        assert list(answer["tasks"]) == ["click", "love"]
        assert answer["scores"] == plain["scores"]
        expected = scorer.score_tasks(user, items, scene)
        for name, scores in {"score": answer["scores"], **answer["tasks"]}.items():
            np.testing.assert_array_equal(np.array(scores, np.float32), expected[name])
        empty = client.post("/v1/score", json={"user": "1", "items": [], "tasks": True}).json()
        assert empty == {"scores": [], "tasks": {"click": [], "love": []}}

        body = {"user": user, "scene": scene, "k": 3}
        plain = client.post("/v1/recommend", json=body).json()["items"]
        ranked = client.post("/v1/recommend", json={**body, "tasks": True}).json()["items"]
        by_task = [item.pop("tasks") for item in ranked]
        assert ranked == plain
        expected = scorer.score_tasks(user, [item["item"] for item in plain], scene)
        for position, probabilities in enumerate(by_task):
            assert list(probabilities) == ["click", "love"]
            for name, value in probabilities.items():
                assert np.float32(value) == expected[name][position]


def test_integer_keys(int_client: httpx.Client) -> None:
    body = {"user": 1, "items": [10, 20], "scene": {"hour": 21}}
    answer = int_client.post("/v1/score", json=body)
    assert len(answer.json()["scores"]) == 2
    # JSON does not distinguish 21.0 from 21.
    same = '{"user": 1.0, "items": [10.0, 2e1], "scene": {"hour": 21.0}}'
    headers = {"content-type": "application/json"}
    assert int_client.post("/v1/score", content=same, headers=headers).json() == answer.json()
    items = int_client.post("/v1/recommend", json={"user": 1, "k": 1}).json()["items"]
    assert type(items[0]["item"]) is int


def test_bundle(client: httpx.Client, scorer: Scorer) -> None:
    answer = client.get("/v1/bundle")
    assert answer.headers["bundle-version"] == scorer.version
    description = answer.json()
    assert (description["name"], description["version"], description["model"]) == (
        "tiny",
        scorer.version,
        scorer.model,
    )
    assert (description["users"], description["items"]) == (2, 4)
    assert description["user_key"] == {"name": "user_id", "dtype": "string"}
    hour = {"name": "hour", "side": "scene", "dtype": "int", "list": False, "default": 12}
    assert [f for f in description["fields"] if f["name"] == "hour"] == [hour]
    assert description["examples"]["users"] == ["1", "2"]
    assert (description["filters"], description["tasks"]) == (["genres", "year"], [])
    assert set(description["examples"]["items"]) == {"10", "20", "30", "40"}
    assert description["limits"]["max_candidates"] == 100


def test_health(client: httpx.Client, scorer: Scorer) -> None:
    assert client.get("/healthz").json() == {"state": "alive"}
    answer = client.get("/readyz")
    assert answer.json() == {"state": "ready"}
    assert answer.headers["bundle-version"] == scorer.version


def test_openapi_describes_the_bundles_fields_and_its_examples_work(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    scene = schemas["Scene"]
    assert set(scene["properties"]) == {"hour", "place", "temperature"}
    assert scene["properties"]["hour"]["default"] == 12
    assert scene["additionalProperties"] is False
    history = schemas["User"]["properties"]["history"]["anyOf"]
    assert [each["type"] for each in history] == ["array", "null"]
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
    history = schemas["User"]["properties"]["history"]["anyOf"][0]
    assert [each["type"] for each in history["items"]["anyOf"]] == ["integer", "null"]


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
    # Unknown paths share one label, so clients cannot create labels.
    assert after['hvdrec_requests_total{route="other",status="404"}'] >= 1
    assert not any("/not/there" in name for name in after)


def test_the_page_may_load_only_itself(client: httpx.Client) -> None:
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert "//" not in answer.text.replace("// Fields", "")
