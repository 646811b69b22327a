"""Claim: an overloaded service keeps what it accepts quick, refuses the rest at once, and recovers.

    python -m benchmarks.overload                      (some 7 minutes; makes an archive first)
    python -m benchmarks.overload --archive runs/RUN_ID/model/NAME.mar --engine asgi

One client that waits for each answer is the measure. Clients that keep all workers busy say how
many requests a second the service can answer. Then five and twenty times as many arrive each
second, whatever becomes of the earlier ones. That is done with the default queue and with short
ones: a queue is how long accepted requests wait, and so is the batch before theirs. The service has
half of the machine's cores and the clients the others, as it takes much to send so many pictures.
Recovery is the time from the last answer to the end of the first one that takes at most twice the
median of before.
"""

import argparse
import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import contenders, load, record
from benchmarks.archive import make_archive
from benchmarks.serving import photographs

LIMITS = ((100, 2), (4, 2), (2, 2), (1, 1))
"""SERVING_QUEUE_SIZE and SERVING_BATCH_SIZE; the first pair is the defaults on a CPU."""
FACTORS = (5, 20)
HEADS = ("load", "answered", "p99 ms", "of one client's", "refused", "p99 ms", "recovery s")


def quantiles(answers: list[load.Answer], status: int) -> dict[str, Any]:
    """How many answers had this status, and how long they took, in milliseconds."""
    times = [a.seconds * 1000 for a in answers if a.status == status and a.counts]
    p50, p99 = np.percentile(times, [50, 99]).tolist() if times else (None, None)
    return {"n": len(times), "p50_ms": p50, "p99_ms": p99}


def seconds_to_recover(server: contenders.Server, picture: bytes, usual_ms: float) -> float:
    over = time.monotonic()
    while True:
        start = time.monotonic()
        try:
            server.label(picture)
        except OSError:  # still refused
            continue
        if ((end := time.monotonic()) - start) * 1000 < 2 * usual_ms:
            return end - over


def measure(
    server: contenders.Server, pictures: list[bytes], clients: int, seconds: float
) -> dict[str, Any]:
    given = (server.contender.url, server.contender.kind, pictures)
    alone = quantiles(load.run_apart(load.send, *given, 1, seconds), 200)
    busy = quantiles(load.run_apart(load.send, *given, clients, seconds), 200)
    capacity = busy["n"] / seconds
    found: dict[str, Any] = {
        "1 client": {"accepted": alone},
        f"{clients} clients": {"accepted": busy, "p99_ratio": busy["p99_ms"] / alone["p99_ms"]},
    }
    for factor in FACTORS:
        answers = load.run_apart(load.send_at_rate, *given, factor * capacity, seconds)
        recovery = seconds_to_recover(server, pictures[0], alone["p50_ms"])
        accepted, refused = quantiles(answers, 200), quantiles(answers, 503)
        found[f"{factor} × {capacity:.0f}/s"] = {
            "accepted": accepted,
            "refused": refused,
            "others": sum(a.status not in (200, 503) for a in answers),
            "p99_ratio": accepted["p99_ms"] / alone["p99_ms"] if accepted["n"] else None,
            "recovery_seconds": recovery,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--archive", type=Path)
    parser.add_argument("--engine", choices=("torchserve", "asgi"), default="torchserve")
    parser.add_argument("--seconds", type=float, default=8, help="Of each load.")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    pictures = photographs()
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        parser.error("two cores at least: one for the service, one for its clients")
    service, clients = usable[: len(usable) // 2], usable[len(usable) // 2 :]
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        archive = (options.archive or make_archive(Path(work))).resolve()
        make = contenders.asgi if options.engine == "asgi" else contenders.service
        for queue, batch in LIMITS:
            (folder := Path(work) / f"queue-{queue}").mkdir()
            contender = make(archive, folder)
            limits = {"SERVING_QUEUE_SIZE": str(queue), "SERVING_BATCH_SIZE": str(batch)}
            contender = replace(contender, environment={**contender.environment, **limits})
            with ExitStack() as stack:
                os.sched_setaffinity(0, service)
                server = contenders.Server(contender, folder / "log", pictures[0])
                stack.callback(server.kill)
                os.sched_setaffinity(0, clients)
                found = measure(server, pictures, len(service) * batch, options.seconds)
            figures[f"queue of {queue}, batches of {batch}"] = found
            record.show(HEADS, [(f"queue {queue}, {name}", *cells(f)) for name, f in found.items()])
    record.save(f"overload-{options.engine}", options.out, len(figures), figures)


def cells(figures: dict[str, Any]) -> list[object]:
    accepted, refused = figures["accepted"], figures.get("refused", {})
    shown = [accepted["n"], accepted["p99_ms"], figures.get("p99_ratio"), refused.get("n")]
    return [*shown, refused.get("p99_ms"), figures.get("recovery_seconds")]


if __name__ == "__main__":
    main()
