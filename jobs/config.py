"""The typed configuration: one YAML file, checked whole before any work starts.

The defaults below are those of the configuration `default`; the files under `configs/` say what
differs. Unknown keys, wrong types and impossible combinations are refused with the path of
the key, as :class:`~jobs.errors.ConfigurationError`.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from jobs.data import findings, sources
from jobs.errors import ConfigurationError
from serving import strict_yaml

CONFIGS = Path(__file__).parent / "configs"

# The trunk of torchvision's Inception-v3 in the order in which it is evaluated.
BLOCKS = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d"),
    *("Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    *("Mixed_7a", "Mixed_7b", "Mixed_7c"),
)
AUX_AFTER = "Mixed_6e"  # the auxiliary head looks at this block's output
AUX_MIN_SIZE = 299  # … and needs the 17×17 map that it has for inputs of this size
ONE_PLACE = 107  # of smaller inputs, the last maps are 1×1: batch norm then needs two images
# Epochs, at most, for whose random shifts a frozen trunk's outputs are stored; see features.py.
# More would take 60,000 images beyond the 2 GB that benchmarks/memory.py claims.
STORED_EPOCHS = 4

Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(gt=0)]
ADDRESS = r"^s3://[a-z0-9][a-z0-9.-]+(/.*)?$"


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


SECRETS = ("access_key", "secret", "token", "password", "credential")


class S3(Section):
    """How an S3 is reached. Credentials come from the environment, a profile of `~/.aws` or the
    machine's role, never from here."""

    endpoint_url: str | None = None
    """Of an S3 that is not Amazon's."""
    region: str | None = None
    profile: str | None = None
    """A section of the files in `~/.aws`, whose credentials then go before the environment's."""
    path_style: bool = False
    """Write `host/bucket/key`, as most servers other than Amazon's want it, and not
    `bucket.host/key`."""
    attempts: Count = 5
    """Tries of each request, with growing pauses."""
    connect_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 15.0
    """Seconds."""
    read_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30.0
    """Seconds without a byte."""

    @property
    def client(self) -> dict[str, Any]:
        """Arguments of `serving.s3.client`."""
        given = self.model_dump(include=S3.model_fields.keys() - {"path_style"})
        return {"style": "path" if self.path_style else "auto", **given}

    @model_validator(mode="before")
    @classmethod
    def _refuse_credentials(cls, raw: Any) -> Any:
        """Says which key, and never the value: the message may end in a log."""
        if not isinstance(raw, dict):
            return raw
        for key, value in raw.items():
            named = any(word in str(key).lower() for word in SECRETS)
            within = key in ("uri", "endpoint_url") and "@" in str(value)
            if named or within:
                raise ValueError(
                    f"{key}: credentials do not belong here; boto3 finds them in the environment "
                    "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), in ~/.aws or in a role"
                )
        return raw


def _known_source(name: str) -> str:
    if name not in sources.names():
        raise ValueError(f"has to be one of {', '.join(sources.names())}")
    return name


def _paths(value: Any) -> Any:
    return sorted(findings.paths_in(Path(value))) if isinstance(value, str) else value


