"""The sampling of chunks around a causal denoiser, with lingbot-world's host reads or without.

Four steps of a chunk, each to x0 and back to noise, then a forward at t = 0 that commits its keys
and values.
"""

import torch
from torch import Tensor

from tests.tables.published.causal import PATCH, TEXT_DIM, CausalWan
from tests.tables.published.causal_cache import Cache, CausalSize, Host, Known, new_caches

STEPS = (0, 179, 358, 679)
TRAINING_STEPS, SHIFT = 1000, 5.0


class Sampler:
    """Sigmas and timesteps on the CPU, as the scheduler of the official code keeps them."""

    def __init__(self, host: Host) -> None:
        last = 1 / TRAINING_STEPS
        linear = torch.linspace(1 - last, 0, TRAINING_STEPS + 1, dtype=torch.float64)[:-1]
        self.sigmas = (SHIFT * linear / (1 + (SHIFT - 1) * linear)).float()
        self.timesteps = (self.sigmas.double() * TRAINING_STEPS).long()
        self.steps = self.timesteps[list(STEPS)]
        self.host = host
        self.known = [self._known(t) for t in self.steps] if host is Host.HOISTED else []

    def _known(self, t: Tensor) -> tuple[float, float, float]:
        """Of a timestep, sigma for x0, then the factors of x0 and of the noise; read once."""
        first = self.sigmas[int(torch.argmin((self.timesteps.double() - t).abs()))]
        second = self.sigmas[self._second(self.timesteps, t)]
        return first.double().item(), (1 - second).item(), second.item()

    @staticmethod
    def _second(timesteps: Tensor, t: Tensor) -> int:
        indices = (timesteps == t).nonzero()
        return int(indices[1 if len(indices) > 1 else 0].item())

    def x0(self, velocity: Tensor, x: Tensor, step: int) -> Tensor:
        """The clean chunk that a velocity points to, computed in fp64."""
        if self.host is Host.HOISTED:
            return (x.double() - self.known[step][0] * velocity.double()).float()
        sigmas, timesteps = (t.double().to(x.device) for t in (self.sigmas, self.timesteps))
        index = torch.argmin((timesteps - self.steps[step]).abs())
        return (x.double() - sigmas[index].reshape(-1, 1) * velocity.double()).float()

    def noised(self, x: Tensor, noise: Tensor, step: int) -> Tensor:
        """The clean chunk with the noise of a step, in fp32."""
        if self.host is Host.HOISTED:
            return self.known[step][1] * x + self.known[step][2] * noise
        sigmas, timesteps = self.sigmas.to(x.device), self.timesteps.to(x.device)
        sigma = sigmas[[self._second(timesteps, self.steps[step].to(x.device))]].unsqueeze(-1)
        return (1 - sigma) * x + sigma * noise


def chunks(model: CausalWan, sampler: Sampler, device: str) -> Tensor:
    """All chunks of a clip from seeded noise, one after the other: [chunks, n, 64]."""
    size = model.size
    generator = torch.Generator(device).manual_seed(42)
    shape = (size.chunks, size.chunk_tokens, PATCH)
    noise = torch.randn(shape, generator=generator, device=device)
    text = torch.randn((1, size.text_len, TEXT_DIM), generator=generator, device=device)
    caches = new_caches(size, device)
    done = [
        _chunk(model, sampler, x, text, caches, number, generator) for number, x in enumerate(noise)
    ]
    return torch.stack(done)


def _chunk(
    model: CausalWan,
    sampler: Sampler,
    x: Tensor,
    text: Tensor,
    caches: list[Cache],
    number: int,
    generator: torch.Generator,
) -> Tensor:
    """One chunk, whose keys and values stay in the caches."""
    zero = 0 * sampler.steps[-1]
    for step, t in enumerate(sampler.steps):
        known = told(model.size, sampler.host, number, step)
        velocity = model(x, t[None].to(x.device), text, caches, known)
        x0 = sampler.x0(velocity, x, step)
        if step + 1 < len(STEPS):
            noise = torch.randn(x.shape, generator=generator, device=x.device)
            x = sampler.noised(x0, noise, step + 1)
    known = told(model.size, sampler.host, number, len(STEPS))
    model(x0, zero[None].to(x.device), text, caches, known)
    return x0


def told(size: CausalSize, host: Host, chunk: int, step: int) -> Known:
    """What the host tells the forward of a step."""
    start, limit = chunk * size.chunk_tokens, size.chunks * size.chunk_tokens
    if host is Host.READ:
        return Known(host, start, limit, None, None)
    return Known(host, start, limit, size.rows * size.columns, chunk == step == 0)
