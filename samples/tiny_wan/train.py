"""Train the tiny Wan and its pixel codec on drawn clips, and write them as an official checkpoint.

    python -m samples.tiny_wan.train FOLDER [--minutes 5] [--seed 0]

from the repository's root, on a GPU; diffusers and Pillow must be installed. Writes config.json,
diffusion_pytorch_model.safetensors, codec.safetensors, loss.csv, training.json and, for looking
at, contact_sheet.png, sampled.npz of 200 latents sampled from the result and, where Matplotlib is
installed, loss.png.
"""

import argparse
import csv
import io
import json
import platform
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from samples.tiny_wan.clips import CAPTIONS, SIDE, draw
from samples.tiny_wan.codec import CHANNELS, CodecNet, to_blocks, to_uint8
from samples.tiny_wan.contact_sheet import contact_sheet
from samples.tiny_wan.loss_plot import loss_plot
from samples.tiny_wan.words import TEXT_DIM, TEXT_LEN, WordEmbeddings
from wanexport.runtime.bundle.durable import durable_file, write_durably
from wanexport.runtime.bundle.tensorfile import make_header
from wanexport.runtime.wan_keys import official_name

HEADS, HEAD_DIM, FFN_DIM, LAYERS, FREQ_DIM = 2, 128, 768, 4, 256
SHIFT = 5.0  # of the noise levels, in training and in sampling
SAMPLED = 200  # clips of the report
LATENT = (CHANNELS, 5, SIDE // 8, SIDE // 8)
LOG_EVERY, TIMED = 50, (20, 60)  # steps


@dataclass
class Settings:
    """What a run is told."""

    seed: int
    steps: int
    batch: int
    learning_rate: float
    codec_steps: int
    codec_batch: int
    codec_learning_rate: float
    minutes: float
    compiled: bool
    device: str


def main() -> None:
    """Train, write, and sample."""
    folder, settings = parse()
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    started = time.monotonic()
    codec, psnr = train_codec(settings, generator)
    codec_seconds = time.monotonic() - started
    print(f"codec: {psnr:.1f} dB on 64 new clips, {codec_seconds:.0f} s", flush=True)
    model, losses = train_denoiser(settings, codec, generator, started)
    seconds = time.monotonic() - started
    write_durably(folder / "loss.csv", losses_csv(losses))
    if find_spec("matplotlib"):
        write_durably(folder / "loss.png", loss_plot(losses))
    write_fp16(folder / "codec.safetensors", codec.state_dict())
    named = {official_name(name): value for name, value in model.state_dict().items()}
    write_fp16(folder / "diffusion_pytorch_model.safetensors", named)
    write_json(folder / "config.json", config())
    report = {"codec_psnr": psnr, "codec_seconds": codec_seconds, "seconds": seconds}
    last = float(np.mean([loss for _, loss in losses[-10:]]))
    write_json(folder / "training.json", record(settings, {**report, "loss": last}))
    write_samples(folder, model.to(settings.device), codec, generator, settings.seed)


def parse() -> tuple[Path, Settings]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12000, help="at most, of the denoiser")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--codec-steps", type=int, default=2500)
    parser.add_argument("--codec-batch", type=int, default=32)
    parser.add_argument("--codec-learning-rate", type=float, default=2e-3)
    parser.add_argument("--minutes", type=float, default=5, help="in all; lowers the steps")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = vars(parser.parse_args())
    folder, given["compiled"] = given.pop("folder"), not given.pop("no_compile")
    return folder, Settings(**given)


def random_captions(count: int, generator: torch.Generator) -> Tensor:
    """Indices [count] into CAPTIONS."""
    return torch.randint(len(CAPTIONS), (count,), generator=generator, device=generator.device)


def random_clips(count: int, generator: torch.Generator) -> Tensor:
    """Clips [count, 3, F, H, W] of random captions."""
    return draw(random_captions(count, generator), generator)


