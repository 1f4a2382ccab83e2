"""The processes that train one policy together, one on each device, as `torchrun` or `accelerate launch` starts them.

Each process rolls out and scores its share of the prompts. Forests are gathered, so that all have the same one; each then
answers its share of the rows, and terms are gathered likewise. Every process computes the same loss of all terms: an
objective never learns that there are several. Each sends its part of d(loss)/d(terms) through the model, and gradients are
added up.

What fails in one process fails in all of them, at the same place: `on_all_ranks`. So does a request to end. One process alone
writes files. With one process all of this costs nothing.
"""

import json
import os
import signal
import sys
import threading
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
from alignbench.runtime import launch
from alignbench.runtime.micro_batch import first_line, out_of_memory
from alignbench.runtime.signals import ENDS, deferred_interrupt

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Found = TypeVar("Found")
Item = TypeVar("Item")

SILENCE = 15.0
"""Seconds after which a process that waits for the others at the start says so."""
TIMEOUT = timedelta(hours=2)
"""How long one process waits for another: scorers and files can be slow."""


class Processes:
    """One process, alone; `DistributedProcesses` is one of several.

    Attributes:
        rank: which of them this is.
        count: how many there are.
        sharded: whether each holds a part of the model's weights alone, so that all must ask the model equally often.
        device: where tensors must be to travel between them.
    """

    rank = 0
    count = 1
    sharded = False
    device = torch.device("cpu")

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's part of them, in order. All are as long: the last item is repeated; `unpadded_length` tells how
        many count."""
        each = -(-len(items) // self.count)
        return [items[min(i, len(items) - 1)] for i in range(self.rank * each, (self.rank + 1) * each)]

    def unpadded_length(self, items: Sequence[Item]) -> int:
        """How many at the start of this process's share are no repetitions."""
        each = -(-len(items) // self.count)
        return min(max(len(items) - self.rank * each, 0), each)

    def on_all_ranks(self, work: Callable[[], Found], *, calls_model: bool = False) -> Found:
        """`work()` in each process; what one raises, all raise, with its message.

        Args:
            calls_model: whether work asks the model. With sharded weights the others then wait inside it for the process that
                failed, and cannot be told: it ends, and they with it.
        """
        return work()

    def on_rank_zero(self, work: Callable[[], object]) -> None:
        """`work()` in the first process alone; what it raises, all raise."""
        self.on_all_ranks(lambda: work() if self.is_rank_zero else None)

    def all_gather_object(self, value: Any) -> list[Any]:
        """What each process says, in the order of ranks; anything that JSON can hold."""
        return [value]

    def all_gather(self, values: Tensor) -> list[Tensor]:
        """The tensor of each process, in the order of ranks; they may differ in their first dimension."""
        return [values]

    def all_reduce_sum_(self, tensors: Sequence[Tensor]) -> None:
        """In place: each becomes the sum over processes, to the same bits in all of them."""

    def raised_on_all_ranks(self, error: BaseException) -> bool:
        """Whether all processes raise it, so that they can still work together."""
        return True

    def deferred_interrupt(self) -> AbstractContextManager[None]:
        """While entered, a request to end waits."""
        return deferred_interrupt()


SINGLE_PROCESS = Processes()


def join(device: torch.device, *, sharded: bool = False) -> Processes:
    """The processes that a launcher started together with this one; `SINGLE_PROCESS` where none did.

    Args:
        device: what each trains on; with CUDA each takes a GPU of its own.
    """
    if launch.count() == 1:
        return SINGLE_PROCESS
    from accelerate import PartialState

    with warnings.catch_warnings():
        # It chooses a number of threads and says so; the run's own is set afterwards.
        warnings.filterwarnings("ignore", "OMP_NUM_THREADS", UserWarning)
        with _waiting(), _meeting():
            state = PartialState(cpu=device.type == "cpu", timeout=TIMEOUT, **on_loopback())
    return DistributedProcesses(state.device, sharded=sharded)


def on_loopback() -> dict[str, Any]:
    """How processes that are all on this machine meet, so that none of them listens to others.

    By itself torch's store listens on every interface, and gloo and NCCL on the one that the host's name or they themselves
    choose. GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME say otherwise where they are set. The elastic agent of `torchrun` and
    `accelerate launch` brings a store of its own.
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
    # The store takes the socket over, and closes it.
    listening = launch.listening(int(port)).detach() if launch.is_first() else None
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address, int(port), launch.count(), launch.is_first(), TIMEOUT, master_listen_fd=listening
    )
    return {"store": store, "rank": int(os.environ["RANK"]), "world_size": launch.count()}


@contextmanager
def _waiting() -> Iterator[None]:
    """Says so where the others take long to come: a job that has ended may have left its variables behind."""
    words = f"waiting for the other processes of this run ({launch.meeting_place()}); unset these if no launcher is at work"
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
        raise errors.RunError(f"the processes of this run cannot meet ({place}): {first_line(error)}") from error


class DistributedProcesses(Processes):
    """One of several, in torch's default process group. From here on a request to end is only noted: see `on_all_ranks`."""

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

    def on_all_ranks(self, work: Callable[[], Found], *, calls_model: bool = False) -> Found:
        failure: Exception | None = None
        try:
            found = work()
        except Exception as error:
            if self.sharded and calls_model:
                kind, message = _described(error) or ("", "")
                print(f"alignbench: process {self.rank} ends: {message}", file=sys.stderr)
                raise error if kind == type(error).__name__ else errors.RunError(message) from error
            failure = error
        told = self.all_gather_object([_described(failure), self.asked_to_end])
        failed = [(rank, *described) for rank, (described, _) in enumerate(told) if described]
        if failed:
            rank, kind, message = failed[0]
            own = failure if rank == self.rank else None  # of several failures all raise the same one
            self.raised = own or _KINDS[kind](f"process {rank}: {message}")
            raise self.raised
        if any(asked for _, asked in told) and not self.deferring:
            self.raised = KeyboardInterrupt()
            raise self.raised
        return found

    def all_gather_object(self, value: Any) -> list[Any]:
        text = json.dumps(value).encode()
        data = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy()).to(self.device)
        return [json.loads(bytes(part.cpu().numpy())) for part in self.all_gather(data)]

    def all_gather(self, values: Tensor) -> list[Tensor]:
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.count)]
        with _connected():
            self.dist.all_gather(lengths, torch.tensor([len(values)], device=self.device))
        wanted = [int(length) for length in lengths]
        # Collectives take one shape, and not every backend takes bool.
        sent = values.new_zeros(max(wanted), *values.shape[1:], device=self.device)
        sent[: len(values)] = values
        sent = sent.view(torch.uint8) if values.dtype == torch.bool else sent
        parts = [torch.empty_like(sent) for _ in wanted]
        with _connected():
            self.dist.all_gather(parts, sent)
        return [part.view(values.dtype)[:length].to(values.device) for part, length in zip(parts, wanted, strict=True)]

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
        lost = "another process of this run has ended, or cannot be reached"
        raise errors.RunError(f"{lost}; what it said says why ({first_line(error)})") from error


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
    """The nearest of the kinds of failure that a run knows, and what to say of it."""
    if error is None:
        return None
    if out_of_memory(error):
        return torch.OutOfMemoryError.__name__, first_line(error)
    known = [cls.__name__ for cls in type(error).__mro__ if cls.__name__ in _KINDS]
    return (known[0], str(error)) if known else (errors.RunError.__name__, f"{type(error).__name__}: {first_line(error)}")


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of it alone: torch's DTensor, whose module takes a while to import."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that is spread over the processes, each of which must ask; any other as it is."""
    return cast("DTensor", tensor).full_tensor() if is_sharded(tensor) else tensor


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor, for a parameter that is spread; for any other the tensor as it is."""
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    spread = cast("DTensor", parameter)
    return distribute_tensor(value, spread.device_mesh, spread.placements, src_data_rank=None)


def shutdown() -> None:
    """Ends what `join` began; at the end of a process that nothing failed in."""
    if launch.count() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()