class Data(Section):
    source: Annotated[str, AfterValidator(_known_source)] = "cifar10"
    """A module of `jobs.data.sources`. `folder`: your own pictures. `digits`: handwritten ones,
    which come with scikit-learn. `generated`: textures drawn from a seed."""
    root: str | None = None
    """`folder`, required: a folder or `s3://bucket/prefix` of class folders or tar shards, or a
    manifest, `.csv` or `.parquet`. `cifar10`: where the download is kept, else in `cache`."""
    s3: S3 = S3()
    """Of a root in S3, which may be another than `storage`."""
    cache: str = "~/.cache/inception-transfer"
    """Downloads, decoded pictures and compiled code live here; safe to delete between runs."""
    train_images: Count | None = None
    """Use only so many training images, validation included, drawn by class; all when absent."""
    test_images: Count | None = None
    """Use only so many test images, drawn by class; all when absent."""
    validation: Share = 0.1
    """Share of the training images held out to choose epoch and winner by, drawn by class."""
    input_size: Annotated[int, Field(ge=75)] = 299
    """Side in pixels of the network's input. Below 299 there can be no auxiliary head."""
    normalization: Literal["inception", "unit"] = "inception"
    """Pixels reach the network in [-1, 1], or (the lecture's mistake) in [0, 1]."""
    flip: bool = True
    """Mirror every image in every other epoch, a random half of them first."""
    shift: Share = 0.125
    """Translate by up to this share of the side, edges repeated; 0.125 is 4 pixels of 32."""
    exclude: Annotated[tuple[str, ...], BeforeValidator(_paths), Field(strict=False)] = ()
    """Pictures to leave out, by their paths below the root. Given as a file that lists them, such
    as findings.csv of `python -m jobs inspect`; the resolved configuration has them all."""
    seed: int = 0
    """Draws subsets, the validation split and generated images; one for all `runtime.seeds`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.root or "").startswith("s3:"):
            if self.source != "folder":
                raise ValueError("root: only the source folder reads from S3")
            if not re.match(ADDRESS, self.root or ""):
                raise ValueError("root: written s3://bucket/prefix")
        return self

    def stored_epochs(self, epochs: int) -> int:
        """For how many of `epochs` a frozen trunk's outputs are stored: for all whose pictures
        differ, but for no more than `STORED_EPOCHS`."""
        return min(epochs, STORED_EPOCHS if self.shift else 1 + self.flip)


class Optim(Section):
    name: Literal["adam", "adamw", "sgd"] = "adamw"
    """`sgd` has Nesterov momentum 0.9."""
    epochs: Count = 5
    batch_size: Count = 256
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """The peak, when there is a schedule."""
    head_factor: Annotated[float, Field(gt=0)] = 1.0
    """The heads' rate over the trunk's; new heads on a trained trunk tolerate a higher one."""
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup: Share = 0.2
    """Share of all steps in which a cosine schedule climbs to its peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """On convolution and linear weights; never on biases or batch norm."""
    label_smoothing: Share = 0.1
    aux_weight: Annotated[float, Field(ge=0)] = 0.3
    """Weight of the auxiliary head's loss; 0 removes the head."""
    balance: Literal["none", "logits"] = "none"
    """For classes of different sizes: `logits` trains the network to answer as if all were equally
    frequent (logit adjustment), for the sake of the small ones; see balanced accuracy."""
    average_decay: Share = 0.99
    """Exponential average of the weights, per step; 0 scores the weights themselves."""


class StandIn(Section):
    """A source task, drawn from a seed, to train weights on where none can be downloaded."""

    task: Literal["characters", "textures"] = "characters"
    """`characters`: printed ones. `textures`: those of `data.source: generated`, in other hues."""
    images: Count = 4800
    optim: Optim = Optim()
    """What differs from the section `optim`, as in a variant."""


class Weights(Section):
    source: str = "imagenet"
    """`imagenet`, `stand-in`, `random`, or the path of a .safetensors or state_dict file."""
    stand_in: StandIn = StandIn()

    @property
    def description(self) -> str:
        """What every table and page says of the weights; never ImageNet unless they are."""
        pictures = {"characters": "printed characters", "textures": "generated textures"}
        task = f"{self.stand_in.images:,} {pictures[self.stand_in.task]}"
        return {
            "imagenet": "ImageNet weights (torchvision, IMAGENET1K_V1)",
            "random": "random weights in place of pretrained ones",
            "stand-in": f"weights trained on the spot on {task}, a stand-in for ImageNet",
        }.get(self.source, f"weights from the file {self.source}")


