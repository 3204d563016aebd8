"""The graph of both VAEs against the official code's recorded values and diffusers' model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from tests.oracles.official_vae import (
    CHANNELS,
    EVERY_LATENT,
    EVERY_PIXEL,
    FRAMES,
    STRIDES,
    latent,
    uniform,
    video,
)
from tests.oracles.small_vae import OFFICIAL, VERSIONS, graph_of, official_file, through, zero_state
from tests.quick import slow_but
from wanexport.exporter.reference.parity import relative_l2
from wanexport.graphs.graph import load_graph
from wanexport.graphs.vae import WanVae
from wanexport.graphs.vae_checkpoint import open_vae_checkpoint
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.parts.torch_checkpoint import load_converted, read_state_dict
from wanexport.runtime.parts.vae_keys import config_of, diffusers_name
from wanexport.runtime.vae_config import VaeConfig
from wanexport.runtime.wan_vae import GRAPH, parameter_shapes, vae_program

SIZES = {"Wan2.1": (32, 48), "Wan2.2": (64, 96)}  # the smallest that the DiT takes, about
GATE = 1e-5
CHUNKS = (1, 2, 3, 4, 5)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vae")
    return {version: official_file(version, folder) for version in VERSIONS}


@pytest.fixture(scope="module")
def models(files: dict[str, Path]) -> dict[str, Any]:
    """diffusers' model with the same weights."""
    found = {}
    for version, path in files.items():
        tensors = read_state_dict(path)
        config = config_of({name: tuple(t.shape) for name, t in tensors.items()}, path)
        with torch.device("meta"):
            model = AutoencoderKLWan(**config)
        named = {diffusers_name(n): t for n, t in tensors.items()}
        found[version] = load_converted(model, named, path).float()
    return found


