"""Fine-tuning that starts with a trained head."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, tiny, tiny_config
from safetensors.torch import load_file

from jobs import config, pipeline
from jobs.errors import ConfigurationError
from jobs.results import Diverged, Done
from jobs.runs import RunFolder
from jobs.train.training import Trainer

pytestmark = pytest.mark.usefixtures("thin")
PROBE = {"name": "probe", "init": "pretrained", "head_of": "frozen"}
TWO = [TINY["variants"][2], PROBE]


def probing(**changes: Any) -> config.Config:
    return tiny_config(variants=[TWO[0], {**PROBE, **changes}])


def test_it_starts_with_the_trained_head_and_the_pretrained_trunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = []

    def trainer(network: Any, variant: Any, *rest: Any, **more: Any) -> Any:
        starts.append({k: v.clone() for k, v in network.state_dict().items()})
        return Trainer(network, variant, *rest, **more)

    monkeypatch.setattr(pipeline, "Trainer", trainer)
    folder, job = RunFolder(tmp_path / "run"), probing()
    for variant in job.variants:
        assert isinstance(pipeline.train(job, folder, variant.name)[0], Done)
    trained = load_file(folder.variant("frozen", 0).best)
    assert torch.equal(starts[1]["fc.weight"], trained["fc.weight"])
    assert not torch.equal(starts[0]["fc.weight"], trained["fc.weight"])
    trunk = "Mixed_7c.branch1x1.conv.weight"
    assert torch.equal(starts[1][trunk], trained[trunk])
    probed = load_file(folder.variant("probe", 0).best)
    assert not torch.equal(probed[trunk], trained[trunk])
    with np.load(folder.variant("probe", 0).path / "test_predictions.npz") as arrays:
        assert arrays["logits"].shape == (40, 10)


def test_by_itself_it_trains_its_head_first(tmp_path: Path) -> None:
    job, folder = probing(optim={"epochs": 1}), RunFolder(tmp_path / "run")
    [result] = pipeline.train(job, folder, "probe")
    head = folder.variant("frozen", 0).result()
    assert isinstance(result, Done) and isinstance(head, Done)
    starts = [row["variant"] for row in folder.metrics() if row["split"] == "test"]
    assert starts == ["frozen", "probe"]


def test_without_a_head_it_is_stopped_and_says_why(tmp_path: Path) -> None:
    job, folder = probing(), RunFolder(tmp_path / "run")
    lost = Diverged(variant="frozen", seed=0, reason="the loss is not finite")
    with folder.open(job):
        folder.variant("frozen", 0).save_result(lost)
    result = pipeline.train(job, folder, "probe")[0]
    assert isinstance(result, Diverged)
    assert result.reason == "frozen, whose head it starts with, was stopped"


@pytest.mark.parametrize(
    ("variants", "problem"),
    [
        (TWO[::-1], "variants.probe.head_of: frozen is no earlier variant"),
        ([{**TWO[0], "trainable": "all"}, PROBE], "head_of: frozen is no earlier variant"),
        (
            [TWO[0], {**PROBE, "init": "random"}],
            "variants.probe.head_of: it needs init: pretrained",
        ),
    ],
)
def test_what_cannot_be_is_refused(variants: list[dict[str, Any]], problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        config.validate(tiny(variants=variants))


def test_the_configuration_differs_from_the_default_in_that_variant() -> None:
    default, hurry = config.load("default"), config.load("probe-finetune")
    assert hurry.variants[:3] == default.variants
    finetune, probe = hurry.variants[1], hurry.variants[3]
    assert probe == finetune.model_copy(update={"name": "probe-finetune", "head_of": "frozen"})
    assert hurry.model_copy(update={"variants": default.variants}) == default
