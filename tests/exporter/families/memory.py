"""A family of the tests: plain Wan that reads its text once a prompt, and whose blocks remember.

Each layer keeps a vector from step to step: the mean of its tokens, and of what it kept, half each.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from wanexport.graphs.rope import combine_axes
from wanexport.graphs.wan import Block, Conditioning, WanModel
from wanexport.runtime import plain_wan
from wanexport.runtime.family import FAMILIES
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import LAYER, Call, Program, TensorSpec
from wanexport.runtime.wan_config import WanConfig

STATE = f"memory.{LAYER}"
GAIN = f"blocks.{LAYER}.memory_gain"


def program(config: WanConfig, geometry: Geometry) -> Program:
    """Plain Wan's, with a call for the text and a state of each block."""
    plain = plain_wan.program(config, geometry, per_frame=False)
    embed, block, head = plain.calls
    of_text = tuple(name for name in embed.parameters if name.startswith("text_embedding."))
    others = tuple(name for name in embed.parameters if name not in of_text)
    calls = (
        Call("read_text", ("text",), ("context",), of_text, when="prompt"),
        replace(
            embed,
            reads=("latent", "timestep"),
            writes=tuple(name for name in embed.writes if name != "context"),
            parameters=others,
        ),
        replace(block, parameters=(*block.parameters, GAIN), state=(STATE,)),
        head,
    )
    return replace(plain, calls=calls, state={STATE: TensorSpec((1, config.dim))})


def parameters(config: WanConfig) -> Mapping[str, tuple[int, ...]]:
    """Plain Wan's, and a gain of each block's memory."""
    gains = {GAIN.replace(LAYER, str(i)): (config.dim,) for i in range(config.num_layers)}
    return {**plain_wan.parameter_shapes(config), **gains}


class MemoryBlock(Block):
    """A block that adds what it remembers to its input, and remembers the mean of its output."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config)
        self.memory_gain = nn.Parameter(torch.empty(config.dim))

    def forward(self, x: Tensor, cond: object, memory: Tensor) -> Tensor:  # type: ignore[override]
        x = super().forward(x + self.memory_gain.float() * memory, cond)  # type: ignore[arg-type]
        memory.copy_(0.5 * (memory + x.mean(dim=1)))
        return x


class MemoryWan(WanModel):
    """Plain Wan in four calls; its block takes `memory`."""

    describe = staticmethod(program)

    def __init__(
        self, config: WanConfig, geometry: Geometry, dtype: torch.dtype, fused: bool = False
    ) -> None:
        super().__init__(config, geometry, dtype)
        self.blocks = nn.ModuleList(MemoryBlock(config) for _ in range(config.num_layers))
        self.freeze()

    def read_text(self, text: Tensor) -> dict[str, Tensor]:
        """The text [1, n, text_dim] -> what the blocks attend to."""
        return {"context": self.text_embedding(text)}

    def embed(self, latent: Tensor, timestep: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """What plain Wan's embedding writes, but for the text."""
        time, modulation = self.embed_time(timestep)
        cos, sin = combine_axes(self.rope_frames, self.rope_rows, self.rope_columns)
        x = self.patch_embedding(self.patchify(latent))[None]
        return {"x": x, "time": time, "modulation": modulation, "cos": cos, "sin": sin}

    def block(  # type: ignore[override]
        self, index: int, x: Tensor, memory: Tensor, **conditioning: Tensor
    ) -> dict[str, Tensor]:
        """The residual stream after one layer, whose memory is written."""
        return {"x": self.blocks[index](x, Conditioning(**conditioning), memory)}


FAMILY = replace(
    FAMILIES["t2v"],
    program=program,
    parameters=parameters,
    graph=f"{__name__}:{MemoryWan.__name__}",
)
