"""A real browser for pages that are made here: chromium without a screen, driven by selenium."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Debian's name, Ubuntu's and Google's.
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    # Chromium refuses to run as root in its sandbox, as continuous integration does.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # A page must need nothing but itself: whatever it asks of a network fails, and that is an error on the console.
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


class Browser:
    """One window.

    Attributes:
        driver: Selenium's, for whatever a test does with the page.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path, width: int = 1200, height: int = 900) -> None:
        """Load a page from a file, and wait for it.

        Args:
            page: The file.
            width: Of the window in CSS pixels; a phone has some 390.
            height: Likewise.
        """
        # A window is never narrower than 500 pixels, a screen is.
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.driver.get_log("browser")
        self.driver.get(page.resolve().as_uri())

    def errors(self) -> list[str]:
        """What the console has held since the page was opened, or since this was last asked: errors and warnings."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script in the page returns; its arguments stand in `arguments`."""
        return self.driver.execute_script(script, *arguments)

    def screenshot(self, file: Path) -> None:
        """The whole page, not only what fits into the window, as a PNG."""
        taken = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        file.write_bytes(base64.b64decode(taken["data"]))


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests, with a profile of its own."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
    binary = next(filter(None, map(shutil.which, NAMES)), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        missing = "chromium" if binary is None else "chromedriver"
        pytest.skip(f"there is no {missing} here: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    try:
        yield Browser(started)
    finally:
        started.quit()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """The browser, left with an empty page."""
    yield chromium
    chromium.driver.get("about:blank")
