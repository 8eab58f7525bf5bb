"""The ladder's page in a browser."""

from __future__ import annotations

import math

import pytest
from race_cases import made_results

from stepladder.bench.ladder import pictures
from stepladder.bench.ladder.race import Lap, Results, Run, Setting, Standing

STEPS = [*range(0, 101, 10)]
# By optimizer: losses at STEPS, and when each of two seeds has reached the target.
CURVES = {
    "sgd": ([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.09], (None, None)),
    "muon": ([1, 0.95, 0.5, 0.2, 0.1, 0.025, 0.02, 0.02, 0.01, 0.01, 0.01], (46, 48)),
    "adamw": ([1, 0.5, 0.4, 0.3, 0.2, 0.1, 0.08, 0.06, 0.02, 0.02, 0.02], (78, 80)),
}


def results():
    standings = [
        Standing(name, [0.01], 2, [Run(Lap(name, 0.01, k), losses[-1], ts[k], None, STEPS, losses) for k in range(2)])
        for name, (losses, ts) in CURVES.items()
    ]
    lost = Standing("lion", [0.01], 2, [Run(Lap("lion", 0.01, k), math.inf, None, 7, [0], [1.0]) for k in range(2)])
    return Results(made_results().machine, Setting("teacher", "essay", 100, 2), [*standings, lost])


@pytest.fixture
def page(browser, tmp_path):
    """The page, opened on a desktop's screen, without an error."""
    pytest.importorskip("plotly", reason="draws the page; pip install 'stepladder[plot]'")
    file = tmp_path / "race.html"
    with file.open("w", encoding="utf-8") as opened:
        pictures.write_html(opened, results())
    browser.open(file)
    yield browser
    assert browser.errors() == []


def leaderboard(page):
    """Rows of (place, optimizer, rate, loss, steps to the target)."""
    script = "return [...document.querySelectorAll('#leaderboard tr')].map(r => [...r.cells].map(c => c.textContent))"
    return page.run(script)


def move_slider(page, step):
    script = "const s = document.getElementById('step'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))"
    page.run(script, step)


def drawn(page):
    """How many points of each curve are on the chart."""
    return page.run("return document.getElementById('chart').data.map(d => [d.name, d.x.length, d.y.length])")


def test_page_shows_the_end(page):
    assert leaderboard(page) == [
        ["1", "muon", "0.01", "0.0100", "47"],
        ["2", "adamw", "0.01", "0.0200", "79"],
        ["", "sgd", "0.01", "0.0900", "not reached"],
        ["", "lion", "", "", "diverged"],
    ]
    assert page.run("return document.getElementById('now').textContent") == "step 100"
    assert drawn(page) == [["muon", 11, 11], ["adamw", 11, 11], ["sgd", 11, 11], ["lion", 0, 0]]
    lines = page.run("return document.querySelectorAll('#chart .scatterlayer path.js-line').length")
    assert lines == 3
    text = page.run("return document.body.innerText")
    assert "a tanh network learns another one's outputs, 100 steps in fp64" in text
    assert "avx2 kernels" in text


def test_slider_moves_the_leaderboard(page):
    """Those that have reached the target come first; a mean over the seeds says when."""
    move_slider(page, 0)
    assert [row[0] for row in leaderboard(page)] == ["", "", "", ""]
    assert {row[3] for row in leaderboard(page)} == {"1.00", ""}
    assert drawn(page)[0] == ["muon", 1, 1]
    move_slider(page, 15)
    assert [row[1] for row in leaderboard(page)][:3] == ["adamw", "sgd", "muon"]
    move_slider(page, 46)
    assert [row[:2] for row in leaderboard(page)][:2] == [["", "muon"], ["", "adamw"]]
    move_slider(page, 47)
    assert [row[:2] for row in leaderboard(page)][:2] == [["1", "muon"], ["", "adamw"]]
    assert leaderboard(page)[0][4] == "47"
    assert leaderboard(page)[1][4] == ""
    assert drawn(page)[0] == ["muon", 5, 5]
    assert page.run("return document.getElementById('now').textContent") == "step 47"


def test_slider_by_keyboard(page):
    slider = page.driver.find_element("id", "step")
    slider.send_keys("\ue012")  # left
    assert page.run("return document.getElementById('now').textContent") == "step 99"


def test_play(page):
    """From the beginning to the end; a click in between pauses."""
    play = page.driver.find_element("id", "play")
    # A replay takes ten seconds; here the clock is the test's.
    page.run("window.frames_ = []; window.requestAnimationFrame = f => { window.frames_.push(f); return 0 }")
    advance = "const f = window.frames_.splice(0); f.forEach(g => g(arguments[0])); return f.length"
    play.click()
    assert play.text == "Pause"
    assert page.run(advance, 5000) > 0
    assert page.run("return document.getElementById('now').textContent") == "step 0"
    page.run(advance, 8000)
    assert page.run("return document.getElementById('now').textContent") == "step 30"
    page.run(advance, 9700)
    assert page.run("return document.getElementById('now').textContent") == "step 47"
    assert leaderboard(page)[0][:2] == ["1", "muon"]
    play.click()
    assert play.text == "Play"
    page.run(advance, 12000)
    assert page.run("return document.getElementById('now').textContent") == "step 47"
    play.click()
    page.run(advance, 20000)
    page.run(advance, 30000)
    assert page.run("return document.getElementById('now').textContent") == "step 100"
    assert play.text == "Play"


def test_phone(page, tmp_path):
    """Nothing is wider than the screen, and chart and table stand below each other."""
    page.open(tmp_path / "race.html", width=390, height=844)
    assert page.run("return document.documentElement.scrollWidth") <= 390
    chart, table = (
        page.run("return document.getElementById(arguments[0]).getBoundingClientRect().toJSON()", name)
        for name in ("chart", "standings")
    )
    assert chart["bottom"] <= table["top"]
    assert 300 <= chart["width"] <= 390
    # Whole rows without scrolling to the side.
    assert page.run("const s = document.getElementById('standings'); return s.scrollWidth <= s.clientWidth")


def test_print(page):
    """On paper there is nothing to click, and the chart is no wider than a page; then all is as it was."""
    width = "return document.querySelector('#chart .main-svg').getBoundingClientRect().width"
    display = "return getComputedStyle(document.querySelector(arguments[0])).display"
    before = page.run(width)
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    page.run("dispatchEvent(new Event('beforeprint'))")
    try:
        assert page.run(display, "#controls") == page.run(display, ".modebar-container") == "none"
        # A4 less margins of 1 cm on each side has 718 pixels, Letter 740.
        assert page.run(width) <= 718
        assert page.run("return document.getElementById('leaderboard').rows.length") == 4
    finally:
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    page.run("dispatchEvent(new Event('afterprint'))")
    assert page.run(width) == before
    assert page.run(display, "#controls") == "flex"
