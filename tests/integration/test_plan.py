"""What a run says before it begins."""

import pytest

from jobs import config, devices
from jobs.data.dataset import load
from jobs.train import plan

pytestmark = pytest.mark.usefixtures("thin")
DEVICE = devices.choose(config.Runtime(device="cpu", precision="fp32"))


def outline(done: int, *, stand_in: bool) -> str:
    resolved = config.load("quickstart")
    dataset = load(resolved.data)
    optim = resolved.weights.stand_in.optim
    variant = config.Variant(name="stand-in", init="random", optim=optim) if stand_in else None
    return plan.outline(resolved, dataset, DEVICE, list(resolved.variants[done:]), variant)


def test_the_steps_are_named_in_their_order_the_stand_in_where_it_is_first_needed() -> None:
    said = outline(0, stand_in=True)
    steps = "scratch, the stand-in for ImageNet, finetune, frozen, report, archive"
    assert said.startswith(f"to do: {steps}; about ")


def test_what_is_done_is_not_to_do() -> None:
    said = outline(2, stand_in=False)
    assert said.startswith("to do: frozen, report, archive; about ")


def test_the_time_is_that_of_the_pictures_to_be_trained_on_and_scored() -> None:
    resolved = config.load("quickstart")
    dataset = load(resolved.data)
    scratch, _, frozen = resolved.variants
    epochs, scored = scratch.optim.epochs, len(dataset.validation) + 160
    expected = epochs * 160 + (epochs * scored + 599) * plan.FORWARD_SHARE
    assert plan._pictures(resolved, dataset, scratch) == pytest.approx(expected)
    cached = (4 * 160 + 240 + 599) * plan.FORWARD_SHARE  # digits are not mirrored, but shifted
    assert plan._pictures(resolved, dataset, frozen) == pytest.approx(cached)


def test_what_is_measured_is_what_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 75 pixels there can be no auxiliary head, and none of these variants has one."""
    settings = ["data.input_size=75", "optim.aux_weight=0.3", "weights.source=random"]
    settings += [f"variants.{n}.optim.aux_weight=0" for n in ("scratch", "finetune")]
    resolved = config.load("quickstart", [*settings, "optim.batch_size=3"])
    dataset, (scratch, _, frozen) = load(resolved.data), resolved.variants
    for remaining in ([frozen], [scratch, frozen]):
        said = plan.outline(resolved, dataset, DEVICE, remaining, None)
        assert said.startswith("to do: ") and "; about " in said
    monkeypatch.setattr("jobs.distributed.share", lambda _: slice(0, 0))
    assert plan.outline(resolved, dataset, DEVICE, [scratch], None).startswith("to do: scratch")