class Variant(Section):
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")]
    init: Literal["pretrained", "random"]
    trainable: Literal["all", "head"] | str = "all"
    """`all`, `head`, or the first block of the trunk to train, such as `Mixed_7a`."""
    batch_norm: Literal["auto", "train", "eval"] = "auto"
    """`auto`: batch statistics where a layer trains, stored ones where it is frozen."""
    head_of: str | None = None
    """An earlier variant, which trains the head alone: this one starts with that trained head
    (linear probing, then fine-tuning: Kumar et al. 2022, arXiv 2202.10054)."""
    optim: Optim = Optim()
    """What differs from the section `optim`; the resolved file spells all of it out."""

    @property
    def cached(self) -> bool:
        """Whether the trunk is a fixed function, whose outputs can be stored."""
        return self.trainable == "head" and self.batch_norm != "train"

    @property
    def moves_norms(self) -> bool:
        """Whether statistics of batch norm move while it trains."""
        return self.batch_norm == "train" or (
            self.batch_norm == "auto" and self.trainable != "head"
        )

    @property
    def has_aux(self) -> bool:
        """Whether the auxiliary loss would reach any trained layer of the trunk."""
        reaches = self.trainable == "all" or (
            self.trainable in BLOCKS and BLOCKS.index(self.trainable) <= BLOCKS.index(AUX_AFTER)
        )
        return self.optim.aux_weight > 0 and reaches

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.trainable not in ("all", "head", *BLOCKS):
            raise ValueError(f"trainable: {self.trainable!r} is not all, head or a block: {BLOCKS}")
        return self


class Part(NamedTuple):
    """One variant with one seed: the least that can be trained on its own."""

    variant: str
    seed: int

    def __str__(self) -> str:
        return f"{self.variant} with seed {self.seed}"


class Runtime(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 where the hardware has instructions for it."""
    compile: Literal["auto"] | bool = "auto"
    """`torch.compile` for the training step. `auto`: on a GPU, where there is enough work to win
    back the time that it takes; never on a CPU."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1, strict=False)] = (0,)
    """Every variant is trained once for each; the comparison gives mean and spread."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    """Steps between checkpoints; each epoch ends with one, too. 0: only at the ends of epochs, and
    not within 20 seconds of the one before. After the last epoch one is written only
    if more than a minute of training would be lost."""
    price_per_hour: Annotated[float, Field(gt=0)] | None = None
    """Price of all hardware that trains one variant, in any currency: the report then says what
    each training cost."""


class Evaluation(Section):
    batch_size: Literal["auto"] | Count = "auto"
    """How many images are scored, or run through a frozen trunk, at once; it changes the order of
    additions and nothing else. `auto`: 500 on a GPU, 50 on a CPU, for the sake of its memory."""
    select_on: Literal["validation", "test"] = "validation"
    """What chooses the epoch and the winner. `test` also scores the test set every epoch."""
    keep: Literal["best", "last"] = "best"
    """Which epoch's weights stand for the variant."""
    batch_norm_images: Annotated[int, Field(ge=0)] = 0
    """Re-estimate batch-norm statistics on so many training images before each scoring; for
    runs of too few steps for the running averages to settle."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_norm_images == 1:
            raise ValueError("batch_norm_images: one image has no statistics; 0 leaves them alone")
        return self


class Export(Section):
    enabled: bool = True
    """Whether a run ends with an archive of its winner."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,80}$")] = (
        "inception_v3_cifar10"
    )
    """The archive's name, and so the last part of the address that serves it."""
    images: Count = 1000
    """How many validation images the gate and the parity check use, at most."""
    calibration_images: Count = 300
    """Training images that int8 quantisation takes its ranges from, at most."""
    max_accuracy_drop: Annotated[float, Field(ge=0)] = 0.3
    """Percentage points that int8 may lose against the reference and still be shipped."""
    samples: bool | None = None
    """Whether the service's page offers some of the held-out pictures to try, to anybody who
    reaches it. When absent: only where the source is a published data set."""


