"""A real browser, for tests of pages; they are skipped where there is none."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
PATIENCE = 300_000  # milliseconds: Playwright's 5 and 30 s are none on a busy machine
expect.set_options(timeout=PATIENCE)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


@contextmanager
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"], timeout=PATIENCE
        )
        yield chromium
        chromium.close()


def new_page(place: Browser | BrowserContext) -> Page:
    """Whoever begins to listen for file choosers is not told when the browser reports them: on a
    busy machine it may not yet do so when the next key opens one."""
    page = place.new_page()
    page.set_default_timeout(PATIENCE)
    page.on("filechooser", lambda _: None)
    return page
