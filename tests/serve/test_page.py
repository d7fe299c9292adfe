"""The page in a real browser: a search is shown as it grows, and traces as they were saved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

pytest.importorskip("selenium")

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.serve.conftest import DEFAULTS, make_engine
from tests.support.browser import WHY_NOT, browser, there_is_one, until
from tests.support.servers import Running, running
from w2s_fast.serve.live import saved_events
from w2s_fast.serve.page import saved_page

browsing = pytest.mark.skipif(not there_is_one(), reason=WHY_NOT)
SHAPE = {"beam_width": 2, "successors": 2, "chunk_length": 4, "max_tokens": 12}


def events(server: Running, **body: Any) -> list[Any]:
    with httpx2.Client(base_url=server.url, timeout=60) as http:
        answer = http.post("/live", json={"prompt": "ab", "seed": 5, **body})
    assert answer.status_code == 200, answer.text
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line]


def test_a_search_is_told_round_by_round(server: Running) -> None:
    told = events(server)
    params = replace(DEFAULTS, seed=5, trace=True)
    (result,) = server.engine.generate(["ab"], params)
    assert result.trace is not None
    assert told[0]["type"] == "search" and told[-1]["type"] == "done"
    rounds = [one for one in told if one["type"] == "round"]
    assert [one["kept"] for one in rounds] == [one.kept for one in result.trace.rounds]
    assert [one["number"] for one in rounds] == list(range(1, len(rounds) + 1))
    # The texts of a line make up the answer; what is certain is a beginning of it.
    line, rank = "", 0
    for one in reversed(rounds):
        candidate = one["candidates"][one["kept"][rank]]
        line, rank = candidate["text"] + line, candidate["parent"]
    assert line == result.text == told[-1]["text"]
    certain = "".join(one["text"] for one in told if one["type"] == "text")
    assert line.startswith(certain)
    assert told[-1]["usage"]["sampled_tokens"] == result.usage.sampled_tokens
    # A saved trace is told alike.
    decode = server.service.decoder("ab")
    saved = list(saved_events("ab", result.trace.rounds, decode, {}))
    assert [one for one in saved if one["type"] == "round"] == rounds


def test_errors_have_a_status_before_it_begins(server: Running, http: httpx2.Client) -> None:
    for body in ({"prompt": "a" * 300}, {"prompt": "ab", "n": 0}, {"prompt": "ab", "num_beams": 3}):
        assert http.post("/live", json=body).status_code == 400


def test_the_page_needs_nothing_from_outside(http: httpx2.Client) -> None:
    page = http.get("/").text
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page and "@import" not in page


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browser() as found:
        yield found


def rows(driver: Any) -> list[Any]:
    return list(driver.find_elements(By.CSS_SELECTOR, "#rounds button"))


def text(driver: Any, name: str) -> str:
    # As it stands in the document: spaces count.
    return str(driver.find_element(By.ID, name).get_property("textContent"))


def fill(driver: Any, **values: Any) -> None:
    for name, value in values.items():
        field = driver.find_element(By.ID, name)
        field.clear()
        field.send_keys(str(value))


@browsing
@pytest.mark.long
def test_the_tree_grows_and_the_answers_stand_beside_each_other(
    server: Running, driver: Any
) -> None:
    driver.get(server.url)
    until(driver, lambda: text(driver, "model") == "tiny")
    assert driver.find_element(By.ID, "beam_width").get_property("value") == "2"
    fill(driver, prompt="ab", seed=5, **SHAPE)
    with server.engine.runner.turn():  # nobody takes a step yet
        driver.find_element(By.ID, "prompt").send_keys(Keys.CONTROL, Keys.ENTER)
        until(driver, lambda: driver.find_element(By.ID, "stop").is_enabled())
        assert not rows(driver)
    until(driver, lambda: driver.find_element(By.ID, "go").is_enabled())
    told = events(server)
    rounds = [one for one in told if one["type"] == "round"]
    assert len(rows(driver)) == sum(len(one["candidates"]) for one in rounds)
    assert len(driver.find_elements(By.CSS_SELECTOR, "#map .node")) == len(rows(driver)) + 1
    assert text(driver, "steered") == "ab" + told[-1]["text"]
    plain = replace(DEFAULTS, method="sample", seed=5)
    assert text(driver, "plain") == "ab" + server.engine.generate(["ab"], plain)[0].text
    kept = driver.find_elements(By.CSS_SELECTOR, "#rounds button.kept, #rounds button.line")
    assert len(kept) == sum(len(one["kept"]) for one in rounds)
    assert not [one for one in driver.get_log("browser") if one["source"] != "network"]


@browsing
@pytest.mark.long
def test_the_keyboard_walks_the_tree(server: Running, driver: Any) -> None:
    driver.get(server.url)
    fill(driver, prompt="ab", seed=5, **SHAPE)
    driver.find_element(By.ID, "go").click()
    until(driver, lambda: len(rows(driver)) and driver.find_element(By.ID, "go").is_enabled())
    first = driver.find_element(By.CSS_SELECTOR, "#rounds button[tabindex='0']")
    first.send_keys(Keys.ARROW_DOWN)
    second = driver.switch_to.active_element
    assert second != first and second.get_attribute("aria-current") == "true"
    second.send_keys(Keys.ARROW_UP)
    assert driver.switch_to.active_element == first
    whole = text(driver, "chosen")
    first.send_keys(Keys.ARROW_LEFT)  # to its parent, a round before
    assert whole.startswith("ab") and driver.switch_to.active_element != first
    driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert len(driver.find_elements(By.CSS_SELECTOR, "#map .node.chosen")) == 1


@browsing
@pytest.mark.long
def test_what_goes_wrong_is_said_and_a_key_is_asked_for(driver: Any) -> None:
    with running(make_engine(), DEFAULTS, api_keys=("secret",)) as server:
        driver.get(server.url)
        fill(driver, prompt="ab")
        driver.find_element(By.ID, "go").click()
        until(driver, lambda: "API key" in text(driver, "error"))
        key = until(driver, lambda: driver.find_element(By.ID, "key"))
        assert key.is_displayed()
        key.send_keys("secret")
        driver.find_element(By.ID, "go").click()
        until(driver, lambda: len(rows(driver)) and driver.find_element(By.ID, "go").is_enabled())
        assert not driver.find_element(By.ID, "error").is_displayed()
        fill(driver, beam_width=64, successors=64)
        driver.find_element(By.ID, "go").click()
        until(driver, lambda: "allowed: 256" in text(driver, "error"))


@browsing
@pytest.mark.long
def test_stop_gives_the_search_up(server: Running, driver: Any) -> None:
    driver.get(server.url)
    fill(driver, prompt="ab", seed=5, max_tokens=60)
    before = server.engine.stats().aborted
    with server.engine.runner.turn():
        driver.find_element(By.ID, "go").click()
        until(driver, lambda: server.engine.stats().waiting == 2)
        driver.find_element(By.ID, "stop").click()
        until(driver, lambda: server.service.gate.under_way == 0)
    until(driver, lambda: server.engine.stats().aborted == before + 2)


@browsing
@pytest.mark.long
def test_it_fits_a_narrow_window_in_light_and_in_dark(server: Running, driver: Any) -> None:
    driver.get(server.url)
    driver.set_window_size(400, 900)
    fill(driver, prompt="ab", seed=5, **SHAPE)
    driver.find_element(By.ID, "go").click()
    until(driver, lambda: len(rows(driver)) and driver.find_element(By.ID, "go").is_enabled())
    page = "document.documentElement"
    assert driver.execute_script(f"return {page}.scrollWidth <= {page}.clientWidth")
    colour = "return getComputedStyle(document.body).backgroundColor"
    before = driver.execute_script(colour)
    driver.find_element(By.ID, "theme").click()
    assert driver.execute_script(colour) != before
    driver.set_window_size(1200, 1000)


@browsing
@pytest.mark.long
def test_saved_traces_are_shown_without_a_server(
    server: Running, driver: Any, tmp_path: Path
) -> None:
    searches = []
    for prompt in ("ab", "<b>&</script><!--"):
        (result,) = server.engine.generate([prompt], replace(DEFAULTS, seed=5, trace=True))
        assert result.trace is not None
        done = {"text": result.text, "score": result.score, "finish_reason": result.finish_reason}
        decode = server.service.decoder(prompt)
        told = list(saved_events(prompt, result.trace.rounds, decode, done))
        searches.append({"title": prompt, "events": told})
    path = tmp_path / "trace.html"
    path.write_text(saved_page("two searches", searches), encoding="utf-8")
    driver.get(path.as_uri())
    assert text(driver, "model") == "two searches"
    assert text(driver, "steered") == "ab" + searches[0]["events"][-1]["text"]
    assert rows(driver) and not driver.find_element(By.ID, "ask").is_displayed()
    driver.find_element(By.CSS_SELECTOR, "#searches option[value='1']").click()
    assert text(driver, "steered").startswith("<b>&</script><!--")
    assert not [one for one in driver.get_log("browser") if one["source"] != "network"]
