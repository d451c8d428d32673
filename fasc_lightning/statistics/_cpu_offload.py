"""Moments on the CPU beside another device: rows are copied to the CPU, where another thread sums them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import RLock
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fasc_lightning._utils import undoing
from fasc_lightning.statistics._collector import CalibrationMoments, RowsRefusedError

#: Devices that can hold the moments in place of the fit's.
MomentsDevice = Literal["cpu"]

#: Bytes of rows that may wait to be summed. A backward pass that is faster than the CPU waits.
ROOM = 2**30


class MomentSums(Protocol):
    """Moments that taps feed: :class:`~fasc_lightning.statistics.CalibrationMoments` or :class:`CpuOffload`."""

    needs: frozenset[str]

    @property
    def takes_pairs(self) -> bool:
        """As ``CalibrationMoments.takes_pairs``."""

    def add_inputs(self, members: Iterable[str], x: Tensor) -> None:
        """As ``CalibrationMoments.add_inputs``."""

    def move_inputs(self, members: Iterable[str], reached: Iterable[str], x: Tensor) -> None:
        """As ``CalibrationMoments.move_inputs``."""

    def add_gradients(self, name: str, h: Tensor, scale: float = 1.0) -> None:
        """As ``CalibrationMoments.add_gradients``."""

    def add_pairs(
        self,
        name: str,
        x: Tensor,
        h: Tensor,
        lengths: Sequence[int] | None = None,
        scale: float = 1.0,
        g: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> None:
        """As ``CalibrationMoments.add_pairs``."""

    def projects(self, name: str) -> Literal["inputs", "outputs"] | None:
        """As ``CalibrationMoments.projects``."""

    def settle(self) -> None:
        """As ``CpuOffload.settle``."""

    def drop(self) -> None:
        """As ``CpuOffload.drop``."""


class CpuOffload:
    """Feeds moments on the CPU with rows from a device, in the order of the calls.

    A call copies its rows to pinned memory on a separate stream and returns. The backward pass goes on, while a thread
    waits for the copy and sums the rows. At the end of each batch, :meth:`settle` waits for the remaining rows, and
    raises the thread's errors.

    Args:
        moments: Moments on the CPU.
        room: Bytes of rows that may wait.
    """

    def __init__(self, moments: CalibrationMoments, room: int = ROOM) -> None:
        self.moments = moments
        self.needs = moments.needs
        self._room = room
        self._waiting: deque[tuple[str, int, Future[None]]] = deque()
        self._bytes = 0
        self._lock = RLock()  # a model on several devices has a backward thread on each
        self._copies: dict[int, tuple[Tensor, _Copy]] = {}
        self._streams: dict[torch.device, Any] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._refused = False  # the thread refused rows; it does not sum later ones

    @property
    def takes_pairs(self) -> bool:
        """As :meth:`CalibrationMoments.takes_pairs`."""
        return self.moments.takes_pairs

    def add_inputs(self, members: Iterable[str], x: Tensor) -> None:
        """As :meth:`CalibrationMoments.add_inputs`; the rows are summed later."""
        members = tuple(members)
        self._later(f"an activation of layer {members[0]!r}", lambda x: self.moments.add_inputs(members, x), x)

    def move_inputs(self, members: Iterable[str], reached: Iterable[str], x: Tensor) -> None:
        """As :meth:`CalibrationMoments.move_inputs`; the rows are summed later."""
        members, reached = tuple(members), tuple(reached)
        what = f"an activation of layer {members[0]!r}"
        self._later(what, lambda x: self.moments.move_inputs(members, reached, x), x)

    def add_gradients(self, name: str, h: Tensor, scale: float = 1.0) -> None:
        """As :meth:`CalibrationMoments.add_gradients`; the rows are summed later."""
        self._later(f"a gradient of layer {name!r}", lambda h: self.moments.add_gradients(name, h, scale), h)

    def add_pairs(
        self,
        name: str,
        x: Tensor,
        h: Tensor,
        lengths: Sequence[int] | None = None,
        scale: float = 1.0,
        g: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> None:
        """As :meth:`CalibrationMoments.add_pairs`; the rows are summed later."""
        more = {name: rows for name, rows in (("g", g), ("seen", seen)) if rows is not None}

        def add(x: Tensor, h: Tensor, *rows: Tensor) -> None:
            self.moments.add_pairs(name, x, h, lengths, scale, **dict(zip(more, rows, strict=True)))

        self._later(f"a gradient of layer {name!r}", add, x, h, *more.values())

    def projects(self, name: str) -> Literal["inputs", "outputs"] | None:
        """As :meth:`CalibrationMoments.projects`."""
        return self.moments.projects(name)

    def settle(self) -> None:
        """Wait until all rows are summed.

        Raises:
            RowsRefusedError: If some rows are not finite; later rows are not summed.
        """
        with self._lock, undoing() as undo:
            undo.add(self.drop)
            while self._waiting:
                self._finish_oldest()

    def drop(self) -> None:
        """Discard the rows that wait to be summed; safe at any time."""
        with self._lock:
            self._waiting.clear()
            self._bytes = 0
            self._copies.clear()
            if self._thread is not None:
                self._thread.shutdown(cancel_futures=True)
                self._thread = None
            self._refused = False

    def _later(self, what: str, work: Callable[..., None], *rows: Tensor) -> None:
        with self._lock:
            known = [copy for _, copy in self._copies.values()]
            copies = [self._copy(tensor) for tensor in rows]
            # Rows of an earlier call are counted already.
            size = sum(copy.values.nbytes for copy in copies if not any(copy is other for other in known))
            while self._waiting and self._bytes + size > self._room:
                self._finish_oldest()
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="fasc-moments")
            self._waiting.append((what, size, self._thread.submit(self._run, work, copies)))
            self._bytes += size

    def _finish_oldest(self) -> None:
        what, size, future = self._waiting.popleft()
        self._bytes -= size
        try:
            future.result()
        except BaseException as error:
            for _, _, other in self._waiting:
                other.cancel()
            self._waiting.clear()
            self._bytes = 0
            if isinstance(error, FloatingPointError):
                raise RowsRefusedError(what, error) from error
            raise

    @torch.no_grad()
    def _run(self, work: Callable[..., None], copies: Sequence[_Copy]) -> None:
        if self._refused:
            return
        try:
            work(*(copy.wait() for copy in copies))
        except BaseException:
            self._refused = True
            raise

    def _copy(self, rows: Tensor) -> _Copy:
        """Return the rows on the CPU, with one copy of a tensor that several layers or sums use."""
        held = self._copies.get(id(rows))
        if held is not None and held[0] is rows:
            return held[1]
        on_cuda = rows.device.type == "cuda"
        copy = self._copy_from_cuda(rows) if on_cuda else _Copy(rows.detach().to("cpu", copy=True))
        if len(self._copies) >= _SHARED:
            self._copies.pop(next(iter(self._copies)))
        self._copies[id(rows)] = rows, copy
        return copy

    def _copy_from_cuda(self, rows: Tensor) -> _Copy:  # pragma: no cover - for want of a device
        stream = self._streams.setdefault(rows.device, torch.cuda.Stream(rows.device))
        stream.wait_stream(torch.cuda.current_stream(rows.device))
        values = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        with torch.cuda.stream(stream):
            values.copy_(rows.detach(), non_blocking=True)
        # The source is held until it is copied: autograd may write into a gradient that nothing else holds.
        return _Copy(values, rows, stream.record_event())


#: Count of recent tensors that are copied only once: the inputs and gradients of this call and the one before.
_SHARED = 4


class _Copy:
    """Rows on their way to the CPU.

    Args:
        values: Destination.
        source: Source.
        arrived: CUDA event of the finished copy.
    """

    def __init__(self, values: Tensor, source: Tensor | None = None, arrived: Any = None) -> None:
        self.values = values
        self._source = source
        self._arrived = arrived

    def wait(self) -> Tensor:
        """Return the rows once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        self._source = self._arrived = None
        return self.values


def offloaded(moments: CalibrationMoments, device: torch.device) -> MomentSums:
    """Return the moments themselves if they are on the device of the batches, otherwise their :class:`CpuOffload`."""
    return moments if moments.device.type == device.type else CpuOffload(moments)
