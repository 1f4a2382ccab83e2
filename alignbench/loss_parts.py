"""Additive parts of a loss: an objective marks them, and the training measures the gradient of each."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor


class LossParts:
    """The parts that a loss marks while it is computed.

    Attributes:
        names: the marked parts, in the order in which they were marked.
        only: the one part that counts; None while all do. An empty text leaves what is not marked.
    """

    def __init__(self, only: str | None = None) -> None:
        self.names: list[str] = []
        self.only = only


_measured: ContextVar[LossParts | None] = ContextVar("measured parts of a loss", default=None)


def loss_part(name: str, value: Tensor) -> Tensor:
    """Marks a tensor that enters the loss as a summand, or linearly, as a part of the loss; returns it unchanged.

    While the parts are measured, all but one of them are multiplied by 0.

    Args:
        name: the setting that is the part's weight, such as `kl_beta`, or a word, such as `policy`. A part that is switched off
            by a weight of 0 is not marked, since it is not meant to act.
    """
    measured = _measured.get()
    if measured is None:
        return value
    if name not in measured.names:
        measured.names.append(name)
    return value if measured.only in (None, name) else value * 0.0


@contextmanager
def measured_parts(only: str | None = None) -> Iterator[LossParts]:
    """While entered, `loss_part` notes the parts, and only one of them counts if it is named."""
    parts = LossParts(only)
    token = _measured.set(parts)
    try:
        yield parts
    finally:
        _measured.reset(token)
