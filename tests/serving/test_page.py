"""The page in headless Chromium, used as a person would, mostly by keyboard."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from hvdrec.scoring import Scorer
from tests.bundles import TITLES, write_bundle
from tests.other_bundle import put, write_other_bundle
from tests.serving.conftest import PATIENT
from tests.serving.launch import Running, serving, wait_for

expect.set_options(timeout=60_000)
SCRIPT = '<img src="x" onerror="document.title = 1"><script>document.title = 2</script>'


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    assert program is not None, "no chromium; apt-get install chromium"
    # Chromium's sandbox does not run as root, and tests in a container do.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=program, args=arguments)


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """Open an empty page; any message on its console fails the test."""
    context = browser.new_context(viewport={"width": 1180, "height": 900})
    context.set_default_timeout(60_000)
    page = context.new_page()
    messages: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    yield page
    context.close()
    # Chromium reports every error response; the tests provoke them.
    assert [line for line in messages if not line.startswith("Failed to load resource")] == []


def titles(page: Page) -> list[str]:
    return page.locator("#items .title").all_inner_texts()


def expected(scorer: Scorer, user: str | None, **scene: object) -> list[str]:
    """Return the titles that the page should list; an item without a title shows its key."""
    return [r.title or str(r.item) for r in scorer.recommend(user, scene)]


def expect_list(page: Page, titles: list[str]) -> None:
    expect(page.locator("#items .title")).to_have_text(titles)


def test_a_user_and_a_scene(page: Page, service: Running, scorer: Scorer) -> None:
    page.goto(service.url)
    expect(page.locator("h1")).to_have_text("tiny")
    expect(page.locator("#counts")).to_contain_text(f"2 users · 4 items · bundle {scorer.version}")
    # The inputs hold the first stored user and the scene's defaults.
    assert page.input_value("#user") == "1"
    assert page.input_value("#scene-hour") == "12"
    assert page.get_attribute("#scene-hour", "type") == "range"
    assert page.get_attribute("#scene-temperature", "type") == "number"
    assert page.get_attribute("#scene-place", "type") == "text"
    scene: dict[str, object] = {"hour": 12, "place": None, "temperature": None}
    expect_list(page, expected(scorer, "1", **scene))
    scores = [f"{r.score:.4f}" for r in scorer.recommend("1", scene)]
    assert page.locator("#items .score").all_inner_texts() == scores
    width = page.locator(".bar").first.evaluate("bar => bar.style.width")
    assert float(width.rstrip("%")) == pytest.approx(100 * scorer.recommend("1", scene)[0].score)
    assert page.locator("#items .source").first.inner_text() == "stored"

    # Another user: another order.
    assert expected(scorer, "2", **scene) != expected(scorer, "1", **scene)
    page.fill("#user", "2")
    expect_list(page, expected(scorer, "2", **scene))

    # Another scene, by the keyboard: other scores.
    before = page.locator("#items .score").first.inner_text()
    page.focus("#scene-hour")
    for _ in range(9):
        page.keyboard.press("ArrowRight")
    scene["hour"] = 21
    expect(page.locator("label[for=scene-hour] output")).to_have_text("21")
    best = f"{scorer.recommend('2', scene)[0].score:.4f}"
    assert best != before
    expect(page.locator("#items .score").first).to_have_text(best)
    page.fill("#scene-place", "home")
    page.fill("#scene-temperature", "-15.5")
    scene |= {"place": "home", "temperature": -15.5}
    best = f"{scorer.recommend('2', scene)[0].score:.4f}"
    expect(page.locator("#items .score").first).to_have_text(best)

    # A field without a value is a missing one, not its default.
    page.click("button[aria-label='hour: no value']")
    scene["hour"] = None
    best = f"{scorer.recommend('2', scene)[0].score:.4f}"
    expect(page.locator("#items .score").first).to_have_text(best)
    expect(page.locator("label[for=scene-hour] output")).to_have_text("no value")


def test_an_unknown_user_and_raw_features(page: Page, service: Running, scorer: Scorer) -> None:
    scene = {"hour": 12, "place": None, "temperature": None}
    page.goto(service.url)
    page.fill("#user", "")
    expect(page.locator("#items .source").first).to_have_text("trending")
    expect_list(page, expected(scorer, None, **scene))
    page.fill("#user", '{"age": 30, "history": ["20"]}')
    expect(page.locator("#items .source").first).to_have_text("features")
    ranked = scorer.recommend({"age": 30, "history": ["20"]}, scene)
    expect_list(page, [r.title or str(r.item) for r in ranked])


def test_options(page: Page, service: Running, scorer: Scorer) -> None:
    scene = {"hour": 12, "place": None, "temperature": None}
    page.goto(service.url)
    page.focus("#k")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect_list(page, expected(scorer, "1", **scene)[:2])
    expect(page.locator("#took")).to_contain_text("2 in ")
    page.focus("#diversity")
    page.keyboard.press("End")
    ranked = scorer.recommend("1", scene, 2, diversity=0.95)
    expect_list(page, [r.title or str(r.item) for r in ranked])
    page.focus("#skip_seen")
    page.keyboard.press("Space")
    ranked = scorer.recommend("1", scene, 2, diversity=0.95, skip_seen=True)
    expect_list(page, [r.title or str(r.item) for r in ranked])


def test_errors_are_shown_next_to_their_input(page: Page, service: Running, scorer: Scorer) -> None:
    page.goto(service.url)
    expect(page.locator("#items li")).to_have_count(4)
    page.fill("#user", '{"agee": 30}')
    error = page.locator(".field", has=page.locator("#user")).get_by_role("alert")
    expect(error).to_contain_text("user.agee: unknown field; known: [user_id, age,")
    expect(page.locator("#user")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#results")).to_have_class("stale")
    page.fill("#user", '{"age": ')
    expect(error).to_contain_text("not a valid JSON object")
    page.fill("#user", "2")
    expect(page.locator(".field [role=alert]")).to_have_count(0)
    expect(page.locator("#user")).not_to_have_attribute("aria-invalid", "true")
    expect_list(page, expected(scorer, "2", hour=12, place=None, temperature=None))
    page.fill("#scene-temperature", "1e31")
    error = page.locator(".field", has=page.locator("#scene-temperature")).get_by_role("alert")
    expect(error).to_have_text("scene.temperature = 1e+31: must be within 1e+30 of 0")


def test_a_user_key_of_the_wrong_type(page: Page, int_service: Running) -> None:
    page.goto(int_service.url)
    expect(page.locator("#items li")).to_have_count(4)
    page.fill("#user", "alice")
    error = page.locator(".field", has=page.locator("#user")).get_by_role("alert")
    expect(error).to_have_text('user = "alice": user_id is an integer, not a string')
    page.fill("#user", "99999999999999999999")
    expect(error).to_contain_text("user = 1e+20: user_id is an integer")
    # The page sends an integer that a JavaScript number would round unchanged.
    page.fill("#user", str(2**53 + 1))
    expect(page.locator(".field [role=alert]")).to_have_count(0)


def test_task_probabilities_are_shown(page: Page, task_service: Running, task_bundle: Path) -> None:
    page.goto(task_service.url)
    expect(page.locator("#items li")).to_have_count(4)
    scene = {"hour": 12, "place": None, "temperature": None}
    scorer = Scorer.load(task_bundle)
    first = [r.item for r in scorer.recommend("1", scene)][:1]
    by_task = scorer.score_tasks("1", first, scene)
    facts = page.locator("#items li").first.locator(".task")
    expect(facts).to_have_text([f"{name} {by_task[name][0]:.4f}" for name in ("click", "love")])


def test_text_is_never_markup(page: Page, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", titles={**TITLES, "10": SCRIPT})
    with serving(bundle, *PATIENT) as running:
        page.goto(running.url)
        expect(page.locator("#items .title").filter(has_text="onerror")).to_have_text(SCRIPT)
        page.fill("#user", '{"<b>": 1}')
        expect(page.locator(".error b")).to_have_count(0)
        expect(page.locator("#user ~ *, .field .error").first).to_contain_text("<b>")
        assert page.locator("#items img, #items script").count() == 0
        assert page.title() == "tiny · hvdrec"


def test_a_service_that_reloads_and_stops(page: Page, bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "served"
    put(bundle, path)
    other = write_other_bundle(tmp_path / "other")
    with serving(path, *PATIENT) as running:
        page.goto(running.url)
        expect(page.locator("#items li")).to_have_count(4)
        put(other, path)
        version = Scorer.load(other).version
        ready = f"{running.url}/readyz"
        wait_for(lambda: httpx.get(ready).headers["bundle-version"] == version)
        page.fill("#user", "2")
        expect(page.locator("#counts")).to_contain_text(version)
        expect(page.locator("#items .title").first).to_contain_text("Other")
    page.fill("#user", "1")
    expect(page.locator("#problem")).to_contain_text("the service does not respond")
