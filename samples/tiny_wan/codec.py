"""A small pixel codec in the VAE's place, with the strides and the channels of Wan2.1's.

Frames are cut into blocks of 4 x 8 x 8 pixels, the first frame alone being repeated four times.
The encoder is linear, the first 16 principal components of blocks about the background; the decoder
is a small convolutional network, which sees neighbouring blocks and makes edges sharp again.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanexport.runtime.arrays import to_numpy
from wanexport.runtime.bundle.tensorfile import load_arrays

CHANNELS, TIME, SPACE = 16, 4, 8
BLOCK = 3 * TIME * SPACE**2  # values


def to_blocks(video: Tensor) -> Tensor:
    """Blocks [B, f, h, w, 768] of a video [B, 3, 4 f - 3, 8 h, 8 w]."""
    video = torch.cat([video[:, :, :1].expand(-1, -1, TIME - 1, -1, -1), video], 2)
    batch, colours, frames, height, width = video.shape
    split = (frames // TIME, TIME, height // SPACE, SPACE, width // SPACE, SPACE)
    blocks = video.view(batch, colours, *split).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return blocks.reshape(*blocks.shape[:4], BLOCK)


def from_blocks(blocks: Tensor) -> Tensor:
    """The inverse of `to_blocks`; of the first four frames, the last is kept."""
    batch, frames, height, width, _ = blocks.shape
    split = blocks.view(batch, frames, height, width, 3, TIME, SPACE, SPACE)
    video = split.permute(0, 4, 1, 5, 2, 6, 3, 7)
    video = video.reshape(batch, 3, frames * TIME, height * SPACE, width * SPACE)
    return video[:, :, TIME - 1 :]


class Decoder(nn.Module):
    """Latents [B, 16, f, h, w] -> video [B, 3, 4 f - 3, 8 h, 8 w], about in [-1, 1].

    The sum of a linear map of each block alone and of a correction that sees its neighbours.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        half, quarter = 3 * width // 8, 3 * width // 16
        self.linear = nn.Linear(CHANNELS, BLOCK)
        self.frame = 3 * width // 4  # channels of a frame before it is enlarged
        self.enter = nn.Conv3d(CHANNELS, width, 3, padding=1)
        self.mix = nn.Conv3d(width, width, 3, padding=1)
        self.split = nn.Conv3d(width, TIME * self.frame, 1)
        self.coarse = nn.Conv2d(self.frame, self.frame, 3, padding=1)
        self.up2 = nn.Conv2d(self.frame, 4 * half, 3, padding=1)
        self.middle = nn.Conv2d(half, half, 3, padding=1)
        self.up4 = nn.Conv2d(half, 4 * quarter, 3, padding=1)
        self.up8 = nn.Conv2d(quarter, 4 * 3, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """Decode; the correction's frames are enlarged in three steps of two."""
        batch, _, frames, height, width = latent.shape
        x = F.gelu(self.enter(latent))
        x = x + F.gelu(self.mix(x))
        x = self.split(x).view(batch, TIME, self.frame, frames, height, width)
        x = x.permute(0, 3, 1, 2, 4, 5).reshape(-1, self.frame, height, width)
        x = x + F.gelu(self.coarse(x))
        x = F.gelu(F.pixel_shuffle(self.up2(x), 2))
        x = x + F.gelu(self.middle(x))
        x = F.gelu(F.pixel_shuffle(self.up4(x), 2))
        x = F.pixel_shuffle(self.up8(x), 2)
        video = x.view(batch, frames * TIME, 3, *x.shape[2:]).transpose(1, 2)
        return from_blocks(self.linear(latent.permute(0, 2, 3, 4, 1))) + video[:, :, TIME - 1 :]


class CodecNet(nn.Module):
    """Encoder and decoder on batches; its parameters and buffers are the codec's file."""

    components: Tensor
    ground: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("components", torch.zeros(CHANNELS, BLOCK))
        self.register_buffer("ground", torch.zeros(BLOCK))
        self.decoder = Decoder()

    def encode(self, video: Tensor) -> Tensor:
        """Latents [B, 16, f, h, w] of a video [B, 3, F, H, W] in [-1, 1]."""
        return F.linear(to_blocks(video) - self.ground, self.components).permute(0, 4, 1, 2, 3)

    def decode(self, latent: Tensor) -> Tensor:
        """Video [B, 3, F, H, W], about in [-1, 1], of latents [B, 16, f, h, w]."""
        video: Tensor = self.decoder(latent)
        return video


class PixelCodec:
    """The codec of the tiny model, from its file, for single videos."""

    channels, spatial_stride = CHANNELS, SPACE

    def __init__(self, path: Path, *, device: str = "cpu") -> None:
        self.net = CodecNet()
        arrays = load_arrays(path)
        state = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
        self.net.load_state_dict(state)
        self.net.to(device).requires_grad_(False)

    def encode(self, video: np.ndarray) -> np.ndarray:
        """Latent [1, 16, f, h, w] in fp32 of a video [3, F, H, W] in [-1, 1]."""
        device = self.net.ground.device
        return self.net.encode(torch.as_tensor(video, device=device)[None]).cpu().numpy()

    def decode(self, latent: np.ndarray | Tensor) -> np.ndarray:
        """Frames [F, H, W, 3] in uint8 of a latent [1, 16, f, h, w]."""
        device = self.net.ground.device
        video = self.net.decode(torch.as_tensor(to_numpy(latent), device=device))
        return to_uint8(video)[0].cpu().numpy()

    def close(self) -> None:
        """The codec is small: it stays open."""


def to_uint8(video: Tensor) -> Tensor:
    """Frames [B, F, H, W, 3] in uint8 of a video [B, 3, F, H, W] in [-1, 1]."""
    scaled = ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 4, 1)
