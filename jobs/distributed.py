"""One job in several processes: torchrun starts them, they share each batch, the first one writes.

    torchrun --nproc-per-node 8 -m jobs run --config default

In a single process each function works locally, at no cost. With several, all processes have to
call the same functions in the same order.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from jobs import interruption
from jobs.errors import JobError
from serving import progress

T = TypeVar("T")

PATIENCE = timedelta(hours=2)  # of processes that wait while one decodes, exports or publishes
_patient: list[dist.ProcessGroup] = []  # the CPU's group with that timeout; empty when alone


@contextmanager
def joined() -> Iterator[bool]:
    """Joins the processes that were started together; gives whether this is the first of them.

    Raises:
        JobError: another process has died.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    store, own_rank, count = next(rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # On one machine torchrun's store outlives a restart, with the addresses of the dead in it.
        store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=own_rank, world_size=count)
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(patient, dist.ProcessGroup), "of all processes, so this one is in it"
    _patient.append(patient)
    progress.console.quiet = rank() > 0
    try:
        yield rank() == 0
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        advice = "the same command, or torchrun --max-restarts, resumes from the checkpoint"
        raise JobError(f"another process of this job is gone; {advice}") from None
    dist.destroy_process_group()
    _patient.clear()


def size() -> int:
    return dist.get_world_size() if _patient else 1


def rank() -> int:
    return dist.get_rank() if _patient else 0


def local_rank() -> int:
    """The process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if _patient else 0


def local_size() -> int:
    """How many of the processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _patient else 1


def share(count: int, owner: int | None = None) -> slice:
    """The slice of `count` consecutive items that belongs to this process, or to `owner`."""
    owner = rank() if owner is None else owner
    return slice(count * owner // size(), count * (owner + 1) // size())


def batches(count: int, batch_size: int, device: torch.device) -> tuple[Tensor, ...]:
    """This process's share of the positions below `count`: int64 [B] each, as many in any process.

    No image is in two shares, so what is counted over them is counted once.
    """
    own = share(count)
    positions = torch.arange(own.start, own.stop, device=device)
    if size() == 1:
        return tuple(positions.split(batch_size))
    longest = -(-count // size())
    return tuple(positions.tensor_split(-(-longest // batch_size)))


def complete(rows: Tensor) -> None:
    """Fills in, in place, the rows that other processes computed: all but this one's share."""
    if size() > 1:
        for owner in range(size()):
            dist.broadcast(rows[share(len(rows), owner)], src=owner)


def total(values: Tensor) -> Tensor:
    """The sum over all processes."""
    if size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values


def check() -> None:
    """:func:`interruption.check`, synchronised: one process that is asked to stop stops all."""
    if size() == 1:
        interruption.check()
        return
    asked = torch.tensor(interruption.asked())
    dist.all_reduce(asked, dist.ReduceOp.MAX, group=_patient[0])  # the device goes on meanwhile
    if asked:
        raise interruption.interrupted()


def once(work: Callable[..., T], *arguments: Any) -> T:
    """Runs `work` in the first process and returns its result, or raises its error, in all."""
    if size() == 1:
        return work(*arguments)
    outcome: list[Any] = _attempt(work, *arguments) if rank() == 0 else [None, None]
    dist.broadcast_object_list(outcome, src=0, group=_patient[0])
    result, error = outcome
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


@contextmanager
def held_once(manager: AbstractContextManager[None]) -> Iterator[None]:
    """Enters a context in the first process alone."""
    with ExitStack() as stack:
        once(stack.enter_context, manager)
        yield


def in_turns(work: Callable[[], T]) -> T:
    """Calls `work` in the first process, then in the first of each machine, then in the rest.

    What one leaves in a cache is there for the next, whether or not the machines share it.
    """
    if size() == 1:
        return work()
    own_turn = 0 if rank() == 0 else 1 if local_rank() == 0 else 2
    result: Any = None
    for turn in range(3):
        error = None
        if turn == own_turn:
            result, error = _attempt(work)
        errors: list[Any] = [None] * size()
        dist.all_gather_object(errors, error, group=_patient[0])
        for error in filter(None, errors):
            raise error
    return result  # type: ignore[no-any-return]


def _attempt(work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """A result, or an error that has its own exit code."""
    try:
        return [work(*arguments), None]
    except (JobError, OSError) as error:
        return [None, error]
