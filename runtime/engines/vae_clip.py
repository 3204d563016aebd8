"""One clip through a VAE: its first frame, then chunks, whatever the caller gives at a time."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from wanexport.runtime.geometry import TEMPORAL_STRIDE
from wanexport.runtime.program import Call, Program
from wanexport.runtime.vae_config import VaeConfig

# What the call of a part at a moment writes, by its names; the state is the caller's.
Run = Callable[[Call, Tensor], Mapping[str, Tensor]]


class Clip:
    """Feeds one of `decode` or `encode` from its first frame on; it serves one caller.

    Frames wait until there are enough for a chunk. A last chunk is filled up with copies of its
    last frame, which is exact: no frame depends on a later one.
    """

    def __init__(self, program: Program, sizes: VaeConfig, part: str, run: Run) -> None:
        calls = {call.name: call for call in program.calls}
        self.calls = {when: calls[f"{part}_{when}"] for when in ("first", "next")}
        self.run, self.is_decoding = run, part == "decode"
        self.chunk = sizes.decode_chunk if self.is_decoding else sizes.encode_chunk
        if not self.is_decoding:
            self.chunk *= TEMPORAL_STRIDE
        self._waiting: Tensor | None = None
        self._has_begun = False

    def feed(self, frames: Tensor) -> Iterator[dict[str, Tensor]]:
        """What each call writes that these frames, [n, height, width, channels], complete."""
        if self._waiting is not None:
            frames = torch.cat([self._waiting, frames])
        self._waiting = None
        if len(frames) and not self._has_begun:
            self._has_begun = True
            yield self._call("first", frames[:1])
            frames = frames[1:]
        while len(frames) >= self.chunk:
            yield self._call("next", frames[: self.chunk])
            frames = frames[self.chunk :]
        if len(frames):
            self._waiting = frames

    def finish(self) -> Iterator[dict[str, Tensor]]:
        """What is written for the frames that wait; the clip is then at its end."""
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        count = len(waiting)
        filling = waiting[-1:].expand(self.chunk - count, *waiting.shape[1:])
        written = self._call("next", torch.cat([waiting, filling]))
        stride = TEMPORAL_STRIDE
        kept = count * stride if self.is_decoding else -(-count // stride)
        yield {name: value[:kept] for name, value in written.items()}

    def _call(self, when: str, frames: Tensor) -> dict[str, Tensor]:
        """The values that the call writes, without the moment in their names."""
        call = self.calls[when]
        written = self.run(call, frames.contiguous())
        return {name.removesuffix(f".{when}"): written[name] for name in call.writes}


def part_of(program: Program, part: str) -> Program:
    """The calls that decode, or those that encode, alone."""
    calls = tuple(call for call in program.calls if call.name.startswith(f"{part}_"))
    kept = {name for call in calls for name in call.state}
    written = {name for call in calls for name in call.writes}
    return Program(
        inputs={name: program.inputs[name] for call in calls for name in call.reads},
        outputs={name: spec for name, spec in program.outputs.items() if name in written},
        calls=calls,
        state={name: spec for name, spec in program.state.items() if name in kept},
        attention=program.attention,
    )