def of_diffusers(model: Any, part: str, clip: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What diffusers' model makes of a clip, in the graph's layout and normalisation."""
    channels = model.config.z_dim
    mean, std = (
        torch.tensor(row).view(1, channels, 1, 1, 1)
        for row in (model.config.latents_mean, model.config.latents_std)
    )
    batch = clip.permute(3, 0, 1, 2)[None]
    with torch.no_grad():
        if part == "decode":
            found = model.decode((batch / (1 / std) + mean).to(dtype), return_dict=False)[0].float()
        else:
            moments = model.encode(batch.to(dtype), return_dict=False)[0].mode().float()
            found = (moments - mean) * (1 / std)
    return found[0].permute(1, 2, 3, 0)


def clip_of(version: str, part: str, frames: int) -> Tensor:
    height, width = SIZES[version]
    if part == "encode":
        return uniform("clip", (frames, height, width, 3))
    stride = STRIDES[version]
    shape = ((frames - 1) // 4 + 1, height // stride, width // stride, CHANNELS[version])
    return 2 * uniform("clip", shape)


@pytest.fixture(scope="module")
def expected(models: dict[str, Any]) -> dict[tuple[str, str], Tensor]:
    """What diffusers makes of a clip of 21 frames."""
    cases = [(version, part) for version in VERSIONS for part in ("decode", "encode")]
    return {(v, part): of_diffusers(models[v], part, clip_of(v, part, 21)) for v, part in cases}


def frame_errors(found: Tensor, expected: Tensor) -> list[float]:
    return [relative_l2(a.numpy(), b.numpy()) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("frames", FRAMES)
def test_frames_and_latents_are_the_official_codes(files: dict[str, Path], frames: int) -> None:
    """Of Wan2.1, whose recorded size the graph takes; Wan2.2's is below what a DiT takes."""
    graph = graph_of(files["Wan2.1"], 32, 48, k=1)
    pixels = through(graph, "decode", latent("Wan2.1", frames).permute(1, 2, 3, 0))
    kept = pixels.permute(3, 0, 1, 2).flatten()[::EVERY_PIXEL].numpy()
    assert relative_l2(kept, np.array(OFFICIAL["Wan2.1"]["decoded"][str(frames)])) < GATE
    mean = through(graph, "encode", video(frames).permute(1, 2, 3, 0))
    kept = mean.permute(3, 0, 1, 2).flatten()[::EVERY_LATENT].numpy()
    assert relative_l2(kept, np.array(OFFICIAL["Wan2.1"]["encoded"][str(frames)])) < GATE


@pytest.mark.parametrize("k", slow_but(CHUNKS, 1, 4))
@pytest.mark.parametrize("part", ["decode", "encode"])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_frame_is_that_of_diffusers(
    files: dict[str, Path],
    expected: dict[tuple[str, str], Tensor],
    version: str,
    part: str,
    k: int,
) -> None:
    """Whatever the chunk, the last of which may be filled up; the first frame is alone."""
    graph, clip = graph_of(files[version], *SIZES[version], k=k), clip_of(version, part, 21)
    found, right = through(graph, part, clip), expected[version, part]
    assert relative_l2(found.numpy(), right.numpy()) < GATE
    assert max(frame_errors(found, right)) < GATE


@pytest.mark.parametrize("version", VERSIONS)
def test_bf16_is_no_further_off_than_diffusers_is(
    files: dict[str, Path], models: dict[str, Any], version: str
) -> None:
    clip = clip_of(version, "decode", 13)
    expected = of_diffusers(models[version], "decode", clip)
    graph = graph_of(files[version], *SIZES[version], k=3, dtype=torch.bfloat16)
    own = frame_errors(through(graph, "decode", clip), expected)
    model = models[version].to(torch.bfloat16)
    try:
        floor = frame_errors(of_diffusers(model, "decode", clip, torch.bfloat16), expected)
    finally:
        # The module's fixture goes back to its values before they were rounded.
        tensors = read_state_dict(files[version])
        load_converted(model, {diffusers_name(n): t for n, t in tensors.items()}, files[version])
    for error, allowed in zip(own, floor):
        assert 1e-4 < error <= 1.25 * allowed


@pytest.mark.parametrize("version", VERSIONS)
def test_encoding_is_in_fp32_beside_a_decoder_in_bf16(files: dict[str, Path], version: str) -> None:
    clip = clip_of(version, "encode", 5)
    exact, mixed = (
        through(graph_of(files[version], *SIZES[version], k=1, dtype=dtype), "encode", clip)
        for dtype in (torch.float32, torch.bfloat16)
    )
    torch.testing.assert_close(mixed, exact, atol=0, rtol=0)


@pytest.mark.parametrize("version", VERSIONS)
def test_uint8_frames_are_cut_and_not_rounded(files: dict[str, Path], version: str) -> None:
    graph = graph_of(files[version], *SIZES[version], k=1)
    graph.get_parameter("decoder.conv_out.weight").data *= 10
    call = graph.program.calls[0]
    given = {call.reads[0]: clip_of(version, "decode", 1)}
    with torch.no_grad():
        written = graph.run_call(call, 0, given, zero_state(graph))
    pixels, frames = (written[name] for name in call.writes)
    assert frames.dtype == torch.uint8 and pixels.abs().max() == 1
    torch.testing.assert_close(frames, ((pixels + 1) / 2 * 255).floor().to(torch.uint8))


@pytest.mark.parametrize("part", ["decode", "encode"])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_state_matters(files: dict[str, Path], version: str, part: str) -> None:
    """A cache that is left out would go unseen where the others carry on."""
    graph, clip = graph_of(files[version], *SIZES[version], k=2), clip_of(version, part, 9)
    expected = through(graph, part, clip)
    calls = {call.name: call for call in graph.program.calls}
    names = calls[f"{part}_next"].state
    assert len(names) == {"decode": 32 + 2, "encode": 24 + 2}[part] - 2
    state = zero_state(graph)
    through(graph, part, clip[:1], state)
    for name in names[:: len(names) // 4]:
        changed = {n: t.clone() + (n == name) for n, t in state.items()}
        k = 2 if part == "decode" else 8
        call = calls[f"{part}_next"]
        with torch.no_grad():
            written = graph.run_call(call, 0, {call.reads[0]: clip[1 : 1 + k]}, changed)
        found = written[call.writes[0]]
        assert relative_l2(found.numpy(), expected[1 : 1 + len(found)].numpy()) > 1e-4, name


@pytest.mark.parametrize("version", VERSIONS)
def test_the_published_files_fill_the_parameters(version: str) -> None:
    """Names and shapes of the official code's model of the published size."""
    shapes = {diffusers_name(n): tuple(s) for n, s in OFFICIAL[version]["full"].items()}
    sizes = {"Wan2.1": (16, 96, 96, False), "Wan2.2": (48, 160, 256, True)}[version]
    own = parameter_shapes(VaeConfig(*sizes))
    assert own.keys() == shapes.keys() | {"latents_mean", "latents_scale"}
    assert all(np.prod(own[name]) == np.prod(shapes[name]) for name in shapes)


@pytest.mark.parametrize(
    ("version", "size", "gigabytes"),
    [("Wan2.1", (480, 832), 3.8), ("Wan2.1", (720, 1280), 8.7), ("Wan2.2", (704, 1280), 6.4)],
)
def test_the_decoders_state_has_the_size_that_was_measured(
    version: str, size: tuple[int, int], gigabytes: float
) -> None:
    """Of the official code in fp32."""
    sizes = {"Wan2.1": (16, 96, 96, False), "Wan2.2": (48, 160, 256, True)}[version]
    config = VaeConfig(*sizes)
    program = vae_program(config, Geometry(*size, 81, config.spatial_stride))
    states = {n: s for n, s in program.states().items() if n.startswith("decoder.")}
    total = 4 * sum(np.prod(spec.shape, dtype=np.int64) for spec in states.values())
    assert len(states) == 32
    assert round(float(total) / 1e9, 1) == gigabytes


def test_the_program_is_that_of_the_graph(files: dict[str, Path]) -> None:
    assert load_graph(GRAPH) is WanVae
    config = open_vae_checkpoint(files["Wan2.2"]).config
    geometry = Geometry(64, 96, 9, 16)
    program = WanVae.describe(config, geometry)
    assert not program.fault() and not program.unfamiliar
    with torch.device("meta"):
        graph = WanVae(config, geometry, torch.bfloat16)
    own = dict(graph.named_parameters())
    assert own.keys() == parameter_shapes(config).keys()
    assert {name for call in program.calls for name in call.parameters} == own.keys()
