"""The ranks that train one policy together, one on each device, as `torchrun` or `accelerate launch` starts them.

Each rank rolls out and scores its share of the prompts. Forests are gathered, so that all ranks have the same one. Each rank
then evaluates its share of the rows, and the terms are gathered in the same way. Every rank computes the same loss of all
terms, so an objective does not know that there are several ranks. Each rank sends its part of d(loss)/d(terms) through the
model, and the gradients are summed.

What fails on one rank fails on all of them, at the same place: see `on_all_ranks`. The same holds for a request to end. Only
rank zero writes files. With a single process all of this costs nothing.
"""

import atexit
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from alignbench import errors
from alignbench.errors import first_line
from alignbench.runtime import launch
from alignbench.runtime.micro_batch import out_of_memory
from alignbench.runtime.signals import ENDS, deferred_interrupt

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Result = TypeVar("Result")
Item = TypeVar("Item")

SILENCE = 15.0
"""Seconds after which a rank that waits for the others at the start says so."""
SETTLING = 0.2
"""Seconds that a rank waits at its end for the threads of gloo to free their tensors."""
TIMEOUT = timedelta(hours=2)
"""How long one rank waits for another. It is long because scorers and files can be slow."""


class Processes:
    """A single process. `DistributedProcesses` is the same for one rank of several.

    Attributes:
        rank: the rank of this process.
        count: the number of ranks.
        sharded: whether each rank holds only a part of the model's weights, so that all must call the model equally often.
        device: the device on which tensors must be to be sent between ranks.
    """

    rank = 0
    count = 1
    sharded = False
    device = torch.device("cpu")

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This rank's part of the items, in order. All parts have the same length: the last item is repeated as padding, which
        `unpadded_length` does not count."""
        each = -(-len(items) // self.count)
        return [items[min(i, len(items) - 1)] for i in range(self.rank * each, (self.rank + 1) * each)]

    def unpadded_length(self, items: Sequence[Item]) -> int:
        """The number of items in this rank's part without the padding."""
        each = -(-len(items) // self.count)
        return min(max(len(items) - self.rank * each, 0), each)

    def on_all_ranks(self, work: Callable[[], Result], *, calls_model: bool = False) -> Result:
        """Runs `work` on every rank; if it raises on one rank, it raises on all of them, with the same message.

        Args:
            work: the function to run.
            calls_model: whether `work` calls the model. With sharded weights the other ranks then wait inside the model for the
                rank that failed and cannot be informed, so that rank ends its process, and the others end as well.
        """
        return work()

    def on_rank_zero(self, work: Callable[[], object]) -> None:
        """Runs `work` on rank zero only; if it raises, all ranks raise."""
        self.on_all_ranks(lambda: work() if self.is_rank_zero else None)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Gathers a value from each rank, in the order of ranks; a value can be anything that JSON can represent."""
        return [value]

    def all_gather(self, values: Tensor) -> list[Tensor]:
        """Gathers a tensor from each rank, in the order of ranks; their first dimensions may differ."""
        return [values]

    def all_reduce_sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor, in place, by its sum over ranks, with the same bits on all ranks."""

    def raised_on_all_ranks(self, error: BaseException) -> bool:
        """Whether all ranks raise this error, so that they can still communicate."""
        return True

    def deferred_interrupt(self) -> AbstractContextManager[None]:
        """Delays a request to end until the context is left."""
        return deferred_interrupt()


SINGLE_PROCESS = Processes()


def join(device: torch.device, *, sharded: bool = False) -> Processes:
    """Joins the ranks that a launcher started; without a launcher this is `SINGLE_PROCESS`.

    Args:
        device: the device that each rank trains on; with CUDA each rank takes a GPU of its own.
        sharded: whether each rank will hold only a part of the model's weights.

    Raises:
        RunError: the ranks cannot connect.
    """
    if launch.count() == 1:
        return SINGLE_PROCESS
    from accelerate import PartialState

    with warnings.catch_warnings():
        # PartialState sets a number of threads and warns about it; the run sets its own number afterwards.
        warnings.filterwarnings("ignore", "OMP_NUM_THREADS", UserWarning)
        with _waiting(), _meeting():
            state = PartialState(cpu=device.type == "cpu", timeout=TIMEOUT, **on_loopback())
    if state.device.type == "cpu":
        # The threads of gloo need Python to free the tensors of the last collective. If it has ended, they abort the process.
        # They live on after `shutdown`, since functions of torch and sharded models keep the group.
        atexit.register(time.sleep, SETTLING)
    return DistributedProcesses(state.device, sharded=sharded)


def on_loopback() -> dict[str, Any]:
    """Options that make ranks on one machine connect over the loopback interface, so that no other machine can connect.

    By default torch's store listens on every interface; gloo and NCCL listen on the interface of the host's name or choose one.
    GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME are respected if they are set. The elastic agent of `torchrun` and
    `accelerate launch` has a store of its own.
    """
    import torch.distributed as dist

    if launch.on_this_machine() != launch.count() or dist.is_initialized():
        return {}
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if interface := launch.loopback_interface():
            os.environ.setdefault(variable, interface)
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if address != launch.LOOPBACK or not port or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return {}
    # The store takes over the socket and closes it.
    listening = launch.listening(int(port)).detach() if launch.is_first() else None
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address, int(port), launch.count(), launch.is_first(), TIMEOUT, master_listen_fd=listening
    )
    return {"store": store, "rank": int(os.environ["RANK"]), "world_size": launch.count()}


