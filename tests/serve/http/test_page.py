"""The page in a real browser: what a reader sees and does, by mouse and by keyboard, against a real server."""

import re
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from serve.client import Connection, Item, RecommenderClient, UserEvent
from serve.pb.recommender_pb2 import Boost, Rules, TrendWindow
from tests.serve.http.asking import ask
from tests.serve.http.browser import WAIT_S, browser, missing
from tests.serve.process import running_server

PAGE = files("serve.http").joinpath("page.html").read_text("utf-8")
TOKEN = "reader-token-0123"
needs_browser = pytest.mark.skipif(bool(missing()), reason=missing())


def port_of(line: str) -> int:
    return int(line.split(" and ")[1].split(" ", maxsplit=1)[0].rpartition(":")[2])


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def serving(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """The address of gRPC and the port of HTTP. What the tests record changes no trend, so the page and a client that
    ask one after the other get the same answer."""
    store = tmp_path_factory.mktemp("page") / "events.sqlite"
    options = ("--http", "127.0.0.1:0", "--trend-refresh-s", "0")
    with running_server(model_directory, store, provider="cpu", options=options) as server:
        yield server.address, port_of(server.line)


class Page:
    """The open page."""

    def __init__(self, driver: Any, port: int, fragment: str = "") -> None:
        self.driver = driver
        driver.get("about:blank")
        driver.get(f"http://localhost:{port}/{fragment}")

    def script(self, text: str, *arguments: Any) -> Any:
        return self.driver.execute_script(text, *arguments)

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def wait(self, condition: Callable[[], Any]) -> Any:
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        ignored = [StaleElementReferenceException]
        return WebDriverWait(self.driver, WAIT_S, 0.05, ignored).until(lambda _: condition())

    @property
    def serial(self) -> int:
        return int(self.one("#recommendations").get_attribute("data-serial") or 0)

    def after(self, act: Callable[[], Any]) -> list[str]:
        """The ids of the list, once it was made anew."""
        before = self.serial
        act()
        self.wait(lambda: self.serial > before)
        return self.listed()

    def listed(self) -> list[str]:
        return [row.get_attribute("data-item") for row in self.all("#recommendations > li")]

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)


@pytest.fixture
def page(driver: Any, serving: tuple[str, int]) -> Page:
    opened = Page(driver, serving[1])
    opened.wait(lambda: opened.serial > 0)
    driver.get_log("browser")
    return opened


@pytest.fixture
def user(serving: tuple[str, int], request: pytest.FixtureRequest) -> str:
    """A user with three events."""
    name = request.node.name
    with RecommenderClient(serving[0]) as client:
        client.record_events(
            UserEvent(event_id=f"{name}-{at}", user_id=name, item_id=str(1007 + 7 * at), timestamp=at + 1, rating=4)
            for at in range(3)
        )
    return name


def test_it_is_small_and_loads_nothing_from_elsewhere() -> None:
    assert len(PAGE.encode()) < 200_000
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:|#)|@import|url\(|https?://", PAGE)