def schedule(optimizer: torch.optim.Optimizer, step: int, steps: int, peak: float) -> None:
    """Set the learning rate: linear over the first 3 %, then a half cosine to 0."""
    warm = max(1, min(300, steps * 3 // 100))
    rate = min(1.0, (step + 1) / warm) * 0.5 * (1 + np.cos(np.pi * min(1.0, step / steps)))
    for group in optimizer.param_groups:
        group["lr"] = peak * rate


def train_codec(settings: Settings, generator: torch.Generator) -> tuple[CodecNet, float]:
    """Fit the encoder, train the decoder; the codec, rounded to fp16, and its PSNR in dB."""
    net = CodecNet().to(settings.device)
    fit_encoder(net, generator)
    optimizer = torch.optim.AdamW(net.decoder.parameters(), weight_decay=1e-4)
    for step in range(settings.codec_steps):
        schedule(optimizer, step, settings.codec_steps, settings.codec_learning_rate)
        clips = random_clips(settings.codec_batch, generator)
        latents = net.encode(clips)
        # Sampled latents are never exact: the decoder learns to see through small errors.
        size = 0.1 * torch.rand(len(clips), 1, 1, 1, 1, generator=generator, device=clips.device)
        error = net.decode(latents + size * normal(latents.shape, generator)) - clips
        loss = error.abs().mean() + 2 * error.square().mean()
        update(net.decoder, optimizer, loss)
        if step % 500 == 0:
            print(f"codec step {step}: loss {loss.item():.4f}", flush=True)
    net.half().float().requires_grad_(False)
    clips = random_clips(64, generator)
    errors = [net.decode(net.encode(part)).clamp(-1, 1) - part for part in clips.split(16)]
    mean_square = torch.cat(errors).square().mean().item() / 4  # of values in [0, 1]
    return net, -10 * float(np.log10(mean_square))


def fit_encoder(net: CodecNet, generator: torch.Generator) -> None:
    """Principal components, about the background, of blocks that show some of a shape.

    Each is scaled to mean square 1 over these blocks, so that the background is 0. Over all blocks,
    of which few show anything, a shape would stand out of the noise in the first step already.
    The decoder starts as the pseudo-inverse.
    """
    blocks = torch.cat([to_blocks(random_clips(32, generator)).flatten(0, 3) for _ in range(8)])
    ground = blocks[:1000].median(0).values
    painted = (blocks - ground)[(blocks - ground).abs().amax(1) > 0.05].double()
    values, vectors = torch.linalg.eigh((painted.T @ painted / len(painted)).cpu())
    values, vectors = values[-CHANNELS:].flip(0), vectors[:, -CHANNELS:].flip(1)
    # A component's sign is arbitrary: its largest value is made positive.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    net.components.copy_((vectors * largest.sign() / values.sqrt()).T)
    net.ground.copy_(ground)
    with torch.no_grad():
        net.decoder.linear.weight.copy_(vectors * largest.sign() * values.sqrt())
        net.decoder.linear.bias.copy_(ground)
        for value in net.decoder.up8.parameters():
            value.zero_()


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal noise."""
    return torch.randn(shape, generator=generator, device=generator.device)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of the optimizer on clipped gradients."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def new_denoiser() -> WanTransformer3DModel:
    """diffusers' Wan with its own initialisation; the head starts at zero."""
    model = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=FREQ_DIM,
        ffn_dim=FFN_DIM,
        num_layers=LAYERS,
    )
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    # Of 512 rows five are words. Zero rows start with keys and values of zero, and the words with
    # logits of deviation 3, or attention would hardly see them.
    text = model.condition_embedder.text_embedder
    attentions = [block.attn2 for block in model.blocks]
    for linear in (text.linear_1, text.linear_2, *(a.to_k for a in attentions)):
        nn.init.zeros_(linear.bias)
    for attention in attentions:
        nn.init.zeros_(attention.to_v.bias)
        nn.init.constant_(attention.norm_q.weight, 3**0.5)
        nn.init.constant_(attention.norm_k.weight, 3**0.5)
    # As in Wan, the residual stream stays fp32 where matrix products run in bf16.
    model.patch_embedding.register_forward_hook(lambda module, inputs, output: output.float())
    return model


def padded_texts(device: str) -> Tensor:
    """Text embeddings [len(CAPTIONS), 512, 4096] in bf16, which holds them exactly."""
    rows = WordEmbeddings()(CAPTIONS)
    texts = torch.zeros(len(CAPTIONS), TEXT_LEN, TEXT_DIM, dtype=torch.bfloat16)
    for text, row in zip(texts, rows, strict=True):
        text[: len(row)] = torch.from_numpy(row)
    return texts.to(device)


def train_denoiser(
    settings: Settings, codec: CodecNet, generator: torch.Generator, started: float
) -> tuple[WanTransformer3DModel, list[tuple[int, float]]]:
    """Flow matching; the averaged model, and the mean loss of every 50 steps.

    Lowers settings.steps to what the minutes allow, by the time of the first steps.
    """
    model = new_denoiser().to(settings.device)
    average = deepcopy(model).requires_grad_(False)
    if settings.compiled:
        model.compile_repeated_blocks(fullgraph=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=settings.device != "cpu"
    )
    losses: list[tuple[int, float]] = []
    recent = torch.zeros((), device=settings.device)
    step, clock = 0, 0.0
    for step, loss in enumerate(flow_losses(model, codec, settings, generator)):
        schedule(optimizer, step, settings.steps, settings.learning_rate)
        update(model, optimizer, loss)
        follow(average, model, min(0.999, (step + 1) / (step + 10)))
        recent += loss.detach()
        if (step + 1) % LOG_EVERY == 0:
            losses.append((step + 1, recent.item() / LOG_EVERY))
            recent.zero_()
        if (step + 1) % 500 == 0:
            print(f"step {step + 1}: loss {losses[-1][1]:.4f}", flush=True)
        if step == TIMED[0]:
            clock = finished(settings.device)
        elif step == TIMED[1]:
            limit_steps(settings, finished(settings.device) - clock, started)
        if step + 1 >= settings.steps:
            break
    return average, losses


def finished(device: str) -> float:
    """The time at which the device has done all that it was given."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.monotonic()


def limit_steps(settings: Settings, timed: float, started: float) -> None:
    """Lower the number of steps to what is left of the minutes."""
    each = timed / (TIMED[1] - TIMED[0])
    left = settings.minutes * 60 - (time.monotonic() - started)
    settings.steps = max(TIMED[1] + 1, min(settings.steps, TIMED[1] + int(left / each)))
    print(f"{each * 1000:.1f} ms a step: {settings.steps} steps", flush=True)


def flow_losses(
    model: nn.Module, codec: CodecNet, settings: Settings, generator: torch.Generator
) -> Iterator[Tensor]:
    """The loss of one new batch after another.

    x = (1 - sigma) x0 + sigma noise, and the model predicts noise - x0 at timestep 1000 sigma.
    """
    texts = padded_texts(settings.device)
    while True:
        captions = random_captions(settings.batch, generator)
        with torch.no_grad():
            clean = codec.encode(draw(captions, generator))
        uniform = torch.rand(len(captions), generator=generator, device=settings.device)
        sigma = shifted(uniform)
        level = sigma.view(-1, 1, 1, 1, 1)
        noise = normal(clean.shape, generator)
        noisy = (1 - level) * clean + level * noise
        with torch.autocast(settings.device, torch.bfloat16):
            (velocity,) = model(noisy, 1000 * sigma, texts[captions], return_dict=False)
        yield F.mse_loss(velocity.float(), noise - clean)


def shifted(sigma: Tensor) -> Tensor:
    """Wan's shift of noise levels in [0, 1] towards 1."""
    return SHIFT * sigma / (1 + (SHIFT - 1) * sigma)


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the running average of the weights."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def losses_csv(losses: list[tuple[int, float]]) -> bytes:
    """The loss curve."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("step", "loss"))
    writer.writerows((step, f"{loss:.5f}") for step, loss in losses)
    return text.getvalue().encode()


def config() -> dict[str, object]:
    """config.json, as the official checkpoints have it."""
    sizes = {"dim": HEADS * HEAD_DIM, "ffn_dim": FFN_DIM, "freq_dim": FREQ_DIM}
    sizes |= {"in_dim": CHANNELS, "out_dim": CHANNELS, "num_heads": HEADS, "num_layers": LAYERS}
    return {"_class_name": "WanModel", "model_type": "t2v", "eps": 1e-6, "text_len": 512} | sizes


def record(settings: Settings, results: dict[str, float]) -> dict[str, object]:
    """What the run was, for repeating and judging it."""
    versions = {m.__name__: m.__version__ for m in (torch, diffusers, np)}
    gpu = torch.cuda.get_device_name() if settings.device != "cpu" else platform.processor()
    versions["python"] = platform.python_version()
    rounded = {name: round(value, 5) for name, value in results.items()}
    return {"settings": asdict(settings), "versions": versions, "device": gpu, **rounded}


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write a JSON file whole."""
    write_durably(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def write_fp16(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write fp16 tensors, which keep three bits more of a weight than bf16; the file is whole."""
    header, entries = make_header({name: ("F16", tuple(t.shape)) for name, t in tensors.items()})
    with durable_file(path) as file:
        file.write(header)
        for name in entries:
            file.write(np.ascontiguousarray(tensors[name].half().cpu().numpy()).data)


@torch.no_grad()
def sample(
    model: Callable[..., tuple[Tensor]], texts: Tensor, noise: Tensor, steps: int = 8
) -> Tensor:
    """Latents by Euler steps on Wan's shifted grid, without guidance."""
    sigmas = shifted(torch.linspace(1, 0, steps + 1)).tolist()
    latent = noise
    for now, after in pairwise(sigmas):
        timestep = torch.full((len(noise),), 1000 * now, device=noise.device)
        (velocity,) = model(latent, timestep, texts, return_dict=False)
        latent = latent + (after - now) * velocity
    return latent


@torch.no_grad()
def write_samples(
    folder: Path, model: nn.Module, codec: CodecNet, generator: torch.Generator, seed: int
) -> None:
    """sampled.npz: `latent` fp16 [200, 16, f, h, w], `caption` strings; contact_sheet.png of 12."""
    texts = padded_texts(str(generator.device)).float()
    generator.manual_seed(seed + 1)
    order = torch.randperm(len(CAPTIONS), generator=generator, device=generator.device)
    order = order.repeat(SAMPLED // len(CAPTIONS) + 1)[:SAMPLED]
    latents = torch.cat(
        [
            sample(model, texts[part], normal((len(part), *LATENT), generator))
            for part in order.split(20)
        ]
    )
    names = [CAPTIONS[index] for index in order.tolist()]
    buffer = io.BytesIO()
    np.savez(buffer, latent=latents.half().cpu().numpy(), caption=np.array(names))
    write_durably(folder / "sampled.npz", buffer.getvalue())
    video = to_uint8(codec.decode(latents[:12])).cpu().numpy()
    write_durably(folder / "contact_sheet.png", contact_sheet(list(video), names[:12]))


if __name__ == "__main__":
    main()
