"""What tests share: a job small enough for seconds, and the runs that many of them look at."""

import fcntl
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import yaml

from jobs import config
from jobs.runs import RunFolder
from serving.files import write
from serving.processes import cores, free_ports

if TYPE_CHECKING:
    from service import Service

pytest_plugins = ["manifests", "memory_s3", "object_store"]

# Several workers of pytest-xdist share the cores, and so do the processes that they start: this
# has to be set before torch is imported, which nothing here does.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // int(workers))))

# What tests and the processes that they start import, torch above all, is compiled once and not in
# each: an environment may forbid bytecode, and Python then compiles 1,500 files at every start.
BYTECODE = Path(tempfile.gettempdir()) / f"inception-transfer-tests-bytecode-{os.getuid()}"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(BYTECODE)
sys.dont_write_bytecode = False

hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

TINY: dict[str, Any] = {
    "data": {
        "source": "generated",
        "train_images": 80,
        "test_images": 40,
        "validation": 0.25,
        "input_size": 75,  # the smallest that Inception-v3 takes; no auxiliary head then
    },
    "weights": {"source": "random"},
    "optim": {"epochs": 2, "batch_size": 10, "aux_weight": 0.0, "average_decay": 0.5},
    "variants": [
        {"name": "scratch", "init": "random"},
        {"name": "finetune", "init": "pretrained", "optim": {"learning_rate": 3e-4}},
        {"name": "frozen", "init": "pretrained", "trainable": "head"},
    ],
    "runtime": {"device": "cpu", "precision": "fp32"},
    "evaluation": {"batch_size": 40, "batch_norm_images": 20},
    "export": {"enabled": False, "calibration_images": 20},
}


def tiny(**sections: Any) -> dict[str, Any]:
    """The tiny job as a mapping, with some keys of its sections changed."""
    raw = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
    for name, changes in sections.items():
        raw[name] = {**raw.get(name, {}), **changes} if isinstance(changes, dict) else changes
    return raw


def tiny_config(**sections: Any) -> config.Config:
    return config.validate(tiny(**sections))


@pytest.fixture
def tiny_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny()))
    return path


@pytest.fixture(scope="session", autouse=True)
def _no_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nobody's cache is read or written, by tests or by what they start; but for matplotlib's
    list of fonts, which takes it half a minute to make."""
    with pytest.MonkeyPatch.context() as patch:
        if "MPLCONFIGDIR" not in os.environ:
            patch.setenv("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib"))
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture
def thin() -> Iterator[None]:
    """Networks are thin in this test, and in the processes that it starts."""
    from thin import thin_network

    with thin_network():
        yield


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports are empty, of runs that this process makes for another reason: drawing one takes
    longer than to train three thin networks."""

    def write_report(folder: RunFolder) -> None:
        write(folder.path / "report" / "index.html", "")

    monkeypatch.setattr("jobs.report.page.write_report", write_report)


MakeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeOnce]:
    """Makes a folder that all workers share: the first to need it does, the others wait.

    Nobody may change it: `copy_of` gives a run that one may.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of this session's workers
    made: dict[Path, dict[Path, int]] = {}

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder, done = root / "shared" / name, root / "shared" / f"{name}.done"
        folder.parent.mkdir(exist_ok=True)
        with (root / "shared" / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                assert not folder.exists(), f"{name} could not be made; see the first failure"
                folder.mkdir()
                fill(folder)
                done.touch()
        made[folder] = changed_at(folder)
        return folder

    yield make
    for folder, before in made.items():
        assert changed_at(folder) == before, f"a test has changed {folder.name}, which all share"


def changed_at(folder: Path) -> dict[Path, int]:
    """Every file but those that are there to be locked, and when it was written."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {p: p.stat().st_mtime_ns for p in files if not {".lock", ".locks"} & {*p.parts}}


def copy_of(run: RunFolder, parent: Path) -> RunFolder:
    """A run of the same name that a test may change; weights are not copied but linked, as they
    are only ever replaced."""
    for source in run.path.rglob("*"):
        target = parent / run.run_id / source.relative_to(run.path)
        if source.is_dir():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix in (".safetensors", ".mar"):
            target.hardlink_to(source)
        else:
            target.write_bytes(source.read_bytes())
    return RunFolder(parent / run.run_id)


@pytest.fixture(scope="session")
def compared(make_once: MakeOnce) -> RunFolder:
    """The tiny job of a thin network with two seeds, finished: trained, compared, reported. To be
    looked at."""

    def run(folder: Path) -> None:
        from thin import thin_network

        from jobs import pipeline

        once = tiny_config(runtime={"seeds": [0, 1]}, optim={"epochs": 1})
        with thin_network():
            pipeline.run(once, RunFolder(folder / "tiny"))

    return RunFolder(make_once("compared", run) / "tiny")


MODEL = "inception_v3_cifar10"


@pytest.fixture(scope="session")
def exported(make_once: MakeOnce) -> RunFolder:
    """The tiny job's frozen variant, trained until it is sure of itself; its run exports it. To
    be looked at."""

    def run(folder: Path) -> None:
        from jobs import pipeline

        sure = tiny_config(
            data={"train_images": 240, "test_images": 100},  # 60 held out: enough for familiarity
            optim={"epochs": 100, "learning_rate": 0.02, "label_smoothing": 0.0},
            export={"enabled": True},
        )
        sure = sure.model_copy(update={"variants": sure.variants[2:]})
        pipeline.run(sure, RunFolder(folder / "exported"))

    return RunFolder(make_once("exported", run) / "exported")


