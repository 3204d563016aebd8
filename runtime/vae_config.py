"""What defines a VAE of Wan and how its engine is cut: its sizes, and the frames of a chunk."""

from dataclasses import dataclass
from typing import Annotated

from wanexport.runtime.decode import Range

CHUNKS = (1, 2, 3, 4, 5)  # latent frames of a steady call, as a build may choose them
_Size = Annotated[int, Range(1, 1 << 16)]
_Chunk = Annotated[int, Range(1, 64)]


@dataclass(frozen=True)
class VaeConfig:
    """The sizes of a VAE, and the latent frames that a steady call encodes or decodes.

    channels are those of a latent, encoder_dim and decoder_dim the width of the widest picture.
    A residual one is Wan2.2's: it works on patches of 2x2 pixels, and its resampling blocks have
    shortcuts. tf32 lets the convolutions that compute in fp32 round their factors to TF32.
    """

    channels: _Size
    encoder_dim: _Size
    decoder_dim: _Size
    is_residual: bool
    decode_chunk: _Chunk = 1
    encode_chunk: _Chunk = 1
    tf32: bool = False

    @property
    def patch(self) -> int:
        """The side in pixels of what the convolutions see as one."""
        return 2 if self.is_residual else 1

    @property
    def pixel_channels(self) -> int:
        """Colours of a patch."""
        return 3 * self.patch**2

    @property
    def spatial_stride(self) -> int:
        """Pixels of a side for one of the latent."""
        return 8 * self.patch
