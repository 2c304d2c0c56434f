"""Headless Chromium for the tests of the page and for its screenshots: Debian's `chromium` and `chromium-driver`,
driven by selenium. Does not depend on: the page.

    with browser(tmp_path) as driver:
        driver.get(url)"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

HOST = "unigen.test"
"""A name of 127.0.0.1 that the browser trusts no more than any other without https, as of a server in the next room."""
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))


@contextmanager
def browser(downloads: Path, width: int = 1100, height: int = 900, *, dark: bool = False) -> Iterator[Any]:
    """Start a browser with an empty profile.

    Args:
        downloads: folder in which it saves files.
        width: of the page, in CSS pixels.
        height: of the page, in CSS pixels.
        dark: whether it prefers dark colors.
    """
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.add_argument(f"--host-resolver-rules=MAP {HOST} 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(str(DRIVER)))
    try:
        driver.set_page_load_timeout(60)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        saved = {"behavior": "allow", "downloadPath": str(downloads)}
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", saved)
        yield driver
    finally:
        driver.quit()


def requested_urls(driver: Any) -> list[str]:
    """The URLs that the page requested since the last call, without data and blob URLs."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if urlsplit(url).scheme not in ("data", "blob")]


def console_messages(driver: Any) -> list[str]:
    """The messages on the console since the last call."""
    return [entry["message"] for entry in driver.get_log("browser")]
