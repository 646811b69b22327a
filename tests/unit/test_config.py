"""A configuration is checked whole before any work, and says exactly what is wrong with it."""

import re
from pathlib import Path

import pytest
from conftest import tiny

from jobs import config
from jobs.data import sources
from jobs.errors import ConfigurationError
from serving import strict_yaml


@pytest.mark.parametrize("name", config.shipped())
def test_every_shipped_file_loads_and_its_resolved_form_means_the_same(
    name: str, tmp_path: Path
) -> None:
    resolved = config.load(name)
    again = tmp_path / "config.yaml"
    again.write_text(resolved.to_yaml())
    assert config.load(str(again)) == resolved
    assert config.load(str(again)).digest == resolved.digest


@pytest.mark.parametrize("name", ["1e3", "012", "1:30", "08", "1_0", "null", "2024-01-01"])
def test_a_text_that_looks_like_something_else_comes_back(name: str, tmp_path: Path) -> None:
    resolved = config.load("quickstart", [f"storage.profile='{name}'"])
    again = tmp_path / "config.yaml"
    again.write_text(resolved.to_yaml())
    assert config.load(str(again)) == resolved and resolved.storage.profile == name


def test_the_shipped_files_are_those_the_command_line_names() -> None:
    shipped = ["cifar10-small", "default", "h200", "lecture", "probe-finetune", "quickstart"]
    assert config.shipped() == shipped


def test_the_file_default_holds_the_defaults() -> None:
    file = config.CONFIGS / "default.yaml"
    written = strict_yaml.parse(file.read_bytes(), file, ValueError)
    variants = {"variants": written["variants"]}
    assert config.load("default") == config.validate(variants)


def test_the_lecture_is_reproduced_as_it_was() -> None:
    lecture = config.load("lecture")
    assert [v.name for v in lecture.variants] == ["scratch", "finetune", "frozen"]
    for variant in lecture.variants:
        assert variant.optim.name == "adam" and variant.optim.schedule == "constant"
        assert (variant.optim.batch_size, variant.optim.epochs) == (8, 5)
        assert variant.optim.aux_weight == 1.0
        assert variant.optim.average_decay == variant.optim.label_smoothing == 0
    assert lecture.evaluation.select_on == "test" and lecture.evaluation.keep == "last"
    assert not lecture.variants[2].cached, "its frozen network ran through its trunk"
    assert not lecture.data.flip and lecture.data.shift == 0


def test_a_variant_inherits_the_section_optim() -> None:
    raw = tiny(optim={"weight_decay": 0.25})
    resolved = config.validate(raw)
    scratch, finetune, _ = resolved.variants
    assert scratch.optim == resolved.optim
    assert finetune.optim.learning_rate == 3e-4 and finetune.optim.weight_decay == 0.25


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("optim.epoch=3", "optim.epoch: Extra inputs are not permitted"),
        ("optim.epochs=three", "optim.epochs: Input should be a valid integer"),
        ("optim.epochs=1.0", "optim.epochs: Input should be a valid integer"),
        ("optim.epochs=0", "optim.epochs: Input should be greater than 0"),
        (
            "data.source=imagenet",
            "data.source: has to be one of cifar10, digits, folder, generated",
        ),
        ("data.source=folder", "data.root: a folder source needs the folder"),
        ("data.root=s3://bucket", "data: root: only the source folder reads from S3"),
        ("data.s3.part_size=3", "data.s3.part_size: Extra inputs are not permitted"),
        ("data.validation=0.0", "data.validation: select_on validation needs a share above 0"),
        ("data.input_size=150", "optim.aux_weight: the auxiliary head needs"),
        ("runtime.seeds=[1, 1]", "runtime.seeds: a seed is given twice"),
        ("variants.frozen.trainable=Mixed_9z", "variants.2: trainable: 'Mixed_9z' is not all"),
        ("variants.frozen.name=scratch", "variants: two have the same name"),
        ("variants.frozen.name=../up", "variants.2.name: String should match pattern"),
        ("variants.best.name=x", "--set variants.best.name=x: there is no best"),
        ("optim.batch_size=1", "optim.batch_size: batch norm has no statistics of one image here"),
        ("evaluation.batch_norm_images=1", "evaluation: batch_norm_images: one image has no"),
        ("variants=[]", "variants: Tuple should have at least 1 item"),
        ("variants=3", "variants: Input should be a valid tuple"),
        ("optim=3", "optim: Input should be"),
        ("optim.epochs.x=3", "--set optim.epochs.x=3: optim.epochs is not a section"),
        ("optim.epochs", "--set optim.epochs: written as key=value"),
        ("=3", "--set =3: written as key=value"),
        ("optim.=3", "--set optim.=3: written as key=value"),
        ("optim.epochs=[", "--set optim.epochs=[: not YAML"),
        ("optim.epochs=!!bool x", "--set optim.epochs=!!bool x: not YAML: 'x'"),
        ("data.seed=012", "--set data.seed=012: not YAML: 012: write it as a decimal number"),
        ("optim.epochs=1:30", "--set optim.epochs=1:30: not YAML: 1:30: write it as a decimal"),
        ("data.s3.connect_timeout=.nan", "data.s3.connect_timeout: Input should be"),
        ("storage.read_timeout=.inf", "storage.read_timeout: Input should be a finite number"),
        ("data.root=/photos #2", "--set data.root=/photos #2: what follows # is a comment; quote"),
        ("data.root='/photos' #2", "--set data.root='/photos' #2: what follows # is a comment"),
        ("data.root=#2", "--set data.root=#2: what follows # is a comment; quote the value"),
        ("export.name=2024-13-45", "--set export.name=2024-13-45: not YAML"),
    ],
)
def test_what_cannot_be_carried_out_is_refused_with_the_path_of_the_key(
    setting: str, complaint: str
) -> None:
    with pytest.raises(ConfigurationError, match="^" + re.escape(complaint)) as caught:
        config.load("default", ["optim.epochs=5", setting])
    assert "\n" not in str(caught.value)


