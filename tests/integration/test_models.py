"""The network is torchvision's, the variants start from the same weights, odd files are refused."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import inception_v3

from jobs import config
from jobs.config import Variant
from jobs.errors import UnavailableError
from jobs.train import models

SCRATCH = Variant(name="scratch", init="random")
FINETUNE = Variant(name="finetune", init="pretrained")
FROZEN = Variant(name="frozen", init="pretrained", trainable="head")
UPPER = Variant(name="upper", init="pretrained", trainable="Mixed_7a")


@pytest.fixture(scope="module")
def pretrained() -> models.State:
    return {k: v.contiguous() for k, v in models.load_pretrained("random").items()}


def test_the_parameter_counts_are_the_published_ones() -> None:
    published = models.build(1000, aux=True)
    assert models.count_parameters(published) == models.PUBLISHED_PARAMETERS == 27_161_264
    described = models.describe(10, 299)
    assert described["published_parameters"] == 27_161_264
    heads = (2048 + 1) * 990 + (768 + 1) * 990
    assert described["parameters"] == 27_161_264 - heads
    assert sum(layer["parameters"] for layer in described["layers"]) == described["parameters"]


def test_the_blocks_are_those_of_torchvision() -> None:
    network = inception_v3(weights=None, init_weights=False, aux_logits=False)
    children = [n for n, m in network.named_children() if list(m.parameters()) and n != "fc"]
    assert children == list(config.BLOCKS)


def test_the_layer_table_has_the_papers_shapes() -> None:
    shapes = {layer["name"]: layer["output"] for layer in models.describe(10, 299)["layers"]}
    assert shapes["Conv2d_1a_3x3"] == [32, 149, 149]
    assert shapes["Mixed_6e"] == [768, 17, 17]
    assert shapes["AuxLogits"] == [10]
    assert shapes["Mixed_7c"] == [2048, 8, 8]
    assert shapes["fc"] == [10]


@pytest.mark.parametrize(
    ("variant", "trainable"),
    [
        (FROZEN, 2048 * 10 + 10),
        (SCRATCH, 24_371_444),
        (UPPER, 13_200_000),
    ],
)
def test_a_variant_trains_what_it_says(
    variant: Variant, trainable: int, pretrained: models.State
) -> None:
    network = models.create(variant, 10, pretrained, seed=0)
    counted = models.count_parameters(network, trainable=True)
    if variant is UPPER:
        assert 20_490 < counted < models.count_parameters(network)
        assert not network.Mixed_6e.branch1x1.conv.weight.requires_grad
        assert network.Mixed_7a.branch3x3_1.conv.weight.requires_grad
    else:
        assert counted == trainable


def test_pretrained_variants_start_from_identical_weights(pretrained: models.State) -> None:
    finetune = models.create(FINETUNE, 10, pretrained, seed=3).state_dict()
    frozen = models.create(FROZEN, 10, pretrained, seed=3).state_dict()
    assert set(frozen) < set(finetune)
    assert all(torch.equal(tensor, finetune[name]) for name, tensor in frozen.items())
    scratch = models.create(SCRATCH, 10, pretrained, seed=3).state_dict()
    assert torch.equal(scratch["fc.weight"], finetune["fc.weight"])
    first = "Conv2d_1a_3x3.conv.weight"
    assert torch.equal(finetune[first], pretrained[first])
    assert not torch.equal(scratch[first], pretrained[first])


@pytest.mark.usefixtures("thin")
def test_a_seed_draws_its_own_weights() -> None:
    one, same, other = (models.create(SCRATCH, 10, None, seed) for seed in (0, 0, 1))
    assert torch.equal(one.fc.weight, same.fc.weight)
    assert not torch.equal(one.fc.weight, other.fc.weight)


@pytest.mark.parametrize(
    ("variant", "moving"), [(SCRATCH, "all"), (FROZEN, "none"), (UPPER, "upper")]
)
def test_batch_norm_moves_only_where_a_layer_trains(
    variant: Variant, moving: str, pretrained: models.State
) -> None:
    network = models.create(variant, 10, pretrained, seed=0)
    models.set_training_mode(network, variant)
    norms = {n: m.training for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert network.dropout.training
    if moving == "upper":
        assert all(trains == name.startswith("Mixed_7") for name, trains in norms.items())
    else:
        assert set(norms.values()) == {moving == "all"}


def test_the_lectures_frozen_network_lets_batch_norm_move(pretrained: models.State) -> None:
    variant = FROZEN.model_copy(update={"batch_norm": "train"})
    assert not variant.cached
    network = models.create(variant, 10, pretrained, seed=0)
    models.set_training_mode(network, variant)
    assert network.Mixed_5b.branch1x1.bn.training


def test_weights_come_from_safetensors_and_from_plain_state_dicts(
    tmp_path: Path, pretrained: models.State
) -> None:
    trunk = {k: v.half() for k, v in pretrained.items() if not k.startswith("AuxLogits")}
    trunk = {k: v for k, v in trunk.items() if not k.endswith("num_batches_tracked")}
    save_file(trunk, tmp_path / "trunk.safetensors")
    torch.save(trunk, tmp_path / "trunk.pt")
    for name in ("trunk.safetensors", "trunk.pt"):
        loaded = models.load_pretrained(str(tmp_path / name))
        assert loaded.keys() == trunk.keys()
        assert all(v.dtype == torch.float32 for v in loaded.values())


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("a pickle was executed",))


def test_files_that_do_not_fit_are_refused_in_one_line(
    tmp_path: Path, pretrained: models.State
) -> None:
    def refused(name: str, match: str) -> None:
        with pytest.raises(UnavailableError, match=match) as caught:
            models.load_pretrained(str(tmp_path / name))
        assert "\n" not in str(caught.value)

    refused("absent.pt", "no such file")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    refused("noise.safetensors", "unreadable")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    refused("noise.pt", "unreadable|refused")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    refused("evil.pt", "unreadable|refused")
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    refused("other.pt", "not a plain state_dict")

    first = "Conv2d_1a_3x3.conv.weight"
    save_file({k: v for k, v in pretrained.items() if k != first}, tmp_path / "less.safetensors")
    refused("less.safetensors", f"lacks {first}")
    save_file({**pretrained, "layer4.weight": torch.zeros(1)}, tmp_path / "more.safetensors")
    refused("more.safetensors", "has an unknown layer4.weight")
    save_file({**pretrained, first: torch.zeros(32, 3, 7, 7)}, tmp_path / "wide.safetensors")
    refused("wide.safetensors", r"is \[32, 3, 7, 7\] instead of \[32, 3, 3, 3\]")


def test_imagenet_weights_out_of_reach_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(UnavailableError, match=r"no route to host.*weights.source=FILE"):
        models.load_pretrained("imagenet")


@pytest.mark.slow
def test_the_real_trunk_loads(real_data: Path) -> None:
    state = models.load_pretrained(str(real_data / "inception_v3_backbone_fp16.safetensors"))
    network = models.create(FINETUNE, 10, state, seed=0)
    assert torch.equal(
        network.Mixed_7c.branch1x1.conv.weight, state["Mixed_7c.branch1x1.conv.weight"]
    )
