"""Inception-v3, the source of its weights, and the parameters that each variant trains."""

from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own idiom
from torchvision.models import Inception3, Inception_V3_Weights, inception_v3

from jobs.config import AUX_MIN_SIZE, BLOCKS, Variant
from jobs.errors import UnavailableError, first_line
from jobs.seeds import generator

State = dict[str, Tensor]

HEADS = ("fc.", "AuxLogits.fc.")  # sized by the number of classes, so never taken from weights
PUBLISHED_PARAMETERS = 27_161_264  # of torchvision's network, both heads for 1,000 classes


def build(num_classes: int, *, aux: bool) -> Inception3:
    """torchvision's Inception-v3 for 299×299 inputs in [-1, 1], both heads replaced, uninitialised.

    In training mode its output is a pair (logits, auxiliary logits) when `aux`; in evaluation
    mode it is the logits [N, num_classes].
    """
    network = inception_v3(weights=None, init_weights=False, transform_input=False, aux_logits=True)
    network.fc = nn.Linear(network.fc.in_features, num_classes)
    if aux:
        assert network.AuxLogits is not None
        network.AuxLogits.fc = nn.Linear(network.AuxLogits.fc.in_features, num_classes)
    else:
        network.AuxLogits, network.aux_logits = None, False
    return network.to(memory_format=torch.channels_last)


def initialise(network: nn.Module, seed: int) -> None:
    """Re-initialises all weights: He et al. (2015) for convolutions, N(0, 0.01) for linear layers.

    Every layer draws from a generator named after it, so a layer starts the same whatever else
    the network has: two variants of one seed share their heads.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator(seed, name))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01, generator=generator(seed, name))
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()


def create(
    variant: Variant, num_classes: int, pretrained: Mapping[str, Tensor] | None, seed: int
) -> Inception3:
    """A variant's network at its start; only what it trains requires a gradient."""
    network = build(num_classes, aux=variant.has_aux)
    initialise(network, seed)
    if variant.init == "pretrained":
        assert pretrained is not None, "load_pretrained comes first"
        wanted = network.state_dict().keys()
        network.load_state_dict({k: v for k, v in pretrained.items() if k in wanted}, strict=False)
    network.requires_grad_(False)
    for module in trained_modules(network, variant):
        module.requires_grad_(True)
    return network


def trained_modules(network: Inception3, variant: Variant) -> list[nn.Module]:
    """The blocks and heads that the variant trains, in order."""
    heads = [network.fc] if network.AuxLogits is None else [network.AuxLogits, network.fc]
    if variant.trainable == "head":
        return [network.fc]
    first = 0 if variant.trainable == "all" else BLOCKS.index(variant.trainable)
    return [*(network.get_submodule(name) for name in BLOCKS[first:]), *heads]


def head(network: Inception3) -> nn.Sequential:
    """What a frozen network trains, under its own names: logits [N, C] of features [N, 2048]."""
    return nn.Sequential(OrderedDict(dropout=network.dropout, fc=network.fc))


def set_training_mode(network: nn.Module, variant: Variant) -> None:
    """Training mode, with batch norm as the variant wants it.

    A layer that does not train keeps its stored statistics (`.train()` alone would let them
    move), unless the variant says otherwise.
    """
    network.train()
    moving = set(moving_norms(network, variant))
    for norm in batch_norms(network):
        norm.train(norm in moving)


def moving_norms(network: nn.Module, variant: Variant) -> list[nn.BatchNorm2d]:
    """The batch-norm layers whose statistics move when the variant trains."""
    mode, norms = variant.batch_norm, batch_norms(network)
    return [n for n in norms if mode == "train" or (mode == "auto" and n.weight.requires_grad)]


def batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]