def test_a_small_input_has_no_auxiliary_head_in_the_stand_in_either() -> None:
    settings = ["data.input_size=150", "weights.source=stand-in"]
    settings += [f"variants.{n}.optim.aux_weight=0" for n in ("scratch", "finetune", "frozen")]
    with pytest.raises(ConfigurationError, match=r"^weights.stand_in.optim.aux_weight: the auxil"):
        config.load("default", settings)
    assert config.load("default", [*settings, "weights.stand_in.optim.aux_weight=0"])
    settings[1] = "weights.source=random"
    assert config.load("default", settings)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("optim.batch_size=1", "weights.stand_in.optim.batch_size: batch norm has no statistics"),
        ("images=10", "weights.stand_in.images: 10 do not fill a batch"),
    ],
)
def test_a_stand_in_that_cannot_be_trained_is_refused_before_another_variant_is(
    setting: str, complaint: str
) -> None:
    settings = ["weights.source=stand-in", f"weights.stand_in.{setting}"]
    with pytest.raises(ConfigurationError, match=f"^{complaint}"):
        config.load("quickstart", settings)
    assert config.load("quickstart", ["weights.source=random", settings[1]])


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_is_one_that_generators_take(seed: int) -> None:
    with pytest.raises(ConfigurationError, match=r"^runtime.seeds: a seed has 64 bits"):
        config.load("quickstart", [f"runtime.seeds=[{seed}]"])


def test_a_file_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes(b"optim: {epochs: 3}  # caf\xe9")
    with pytest.raises(ConfigurationError, match=r"job.yaml: not YAML: "):
        config.load(str(tmp_path / "job.yaml"))


def test_a_setting_of_one_variant_leaves_those_alone_that_have_the_same_alias(
    tmp_path: Path,
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "variants:\n"
        "  - {name: a, init: random, optim: &both {epochs: 3}}\n"
        "  - {name: b, init: random, optim: *both}\n"
    )
    changed = config.load(str(file), ["variants.a.optim.epochs=10"])
    assert [variant.optim.epochs for variant in changed.variants] == [10, 3]


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("optim: {epochs: 7}\ndata: {source: digits}\noptim: {aux_weight: 0}\n")
    with pytest.raises(ConfigurationError, match=r"job.yaml: not YAML: optim is there twice in "):
        config.load(str(file))
    file.write_text("variants: [{<<: {name: a}, <<: {init: random}}]\n")
    assert config.load(str(file)).variants[0].name == "a"


def test_a_bucket_s_address_has_a_bucket() -> None:
    # pragma: allowlist nextline secret
    for root in ("s3:bucket", "s3://", "s3:///prefix", "s3://key:secret@bucket/prefix"):
        with pytest.raises(ConfigurationError, match=r"^data: root: written s3") as caught:
            config.load("default", ["data.source=folder", f"data.root={root}"])
        assert "secret" not in str(caught.value)


