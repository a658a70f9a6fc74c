"""Every operation of PyTorch watched: what would make a GPU wait for the CPU is seen on a CPU as well."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """Sees every operation: the largest tensor made anew, and operations that make a GPU wait for the CPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.largest_new, self.waits = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name == "index" else []
        if masks or any(waiting in name for waiting in self.WAITING):
            self.waits.append(name)
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.largest_new = max(self.largest_new, result.numel())
        return result
