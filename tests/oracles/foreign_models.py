"""Small models that are not ours, each with inputs, as `wanexport lint module:function` takes them.

diffusers' Wan, its TI2V form and Helios are diffusers' own classes. `OfficialWan` is Wan's forward
as Wan-Video/Wan2.2 `wan/modules/model.py` computes it, written from its formulas: RoPE as a product
in complex128, one timestep repeated for every token, the precision policy as casts. The sizes of
the grid are numbers there: the official forward reads them from a tensor, and is not exported.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import HeliosTransformer3DModel, WanTransformer3DModel
from torch import Tensor, nn

HEADS, HEAD_DIM, LAYERS, FFN = 2, 128, 2, 512
DIM = HEADS * HEAD_DIM
Grid = tuple[int, int, int]  # frames, rows and columns of tokens
GRID = (3, 4, 6)
TEXT = 16  # tokens
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Exported = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class Velocity(nn.Module):
    """A model of diffusers that returns a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.model(*args, **kwargs, return_dict=False)[0]


def random_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in a precision, with weights in which every parameter matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape)
            scale = 0.1 if parameter.dim() < 2 or "table" in name else parameter[0].numel() ** -0.5
            is_gain = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.1 * values if is_gain else scale * values)
    return model.to(dtype).eval().requires_grad_(False)


def latent(dtype: torch.dtype, grid: Grid = GRID, seed: int = 1) -> Tensor:
    """Noise of two by two times the grid."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 16, grid[0], 2 * grid[1], 2 * grid[2])
    return torch.randn(shape, generator=generator).to(dtype)


def text(dtype: torch.dtype) -> Tensor:
    """Embeddings of a prompt, 32 wide."""
    return torch.randn(1, TEXT, 32, generator=torch.Generator().manual_seed(2)).to(dtype)


def diffusers_wan(dtype: torch.dtype = torch.float32, grid: Grid = GRID) -> Exported:
    """diffusers' Wan T2V with one timestep."""
    model = WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, ffn_dim=FFN, num_layers=LAYERS,
        text_dim=32,
    )  # fmt: skip
    args = (latent(dtype, grid), torch.tensor([500.0]), text(dtype))
    return random_weights(Velocity(model), dtype), args, {}


def diffusers_ti2v(dtype: torch.dtype = torch.float32, grid: Grid = GRID) -> Exported:
    """The same with a timestep for each token, as Wan2.2 TI2V-5B has."""
    model, (noise, time, prompt), _ = diffusers_wan(dtype, grid)
    tokens = grid[0] * grid[1] * grid[2]
    return model, (noise, time.expand(1, tokens).contiguous(), prompt), {}


def diffusers_helios(dtype: torch.dtype = torch.float32, grid: Grid = GRID) -> Exported:
    """diffusers' Helios with its three histories."""
    model = HeliosTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, ffn_dim=FFN, num_layers=LAYERS,
        text_dim=32, is_amplify_history=True,
    )  # fmt: skip
    frames = {"long": 16, "mid": 2, "short": 2}
    given: dict[str, Tensor] = {"indices_hidden_states": torch.arange(20, 20 + grid[0])[None]}
    first = 1
    for seed, (name, count) in enumerate(frames.items()):
        given[f"indices_latents_history_{name}"] = torch.arange(first, first + count)[None]
        given[f"latents_history_{name}"] = latent(dtype, (count, *grid[1:]), seed + 5)
        first += count
    args = (latent(dtype, grid), torch.tensor([500]), text(dtype))
    return random_weights(Velocity(model), dtype), args, given


def official_wan(dtype: torch.dtype = torch.float32, grid: Grid = GRID) -> Exported:
    """Wan as the official code computes it."""
    model = random_weights(OfficialWan(grid), torch.float32)
    model.lower(dtype)  # type: ignore[operator]
    return model, (latent(torch.float32, grid), torch.tensor([500.0]), text(dtype)), {}


def axis_turns(length: int, dim: int) -> Tensor:
    """exp(i p 10000^(-2j/dim)) of positions p < length and pairs j < dim/2, complex128."""
    steps = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), steps)
    return torch.polar(torch.ones_like(angles), angles)