def test_where_pictures_are_reached_is_not_part_of_the_experiment() -> None:
    folder = ["data.source=folder", "data.root=s3://bucket/prefix"]
    one, other = (config.load("default", [*folder, *more]) for more in ([], ["data.s3.region=x"]))
    assert one.digest == other.digest and one != other


def test_who_is_shown_the_metrics_is_not_part_of_the_experiment() -> None:
    one = config.load("default")
    other = config.load("default", ["tracking.tensorboard=true", "tracking.mlflow=http://mlflow"])
    assert one.digest == other.digest and one != other


def test_a_password_in_an_address_of_mlflow_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigurationError, match=r"^tracking: mlflow: credentials") as caught:
        # pragma: allowlist nextline secret
        config.load("default", ["tracking.mlflow=https://me:secret@mlflow"])
    assert "secret" not in str(caught.value)


def test_a_number_in_scientific_notation_is_a_number() -> None:
    resolved = config.load("default", ["optim.learning_rate=1e-4"])
    assert resolved.optim.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("written", "root"),
    [
        ("'/photos #2'", "/photos #2"),
        ('"/photos #2"', "/photos #2"),
        ("/photos#2", "/photos#2"),
        (" /my photos  ", "/my photos"),
    ],
)
def test_a_value_is_taken_whole(written: str, root: str) -> None:
    resolved = config.load("default", ["data.source=folder", f"data.root={written}"])
    assert resolved.data.root == root


def test_a_value_may_be_empty_or_a_list() -> None:
    settings = ["data.train_images=5", "data.train_images=", "runtime.seeds=[1, 2]"]
    resolved = config.load("default", settings)
    assert resolved.data.train_images is None and resolved.runtime.seeds == (1, 2)


def test_a_setting_reaches_a_variant_by_its_name() -> None:
    resolved = config.load("cifar10-small", ["variants.frozen.optim.learning_rate=0.5"])
    assert [v.optim.learning_rate for v in resolved.variants] == [1e-3, 3e-4, 0.5]


def test_a_missing_file_names_the_shipped_ones() -> None:
    with pytest.raises(ConfigurationError, match="no such file, and not one of cifar10-small"):
        config.load("defualt")


@pytest.mark.parametrize(
    ("trainable", "expected"), [("all", True), ("Mixed_6e", True), ("Mixed_7a", False)]
)
def test_the_auxiliary_head_is_there_when_its_loss_reaches_a_trained_layer(
    trainable: str, expected: bool
) -> None:
    variant = config.Variant(name="x", init="pretrained", trainable=trainable)
    assert variant.has_aux is expected


@pytest.mark.parametrize(
    ("name", "settings", "varied", "stored"),
    [
        ("default", [], "mirrored in every other epoch, shifted by up to 12.5 % of the side", 4),
        ("default", ["optim.epochs=4"], "mirrored in every other epoch, shifted by up to", None),
        ("default", ["data.shift=0.0"], "mirrored in every other epoch", None),
        ("lecture", [], "as they are", None),
    ],
)
def test_the_report_says_how_each_variants_pictures_were_varied(
    name: str, settings: list[str], varied: str, stored: int | None
) -> None:
    resolved = config.load(name, settings)
    scratch, _, frozen = map(resolved.augmentation, resolved.variants)
    assert scratch.startswith(varied)
    in_turn = f", in {stored} stored versions of each, which 5 epochs take in turn"
    assert frozen == scratch + (in_turn if stored else "")


@pytest.mark.parametrize(
    "setting",
    [
        "storage.access_key=XYZZY",
        "storage.aws_secret_access_key=XYZZY",
        "storage.session_token=XYZZY",
        # pragma: allowlist nextline secret
        "storage.uri=s3://AKIA:XYZZY@bucket/prefix",
        # pragma: allowlist nextline secret
        "storage.endpoint_url=https://AKIA:XYZZY@host",
        "data.s3.secret_key=XYZZY",
    ],
)
def test_credentials_in_a_configuration_are_refused_and_not_repeated(setting: str) -> None:
    with pytest.raises(ConfigurationError, match="credentials do not belong here") as caught:
        config.load("quickstart", [setting])
    assert "XYZZY" not in str(caught.value)


def test_a_file_in_the_folder_of_sources_is_a_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("def check(settings):\n    return True, settings.source\n")
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(tmp_path)])
    wanted = config.Data(source="mine")
    assert sources.find("mine").check(wanted) == (True, "mine")