@pytest.fixture(scope="session")
def archive(exported: RunFolder) -> Path:
    return exported.path / "model" / f"{MODEL}.mar"


@pytest.fixture(scope="session")
def strange_integers(archive: Path, make_once: MakeOnce) -> Path:
    """The same, unpacked, on a machine where integers go wrong: their logits have other signs."""

    def fill(folder: Path) -> None:
        import openvino
        from openvino import opset13

        from serving import archive as archives
        from serving import runtimes

        archives.unpack(archive, folder)
        model = runtimes.core().read_model(folder / "float.xml")
        logits, *others = (output.get_node().input_value(0) for output in model.outputs)
        turned = openvino.Model(
            [opset13.negative(logits).output(0), *others], model.get_parameters()
        )
        openvino.save_model(turned, folder / "int8.xml")
        description = archives.open_model(folder).description
        forms = ("int8", "float", "program")
        archives.write_description(folder, description.model_copy(update={"forms": forms}))

    return make_once("strange-integers", fill)


@pytest.fixture(scope="session", params=["torchserve", "asgi"])  # service.ENGINES
def service(
    request: pytest.FixtureRequest, archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator["Service"]:
    """One that all tests share which leave it as it is: of each engine."""
    from service import running

    state = tmp_path_factory.mktemp("service") / "state"
    with running(archive, state, SERVING_WORKERS="2", SERVING_ENGINE=request.param) as service:
        yield service


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("first-key\nsecond-key\n")
    return file


@pytest.fixture(scope="session")
def locked(
    archive: Path, keys: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator["Service"]:
    """Another, which wants keys: two of a file, two of the environment; and none too often."""
    from service import running

    state = tmp_path_factory.mktemp("locked") / "state"
    # pragma: allowlist nextline secret
    given = {"SERVING_API_KEYS_FILE": str(keys), "SERVING_API_KEYS": "third-key,often-key"}
    given["SERVING_KEY_REQUESTS_PER_MINUTE"] = "20"
    with running(archive, state, **given) as service:
        yield service


@pytest.fixture(scope="session")
def real_data(make_once: MakeOnce) -> Path:
    """CIFAR-10 as a folder of JPEGs, and a pretrained trunk; see the README of that folder."""
    unpack = SHARED_DATA / "unpack.sh"
    if not unpack.is_file():
        pytest.skip(f"the real data is not at {SHARED_DATA}")

    def run(folder: Path) -> None:
        subprocess.run(["bash", str(unpack), str(folder)], check=True, capture_output=True)

    return make_once("real-data", run)


class WithoutTorch(MetaPathFinder):
    """Makes an import of torch an error at the place where it happens."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "torch":
            raise ImportError("`make check` is quick because what it runs does not import torch")


def pytest_configure(config: pytest.Config) -> None:
    if "MUTANT_UNDER_TEST" in os.environ:  # mutmut runs the other tests in the same process
        return
    unit = ROOT / "tests" / "unit"
    if all(Path(argument).absolute().is_relative_to(unit) for argument in config.args):
        assert "torch" not in sys.modules
        sys.meta_path.insert(0, WithoutTorch())


# What takes longest is begun first, so that no worker waits at the end. All that asks a shared
# service goes to one worker, so that it is started once.
ASK_A_SERVICE = ("test_gateway", "test_page", "test_predict", "test_scoring", "test_service")
LONGEST_FIRST = (
    # While the second makes the archive that most need, the third needs none.
    *("test_real", "service", "test_training", "test_quickstart", "test_benchmarks"),
    *("test_parts", "test_nights", "test_ray", "test_distributed", "test_stub_gpu"),
    *("test_storage", "test_promotion", "test_classes", "test_mirror", "test_export"),
    *("test_failures", "test_reliability", "test_demo", "test_serving_benchmark", "test_examples"),
    *("test_supervisor", "test_readme", "test_report", "test_interrupted", "test_cli"),
)


def group_of(nodeid: str) -> str:
    """What goes to the same worker as a test: its file, which has fixtures of its own, or more."""
    name = Path(nodeid.partition("::")[0]).stem
    return "service" if name in ASK_A_SERVICE else name


@pytest.hookimpl(trylast=True)  # after pytest-randomly, which leaves the tests of a file together
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        ranks = {group: rank for rank, group in enumerate(LONGEST_FIRST)}
        items.sort(key=lambda item: ranks.get(group_of(item.nodeid), len(ranks)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hands out whole groups in the order above. (`--dist loadgroup` would, but does not see the
    groups with pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class ByGroup(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return ByGroup(config, log)


def classes_of(run: RunFolder) -> list[str]:
    classes: list[str] = json.loads((run.path / "data.json").read_text())["classes"]
    return classes


def pictures(run: RunFolder, count: int) -> list[bytes]:
    """The first test pictures as PNG files."""
    import torch
    from PIL import Image

    from jobs.data.dataset import load

    files = []
    for picture in load(run.config().data).test.raw(torch.arange(count)):
        file = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "PNG")
        files.append(file.getvalue())
    return files


def predictions(run: RunFolder, count: int) -> list[str]:
    """The job's own labels for them."""
    import numpy as np

    with np.load(run.path / "variants" / "frozen" / "test_predictions.npz") as arrays:
        return [classes_of(run)[i] for i in arrays["logits"][:count].argmax(1)]


def free_port() -> int:
    return free_ports(1)[0]
