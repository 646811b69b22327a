"""The pages in a real browser: the service's, against the real service, and the report."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import browser, needs_browser, new_page
from conftest import MODEL, classes_of, pictures, predictions, tiny_config
from drawings import make_photos
from playwright.sync_api import FilePayload, Locator, Page, Route, expect
from service import Service

from jobs import inspection
from jobs.runs import RunFolder
from serving.archive import open_model

pytestmark = needs_browser


WIDTH = 390  # CSS pixels of a phone
# Where only the page is asked: it is the same one before either engine.
ONE_ENGINE = pytest.mark.parametrize("service", ["asgi"], indirect=True)


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as chromium:
        yield new_page(chromium)


@pytest.fixture(params=["light", "dark"])
def phone(request: pytest.FixtureRequest, page: Page) -> Iterator[Page]:
    assert page.context.browser is not None
    context = page.context.browser.new_context(
        viewport={"width": WIDTH, "height": 800},
        is_mobile=True,
        has_touch=True,
        color_scheme=request.param,
    )
    yield new_page(context)
    context.close()


@pytest.fixture
def places(page: Page) -> Iterator[None]:
    """The page takes the model for one of larger pictures, whose maps say where something is."""

    def tell(route: Route) -> None:
        route.fulfill(json={**route.fetch().json(), "map_size": [8, 8]})

    page.route("**/card", tell)
    yield
    page.unroute("**/card")


def png(data: bytes, name: str = "a.png") -> FilePayload:
    return {"name": name, "mimeType": "image/png", "buffer": data}


def width_of(page: Page) -> int:
    width: int = page.evaluate("document.documentElement.scrollWidth")
    return width


def tab_to(page: Page, element: Locator) -> None:
    for _ in range(30):
        page.keyboard.press("Tab")
        if element.evaluate("element => element === document.activeElement"):
            return
    raise AssertionError(f"the keyboard does not reach {element}")


def said_by(program: str, folder: Path, picture: bytes, **environment: str) -> str:
    (folder / "picture.jpg").write_bytes(picture)
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@pytest.mark.usefixtures("places")
def test_it_shows_what_the_service_says(
    page: Page, service: Service, exported: RunFolder, tmp_path: Path
) -> None:
    files = [tmp_path / name for name in ("0.png", "1.png", "text.png")]
    for file, data in zip(files, [*pictures(exported, 2), b"no picture"], strict=True):
        file.write_bytes(data)
    asked, errors = [], []
    page.goto("about:blank")  # which ends what an earlier test's page still asks
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(error.message))

    page.goto(service.address)
    expect(page.locator("#model")).to_have_text(MODEL)
    page.set_input_files("#files", files)

    cards = page.locator(".result")
    expect(cards).to_have_count(3)
    expect(page.locator(".busy")).to_have_count(0)
    newest_first = [*predictions(exported, 2), "Not a picture in one of JPEG, PNG, WEBP."][::-1]
    expect(cards.locator(".label")).to_have_text(newest_first)
    expect(cards.nth(1).locator(".top li")).to_have_count(5)
    about = re.compile(rf"^\d+ ms · familiarity [01]\.\d\d · version {exported.run_id}$")
    expect(cards.nth(1).locator(".meta")).to_have_text(about)
    test = exported.comparison().done["frozen"].test
    facts = page.locator("#facts")
    expect(facts).to_be_hidden()
    page.get_by_role("link", name="Model card").click()
    expect(cards.first).to_be_hidden()
    expect(facts).to_be_visible()
    expect(facts).to_contain_text(exported.run_id)
    expect(facts).to_contain_text(f"of {test.images} test pictures (95 % interval")
    expect(facts).to_contain_text("floating-point numbers (in use), the trained network")
    page.go_back()
    expect(facts).to_be_hidden()
    curl = f"curl -T picture.jpg {service.address}/predictions/{MODEL}"
    expect(page.locator("#curl")).to_have_text(curl)
    program = page.locator("#python").inner_text()
    assert said_by(program, tmp_path, files[1].read_bytes()) == predictions(exported, 2)[1] + "\n"
    cards.nth(1).get_by_role("button", name="Why?").click()
    why = f"Lit is what speaks most for {predictions(exported, 2)[1]}."
    expect(cards.nth(1).locator(".meta")).to_have_text(why)
    lit = cards.nth(1).locator(".thumb img")
    expect(lit).to_have_attribute("alt", why)
    assert lit.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    ours = (service.address, "blob:", "data:")
    assert not errors and all(url.startswith(ours) for url in asked), (errors, asked)
    page.get_by_role("button", name="Clear").click()
    expect(cards).to_have_count(0)


@ONE_ENGINE
def test_a_sample_is_a_click_away(page: Page, service: Service, archive: Path) -> None:
    model, asked = open_model(archive), []
    page.goto("about:blank")  # which ends what an earlier test's page still asks
    page.on("request", lambda request: asked.append(request.url))
    page.goto(service.address)
    samples = page.locator("#samples button")
    expect(samples).to_have_count(model.description.samples)
    images = samples.locator("img")
    images.evaluate_all("all => Promise.all(all.map((one) => one.decode()))")  # or it fails
    samples.nth(2).click()
    sure = model.golden[2].probabilities
    label = model.classes[sure.index(max(sure))]
    expect(page.locator(".result .label")).to_have_text(label)
    expect(page.locator(".result .name")).to_have_text("sample 3")
    expect(page.get_by_role("button", name="Why?")).to_have_count(0)  # a map of one place
    expect(samples.nth(2)).to_be_focused()
    fetched = [url for url in asked if "/samples/" in url]
    assert len(fetched) == model.description.samples, "once, and not with every prediction"


@ONE_ENGINE
def test_the_card_tells_the_choice_and_the_classes(page: Page, service: Service) -> None:
    """As a service says of a model that was chosen among three, and of no pictures to show."""

    def among_three(route: Route) -> None:
        card = route.fetch().json()
        accuracy = {"value": 0.5, "low": 0.25, "high": 0.875}
        other = {"variant": "<b>other</b>", "accuracy": accuracy, "seconds": 100.0}
        broken = {"variant": "broken", "accuracy": None, "seconds": None}
        card["compared"] = [*card["compared"], other, broken]
        card["test"]["per_class"] = [0.75, None, *[1.0] * 7, 0.5]
        route.fulfill(json={**card, "sentences": ["frozen wins"], "samples": 0})

    page.route("**/card", among_three)
    page.goto("about:blank")  # or only the fragment would change
    page.goto(service.address + "/#model-card")
    variants = page.locator("#variants li")
    expect(variants).to_have_count(3)
    expect(variants.first).to_have_class("chosen")
    expect(variants.nth(1)).to_have_text("<b>other</b>50.0 %25.0 % to 87.5 %, 2 min")
    whisker = (
        variants.nth(1).locator(".whisker").evaluate("one => [one.style.left, one.style.width]")
    )
    assert whisker == ["25%", "62.5%"]
    expect(variants.nth(2)).to_have_text("brokennoneits loss was no number")
    expect(page.locator("#sentences li")).to_have_text(["frozen wins"])
    shares = page.locator("#classes li > span:last-child")
    expect(shares).to_have_text(["50.0 %", "75.0 %", *["100.0 %"] * 7])
    page.get_by_role("link", name="Pictures").click()
    expect(page.locator("#drop")).to_be_visible()
    expect(page.locator("#samples")).to_be_hidden()
    page.unroute("**/card")


HOSTILE = """</script><img src=x onerror="window.hurt=1"><svg onload='window.hurt=2'>{{7*7}}"""


@ONE_ENGINE
def test_hostile_names_of_files_classes_and_variants_stay_text(
    page: Page, service: Service, exported: RunFolder
) -> None:
    def rename(route: Route) -> None:
        text = route.fetch().text().replace("frozen", "@").replace(MODEL, "@")
        for name in sorted(classes_of(exported), key=len, reverse=True):
            text = text.replace(f'"{name}"', '"@"')
        route.fulfill(body=text.replace("@", HOSTILE.replace('"', '\\"')))

    page.route("**/card", rename)
    page.route("**/predictions/**", rename)
    page.goto("about:blank")
    page.goto(service.address + "/#model-card")
    expect(page.locator("#variants li").first).to_contain_text(HOSTILE)
    expect(page.locator("#classes li").first).to_contain_text(HOSTILE)
    page.get_by_role("link", name="Pictures").click()
    page.set_input_files("#files", [png(pictures(exported, 1)[0], HOSTILE)])
    card = page.locator(".result")
    expect(card.locator(".label")).to_have_text(HOSTILE)
    expect(card.locator(".top li").first).to_contain_text(HOSTILE)
    assert "onerror" in card.locator(".name").inner_text()
    assert page.evaluate("window.hurt") is None
    assert page.locator("main svg[onload], img[onerror]").count() == 0
    page.unroute("**/card")
    page.unroute("**/predictions/**")


@ONE_ENGINE
def test_it_says_that_the_service_is_gone_and_tries_again(
    page: Page, service: Service, exported: RunFolder
) -> None:
    picture = png(pictures(exported, 1)[0])
    page.goto(service.address)
    page.context.set_offline(True)
    page.set_input_files("#files", picture)
    expect(page.locator(".failed .label")).to_have_text("The service does not answer.")
    expect(page.locator("#model")).to_have_text("The service does not answer.")
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".label")).to_have_text(predictions(exported, 1))
    expect(page.locator("#model")).to_have_text(MODEL)


@ONE_ENGINE
def test_what_is_not_the_service_s_fault_is_not_called_that(
    page: Page, service: Service, tmp_path: Path
) -> None:
    page.goto(service.address)
    expect(page.locator("#model")).to_have_text(MODEL)
    (file := tmp_path / "gone.png").write_bytes(b"x" * 10_000)
    page.evaluate("window.sendLater = send; send = () => {}")
    page.set_input_files("#files", file)
    file.unlink()
    page.evaluate("send = sendLater; send(document.querySelector('.result'))")
    expect(page.locator(".failed .label")).to_have_text("This file cannot be read.")
    expect(page.locator("#model")).to_have_text(MODEL)


@ONE_ENGINE
def test_an_answer_that_is_cut_off_is_none(
    page: Page, service: Service, exported: RunFolder
) -> None:
    page.goto(service.address)
    page.route("**/predictions/*", lambda route: route.fulfill(status=200, body='{"label"'))
    page.set_input_files("#files", png(pictures(exported, 1)[0]))
    expect(page.locator(".failed .label")).to_have_text("The service's answer was cut off.")
    page.unroute("**/predictions/*")


@ONE_ENGINE
def test_after_clear_nothing_waits_for_what_was_sent_before(
    page: Page, service: Service, exported: RunFolder
) -> None:
    page.goto(service.address)
    hanging: list[Route] = []

    def hang(route: Route) -> None:
        hanging.append(route)

    page.route("**/predictions/*", hang)
    page.set_input_files("#files", [png(data) for data in pictures(exported, 5)])
    expect(page.locator(".busy")).to_have_count(5)
    for _ in range(600):
        if len(hanging) < 4:
            page.wait_for_timeout(50)
    assert len(hanging) == 4
    page.unroute("**/predictions/*")
    page.locator("#clear").click()
    page.set_input_files("#files", png(pictures(exported, 1)[0]))
    expect(page.locator(".label")).to_have_text(predictions(exported, 1))


@ONE_ENGINE
def test_a_picture_that_is_pasted_is_shown(
    page: Page, service: Service, exported: RunFolder
) -> None:
    page.goto("about:blank")  # else only the hash would change
    page.goto(f"{service.address}#model-card")
    page.evaluate(
        """bytes => {
          const clipboardData = new DataTransfer();
          clipboardData.items.add(new File([new Uint8Array(bytes)], "a.png"));
          document.dispatchEvent(new ClipboardEvent("paste", { clipboardData }));
        }""",
        list(pictures(exported, 1)[0]),
    )
    expect(page.locator(".label")).to_have_text(predictions(exported, 1))
    expect(page.locator(".label")).to_be_visible()


@ONE_ENGINE
def test_a_file_that_is_too_large_is_refused_in_plain_words(page: Page, service: Service) -> None:
    page.goto(service.address)
    page.set_input_files("#files", png(bytes(10_000_001)))
    expect(page.locator(".failed .label")).to_have_text(
        "This file is too large: the service takes 10 MB at most."
    )
    expect(page.get_by_role("button", name="Try again")).to_have_count(0)


@ONE_ENGINE
def test_it_fits_a_phone_and_takes_pictures_there(
    page: Page, phone: Page, service: Service, exported: RunFolder
) -> None:
    phone.goto(service.address)
    phone.wait_for_load_state("networkidle")  # what it has asked for moves what is to be tapped
    with phone.expect_file_chooser() as chooser:
        phone.get_by_text("Take a picture").click()
    chooser.value.set_files(png(pictures(exported, 1)[0], "a-long-name" * 9 + ".png"))
    expect(phone.locator(".label")).to_have_text(predictions(exported, 1))
    assert width_of(phone) == WIDTH
    phone.get_by_role("link", name="Model card").tap()
    expect(phone.locator("#facts")).to_be_visible()
    assert width_of(phone) == WIDTH
    page.goto(service.address)
    expect(page.get_by_text("Take a picture")).to_be_hidden()  # there is a mouse


@ONE_ENGINE
@pytest.mark.usefixtures("places")
def test_everything_is_reached_by_keyboard(
    page: Page, service: Service, exported: RunFolder
) -> None:
    page.goto(service.address)
    tab_to(page, page.locator("#files"))
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Space")
    chooser.value.set_files(png(pictures(exported, 1)[0]))
    expect(page.locator(".label")).to_have_text(predictions(exported, 1))
    tab_to(page, page.get_by_role("button", name="Why?"))
    page.keyboard.press("Enter")
    expect(page.locator(".explained")).to_have_count(1)
    tab_to(page, page.locator("[data-copies=curl]"))
    page.keyboard.press("Enter")
    expect(page.locator("[data-copies=curl]")).to_have_text("Copied")
    tab_to(page, page.locator("summary"))
    page.keyboard.press("Enter")
    tab_to(page, page.locator("#key"))
    page.keyboard.press("Control+V")
    expect(page.locator("#key")).to_have_value(page.locator("#curl").inner_text())
    tab_to(page, page.get_by_role("button", name="Clear"))
    page.keyboard.press("Enter")
    expect(page.locator(".result")).to_have_count(0)


def test_the_report_fits_a_phone(phone: Page, compared: RunFolder) -> None:
    phone.goto((compared.path / "report" / "index.html").absolute().as_uri())
    phone.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert width_of(phone) == WIDTH


def test_a_look_at_data_fits_a_phone_whatever_its_classes_are_called(
    phone: Page, tmp_path: Path
) -> None:
    make_photos(root := tmp_path / "photos", train=3, test=2, size=(40, 40))
    for split in ("train", "test"):
        (root / split / "cat").rename(root / split / ("Chrysanthemum_leucanthemum" * 8))
    data = {"source": "folder", "root": str(root), "train_images": None, "test_images": None}
    inspection.inspect(tiny_config(data=data), tmp_path / "out")
    phone.goto((tmp_path / "out" / "index.html").as_uri())
    assert phone.locator(".card").count() > 0
    assert width_of(phone) == WIDTH
    over = "cards => cards.filter(one => one.scrollWidth > one.clientWidth).length"
    assert phone.locator(".card").evaluate_all(over) == 0


def test_it_asks_for_a_key_where_the_service_wants_one(
    page: Page, locked: Service, exported: RunFolder, tmp_path: Path
) -> None:
    picture = png(pictures(exported, 1)[0])
    label, key = page.locator(".label"), page.locator("#key")
    page.goto(locked.address)
    expect(key).to_be_hidden()
    expect(page.locator("#card-news")).to_contain_text("wants an access key. You can give one")
    page.set_input_files("#files", picture)
    expect(label).to_have_text("The service wants an access key.")
    key.fill("wrong")
    key.press("Enter")
    expect(label).to_have_text("The service does not take this key.")
    key.fill("third-\u200bkey")  # as copied from a chat; no header may have it
    key.press("Enter")
    expect(label).to_have_text("This key has characters that no key can have.")
    key.fill("third-key")
    key.press("Enter")
    expect(label).to_have_text(predictions(exported, 1))
    expect(page.locator("#facts")).to_contain_text(exported.run_id)
    expect(page.locator("#samples button").first).to_be_visible()
    said = said_by(
        page.locator("#python").inner_text(), tmp_path, picture["buffer"], KEY="third-key"
    )
    assert said == predictions(exported, 1)[0] + "\n"
    page.goto("about:blank")  # lets go of its connections, which a drain would wait for