def count_parameters(network: nn.Module, *, trainable: bool = False) -> int:
    """Of all parameters, or of those alone that are trained."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad or not trainable)


def load_pretrained(source: str) -> State:
    """Weights of the trunk, and of the auxiliary head's convolutions where there are any.

    Args:
        source: `imagenet` (torchvision's, downloaded once), `random`, or a file.

    Raises:
        UnavailableError: they cannot be reached or read, or do not fit the network.
    """
    if source == "imagenet":
        state = _download()
    elif source == "random":
        network = build(10, aux=True)
        initialise(network, seed=0)
        state = network.state_dict()
    else:
        state = read(Path(source).expanduser())
    return check_fit(state, source)


def check_fit(state: Mapping[str, Tensor], source: str) -> State:
    """The weights in float32 without their heads, once they are known to fit.

    Missing heads, a missing auxiliary branch and missing `num_batches_tracked` are fine; any
    other difference is an error.
    """
    reference = build(10, aux=True).state_dict()
    wanted = {k: v.shape for k, v in reference.items() if not k.startswith(HEADS)}
    given = {k: v for k, v in state.items() if not k.startswith(HEADS)}
    optional = {k for k in wanted if k.startswith("AuxLogits.") or k.endswith("_tracked")}
    problems = [f"lacks {k}" for k in wanted if k not in given and k not in optional]
    problems += [f"has an unknown {k}" for k in given if k not in wanted]
    problems += [
        f"{k} is {list(v.shape)} instead of {list(wanted[k])}"
        for k, v in given.items()
        if k in wanted and v.shape != wanted[k]
    ]
    if problems:
        more = f" — and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise UnavailableError(f"weights {source}: not an Inception-v3: {problems[0]}{more}")
    return {k: v.float() if v.is_floating_point() else v for k, v in given.items()}


def _download() -> State:
    try:
        state: State = Inception_V3_Weights.IMAGENET1K_V1.get_state_dict(
            progress=False, check_hash=True, weights_only=True, map_location="cpu"
        )
    except (OSError, RuntimeError) as error:
        raise UnavailableError(
            f"the ImageNet weights: download failed ({error}); give a file with "
            "--set weights.source=FILE, or use --set weights.source=stand-in"
        ) from None
    return state


def read(path: Path) -> State:
    """The tensors of a safetensors or `state_dict` file, as they are.

    Raises:
        UnavailableError: it is missing, damaged, or has anything but tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UnavailableError(f"weights {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise UnavailableError(f"weights {path}: unreadable: {first_line(error)}") from None
    except Exception as error:  # pickle's own errors: anything but plain tensors is refused
        raise UnavailableError(f"weights {path}: refused: {first_line(error)}") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UnavailableError(f"weights {path}: not a plain state_dict of tensors")
    return state


def class_maps(places: Tensor, weight: Tensor) -> Tensor:
    """Class maps [N, C, h, w] of the last block's output [N, 2048, h, w] and the last layer's
    weight [C, 2048] (Zhou et al. 2016).

    The last layer without its bias at every place, where the network pools first: a map's mean over
    the places and the bias add up to the logit.
    """
    return F.conv2d(places, weight[:, :, None, None])


def describe(num_classes: int, input_size: int) -> dict[str, Any]:
    """Parameter counts and one row a block: name, type, output shape, parameters.

    Computed on the meta device, so no memory is touched. The auxiliary head is listed where the
    input is large enough for it.
    """
    aux = input_size >= AUX_MIN_SIZE
    with torch.device("meta"):
        network = build(num_classes, aux=aux).train()
        rows: list[dict[str, Any]] = []
        for name, module in network.named_children():
            row = {"name": name, "type": type(module).__name__}
            row["parameters"] = count_parameters(module)
            module.register_forward_hook(partial(_remember_shape, row))
            rows.append(row)
        network(torch.empty(2, 3, input_size, input_size))
    return {
        "published_parameters": PUBLISHED_PARAMETERS,
        "parameters": count_parameters(network),
        "input": [3, input_size, input_size],
        "layers": rows,
    }


def _remember_shape(row: dict[str, Any], _: nn.Module, _inputs: Any, output: Tensor) -> None:
    row["output"] = list(output.shape[1:])


def first_kernels(network: nn.Module, when: str) -> dict[str, NDArray[np.float32]]:
    """Copies of the first two convolutions' weights, float32 [out, in, 3, 3], by layer and time."""
    found = {name: network.get_parameter(f"{name}.conv.weight") for name in BLOCKS[:2]}
    return {f"{name}.{when}": w.detach().float().cpu().clone().numpy() for name, w in found.items()}