def complex_rope(x: Tensor, turns: Tensor, grid: Grid) -> Tensor:
    """Rotate [1, L, H, D] by the position of each token in the grid; fp32."""
    frames, rows, columns = grid
    pairs = x.shape[-1] // 2
    by_axis = turns.split([pairs - 2 * (pairs // 3), pairs // 3, pairs // 3], dim=1)
    rotated = []
    for one in x:
        numbers = torch.view_as_complex(one.to(torch.float64).reshape(*one.shape[:-1], -1, 2))
        of_grid = torch.cat(
            [
                by_axis[0][:frames].view(frames, 1, 1, -1).expand(*grid, -1),
                by_axis[1][:rows].view(1, rows, 1, -1).expand(*grid, -1),
                by_axis[2][:columns].view(1, 1, columns, -1).expand(*grid, -1),
            ],
            dim=-1,
        ).reshape(frames * rows * columns, 1, -1)
        rotated.append(torch.view_as_real(numbers * of_grid).flatten(2))
    return torch.stack(rotated).float()


class Norm(nn.Module):
    """RMS over all heads, in fp32, rounded before the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).type_as(
            x
        ) * self.weight


class OfficialAttention(nn.Module):
    """Attention to the tokens themselves, with RoPE, or to the text."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm_q, self.norm_k = Norm(), Norm()

    def forward(
        self, x: Tensor, attended: Tensor, turns: Tensor | None = None, grid: Grid = GRID
    ) -> Tensor:
        dtype = self.q.weight.dtype
        q, k = self.norm_q(self.q(x.to(dtype))), self.norm_k(self.k(attended.to(dtype)))
        q, k, v = (
            value.unflatten(2, (HEADS, HEAD_DIM)) for value in (q, k, self.v(attended.to(dtype)))
        )
        if turns is not None:
            q, k = complex_rope(q, turns, grid), complex_rope(k, turns, grid)
        q, k, v = (value.to(dtype).transpose(1, 2) for value in (q, k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class OfficialBlock(nn.Module):
    """One block; its input and output are fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation_table = nn.Parameter(torch.zeros(1, 6, DIM))
        self.self_attn, self.cross_attn = OfficialAttention(), OfficialAttention()
        self.norm3 = nn.LayerNorm(DIM, eps=1e-6)
        self.ffn = nn.Sequential(
            nn.Linear(DIM, FFN), nn.GELU(approximate="tanh"), nn.Linear(FFN, DIM)
        )

    def forward(
        self, x: Tensor, steering: Tensor, turns: Tensor, attended: Tensor, grid: Grid
    ) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = (
            part.squeeze(2) for part in (self.modulation_table + steering).chunk(6, dim=2)
        )
        dtype = next(self.ffn.parameters()).dtype
        hidden = (plain_norm(x) * (1 + scale) + shift).to(dtype)
        x = x + self.self_attn(hidden, hidden, turns, grid).float() * gate
        x = x + self.cross_attn(self.norm3(x), attended).float()
        hidden = (plain_norm(x) * (1 + scale2) + shift2).to(dtype)
        return x + self.ffn(hidden).float() * gate2


def plain_norm(x: Tensor) -> Tensor:
    """LayerNorm without parameters, fp32."""
    return F.layer_norm(x.float(), (DIM,), eps=1e-6)


class OfficialWan(nn.Module):
    """T2V: latent [1, 16, F, h, w], timestep [1], text [1, n, 32] -> velocity."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.patch_embedding = nn.Conv3d(16, DIM, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.text_embedding = nn.Sequential(
            nn.Linear(32, DIM), nn.GELU(approximate="tanh"), nn.Linear(DIM, DIM)
        )
        self.time_embedding = nn.Sequential(nn.Linear(256, DIM), nn.SiLU(), nn.Linear(DIM, DIM))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(DIM, 6 * DIM))
        self.blocks = nn.ModuleList(OfficialBlock() for _ in range(LAYERS))
        self.head = nn.Linear(DIM, 64)
        self.head_table = nn.Parameter(torch.zeros(1, 2, DIM))
        side = 2 * (HEAD_DIM // 6)
        axes = (HEAD_DIM - 2 * side, side, side)
        self.freqs = torch.cat([axis_turns(1024, dim) for dim in axes], dim=1)  # no buffer

    def lower(self, dtype: torch.dtype) -> None:
        """What autocast computes in a lower precision; time, norms and head stay fp32."""
        for name, module in self.named_modules():
            is_wide = name.startswith(("time_", "head"))
            if isinstance(module, nn.Linear | nn.Conv3d) and not is_wide:
                module.to(dtype)

    def forward(self, noise: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        dtype = self.patch_embedding.weight.dtype
        x = self.patch_embedding(noise.to(dtype)).flatten(2).transpose(1, 2).float()
        times = timestep.expand(timestep.size(0), x.shape[1])  # a time for each token
        half = torch.arange(128, dtype=torch.float64).div(128)
        angles = torch.outer(times.flatten().to(torch.float64), torch.pow(10000, -half))
        waves = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1).float()
        time = self.time_embedding(waves.unflatten(0, (1, x.shape[1])))
        steering = self.time_projection(time).unflatten(2, (6, DIM))
        attended = self.text_embedding(prompt)
        for block in self.blocks:
            x = block(x, steering, self.freqs, attended, self.grid)
        shift, scale = (
            part.squeeze(2) for part in (self.head_table[:, None] + time[:, :, None]).chunk(2, 2)
        )
        out = self.head(plain_norm(x) * (1 + scale) + shift)
        frames, rows, columns = self.grid
        out = out.view(frames, rows, columns, 1, 2, 2, 16)
        return torch.einsum("fhwpqrc->cfphqwr", out).reshape(1, *noise.shape[1:])


MODELS = {
    "diffusers Wan": diffusers_wan,
    "diffusers Wan, a timestep for each token": diffusers_ti2v,
    "diffusers Helios": diffusers_helios,
    "official Wan": official_wan,
}
