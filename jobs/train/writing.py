"""Checkpoints on their way to the disk while training goes on."""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Protocol, Self

from torch import Tensor

from jobs import distributed
from jobs.devices import Device

Row = dict[str, Any]


class Store(Protocol):
    """Where a variant's progress is kept."""

    def save_checkpoint(self, state: dict[str, Any]) -> None: ...

    def save_best(self, state: dict[str, Tensor]) -> None: ...

    def append(self, rows: list[Row]) -> None: ...


class Writer:
    """Writes in one thread of the first process, one thing after the other.

    A context, which is left when all is written. All processes call the same methods.
    """

    def __init__(self, store: Store, device: Device) -> None:
        self._store, self._device = store, device
        self._thread = ThreadPoolExecutor(1)
        self._begun: Future[None] | None = None

    def begin(self, best: dict[str, Tensor], state: dict[str, Any] | None = None) -> None:
        """Begins to write the best weights, if any, then a copy of the state, if given.

        Args:
            best: nothing changes them any more.

        Raises:
            JobError, OSError: what was begun before has failed.
        """
        self.finish()
        if distributed.rank() == 0:
            state = _each(state, Tensor.clone)
            self._begun = self._thread.submit(self._write, best, state, self._device.aside())

    def finish(self) -> None:
        """Waits until what was begun is on the disk.

        Raises:
            JobError, OSError: it has failed.
        """
        begun, self._begun = self._begun, None
        distributed.once(lambda: begun.result() if begun else None)

    def _write(
        self,
        best: dict[str, Tensor],
        state: dict[str, Any] | None,
        aside: AbstractContextManager[Any],
    ) -> None:
        with aside:
            best, state = _each(best, Tensor.cpu), _each(state, Tensor.cpu)
        if best:
            self._store.save_best(best)
        if state is not None:
            self._store.save_checkpoint(state)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()


def _each(value: Any, change: Any) -> Any:
    """The value with every tensor in it changed."""
    if isinstance(value, dict):
        return {key: _each(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_each(item, change) for item in value)
    return change(value) if isinstance(value, Tensor) else value
