"""Where a training step's time goes, by kind of operation (torch.profiler).

    python -m benchmarks.profile                   (a minute on 2 cores)

`scratch` at 299 pixels in batches of 8 on a CPU, of 256 on a GPU, as the job trains it: with
augmentation, both heads, fused AdamW and the average of the weights. Seconds are an operation's
own, without those that it calls; on a GPU they are the device's. The step's rate of arithmetic is
set against the best that the same device does in a large matrix product of the same type.
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from benchmarks import record
from benchmarks.gpu_parts import seconds as seconds_of
from jobs import config, devices
from jobs.data.images import Images
from jobs.data.sources import generated
from jobs.train import models
from jobs.train.training import Trainer, train_epoch

OPERATIONS = 3 * 2 * 5.71e9  # a training image at 299: forward, and twice that backward
# The first kind whose word an operation's name contains is the operation's.
KINDS = {
    "convolution backward": ("convolution_backward",),
    "convolution": ("convolution", "conv2d"),
    "batch norm": ("batch_norm",),
    "optimizer and average": ("adam", "lerp", "_foreach"),
    "pooling": ("pool",),
    "activation": ("relu", "threshold", "clamp_min"),
    "concatenation": ("aten::cat", "aten::slice", "aten::narrow"),
    "scaling the pictures": ("upsample", "aten::index"),
    "copies and casts": ("copy", "_to_copy", "contiguous", "clone"),
    "additions": ("aten::add",),
}


def kind_of(operation: str) -> str:
    matches = (kind for kind, words in KINDS.items() if any(w in operation for w in words))
    return next(matches, "other")


def best_rate(device: devices.Device) -> float:
    """Floating-point operations a second of a large matrix product."""
    side = 8192 if device.device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device.device, dtype=device.dtype)
    return 2 * side**3 / seconds_of(lambda: a @ a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, default=299)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    device = devices.choose(config.Runtime())
    on_gpu = device.device.type == "cuda"
    batch = options.batch or (256 if on_gpu else 8)
    aux = 0.3 if options.size >= config.AUX_MIN_SIZE else 0.0
    optim = config.Optim(batch_size=batch, aux_weight=aux)
    variant = config.Variant(name="scratch", init="random", optim=optim)
    pixels, labels = generated.TARGET.draw(batch * options.steps, 32, seed=0)
    rows = torch.arange(len(labels))
    images = Images(pixels, rows, labels, config.Data(input_size=options.size)).to(device.device)
    network = models.create(variant, 10, None, seed=0).to(device.device)
    trainer = Trainer(network, variant, len(labels), device, seed=0)
    train_epoch(trainer, images, lambda: None, lambda _: None)  # warm-up
    trainer.start_next_epoch()
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    start = time.perf_counter()
    train_epoch(trainer, images, lambda: None, lambda _: None)
    trainer.totals.tolist()
    unwatched = (time.perf_counter() - start) / options.steps
    trainer.start_next_epoch()
    with profile(activities=activities, acc_events=True) as profiled:
        train_epoch(trainer, images, lambda: None, lambda _: None)
        trainer.totals.tolist()
    seconds: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel, whose time is already that of the operation that launched it
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds[kind_of(event.key)] += own / 1e6 / options.steps
    whole = sum(seconds.values())
    ranked = sorted(seconds.items(), key=lambda item: -item[1])
    record.show(("kind", "s a step", "share"), [(k, s, f"{s / whole:.1%}") for k, s in ranked])
    where = "device" if on_gpu else "cpu"
    print(profiled.key_averages().table(sort_by=f"self_{where}_time_total", row_limit=15))
    rates = {"best_rate": best_rate(device), "rate": OPERATIONS * batch / unwatched}
    if options.size == 299:
        print({name: f"{rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()})
    figures = {"batch": batch, "size": options.size, "seconds": unwatched, **rates}
    figures["seconds_a_step"] = dict(ranked)
    record.save("profile", options.out, options.steps, figures)


if __name__ == "__main__":
    main()
