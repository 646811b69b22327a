"""The report is drawn from the run folder alone and stands on its own."""

import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import browser, needs_browser, new_page
from conftest import changed_at, copy_of, tiny_config
from matplotlib.container import ErrorbarContainer
from PIL import Image
from playwright.sync_api import expect
from safetensors.torch import load_file
from typer.testing import CliRunner

from jobs import config, pipeline
from jobs.cli import app
from jobs.errors import ConfigurationError, UnavailableError
from jobs.report import comparison, coverage, page, plots, runs
from jobs.results import Diverged, Done
from jobs.runs import RunFolder, read_arrays, write_arrays
from jobs.statistics import wilson
from serving.files import digest_of, write
from serving.messages import softmax

MARKUP = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def run(compared: RunFolder) -> RunFolder:
    return compared


def test_a_run_leaves_exactly_the_files_it_promises(run: RunFolder) -> None:
    of_a_variant = {
        "best.safetensors",
        "validation_predictions.npz",
        "test_predictions.npz",
        "kernels.npz",
        "examples.npz",
        "result.json",
    }
    kept = "config.yaml environment.json data.json architecture.json metrics.jsonl comparison.json"
    expected = {*kept.split(), "findings.csv", "report/index.html"}
    expected |= {f"report/{name}.png" for name in ("cost", "curves", "time", "classes", "coverage")}
    for name in ("scratch", "finetune", "frozen"):
        for folder in (name, f"{name}/seed-1"):
            expected |= {f"variants/{folder}/{file}" for file in of_a_variant}
        pictures = ("curves", "confusion", *page.LAYERS)
        expected |= {f"report/{name}-{picture}.png" for picture in pictures}
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert set(manifest["files"]) == expected
    there = {path.relative_to(run.path).as_posix() for path in changed_at(run.path)}
    assert there == expected | {"manifest.json"}
    for name, entry in manifest["files"].items():
        path = run.path / name
        assert entry == {"size": path.stat().st_size, "sha256": digest_of(path)}


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]


def test_the_page_needs_no_network_and_describes_its_pictures(run: RunFolder) -> None:
    text = (run.path / "report" / "index.html").read_text()
    page = Page()
    page.feed(text)
    assert all(
        link.startswith(("data:image/png;base64,", "data:image/jpeg;base64,"))
        for link in page.links
    )
    assert "script" not in page.tags and "url(" not in text
    variants = [run.variant(name, 0).path for name in run.comparison().done]
    examples = sum(len(read_arrays(path / "examples.npz")["rows"]) for path in variants)
    figures = len(list((run.path / "report").glob("*.png")))
    assert len(page.images) == figures + 2 * examples, "of each a small one and a large one"
    assert all(image["alt"] for image in page.images)
    assert 'name="viewport"' in text


def test_the_page_says_what_the_comparison_says(run: RunFolder) -> None:
    text = (run.path / "report" / "index.html").read_text()
    result = run.comparison()
    for sentence in result.sentences:
        assert sentence.replace("'", "&#39;") in text.replace("&lt;", "<")
    assert result.weights in text
    varied = "mirrored in every other epoch, shifted by up to 12.5 % of the side"
    assert f"of finetune: {varied}; of frozen: {varied}." in text, "of a single epoch"
    assert len(result.done) == 3
    for variant in result.done.values():
        assert f"{variant.accuracy_mean * 100:.2f} %" in text
        assert f"± {variant.accuracy_spread * 100:.2f}" in text  # type: ignore[operator]
        row = f'<th scope="row">{variant.variant}</th><td'
        assert row in text.partition("I don't know")[2]
    assert f"the exported weights are of seed {result.winner_seed}" in text


