"""Numbers from the host to the device that computes, without waiting for either."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def on_device(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Return an array as a tensor on `device`.

    A copy from ordinary memory makes the host wait until the device has done everything before it;
    from pinned memory the copy is queued like any other work. torch keeps the pinned block until
    the copy is done, and uses it again.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