@contextmanager
def _waiting() -> Iterator[None]:
    """Prints a line if the other ranks take long to connect: variables may be left over from a job that has ended."""
    words = (
        f"waiting for the other processes of this run ({launch.meeting_place()}); unset these variables if there is no launcher"
    )
    timer = threading.Timer(SILENCE, lambda: print(f"alignbench: {words}", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _meeting() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        place = launch.meeting_place()
        raise errors.RunError(f"the processes of this run cannot connect ({place}): {first_line(error)}") from error


class DistributedProcesses(Processes):
    """One rank of several, in torch's default process group. It records a request to end, on which `on_all_ranks` acts."""

    def __init__(self, device: torch.device, *, sharded: bool = False) -> None:
        import torch.distributed as dist

        self.dist, self.device, self.sharded = dist, device, sharded
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.raised: BaseException | None = None
        self.asked_to_end = False
        self.deferring = 0
        for number in ENDS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked_to_end = True

    def on_all_ranks(self, work: Callable[[], Result], *, calls_model: bool = False) -> Result:
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            if self.sharded and calls_model:
                kind, message = _described(error) or ("", "")
                print(f"alignbench: rank {self.rank} ends: {message}", file=sys.stderr)
                if kind == type(error).__name__ and not out_of_memory(error):
                    raise
                raise errors.RunError(message) from error  # also where memory ran out: this rank cannot try again alone
            failure = error
        states = self.all_gather_object([_described(failure), self.asked_to_end])
        failed = [(rank, *described) for rank, (described, _) in enumerate(states) if described]
        if failed:
            rank, kind, message = failed[0]
            own = failure if rank == self.rank else None  # if several ranks fail, all raise the same error
            self.raised = own or _KINDS[kind](f"rank {rank}: {message}")
            raise self.raised
        if any(asked for _, asked in states) and not self.deferring:
            self.raised = KeyboardInterrupt()
            raise self.raised
        return result

    def all_gather_object(self, value: Any) -> list[Any]:
        text = json.dumps(value).encode()
        data = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy()).to(self.device)
        return [json.loads(bytes(part.cpu().numpy())) for part in self.all_gather(data)]

    def all_gather(self, values: Tensor) -> list[Tensor]:
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.count)]
        with _connected():
            self.dist.all_gather(lengths, torch.tensor([len(values)], device=self.device))
        sizes = [int(length) for length in lengths]
        # Collectives need equal shapes, and not every backend supports bool.
        sent = values.new_zeros(max(sizes), *values.shape[1:], device=self.device)
        sent[: len(values)] = values
        sent = sent.view(torch.uint8) if values.dtype == torch.bool else sent
        parts = [torch.empty_like(sent) for _ in sizes]
        with _connected():
            self.dist.all_gather(parts, sent)
        return [part.view(values.dtype)[:length].to(values.device) for part, length in zip(parts, sizes, strict=True)]

    def all_reduce_sum_(self, tensors: Sequence[Tensor]) -> None:
        with _connected():
            for work in [self.dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def raised_on_all_ranks(self, error: BaseException) -> bool:
        cause: BaseException | None = error
        while cause is not None and cause is not self.raised:
            cause = cause.__cause__
        return cause is not None

    @contextmanager
    def deferred_interrupt(self) -> Iterator[None]:
        self.deferring += 1
        try:
            yield
        finally:
            self.deferring -= 1


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        lost = "another process of this run has ended or cannot be reached"
        raise errors.RunError(f"{lost}; see its log for the cause ({first_line(error)})") from error


_KINDS: dict[str, Callable[[str], Exception]] = {
    kind.__name__: kind
    for kind in (
        errors.UserError,
        errors.RunError,
        errors.ScorerError,
        errors.DiskError,
        errors.NonFiniteError,
        torch.OutOfMemoryError,
    )
}


def _described(error: Exception | None) -> tuple[str, str] | None:
    """The name of the closest known class of failure, and its message."""
    if error is None:
        return None
    if out_of_memory(error):
        return torch.OutOfMemoryError.__name__, first_line(error)
    known = [cls.__name__ for cls in type(error).__mro__ if cls.__name__ in _KINDS]
    return (known[0], str(error)) if known else (errors.RunError.__name__, f"{type(error).__name__}: {first_line(error)}")


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only a part of the tensor (a DTensor, whose module is slow to import)."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; every rank must call this. Any other tensor is returned unchanged."""
    return cast("DTensor", tensor).full_tensor() if is_sharded(tensor) else tensor


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a whole tensor, sharded like the parameter. It is returned unchanged for an unsharded parameter."""
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded = cast("DTensor", parameter)
    return distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)


def shutdown() -> None:
    """Leaves the process group that `join` entered, at the end of a process without a failure."""
    if launch.count() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()
