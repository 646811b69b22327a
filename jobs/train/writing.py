"""Checkpoints on their way to the disk while training goes on."""

from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from jobs import distributed
from jobs.devices import Device

Row = dict[str, Any]
Kind = tuple[torch.device, torch.dtype]


class Store(Protocol):
    """Where a variant's progress is kept."""

    def save_checkpoint(self, state: dict[str, Any]) -> None: ...

    def save_best(self, weights: dict[str, Tensor], epoch: int, accuracy: float) -> None: ...

    def append(self, rows: list[Row]) -> None: ...


class Snapshot:
    """A copy of nested values as they are now, made where their tensors are.

    All tensors of one device and type lie in one flat tensor, and so come to the host in one copy:
    the thousand and more of a network would be as many copies, and training would wait for each.
    """

    def __init__(self, values: Any) -> None:
        """
        Args:
            values: mappings and sequences of plain values, and of tensors without gaps.
        """
        tensors: dict[Kind, list[Tensor]] = defaultdict(list)
        map_tensors(values, lambda tensor: tensors[_kind(tensor)].append(tensor))
        self._flat = {kind: torch.cat([_flat(t) for t in of]) for kind, of in tensors.items()}
        parts = {
            kind: iter(flat.split([tensor.numel() for tensor in tensors[kind]]))
            for kind, flat in self._flat.items()
        }
        self._values = map_tensors(
            values,
            lambda tensor: next(parts[_kind(tensor)]).as_strided(tensor.shape, tensor.stride()),
        )

    def on_cpu(self) -> Any:
        """The values on the CPU, copied through pinned memory after the current stream's work."""
        here = {kind: _on_cpu(flat) for kind, flat in self._flat.items()}

        def moved(part: Tensor) -> Tensor:
            flat = here[_kind(part)]
            return flat.as_strided(part.shape, part.stride(), part.storage_offset())

        return map_tensors(self._values, moved)


class Writer(AbstractContextManager["Writer"]):
    """Writes in one thread of the first process, one thing after the other.

    A context, which is left when all is written. All processes call the same methods.
    """

    def __init__(self, store: Store, device: Device) -> None:
        self._store, self._device = store, device
        self._thread = ThreadPoolExecutor(1)
        self._begun: Future[None] | None = None

    def begin(self, best: Snapshot | None, state: dict[str, Any] | None = None) -> None:
        """Begins to write the best weights, if any, then the state as it is now, if given.

        Args:
            best: the arguments of :meth:`Store.save_best`.

        Raises:
            JobError, OSError: what was begun before has failed.
        """
        self.finish()
        if distributed.rank() == 0:
            now = None if state is None else Snapshot(state)
            self._begun = self._thread.submit(self._write, best, now, self._device.aside())

    def finish(self) -> None:
        """Waits until what was begun is on the disk.

        Raises:
            JobError, OSError: it has failed.
        """
        begun, self._begun = self._begun, None
        distributed.once(lambda: begun.result() if begun else None)

    def _write(
        self, best: Snapshot | None, state: Snapshot | None, aside: AbstractContextManager[Any]
    ) -> None:
        with aside:
            kept, progress = (part.on_cpu() if part else None for part in (best, state))
        if kept is not None:
            self._store.save_best(**kept)
        if progress is not None:
            self._store.save_checkpoint(progress)

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()


def map_tensors(value: Any, change: Any) -> Any:
    """Nested mappings and sequences with every tensor replaced by `change(tensor)`, in order."""
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, change) for item in value)
    return change(value) if isinstance(value, Tensor) else value


def _kind(tensor: Tensor) -> Kind:
    return tensor.device, tensor.dtype


def _flat(tensor: Tensor) -> Tensor:
    """Its numbers [N] as they lie in memory."""
    in_order = tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    assert in_order, f"{tensor.shape} with strides {tensor.stride()} has gaps, or repeats itself"
    return tensor.as_strided((tensor.numel(),), (1,))


def _on_cpu(flat: Tensor) -> Tensor:
    if flat.device.type == "cpu":
        return flat
    return torch.empty_like(flat, device="cpu", pin_memory=True).copy_(flat)