@pytest.fixture(scope="module")
def redrawn(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The report of a run with a price of 2,000 a second, with class maps of 8×8 places, and with
    names that would be markup."""
    folder = copy_of(run, tmp_path_factory.mktemp("redrawn"))
    raw = run.config().model_dump(mode="json")
    priced = config.validate({**raw, "runtime": {**raw["runtime"], "price_per_hour": 7.2e6}})
    write(folder.path / "config.yaml", priced.to_yaml())
    facts = folder.facts()
    update = {"classes": (MARKUP, *facts.classes[1:]), "skipped": (f"{MARKUP}.png: empty",)}
    write(folder.path / "data.json", facts.model_copy(update=update).to_json())
    file = folder.path / "variants" / "frozen" / "examples.npz"
    kept = read_arrays(file)
    larger = np.stack([np.eye(8, dtype=np.float32)] * len(kept["maps"]))
    write_arrays(file, {**kept, "maps": larger})
    pipeline.report_again(folder)
    return folder


def test_the_page_begins_with_the_answer_and_its_cost(run: RunFolder, redrawn: RunFolder) -> None:
    result = redrawn.comparison()
    text = html.unescape((redrawn.path / "report" / "index.html").read_text())
    answer = text.partition('<p class="answer">')[2].partition("</p>")[0]
    assert result.winner is not None
    seconds = result.done[result.winner].seconds
    assert answer.startswith(
        f"{result.sentences[0]}; {result.pairs[0].sentence}; training {result.winner} "
    )
    assert answer.endswith(f"and cost {seconds * 2000:,.2f}.")
    cells = [f"<td>{variant.seconds * 2000:,.2f}</td>" for variant in result.done.values()]
    assert all(cell in text for cell in cells)
    assert "cost {" not in (run.path / "report" / "index.html").read_text()


def test_runs_are_compared_on_the_test_pictures_that_they_share(
    run: RunFolder, exported: RunFolder, tmp_path: Path
) -> None:
    worse = RunFolder(copy_of(run, tmp_path).path.rename(tmp_path / "worse"))
    result = run.comparison()
    assert result.winner is not None and result.winner_seed is not None
    file = worse.variant(result.winner, result.winner_seed).path / "test_predictions.npz"
    kept = read_arrays(file)
    predicted = kept["logits"].argmax(1)
    write_arrays(file, {**kept, "labels": predicted + 1})  # none is right
    out = tmp_path / "page.html"
    folders = [str(folder.path) for folder in (run, worse, exported)]
    assert CliRunner().invoke(app, ["report", *folders, "--out", str(out)]).exit_code == 0
    text = html.unescape(out.read_text())
    (sentence,) = re.findall("<li>(.*?)</li>", text)  # the test pictures of the third are others
    assert re.match(rf"{result.winner} of tiny \w+ .*{result.winner} of worse", sentence)
    assert f" {100 * (predicted == kept['labels']).mean():.1f} points" in sentence
    rows = re.findall(r'<th scope="row">(\w+)</th><td>(\w+), winner</td>', text)
    assert rows == [("tiny", result.winner), ("worse", result.winner), ("exported", "frozen")]


def test_the_page_of_several_runs_says_what_their_pictures_have_in_common(
    run: RunFolder, tmp_path: Path
) -> None:
    other = RunFolder(copy_of(run, tmp_path).path.rename(tmp_path / "other"))
    file = other.path / "comparison.json"
    said = json.loads(file.read_text())

    def page_of(data: dict[str, Any], **changes: Any) -> str:
        file.write_text(json.dumps({**said, "data": {**said["data"], **data}, **changes}))
        return html.unescape(runs.render([run, other]))

    titles = f"{said['winner']} of other"
    assert "All have the same data." in page_of({}, selected_on="validation")
    fewer = {**said["data"]["images"], "train": 1}
    assert "All have the same data." not in page_of({"images": fewer})
    flattered = f"{titles} was chosen on these same pictures, which flatters it</li>"
    assert flattered in page_of({}, selected_on="test")
    learned = f"{titles} was also trained on, or chosen by, 2 of these pictures</li>"
    assert learned in page_of({"leaked": [0, 1]}, selected_on="validation")
    assert "these" not in page_of({}, selected_on="validation").split("<table>")[0]


@pytest.mark.parametrize("arguments", [["a", "b"], ["a", "--out", "page.html"]])
def test_a_page_of_several_runs_needs_a_file_and_one_of_a_run_has_its_own(
    arguments: list[str],
) -> None:
    refused = CliRunner().invoke(app, ["report", *arguments])
    assert refused.exit_code == 2 and "--out" in refused.output


def test_the_comparison_is_what_the_predictions_give(run: RunFolder) -> None:
    result = run.comparison()
    right = {}
    for name, variant in result.done.items():
        with np.load(run.path / "variants" / name / "test_predictions.npz") as arrays:
            right[name] = arrays["logits"].argmax(1) == arrays["labels"]
        assert variant.test.accuracy == pytest.approx(right[name].mean())
        assert variant.accuracy_by_seed[0] == variant.test.accuracy
        assert len(variant.accuracy_by_seed) == 2
        assert variant.accuracy_low <= variant.accuracy_mean <= variant.accuracy_high
    for pair in result.pairs:
        a, b = (result.done[name].accuracy_by_seed for name in (pair.a, pair.b))
        assert pair.difference == pytest.approx(np.subtract(a, b).mean())
        assert pair.low <= pair.difference <= pair.high
    best = max(result.done.values(), key=lambda v: v.selection_accuracy)
    assert result.winner == best.variant


def test_of_several_seeds_the_best_on_the_validation_set_is_exported(run: RunFolder) -> None:
    result = run.comparison()
    assert result.winner is not None
    winner = result.done[result.winner]
    by_seed = {}
    for seed in (0, 1):
        outcome = run.variant(result.winner, seed).result()
        assert isinstance(outcome, Done)
        by_seed[seed] = outcome.selection_accuracy
    assert by_seed[result.winner_seed or 0] == max(by_seed.values())
    assert winner.selection_accuracy == pytest.approx(np.mean(list(by_seed.values())))
    for accuracies, seed in (((0.5, 0.7), 8), ((0.7, 0.5), 4), ((0.6, 0.6), 4)):
        changed = winner.model_copy(update={"selection_by_seed": accuracies})
        assert comparison.best_seed(changed, (4, 8)) == seed


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("variants/frozen/result.json", b'{"status": "done"}', "result.json: done.seconds: Field"),
        ("variants/frozen/result.json", b"{", "result.json: .*Invalid JSON"),
        ("data.json", b"[]", "data.json: "),
        ("environment.json", b"[]", "environment.json: "),
        ("environment.json", None, "environment.json: no such file"),
        ("architecture.json", None, "architecture.json: no such file"),
    ],
)
def test_a_result_that_is_none_gives_one_line(
    run: RunFolder, tmp_path: Path, name: str, content: bytes | None, complaint: str
) -> None:
    copy = copy_of(run, tmp_path)
    (copy.path / name).unlink()
    if content is not None:
        write(copy.path / name, content)
    with pytest.raises(UnavailableError, match=complaint) as caught:
        pipeline.report_again(copy)
    assert "\n" not in str(caught.value)


def test_one_seed_is_compared_on_its_test_pictures(run: RunFolder, tmp_path: Path) -> None:
    folder = copy_of(run, tmp_path)
    result = comparison.compare(folder, tiny_config(runtime={"seeds": [0]}, optim={"epochs": 1}))
    images = result.data.images.test
    for pair in result.pairs:
        a, b = (result.done[name].test.accuracy for name in (pair.a, pair.b))
        assert pair.difference == pytest.approx(a - b)
        assert pair.only_a is not None and pair.only_b is not None
        assert pair.difference * images == pytest.approx(pair.only_a - pair.only_b)
    for variant in result.done.values():
        assert variant.accuracy_low == variant.test.accuracy_low
    assert "seeds" not in result.sentences[0]


def test_metrics_have_a_row_for_every_epoch_and_split(run: RunFolder) -> None:
    rows = run.metrics()
    keys = {(r["variant"], r["seed"], r["epoch"], r["split"]) for r in rows}
    names, splits = ("scratch", "finetune", "frozen"), ("train", "validation", "test")
    assert keys == {(n, seed, 0, split) for n in names for seed in (0, 1) for split in splits}
    assert len(rows) == len(keys)
    promised = {"time", "run_id", "variant", "seed", "epoch", "split", "loss", "aux_loss"}
    promised |= {"accuracy", "images_per_second", "learning_rate", "seconds"}
    assert all(set(r) == promised for r in rows)


def test_the_report_is_drawn_again_the_same(run: RunFolder, tmp_path: Path) -> None:
    run = copy_of(run, tmp_path)
    before = {p.name: p.read_bytes() for p in (run.path / "report").glob("*.png")}
    pipeline.report_again(run)
    assert {p.name: p.read_bytes() for p in (run.path / "report").glob("*.png")} == before
    manifest = json.loads((run.path / "manifest.json").read_text())
    page = run.path / "report" / "index.html"
    assert manifest["files"]["report/index.html"]["sha256"] == digest_of(page)


def test_the_surest_answers_are_kept_with_the_maps_of_their_classes(run: RunFolder) -> None:
    for name in ("scratch", "frozen"):
        path = run.path / "variants" / name
        kept, test = (read_arrays(path / f) for f in ("examples.npz", "test_predictions.npz"))
        predicted, sure = test["logits"].argmax(1), softmax(test["logits"]).max(1)
        order = np.argsort(-sure, kind="stable")
        wrong = predicted[order] != test["labels"][order]
        rows = np.concatenate([order[wrong][:24], order[~wrong][:8]])
        np.testing.assert_allclose(sure[kept["rows"]], sure[rows], rtol=1e-4)
        assert set(kept["rows"]) == set(rows)
        assert kept["pixels"].shape[1:] == (3, 75, 75) and kept["maps"].shape[1:] == (1, 1)
        bias = load_file(path / "best.safetensors")["fc.bias"].numpy()[predicted[kept["rows"]]]
        logits = test["logits"][kept["rows"]].max(1)
        np.testing.assert_allclose(kept["maps"].mean((1, 2)) + bias, logits, rtol=0.02, atol=0.02)


def test_maps_with_more_than_one_place_are_shown(run: RunFolder, redrawn: RunFolder) -> None:
    pages = [(one.path / "report" / "index.html").read_text() for one in (run, redrawn)]
    examples = read_arrays(run.variant("frozen", 0).path / "examples.npz")["rows"]
    assert [page.count("lit where it spoke most for") for page in pages] == [0, len(examples)]


def test_the_true_class_is_shown_however_unlikely_it_is(tmp_path: Path) -> None:
    logits = np.zeros((3, 1000), np.float32)
    logits[2] = np.linspace(8, 0, 1000)
    labels = np.array([0, 0, 999])
    write_arrays(tmp_path / "test_predictions.npz", {"logits": logits, "labels": labels})
    pixels, maps = np.zeros((1, 3, 8, 8), np.uint8), np.zeros((1, 2, 2), np.float32)
    kept = {"rows": np.array([2]), "pixels": pixels, "maps": maps}
    write_arrays(tmp_path / "examples.npz", kept)
    (answer,) = page._answers(tmp_path, [f"class {i}" for i in range(1000)])
    assert [name for name, *_ in answer["top"]] == [f"class {i}" for i in (*range(5), 999)]
    assert [own for *_, own in answer["top"]] == [False] * 5 + [True]
    probabilities = [probability for _, probability, _ in answer["top"]]
    np.testing.assert_allclose(probabilities, softmax(logits[2:])[0, [*range(5), 999]])
    assert (answer["row"], answer["true"], answer["right"]) == (2, "class 999", False)


def test_a_run_that_has_no_pictures_of_answers_is_reported_without(
    run: RunFolder, tmp_path: Path
) -> None:
    older = copy_of(run, tmp_path)
    for file in older.path.rglob("examples.npz"):
        file.unlink()
    pipeline.report_again(older)
    text = (older.path / "report" / "index.html").read_text()
    assert "popover" not in text.partition("<body>")[2]
    assert text.count("This run is older than this report") == 3


@needs_browser
def test_an_answer_opens_by_keyboard_and_names_are_no_markup(redrawn: RunFolder) -> None:
    test = read_arrays(redrawn.variant("frozen", 0).path / "test_predictions.npz")
    row = read_arrays(redrawn.variant("frozen", 0).path / "examples.npz")["rows"][0]
    probabilities, true = softmax(test["logits"][[row]])[0], test["labels"][row]
    odd: list[str] = []
    with browser() as chromium:
        shown = new_page(chromium)
        shown.on("dialog", lambda dialog: odd.append(dialog.message))
        shown.on("request", lambda request: odd.append(request.url[:40]))
        shown.goto((redrawn.path / "report" / "index.html").absolute().as_uri())
        variant = shown.locator("details", has=shown.locator("summary", has_text="frozen"))
        variant.evaluate("details => { details.open = true; }")

        button = variant.locator("[popovertarget]").first
        button.focus()
        shown.keyboard.press("Enter")
        opened = variant.get_by_role("dialog", name=f"row {row} of the test set")
        expect(opened).to_be_visible()
        numbers = [f"{100 * p:.1f} %" for p in sorted(probabilities, reverse=True)[:5]]
        told = opened.locator(".top li > span:last-child").all_inner_texts()
        assert told[:5] == numbers
        expect(opened.locator(".true")).to_contain_text(redrawn.facts().classes[true])
        expect(opened.locator(".true")).to_contain_text(f"{100 * probabilities[true]:.1f} %")
        lit = opened.locator("img").nth(1)
        assert lit.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
        shown.keyboard.press("Escape")
        expect(opened).to_be_hidden()
        expect(button).to_be_focused()
        shown.keyboard.press("Space")
        expect(opened).to_be_visible()

        assert shown.locator("script, [onerror]").count() == 0
        text = shown.locator("main").evaluate("main => main.textContent")
        assert f"{MARKUP}.png" in text and f"is {MARKUP}" in text
    assert all(url.startswith(("file:", "data:")) for url in odd), odd


def test_a_run_with_another_configuration_is_refused(run: RunFolder, tmp_path: Path) -> None:
    other = tiny_config(runtime={"seeds": [0, 1]}, optim={"epochs": 3})
    with pytest.raises(ConfigurationError, match=r"another configuration \(optim.epochs"):
        pipeline.run(other, copy_of(run, tmp_path))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="not a run folder"):
        pipeline.report_again(RunFolder(tmp_path))


def test_two_processes_cannot_work_on_one_run(run: RunFolder, tmp_path: Path) -> None:
    copy = copy_of(run, tmp_path)
    with (
        copy.open(copy.config()),
        pytest.raises(ConfigurationError, match="another process"),
        RunFolder(copy.path).open(copy.config()),
    ):
        pass


def test_a_line_cut_short_by_a_crash_is_dropped_and_nothing_is_written_twice(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path)
    row = {"variant": "a", "seed": 0, "epoch": 0, "split": "train", "loss": 1.5}
    folder.append_metrics([row])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"variant": "a", "seed": 0, "epo')
    assert len(folder.metrics()) == 1
    folder.append_metrics([row, {**row, "epoch": 1}])
    assert [r["epoch"] for r in folder.metrics()] == [0, 1]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_variant_that_is_always_right_is_drawn(run: RunFolder) -> None:
    low, high = wilson(40, 40)
    changes = {"accuracy_mean": 1.0, "accuracy_low": float(low), "accuracy_high": float(high)}
    perfect = next(iter(run.comparison().done.values())).model_copy(update=changes)
    [panel] = plots.accuracy_by_cost({"a": perfect}, {"a": "#ff0000"}).axes
    [drawn] = panel.containers
    assert isinstance(drawn, ErrorbarContainer)
    [line] = drawn.lines[2]
    assert line.get_segments()[0][:, 1] == pytest.approx([100 * low, 100])


def test_true_classes_go_down_and_predicted_ones_across() -> None:
    labels, predicted = np.array([0, 0, 1, 1, 1, 0]), np.array([0, 1, 1, 1, 2, 0])
    [panel] = plots.confusion(labels, predicted, ["a", "b", "c"], "title").axes
    counts = {(text.get_position()[::-1], text.get_text()) for text in panel.texts}
    assert counts == {((0, 0), "2"), ((0, 1), "1"), ((1, 1), "2"), ((1, 2), "1")}
    shares = np.array([[2, 1, 0], [0, 2, 1], [0, 0, 0]]) / 3
    np.testing.assert_allclose(np.asarray(panel.images[0].get_array()), shares)


def test_names_that_no_plot_has_room_for_are_numbers() -> None:
    assert plots.drawable(["a" * 80, "b" * 81]) == ["a" * 80, "class 1"]


def test_a_page_whose_first_variant_diverged_has_one_colour_for_each(
    run: RunFolder, tmp_path: Path
) -> None:
    folder = copy_of(run, tmp_path)
    names = [variant.name for variant in folder.config().variants]
    for seed in folder.config().runtime.seeds:
        lost = Diverged(variant=names[0], seed=seed, reason="its loss was no number")
        folder.variant(names[0], seed).save_result(lost)
    pipeline.report_again(folder)
    text = (folder.path / "report" / "index.html").read_text()
    colours = re.findall(r'class="card" style="--colour: (\S+)">\s+([\w-]+)', text)
    found = folder.comparison()
    covered = {name: coverage.read(folder.variant(name).path) for name in found.done}
    figures = dict(page._figures(folder, found, covered))
    drawn = {line.get_label(): line.get_color() for line in figures["time"].axes[0].lines}
    assert {*drawn} == {*names[1:]}
    assert drawn.items() <= {name: colour for colour, name in colours}.items()


def test_a_run_that_keeps_its_last_epochs_says_of_none_that_it_was_chosen(
    run: RunFolder, tmp_path: Path
) -> None:
    assert "Epoch and winner were chosen on" in (run.path / "report" / "index.html").read_text()
    folder = copy_of(run, tmp_path)
    raw = run.config().model_dump(mode="json")
    last = config.validate({**raw, "evaluation": {**raw["evaluation"], "keep": "last"}})
    write(folder.path / "config.yaml", last.to_yaml())
    pipeline.report_again(folder)
    text = (folder.path / "report" / "index.html").read_text()
    assert "The winner was chosen on" in text
    assert "best epoch" not in text and "Epoch and winner" not in text


def test_data_that_nobody_has_searched_is_not_called_free_of_doubles(
    run: RunFolder, tmp_path: Path
) -> None:
    """`train` of each variant, then `report`, makes a page, too."""
    assert "No picture is there twice" in (run.path / "report" / "index.html").read_text()
    folder = copy_of(run, tmp_path)
    write(folder.path / "data.json", folder.facts().model_copy(update={"doubles": None}).to_json())
    pipeline.report_again(folder)
    text = (folder.path / "report" / "index.html").read_text()
    assert "Nobody has looked for pictures that are there twice" in text
    assert "No picture is there twice" not in text


def test_a_run_that_has_its_data_described_gets_what_is_missing_and_keeps_what_was_found(
    run: RunFolder, tmp_path: Path
) -> None:
    """As where parts from S3 have brought it, or the process before was killed."""
    folder = copy_of(run, tmp_path)
    (folder.path / "architecture.json").unlink()
    found = folder.facts().model_copy(update={"doubles": {"leak": 3}})
    write(folder.path / "data.json", found.to_json())
    _ = pipeline.Job(folder.config(), folder).dataset
    assert (folder.path / "architecture.json").is_file() and folder.facts() == found


def test_points_of_curves_say_their_values_where_they_are() -> None:
    reached = ((5, 0.2), (10, 0.9))
    rows = [{"variant": "a", "split": "test", "seconds": s, "accuracy": a} for s, a in reached]
    figure = plots.accuracy_by_time(rows, "test", {"a": "#ff0000"})
    marks = plots.marks(figure)
    said = [f"a, seconds of training {s}: test accuracy, % {a * 100:.0f}" for s, a in reached]
    assert [text for _, _, text in marks] == said
    png = io.BytesIO()
    figure.savefig(png, dpi=page.DPI)
    drawn = Image.open(png).convert("RGB")
    places = [(left * drawn.width / 100, top * drawn.height / 100) for left, top, _ in marks]
    assert [drawn.getpixel((round(x), round(y))) for x, y in places] == [(255, 0, 0)] * 2


def test_the_difference_of_untouched_kernels_is_called_exactly_zero() -> None:
    kernels = {f"conv.{when}": np.ones((32, 32, 3, 3), np.float32) for when in ("before", "after")}
    titles = [axes.get_title(loc="left") for axes in plots.kernels(kernels, "conv").axes]
    assert titles[2] == "difference: exactly zero"
    kernels["conv.after"] = kernels["conv.after"] + 0.25
    titles = [axes.get_title(loc="left") for axes in plots.kernels(kernels, "conv").axes]
    assert re.fullmatch(r"difference \(largest change 0\.25\)", titles[2])
