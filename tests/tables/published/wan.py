"""diffusers' Wan with random weights, its inputs, and the places where a form is put in.

The text-to-video model only. Parameters that diffusers keeps in fp32 stay so.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.tables.published.rope_forms import RotateBoth

HEAD_DIM = 128


@dataclass(frozen=True)
class Size:
    """A model of `layers` blocks, and a video of `frames` x `rows` x `columns` tokens."""

    layers: int
    frames: int
    rows: int
    columns: int
    dtype: torch.dtype
    heads: int = 12
    ffn_dim: int = 8960

    @property
    def tokens(self) -> int:
        """Tokens of the video."""
        return self.frames * self.rows * self.columns

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.tokens} tokens, {self.heads} heads of {HEAD_DIM}, {dtype}"


# 480x832 with 81 frames; and four latent frames of 256x256 through two blocks.
SIZES = {
    "cuda": Size(30, 21, 30, 52, torch.bfloat16),
    "cpu": Size(2, 4, 16, 16, torch.float32),
}


def denoiser(size: Size, device: str) -> Any:
    """A model of seeded random weights; two of the same size are the same."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    with torch.device(device):
        model = WanTransformer3DModel(
            num_attention_heads=size.heads, ffn_dim=size.ffn_dim, num_layers=size.layers
        )
    kept = set(model._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(size.dtype)
    return model.eval().requires_grad_(False)


def inputs(size: Size, device: str) -> dict[str, Any]:
    """Noise, text and a timestep, as the model takes them."""
    generator = torch.Generator(device).manual_seed(1)
    shape = (1, 16, size.frames, 2 * size.rows, 2 * size.columns)
    noise = torch.randn(shape, generator=generator, device=device)
    text = torch.randn((1, 512, 4096), generator=generator, device=device)
    return {
        "hidden_states": noise.to(size.dtype),
        "encoder_hidden_states": text.to(size.dtype),
        "timestep": torch.tensor([812.0], device=device),
        "return_dict": False,
    }


def query_and_key(size: Size, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random query and key [1, L, heads, 128], and diffusers' tables of cos and sin."""
    generator = torch.Generator(device).manual_seed(2)
    shape = (2, 1, size.tokens, size.heads, HEAD_DIM)
    q, k = torch.randn(shape, generator=generator, device=device).to(size.dtype)
    cos, sin = denoiser(replace(size, layers=1), device).rope(inputs(size, device)["hidden_states"])
    return q, k, cos, sin


class Rotating:
    """diffusers' attention processor of a text-to-video model, with another rotation."""

    def __init__(self, rotate: RotateBoth) -> None:
        self.rotate = rotate

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention of the hidden states to themselves, or to the text."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(source))
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, attn.to_v(source)))
        if rotary_emb is not None:
            q, k = self.rotate(q, k, *rotary_emb)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](out.type_as(hidden_states)))


def put(model: Any, rotate: RotateBoth) -> Any:
    """The model with a rotation in every self-attention."""
    for block in model.blocks:
        block.attn1.processor = Rotating(rotate)
    return model


@contextmanager
def as_served(device: str) -> Iterator[None]:
    """No gradients, and on a GPU the attention kernel that is the fastest of PyTorch's."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    order += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with torch.no_grad():
        if device == "cpu":
            yield
            return
        with sdpa_kernel(order, set_priority=True):
            yield