@needs_browser
def test_the_browser_lets_the_page_run_and_nothing_else(page: Page, serving: tuple[str, int]) -> None:
    assert page.driver.title == "jaxrec"
    assert [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    refused = page.driver.execute_async_script(
        "document.addEventListener('securitypolicyviolation', (e) => arguments[0](e.violatedDirective));"
        "const script = document.createElement('script'); script.textContent = 'window.stranger = 1';"
        "document.head.append(script);"
    )
    assert refused.startswith("script-src")
    assert page.script("return window.stranger") is None
    policy = ask(serving[1], "/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    page.driver.get_log("browser")


@needs_browser
def test_a_history_is_built_by_the_keyboard_alone(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    page.script("document.body.focus()")
    page.one("body").send_keys("/")
    assert page.script("return document.activeElement.id") == "search"
    page.press("movie 1")
    page.wait(lambda: len(page.all("[role=option]")) > 1)
    first = page.one("[role=option][aria-selected=true]").get_attribute("data-item")
    page.press(Keys.ARROW_DOWN)
    second = page.one("[role=option][aria-selected=true]").get_attribute("data-item")
    assert first != second
    assert page.one("#search").get_attribute("aria-activedescendant") == "found-1"
    before = page.listed()
    after = page.after(lambda: page.press(Keys.ENTER))
    assert before != after
    assert second not in after
    assert "moved" in page.one("#said").text
    assert len(page.all("#events li button")) == 1
    page.press("1007")
    page.wait(lambda: page.all("[role=option]"))
    page.after(lambda: page.press(Keys.ENTER))
    assert len(page.all("#events li button")) == 2
    # From the list: Enter on a title is a click, and the focus stays in the list.
    page.script("document.querySelector('#recommendations .title').focus()")
    clicked = page.listed()[0]
    assert clicked not in page.after(lambda: page.press(Keys.ENTER))
    assert page.script("return document.activeElement.className") == "title"


@needs_browser
def test_a_click_records_the_event_of_a_stored_user_and_the_list_moves(
    page: Page, serving: tuple[str, int], user: str
) -> None:
    page.script("arguments[0].click()", page.one("input[value=user]"))
    page.one("#user").send_keys(user)
    page.after(lambda: page.one("#user").submit())
    page.wait(lambda: "Movie" in page.one("#events").text and len(page.all("#events li")) == 3)
    shown = page.listed()
    with RecommenderClient(serving[0]) as client:
        assert [one.item_id for one in client.recommend(user_id=user, k=10).recommendations] == shown
        moved = page.after(page.one("#recommendations .title").click)
        newest = client.list_events(user).events[0]
        assert (newest.item_id, newest.type, len(newest.recommendation_id)) == (shown[0], "click", 32)
        assert [one.item_id for one in client.recommend(user_id=user, k=10).recommendations] == moved
        assert shown[0] not in moved
        assert page.all("#recommendations .moved")
        page.wait(lambda: len(page.all("#events li")) == 4)
        page.after(page.one("#events li button").click)
        page.wait(lambda: len(page.all("#events li")) == 3)
        assert len(client.list_events(user).events) == 3


@needs_browser
def test_reasons_scores_filters_similar_items_and_the_profile(
    page: Page, driver: Any, serving: tuple[str, int], user: str
) -> None:
    page = Page(driver, serving[1], f"#user={user}")
    page.wait(lambda: page.serial > 0 and page.all("#recommendations li"))
    with RecommenderClient(serving[0]) as client:
        answer = client.recommend(user_id=user, k=10, explain=True)
        first = page.one("#recommendations li").text
        assert f"{answer.recommendations[0].score:.3f}" in first
        assert answer.recommendations[0].explanation.text in first
        assert f"“{answer.policy}”" in page.one("#answer").text
        page.wait(lambda: page.all("#tags option"))
        tag = page.one("#recommendations .tags button").text
        only = page.after(page.one("#recommendations .tags button").click)
        assert all(tag in client.get_item(item).item.item.tags for item in only)
        page.after(page.one("#chosen-tags button").click)
        page.one(".actions button:last-child").click()
        page.wait(lambda: page.one("#similar").is_displayed() and page.all("#similar-items button"))
        similar = client.similar_items(page.listed()[0], k=10).items
        assert [one.text.split(",")[0] for one in page.all("#similar-items button")] == [
            one.title.split(",")[0] for one in similar
        ]
        page.one("#profile summary").click()
        page.wait(lambda: "3 positive events" in page.one("#profile-text").text)
        assert page.one("#profile-genres").text
        page.one("#models summary").click()
        page.wait(lambda: client.get_model_info().model_version in page.one("#model-list").text)
        assert "100 % of the users" in page.one("#model-list").text


def change(page: Page, control: str, value: str) -> list[str]:
    """The list after a control of the page has another value."""
    text = "const one = $(arguments[0]); one.value = arguments[1]; one.dispatchEvent(new Event('change'))"
    return page.after(lambda: page.script(text, control, value))


@needs_browser
def test_rules_and_what_they_did(page: Page, driver: Any, serving: tuple[str, int], user: str) -> None:
    page = Page(driver, serving[1], f"#user={user}")
    page.wait(lambda: page.serial > 0 and page.all("#recommendations li"))
    with RecommenderClient(serving[0]) as client:

        def expected(rules: Rules | None) -> list[str]:
            return [one.item_id for one in client.recommend(user_id=user, rules=rules).recommendations]

        plain = page.listed()
        diverse = change(page, "diversity", "0.9")
        assert diverse == expected(Rules(diversity=0.9)) != plain
        assert "rules: diversity" in page.one("#recommendations").text
        assert change(page, "diversity", "0") == plain
        assert change(page, "max-per-tag", "2") == expected(Rules(max_per_tag=2)) != plain
        change(page, "max-per-tag", "0")
        page.one("#how").send_keys("less of")
        tag = page.one("#recommendations .tags button").text
        page.one("#tag").send_keys(tag)
        boosted = page.after(lambda: page.one("#tag-form").submit())
        assert boosted == expected(Rules(boosts=[Boost(tag=tag, factor=0.25)]))
        scores = [one.text for one in page.all("#recommendations .actions > .small")]
        assert page.after(page.one("#chosen-tags button").click) == plain
        assert scores != [one.text for one in page.all("#recommendations .actions > .small")]
        # Pinned to its place, an item stays there when the others move.
        page.after(page.all("#recommendations li:nth-child(3) .actions button")[-2].click)
        assert page.one("#chosen-tags button").text.startswith("place 3: ")
        moved = page.after(page.one("#recommendations .title").click)
        assert moved[2] == plain[2]


@needs_browser
def test_metadata_and_items_of_the_store(page: Page, driver: Any, serving: tuple[str, int]) -> None:
    with RecommenderClient(serving[0]) as client:
        known = page.listed()[0]
        client.upsert_items(
            [Item(item_id=known, title="Stored", metadata={"year": "1999"}), Item(item_id="added", title="Added")]
        )
        try:
            page.wait(lambda: client.get_model_info().added_item_count == 1)
            page = Page(driver, serving[1])
            page.wait(lambda: page.serial > 0)
            assert "and 1 of the store" in page.one("#model").text
            assert page.one("#new-items").is_displayed()
            page.after(page.one("#metadata").click)
            assert "year: 1999" in page.one("#recommendations").text
        finally:
            client.delete_items([known, "added"])


def trending(page: Page) -> list[str]:
    """The ids of the trending items, asked for once more."""
    page.script("trending.open = false")
    page.script("$('trending-items').replaceChildren(); trending.open = true")
    page.wait(lambda: page.all("#trending-items button"))
    return list(
        page.script("return [...$('trending-items').querySelectorAll('button')].map((one) => one.dataset.item)")
    )


@needs_browser
def test_trending_by_windows(driver: Any, model_directory: Path, tmp_path: Path) -> None:
    now = int(time.time())
    recent = [UserEvent(event_id=f"now-{at}", user_id="now", item_id="1014", timestamp=now) for at in range(20)]
    earlier = [
        UserEvent(event_id=f"then-{at}", user_id="then", item_id="1021", timestamp=now - 86_400 - at)
        for at in range(200)
    ]
    options = ("--http", "127.0.0.1:0", "--trend-refresh-s", "0.2")
    with running_server(model_directory, tmp_path / "events.sqlite", provider="cpu", options=options) as server:
        with RecommenderClient(server.address) as client:
            client.record_events([*recent, *earlier])
        page = Page(driver, port_of(server.line))
        page.wait(lambda: page.serial > 0)
        for window, first in (("HOUR", "1014"), ("MONTH", "1021")):
            page.script("$('trending-window').value = arguments[0]", f"TREND_WINDOW_{window}")
            page.wait(lambda first=first: trending(page)[:1] == [first])


def test_the_windows_are_those_of_the_contract() -> None:
    windows = set(TrendWindow.keys()) - {"TREND_WINDOW_UNSPECIFIED"}
    assert set(re.findall(r"TREND_WINDOW_\w+", PAGE)) == windows


@needs_browser
def test_what_is_not_there_is_hidden(page: Page) -> None:
    assert not page.one("#new-items").is_displayed()
    assert not page.one("#profile").is_displayed()
    assert not page.one("#similar").is_displayed()
    page.script("arguments[0].click()", page.one("input[value=user]"))
    page.wait(lambda: page.one("#profile").is_displayed())


@needs_browser
def test_an_error_is_said_and_goes_away(page: Page) -> None:
    page.script("const k = document.getElementById('k'); k.value = 5000; k.dispatchEvent(new Event('change'))")
    page.wait(lambda: page.one("#failed").is_displayed())
    assert page.one("#failed").text.startswith("invalid_argument: k: expected 1 to 1000")
    assert page.one("#failed").get_attribute("role") == "alert"
    page.after(
        lambda: page.script("const k = document.getElementById('k'); k.value = 3; k.dispatchEvent(new Event('change'))")
    )
    assert not page.one("#failed").is_displayed()
    assert len(page.listed()) == 3


@needs_browser
def test_texts_of_the_catalogue_are_texts(page: Page, serving: tuple[str, int]) -> None:
    with RecommenderClient(serving[0]) as client:
        client.upsert_items([Item(item_id="1007", title="<img src=x onerror=window.stranger=1>", tags=["<b>"])])
        try:
            opened = Page(page.driver, serving[1])
            opened.wait(lambda: opened.serial > 0)
            opened.one("#search").click()
            opened.one("#search").send_keys("<img")
            opened.wait(lambda: "<img src=x" in opened.one("#found").text)
            assert opened.script("return [document.images.length, window.stranger]") == [0, None]
        finally:
            client.delete_items(["1007"])


@needs_browser
def test_every_control_has_a_name_for_a_screen_reader(page: Page) -> None:
    for details in page.all("details"):
        page.script("arguments[0].open = true", details)
    controls = [one for one in page.all("input, select, button, summary, [role]") if one.is_displayed()]
    assert len(controls) > 20
    names = {one.get_attribute("id") or one.text: one.accessible_name for one in controls if one.tag_name != "p"}
    assert all(names.values()), names
    assert page.one("html").get_attribute("lang") == "en"
    assert page.one("#said").get_attribute("role") == "status"


CONTRAST = """
const part = (text) => text.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
const light = (text) => part(text).reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
const ground = (node) => {
    for (; node; node = node.parentElement) {
        const color = getComputedStyle(node).backgroundColor;
        if (!/, 0\\)$/.test(color)) return color;
    }
};
return [...document.querySelectorAll("h1, h2, p, label, button, summary, .faint, .number, a")]
    .filter((one) => one.checkVisibility() && one.textContent.trim())
    .map((one) => [light(getComputedStyle(one).color), light(ground(one))])
    .map(([a, b]) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
"""


@needs_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes_can_be_read(page: Page, theme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        page.wait(lambda: page.script("return document.getAnimations().length") == 0)
        ratios = page.script(CONTRAST)
        assert len(ratios) > 20
        assert min(ratios) >= 4.5  # WCAG 2, AA
        ground = page.script("return getComputedStyle(document.body).backgroundColor")
        page.one("#theme").click()
        page.one("#theme").click()
        dark = page.script("return getComputedStyle(document.body).backgroundColor")
        assert page.one("#theme").text == "Theme: dark"
        assert (ground == dark) is (theme == "dark")
        page.one("#theme").click()
    finally:
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@needs_browser
def test_a_narrow_window_does_not_scroll_sideways(page: Page) -> None:
    size = page.driver.get_window_size()
    try:
        page.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 700, "deviceScaleFactor": 1, "mobile": True}
        )
        assert page.script("return document.documentElement.scrollWidth") <= 360
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.driver.set_window_size(size["width"], size["height"])


@needs_browser
def test_the_token_of_the_field_is_sent(driver: Any, model_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"read {TOKEN}\n")
    options = ("--http", "127.0.0.1:0", "--tokens-file", str(tmp_path / "tokens"))
    with running_server(model_directory, tmp_path / "events.sqlite", provider="cpu", options=options) as server:
        page = Page(driver, port_of(server.line))
        page.wait(lambda: page.one("#failed").is_displayed())
        assert page.one("#failed").text.startswith("unauthenticated: ")
        assert page.script("return document.activeElement.id") == "token"
        page.press(TOKEN, "\t")
        page.wait(lambda: page.serial > 0)
        assert not page.one("#failed").is_displayed()
        # The right to read is not the right to record.
        page.script("arguments[0].click()", page.one("input[value=user]"))
        page.one("#user").send_keys("u")
        page.after(lambda: page.one("#user").submit())
        page.one("#recommendations .title").click()
        page.wait(lambda: page.one("#failed").is_displayed())
        assert page.one("#failed").text.startswith("permission_denied: ")
        with RecommenderClient(Connection(server.address, token=TOKEN)) as client:
            assert not client.list_events("u").events
        page.script("sessionStorage.clear()")


@needs_browser
def test_each_item_says_what_the_parts_gave_to_its_score(page: Page, serving: tuple[str, int], user: str) -> None:
    page.script("document.querySelector('input[name=who][value=user]').click()")
    page.wait(lambda: page.one("#user").is_displayed())
    page.one("#user").send_keys(user)
    page.after(lambda: page.one("#user-form button").click())
    with RecommenderClient(serving[0]) as client:
        expected = client.recommend(user_id=user, k=10, explain=True).recommendations
    rows = page.script(
        "return [...document.querySelectorAll('#recommendations > li')].map((row) =>"
        " [...row.querySelectorAll('.parts dt')].map((part) => [part.textContent, part.nextSibling.textContent]))"
    )
    assert len(rows) == len(expected) == 10
    for row, one in zip(rows, expected, strict=True):
        shown = {name: float(value) for name, value in row}
        assert list(shown)[:2] == ["LSTM", "content"]
        parts = [part.value for part in one.explanation.parts if abs(part.value) >= 0.0005]
        assert list(shown.values()) == pytest.approx(parts, abs=6e-4)
        assert sum(shown.values()) == pytest.approx(one.score, abs=0.01)
    assert page.script("return document.querySelector('.parts').getAttribute('aria-label')")


@needs_browser
def test_outcomes_of_versions(page: Page, serving: tuple[str, int], user: str) -> None:
    """They are there once there is something to compare."""
    now = int(time.time())
    with RecommenderClient(serving[0]) as client:
        for at in range(3):
            answer = client.recommend(user_id=user, k=3)
            first = answer.recommendations[0].item_id
            seen = {"item_id": first, "timestamp": now, "recommendation_id": answer.recommendation_id}
            client.record_events([UserEvent(event_id=f"{user}-outcome-{at}", user_id=user, **seen)])  # type: ignore[arg-type]
        version = answer.model_version
    page.one("#models > summary").click()

    def rows() -> list[list[str]]:
        found: list[list[str]] = page.script(
            "return [...document.querySelectorAll('#outcome-list tbody tr')].map((row) =>"
            " [...row.cells].map((cell) => cell.textContent))"
        )
        return found

    def compared() -> list[list[str]]:
        # Recommendations are written within a second, and an answer is kept for ten.
        page.script("document.getElementById('outcomes-window').dispatchEvent(new Event('change'))")
        page.wait(lambda: page.one("#outcome-list").text and "Comparing" not in page.one("#outcome-list").text)
        return [row for row in rows() if row[:2] == [version, "reinforce"]]

    page.wait(lambda: page.one("#outcomes").is_displayed())
    (row,) = page.wait(compared)
    assert int(row[2]) >= 1
    assert [cell.get_attribute("scope") for cell in page.all("#outcome-list th")] == ["col"] * 6
    assert page.script("return document.querySelector('#outcome-list .scroll').tabIndex") == 0