class Promotion(Section):
    """The gate between a published run and the model that production serves."""

    channel: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")] = "production"
    """The channel that is moved, and whose model the new one is compared with. Any other than the
    service's is for a canary or a shadow: production does not serve what it points to."""
    min_accuracy: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Per cent of the test images that have to be right."""
    tolerance: Annotated[float, Field(ge=0)] | None = 0.5
    """Percentage points that a model may be worse than the one that serves, on the test images that
    both were asked. Too few of these close the gate; null lets the first model of a new set in."""
    max_latency_ms: Annotated[float, Field(gt=0)] | None = None
    """Median time that the archive may take for one picture on this machine; not measured when
    absent."""
    signing_key: str | None = None
    """File of a private key (P-256, PEM) that signs what is promoted; not signed when absent."""


class Storage(S3):
    uri: Annotated[str, Field(pattern=ADDRESS)] | None = None
    """`s3://bucket/prefix`, where finished runs are published; nowhere when absent."""
    checksums: Literal["sha256", "md5"] = "sha256"
    """What the server checks uploads with; `md5` is for servers that know nothing newer."""
    encryption: Literal["none", "s3", "kms"] = "none"
    """`none` leaves it to the bucket's own setting."""
    kms_key: str | None = None
    """Id or ARN for `encryption: kms`; the account's own key when absent."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kms_key and self.encryption != "kms":
            raise ValueError("kms_key: needs encryption kms")
        return self


class Tracking(Section):
    """Who else is shown the metrics while the job works. None of them can stop it."""

    tensorboard: bool = False
    """Write event files into the run's folder; needs the extra `tensorboard`."""
    mlflow: str | None = None
    """Tracking URI of an MLflow, such as `http://mlflow:5000`; needs the extra `mlflow`. User and
    password come from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    prometheus: Annotated[int, Field(gt=0, lt=2**16)] | None = None
    """Port on which Prometheus gets the newest metrics while the job works."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_credentials(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "@" in str(raw.get("mlflow")):
            raise ValueError("mlflow: credentials belong in the environment, not here")
        return raw


DELIVERY = ("export", "promotion", "storage")  # sections about what is done with a finished run


