"""How far the host runs ahead of the device."""

from __future__ import annotations

from collections import deque

import torch

__all__ = ["HostLead"]


class HostLead:
    """Lets the host launch at most two steps that the device has not finished.

    Two keep the device busy. More would only hold memory for batches that wait, and make a signal
    or an error wait for every step that is already launched. On a CPU there is nothing to do.

    Args:
        device: that the steps run on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._launched: deque[torch.cuda.Event] = deque()

    def wait(self) -> None:
        """To be called before a step: waits until only one is under way."""
        if len(self._launched) == 2:
            self._launched.popleft().synchronize()

    def mark(self) -> None:
        """To be called when a step is launched, on its stream."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(blocking=True)  # sleeps, and leaves the core to the loader
            event.record(torch.cuda.current_stream(self._device))
            self._launched.append(event)
