"""The page to try the service, in a real browser, against the real service."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MODEL, pictures, predictions
from playwright.sync_api import FilePayload, Page, expect, sync_playwright
from service import Service

from jobs.runs import RunFolder

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"]
        )
        yield chromium.new_page()
        chromium.close()


def png(data: bytes) -> FilePayload:
    return {"name": "a.png", "mimeType": "image/png", "buffer": data}


def test_it_shows_what_the_service_says(
    page: Page, service: Service, exported: RunFolder, tmp_path: Path
) -> None:
    files = [tmp_path / name for name in ("0.png", "1.png", "text.png")]
    for file, data in zip(files, [*pictures(exported, 2), b"no picture"], strict=True):
        file.write_bytes(data)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(error.message))

    page.goto(service.address)
    expect(page.locator("#model")).to_have_text(MODEL)
    page.keyboard.press("Tab")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Space")
    chooser.value.set_files(files)

    cards = page.locator(".result")
    expect(cards).to_have_count(3)
    expect(page.locator(".busy")).to_have_count(0, timeout=30_000)
    newest_first = [*predictions(exported, 2), "Not a picture in one of JPEG, PNG, WEBP."][::-1]
    expect(cards.locator(".label")).to_have_text(newest_first)
    expect(cards.nth(1).locator(".top li")).to_have_count(5)
    expect(cards.nth(1).locator(".meta")).to_contain_text("ms")
    expect(page.locator("#model")).to_have_text(f"{MODEL}, version {exported.run_id}")
    expect(page.locator("#curl")).to_have_text(
        f"curl -T picture.jpg {service.address}/predictions/{MODEL}"
    )
    cards.nth(1).get_by_role("button", name="Why?").click()
    why = f"cannot say which part speaks for {predictions(exported, 2)[1]}."
    expect(cards.nth(1).locator(".meta")).to_contain_text(why)
    lit = cards.nth(1).locator(".thumb img")
    expect(lit).to_have_attribute("alt", re.compile("one place"))
    assert lit.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    ours = (service.address, "blob:", "data:")
    assert not errors and all(url.startswith(ours) for url in asked), (errors, asked)
    page.get_by_role("button", name="Clear").click()
    expect(cards).to_have_count(0)


def test_it_says_that_the_service_is_gone_and_tries_again(
    page: Page, service: Service, exported: RunFolder
) -> None:
    picture = png(pictures(exported, 1)[0])
    page.goto(service.address)
    page.context.set_offline(True)
    page.set_input_files("#files", picture)
    expect(page.locator(".failed .label")).to_have_text("The service does not answer.")
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".label")).to_have_text(predictions(exported, 1))


def test_it_asks_for_a_key_where_the_service_wants_one(
    page: Page, locked: Service, exported: RunFolder
) -> None:
    picture = png(pictures(exported, 1)[0])
    label, key = page.locator(".label"), page.locator("#key")
    page.goto(locked.address)
    expect(key).to_be_hidden()
    page.set_input_files("#files", picture)
    expect(label).to_have_text("The service wants an access key.")
    key.fill("wrong")
    key.press("Enter")
    expect(label).to_have_text("The service does not take this key.")
    key.fill("third-key")
    key.press("Enter")
    expect(label).to_have_text(predictions(exported, 1))
    page.goto("about:blank")  # lets go of its connections, which a drain would wait for
