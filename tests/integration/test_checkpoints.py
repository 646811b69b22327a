"""What a variant saves while it trains comes back whole, or is named in one line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_faults import Damage, every_damage, refused, variant_of

from jobs.runs import RunFolder, VariantFolder


@every_damage
def test_a_checkpoint_comes_back_and_a_damaged_one_is_not_gone_on_from(
    damage: Damage, tmp_path: Path
) -> None:
    variant = variant_of(tmp_path)
    assert variant.load_checkpoint() is None
    state = {"epoch": 1, "network": {"weight": torch.arange(10_000)}}
    variant.save_checkpoint(state)
    found = variant.load_checkpoint()
    assert found is not None and found["epoch"] == 1
    assert torch.equal(found["network"]["weight"], torch.arange(10_000))
    damage(variant.checkpoint)
    said = refused(variant.load_checkpoint, variant.checkpoint)
    assert said.startswith(f"{variant.checkpoint}: damaged: ")
    assert said.endswith("; without that file, the variant is trained from its start")
    variant.save_checkpoint(state)
    assert variant.load_checkpoint() is not None


def test_the_best_weights_have_those_of_layers_that_were_not_trained(tmp_path: Path) -> None:
    trained = torch.arange(6.0).reshape(2, 3).T  # not in the order in which a file has it
    variant = VariantFolder(tmp_path, RunFolder(tmp_path), {"trunk": torch.ones(2)})
    variant.save_best({"head": trained}, 0, 0.5)
    found = load_file(variant.best)
    assert set(found) == {"trunk", "head"}
    assert torch.equal(found["head"], trained) and torch.equal(found["trunk"], torch.ones(2))


def test_the_best_weights_say_of_which_epoch_they_are(tmp_path: Path) -> None:
    variant = variant_of(tmp_path)
    assert variant.kept() is None
    variant.save_best({"head": torch.ones(2)}, 7, 0.1)
    assert variant.kept() == (7, 0.1)
    before = variant.best.read_bytes()
    variant.save_best({"head": torch.ones(2)}, 7, 0.1)
    assert variant.best.read_bytes() == before
    variant.best.write_bytes(before[:20])
    assert variant.kept() is None


class Planted:
    """Runs nothing here, but would where a checkpoint is unpickled as it comes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("planted",)


def test_a_checkpoint_that_would_run_code_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variant = variant_of(tmp_path)
    variant.save_checkpoint({"epoch": Planted()})
    refused(variant.load_checkpoint, variant.checkpoint)
    assert capsys.readouterr().out == ""


def test_a_full_disk_is_told_as_such_whatever_torch_makes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = variant_of(tmp_path)

    def save(hidden: Exception | None) -> None:
        def fail(*_: Any) -> None:
            try:
                if hidden:
                    raise hidden
            finally:
                raise RuntimeError("unexpected pos 64 vs 0")

        monkeypatch.setattr(torch, "save", fail)
        variant.save_checkpoint({})

    with pytest.raises(OSError, match="No space left"):
        save(OSError(28, "No space left on device"))
    for hidden in (None, KeyError("x")):
        with pytest.raises(RuntimeError, match="unexpected pos"):
            save(hidden)
    assert not variant.checkpoint.exists()