class Config(Section):
    data: Data = Data()
    optim: Optim = Optim()  # before those that inherit it, so that a mistake is named here
    weights: Weights = Weights()
    variants: Annotated[tuple[Variant, ...], Field(min_length=1, strict=False)]
    runtime: Runtime = Runtime()
    evaluation: Evaluation = Evaluation()
    export: Export = Export()
    promotion: Promotion = Promotion()
    storage: Storage = Storage()
    tracking: Tracking = Tracking()

    @model_validator(mode="before")
    @classmethod
    def _inherit_optim(cls, raw: Any) -> Any:
        """Gives every variant, and the stand-in, the whole of `optim`, its own settings on top."""
        base = raw.get("optim", {}) if isinstance(raw, dict) else None
        if not isinstance(base, dict):
            return raw
        if isinstance(raw.get("variants"), list):
            raw = {**raw, "variants": [_with_optim(variant, base) for variant in raw["variants"]]}
        weights = raw.get("weights", {})
        if isinstance(weights, dict):
            stand_in = _with_optim(weights.get("stand_in", {}), base)
            raw = {**raw, "weights": {**weights, "stand_in": stand_in}}
        return raw

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [variant.name for variant in self.variants]
        is_small = self.data.input_size < AUX_MIN_SIZE
        small = (
            f"the auxiliary head needs data.input_size {AUX_MIN_SIZE}, so a smaller input needs "
            "aux_weight 0"
        )
        problems = {
            f"variants: two have the same name: {names}": len(set(names)) < len(names),
            "variants: the name stand-in is taken by the source task": "stand-in" in names,
            **self._head_problems(),
            "data.root: a folder source needs the folder": self.data.source == "folder"
            and not self.data.root,
            "data.validation: select_on validation needs a share above 0": not self.data.validation
            and self.evaluation.select_on == "validation",
            f"optim.aux_weight: {small}": is_small
            and any(variant.has_aux for variant in self.variants),
            "optim.batch_size: batch norm has no statistics of one image here": any(
                v.optim.batch_size == 1
                and v.moves_norms
                and (v.has_aux or self.data.input_size < ONE_PLACE)
                for v in self.variants
            ),
            **self._stand_in_problems(small if is_small else None),
            "runtime.seeds: a seed has 64 bits, as PyTorch takes it": not all(
                -(2**63) <= seed < 2**64 for seed in self.runtime.seeds
            ),
            "runtime.seeds: a seed is given twice": len(set(self.runtime.seeds))
            < len(self.runtime.seeds),
        }
        for problem, found in problems.items():
            if found:
                raise ValueError(problem)
        return self

    def _stand_in_problems(self, small: str | None) -> dict[str, bool]:
        needed = any(variant.init == "pretrained" for variant in self.variants)
        if self.weights.source != "stand-in" or not needed:
            return {}
        optim, images = self.weights.stand_in.optim, self.weights.stand_in.images
        has_aux = optim.aux_weight > 0
        alone = optim.batch_size == 1 and (has_aux or self.data.input_size < ONE_PLACE)
        return {
            f"weights.stand_in.optim.aux_weight: {small}": bool(small) and has_aux,
            "weights.stand_in.optim.batch_size: batch norm has no statistics of one image": alone,
            f"weights.stand_in.images: {images} do not fill a batch": images < optim.batch_size,
        }

    def _head_problems(self) -> dict[str, bool]:
        problems: dict[str, bool] = {}
        earlier: set[str] = set()
        for variant in self.variants:
            problems[
                f"variants.{variant.name}.head_of: {variant.head_of} is no earlier variant with "
                "pretrained weights that trains its head alone"
            ] = variant.head_of not in {None, *earlier}
            problems[f"variants.{variant.name}.head_of: it needs init: pretrained, too"] = (
                variant.head_of is not None and variant.init != "pretrained"
            )
            if variant.init == "pretrained" and variant.trainable == "head":
                earlier.add(variant.name)
        return problems

    def variant(self, name: str) -> Variant:
        """
        Raises:
            StopIteration: there is none of this name.
        """
        return next(variant for variant in self.variants if variant.name == name)

    @property
    def parts(self) -> list[Part]:
        """Every variant with every seed, in the order in which one process trains them."""
        return [Part(v.name, seed) for seed in self.runtime.seeds for v in self.variants]

    def to_yaml(self) -> str:
        """The resolved configuration; loading it again gives an equal one."""
        return strict_yaml.to_text(self.model_dump(mode="json"))

    def augmentation(self, variant: Variant) -> str:
        """What the report says of how the variant's training pictures were varied."""
        ways = ["mirrored in every other epoch"] if self.data.flip else []
        if self.data.shift:
            ways.append(f"shifted by up to {self.data.shift * 100:.3g} % of the side")
        if not ways:
            return "as they are"
        epochs = variant.optim.epochs
        stored = self.data.stored_epochs(epochs)
        if variant.cached and self.data.shift and stored < epochs:
            ways.append(f"in {stored} stored versions of each, which {epochs} epochs take in turn")
        return ", ".join(ways)

    def epochs_alike(self, variant: Variant) -> int:
        """How many epochs of all variants and seeds share the variant's compiled training step."""

        def code(v: Variant) -> tuple[object, ...]:
            return v.trainable, v.batch_norm, v.has_aux, v.optim.batch_size

        alike = [v.optim.epochs for v in self.variants if code(v) == code(variant)]
        return sum(alike) * len(self.runtime.seeds)

    @property
    def experiment(self) -> dict[str, Any]:
        """All that decides what is trained, and so not how it is packed, or where it is sent or
        shown.

        Nor where, how and at what price the work is done: a device, compiled code and the number
        of images scored at once change the order of additions, as another machine does.
        `runtime.precision` is in, for bf16 is another result.
        """
        dump = self.model_dump(mode="json", exclude={*DELIVERY, "tracking"})
        for key in ("cache", "s3"):
            dump["data"].pop(key)
        dump["evaluation"].pop("batch_size")
        for key in ("device", "compile", "checkpoint_every", "price_per_hour"):
            dump["runtime"].pop(key)
        return dump

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that stand for the experiment."""
        canonical = json.dumps(self.experiment, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def _with_optim(section: Any, base: dict[str, Any]) -> Any:
    own = section.get("optim", {}) if isinstance(section, dict) else None
    return {**section, "optim": {**base, **own}} if isinstance(own, dict) else section


def shipped() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def load(name_or_path: str, settings: Sequence[str] = ()) -> Config:
    """Reads a shipped configuration by name, or a file, and applies `a.b=c` settings on top."""
    path = CONFIGS / f"{name_or_path}.yaml"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        raise ConfigurationError(
            f"--config {name_or_path}: no such file, and not one of {', '.join(shipped())}"
        )
    raw = strict_yaml.parse(path.read_bytes(), path, ConfigurationError) or {}
    if not isinstance(raw, dict):
        raise ConfigurationError(f"{path}: a mapping of sections is needed")
    return _with_settings(raw, settings)


def apply(config: Config, settings: Sequence[str]) -> Config:
    """A finished run's configuration with `a.b=c` settings on top.

    Raises:
        ConfigurationError: one is about training, which is over.
    """
    resolved = _with_settings(config.model_dump(mode="json"), settings)
    for setting in settings:
        if setting.partition("=")[0].partition(".")[0] not in DELIVERY:
            raise ConfigurationError(
                f"--set {setting}: the run is made; {', '.join(DELIVERY)} can still be set"
            )
    return resolved


def _with_settings(raw: dict[str, Any], settings: Sequence[str]) -> Config:
    for setting in settings:
        _set_key(raw, setting)
    return validate(raw)


def validate(raw: dict[str, Any]) -> Config:
    """Turns a mapping into a configuration; the first problem is raised as one line."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        given = f" (given: {first['input']!r})" if not isinstance(first["input"], dict) else ""
        more = f" — and {error.error_count() - 1} more" if error.error_count() > 1 else ""
        message = f"{where}: {what}{given}{more}" if where else what
        raise ConfigurationError(message) from None


