from __future__ import annotations

import pytest


def page(tmp_path, body: str):
    file = tmp_path / "page.html"
    file.write_text(f'<!DOCTYPE html><head><link rel="icon" href="data:,"></head><body>{body}</body>')
    return file


def test_a_page_runs_and_is_as_wide_as_asked(browser, tmp_path):
    browser.open(page(tmp_path, "<p id='p'></p><script>p.textContent = innerWidth</script>"), width=390)
    assert browser.run("return document.getElementById('p').textContent") == "390"
    assert browser.errors() == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<script>absent()</script>", "absent is not defined"),
        ("<script>console.error('as it says')</script>", "as it says"),
        ("<script src='https://example.org/x.js'></script>", "ERR_NAME_NOT_RESOLVED"),
        ("<script src='missing.js'></script>", "ERR_FILE_NOT_FOUND"),
    ],
)
def test_errors_of_a_page_are_seen(browser, tmp_path, body, message):
    browser.open(page(tmp_path, body))
    (error,) = browser.errors()
    assert message in error
    assert browser.errors() == []
