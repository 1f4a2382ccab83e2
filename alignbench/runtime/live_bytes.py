"""Counts the bytes of tensors, on the device `meta` as well, where nothing is computed."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors that are made inside this context. Tensors on `meta` count as if they had values.

    Attributes:
        now: the bytes that are alive now.
        most: the largest number of bytes that were alive at one time.
    """

    def __init__(self, device: torch.device) -> None:
        """Counts tensors on this device only."""
        super().__init__()
        self.device = device
        self.now = self.most = 0
        self._seen: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tree_map_only(Tensor, lambda t: self._seen.setdefault(t.untyped_storage(), True), (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._made, result)
        return result

    def _made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type == self.device.type and storage not in self._seen:
            self._seen[storage] = True
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, size: int) -> None:
        self.now -= size
