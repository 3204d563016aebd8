"""The streams of a device beside which layers are copied; those of a CPU do all at once."""

from contextlib import AbstractContextManager, nullcontext

import torch

from wanexport.runtime.engines.layer_ring import Event


class CudaStreams:
    """The caller's current stream, and one for copies. The host waits for neither."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._copying = device, torch.cuda.Stream(device)

    def event(self) -> Event:
        """See Streams."""
        return torch.cuda.Event()

    def computing_records(self, event: Event) -> None:
        """See Streams."""
        event.record(torch.cuda.current_stream(self._device))

    def computing_waits(self, event: Event) -> None:
        """See Streams."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def copying_records(self, event: Event) -> None:
        """See Streams."""
        event.record(self._copying)

    def copying_waits(self, event: Event) -> None:
        """See Streams."""
        self._copying.wait_event(event)

    def copying(self) -> AbstractContextManager[None]:
        """See Streams."""
        return torch.cuda.stream(self._copying)

    def host_waits(self, event: Event) -> None:
        """See CopyStreams."""
        event.synchronize()

    def host_waits_for_copies(self) -> None:
        """Wait until no copy is under way."""
        self._copying.synchronize()


class CpuStreams:
    """A CPU, which has done what it is told when it is told the next."""

    def event(self) -> Event:
        """See Streams."""

    def computing_records(self, event: Event) -> None:
        """See Streams."""

    def computing_waits(self, event: Event) -> None:
        """See Streams."""

    def copying_records(self, event: Event) -> None:
        """See Streams."""

    def copying_waits(self, event: Event) -> None:
        """See Streams."""

    def copying(self) -> AbstractContextManager[None]:
        """See Streams."""
        return nullcontext()

    def host_waits(self, event: Event) -> None:
        """See CopyStreams."""

    def host_waits_for_copies(self) -> None:
        """See CudaStreams."""


def streams_of(device: torch.device) -> CudaStreams | CpuStreams:
    """The streams of a device."""
    return CudaStreams(device) if device.type == "cuda" else CpuStreams()
