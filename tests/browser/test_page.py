"""A page of features.py in Chromium: it opens without a complaint, and list, search, order, keys and narrow screens work.

bash setup_env.sh python -m pytest -m browser tests/browser
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from feature_pages import HOSTILE, made_up_page

from features import page
from target_models import load_target

pytestmark = pytest.mark.browser
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
N, LAYERS = 1500, 4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of 6,000 units, and a small one whose tokens are markup."""
    folder, target = tmp_path_factory.mktemp("pages"), load_target("tiny", "cpu")
    whole, hostile = made_up_page(target, n=N, layers=LAYERS), made_up_page(target, n=30, layers=2)
    hostile["vocabulary"] = [HOSTILE[i % len(HOSTILE)] for i in range(len(hostile["vocabulary"]))]
    hostile["title"] = HOSTILE[0]
    found = {name: folder / f"{name}.html" for name in ("whole", "hostile")}
    for file, data in zip(found.values(), (whole, hostile)):
        file.write_text(page(data), encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


class Reader:
    """Somebody who opens a page at a width, and looks and types."""

    def __init__(self, driver: object, file: Path, width: int, height: int = 900, unit: int | None = None) -> None:
        self.driver = driver
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get("about:blank")
        driver.get(file.as_uri() + ("" if unit is None else f"#{unit}"))

    def js(self, expression: str) -> object:
        return self.driver.execute_script(f"return {expression}")

    def rows(self) -> list[int]:
        """Units of the row elements, from the top."""
        return self.js("[...document.querySelectorAll('.row')].map((row) => Number(row.dataset.unit))")

    def keys(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def order(self, value: str) -> None:
        from selenium.webdriver.common.by import By
        from selenium.webdriver.support.select import Select

        Select(self.driver.find_element(By.ID, "order")).select_by_value(value)

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture
def reader(chromium: object, files: dict[str, Path]) -> Reader:
    return Reader(chromium, files["whole"], 1280)


def test_it_opens_with_its_units_and_without_a_complaint(reader: Reader) -> None:
    assert reader.complaints() == []
    assert reader.js("document.getElementById('found').textContent").startswith("6,000 of 6,000 units, 62 never active")
    assert len(reader.rows()) >= 10 and reader.js("document.querySelector('[aria-selected=true]').dataset.unit") == str(
        reader.rows()[0]
    )
    assert reader.js("document.querySelectorAll('.top .examples li').length") == 8
    assert reader.js("document.querySelectorAll('.quarters .examples').length") == 4
    assert reader.js("document.querySelectorAll('.text .strongest').length") == 16
    assert reader.js("document.querySelectorAll('.bars i').length") == 32
    assert reader.js("document.querySelectorAll('.raised li').length") == 8


def test_six_thousand_units_are_a_bounded_number_of_elements(reader: Reader) -> None:
    most = 0
    for part in (0, 0.37, 1):
        reader.js(f"(list.scrollTop = {part} * list.scrollHeight, drawRows())")
        most = max(most, len(reader.rows()))
        assert len(reader.rows()) >= 10
    assert most <= 100 and reader.js("document.querySelectorAll('*').length") < 2500
    assert reader.js("list.scrollHeight") >= 6000 * 40


def test_search_finds_numbers_and_tokens_and_nothing(reader: Reader) -> None:
    reader.keys("/", "#1234")
    assert sorted(reader.rows()) == [1234 + N * layer for layer in range(LAYERS)]
    reader.keys("\ue00c", "/", "return")  # escape
    assert 0 < len(reader.js("shown")) < 6000
    said = reader.js("shown.every((unit) => indexed()[unit].includes('return'))")
    assert said and reader.js("shown.length") == reader.js("indexed().filter((text) => text.includes('return')).length")
    reader.keys("\ue00c", "/", "no such token anywhere")
    assert reader.rows() == [] and "0 of 6,000" in reader.js("found.textContent")
    reader.keys("\ue00c")
    assert reader.js("shown.length") == 6000


@pytest.mark.parametrize(
    "order, key",
    [
        ("peak", "all.peak[unit]"),
        ("density", "all.count[unit]"),
        ("effect", "Math.max(all.effect[unit * 16], -all.effect[unit * 16 + 8])"),
        ("layer", "-Math.floor(unit / 1500)"),
    ],
)
def test_order_is_that_of_the_numbers_with_silent_units_last(reader: Reader, order: str, key: str) -> None:
    reader.order(order)
    for way in (1, -1):
        values = reader.js(f"shown.filter((unit) => all.count[unit]).map((unit) => {key})")
        assert [way * v for v in values] == sorted((way * v for v in values), reverse=True) and len(set(values)) > 3
        assert reader.js("shown.slice(-62).every((unit) => all.count[unit] === 0)")
        reader.click("#direction")


def test_keys_move_the_choice_and_enter_reads(reader: Reader) -> None:
    shown = reader.js("shown.slice(0, 40)")
    for keys, at in (("j", 1), ("jj", 3), ("k", 2), ("\ue015", 3), ("\ue013", 2), ("j" * 30, 32)):
        reader.keys(*keys)
        assert reader.js("chosen") == shown[at]
        assert reader.js("document.querySelector('[aria-selected=true]').dataset.unit") == str(shown[at])
        title = reader.js("document.querySelector('h2').textContent")
        assert title == f"Layer {shown[at] // N}, latent {shown[at] % N}"
    box = "document.querySelector('[aria-selected=true]').getBoundingClientRect()"
    assert reader.js(f"{box}.bottom <= innerHeight && {box}.top >= list.getBoundingClientRect().top")
    reader.keys("/", "#77", "\ue007")  # enter
    assert reader.js("all.number[chosen]") == 77 and reader.js("document.activeElement.tagName") == "MAIN"
    reader.click(".related button")
    assert reader.js("location.hash") == f"#{reader.js('chosen')}" and reader.complaints() == []


def test_a_link_opens_its_unit(chromium: object, files: dict[str, Path]) -> None:
    reader = Reader(chromium, files["whole"], 1280, unit=4567)
    assert reader.js("chosen") == 4567 and 4567 in reader.rows()


@pytest.mark.parametrize("width", (1280, 390))
@pytest.mark.parametrize("name", ("whole", "hostile"))
def test_nothing_is_wider_than_the_screen(chromium: object, files: dict[str, Path], width: int, name: str) -> None:
    reader = Reader(chromium, files[name], width, 844)
    assert reader.js("innerWidth") == width
    for _ in range(5):
        reader.keys("j")
        seen = "[...document.querySelectorAll('body *')].filter((e) => !e.matches('.gist *'))"  # those are cut off, with a …
        wide = f"{seen}.filter((e) => e.getBoundingClientRect().right > innerWidth + 1)"
        assert reader.js(f"{wide}.map((e) => e.outerHTML.slice(0, 80))") == []
        assert reader.js("document.documentElement.scrollWidth") <= width
        assert reader.js("document.querySelector('main').scrollWidth <= document.querySelector('main').clientWidth")
    list_, detail = (reader.js(f"document.querySelector('{e}').getBoundingClientRect()") for e in ("nav", "main"))
    assert detail["height"] > 300 and list_["height"] > 200
    assert detail["top"] >= list_["bottom"] - 1 if width == 390 else detail["left"] >= list_["right"] - 1


def test_markup_in_tokens_stays_text(chromium: object, files: dict[str, Path]) -> None:
    reader = Reader(chromium, files["hostile"], 1280)
    for _ in range(10):
        reader.keys("j")
    reader.keys("/", "onerror")
    assert reader.js("shown.length") > 0 and reader.complaints() == []
    assert reader.js("window.broken") is None and reader.js("document.querySelectorAll('img').length") == 0
    assert reader.js("document.scripts.length") == 1 and reader.js("document.title") == HOSTILE[0]
    assert HOSTILE[1] in reader.js("document.querySelector('.examples').textContent")