def _set_key(raw: dict[str, Any], setting: str) -> None:
    """Sets one `a.b=value`; a variant is named, as in `variants.frozen.optim.epochs=10`."""
    key, equals, value = setting.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigurationError(f"--set {setting}: written as key=value, such as optim.epochs=3")
    *parents, last = key.split(".")
    target: Any = raw
    for part in parents:
        target = _child(target, part, setting)
    if not isinstance(target, dict):
        raise ConfigurationError(f"--set {setting}: {'.'.join(parents)} is not a section")
    target[last] = strict_yaml.parse(value, f"--set {setting}", ConfigurationError)
    node = yaml.compose(value)
    if value[node.end_mark.index if node else 0 :].lstrip().startswith("#"):
        raise ConfigurationError(f"--set {setting}: what follows # is a comment; quote the value")


def _child(target: Any, part: str, setting: str) -> Any:
    """Its own copy: what stands for an alias of YAML is in other places, too."""
    if isinstance(target, dict):
        target[part] = copy(target.get(part, {}))
        return target[part]
    if isinstance(target, list):
        for at, item in enumerate(target):
            if isinstance(item, dict) and item.get("name") == part:
                target[at] = copy(item)
                return target[at]
    raise ConfigurationError(f"--set {setting}: there is no {part}")
