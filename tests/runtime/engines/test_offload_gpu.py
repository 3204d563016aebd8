"""Blocks streamed to a GPU: the same bits in less memory, and no wait of the host."""

from pathlib import Path
from typing import Any

import pytest
import torch

from wanexport.exporter.build import build
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.graphs.config import PRESETS
from wanexport.runtime import Denoiser, fitting, load
from wanexport.runtime.errors import BadRequest, WanExportWarning
from wanexport.runtime.gpu_fit import Needs, fit_blocks

pytestmark = pytest.mark.gpu
LAYERS = PRESETS["tiny"].config.num_layers


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with random weights and cuDNN attention."""
    folder = tmp_path_factory.mktemp("offload") / "bundle"
    build(
        "tiny", random_weights=0, resolution="64x96", frames=9, backends=["aoti"], dtype="bf16",
        attention="cudnn", output=folder,
    )  # fmt: skip
    return folder


def on_gpu(denoiser: Denoiser, seed: int = 2) -> dict[str, Any]:
    config = PRESETS["tiny"].config
    given = forward_inputs(config, denoiser.geometry, 812.0, seed)
    tensors = {n: torch.from_numpy(v).cuda() for n, v in given.items() if n != "timestep"}
    return {**tensors, "timestep": 812.0}


@pytest.mark.parametrize("resident", range(LAYERS + 1))
def test_any_number_of_resident_blocks_gives_the_same_bits(bundle: Path, resident: int) -> None:
    whole = load(bundle)
    streamed = load(bundle, offload="blocks", resident_blocks=resident)
    assert streamed.resident_blocks == resident and streamed.offload == "blocks"
    for seed in range(5):
        given = on_gpu(whole, seed)
        assert torch.equal(streamed(**given), whole(**given))


def test_a_forward_waits_for_nothing_and_many_follow_one_another(bundle: Path) -> None:
    whole, streamed = load(bundle), load(bundle, offload="blocks", resident_blocks=1)
    given = on_gpu(whole)
    expected = whole(**given)
    streamed(**given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [streamed(**given) for _ in range(50)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(velocity, expected) for velocity in found)


def test_callers_on_several_streams_get_the_same(bundle: Path) -> None:
    whole, streamed = load(bundle), load(bundle, offload="blocks", resident_blocks=0)
    given = on_gpu(whole)
    latents = [given["latent"] * scale for scale in (1.0, 0.5, -1.0)]
    alone = [whole(**{**given, "latent": latent}) for latent in latents]
    streams = [torch.cuda.Stream() for _ in latents]
    torch.cuda.synchronize()
    for _ in range(20):
        together = []
        for stream, latent in zip(streams, latents):
            with torch.cuda.stream(stream):
                together.append(streamed(**{**given, "latent": latent}))
        torch.cuda.synchronize()
        assert all(torch.equal(*pair) for pair in zip(alone, together))


def test_it_takes_less_memory_and_a_hundred_forwards_no_more(bundle: Path) -> None:
    held = []
    for options in ({}, {"offload": "blocks", "resident_blocks": 0}):
        before = torch.cuda.memory_allocated()
        denoiser = load(bundle, **options)  # type: ignore[arg-type]
        denoiser(**on_gpu(denoiser))
        held.append(torch.cuda.memory_allocated() - before)
        if options:
            given = on_gpu(denoiser)
            denoiser(**given)
            torch.cuda.synchronize()
            after = torch.cuda.memory_allocated()
            for _ in range(100):
                denoiser(**given)
            torch.cuda.synchronize()
            assert torch.cuda.memory_allocated() == after
        denoiser.close()
    assert held[1] < 0.8 * held[0]  # of four layers two buffers, and what is in no layer


def test_a_closed_engine_gives_its_memory_back(bundle: Path) -> None:
    before = torch.cuda.memory_allocated()
    denoiser = load(bundle, offload="blocks", resident_blocks=2)
    velocity = denoiser(**on_gpu(denoiser))
    denoiser.close()
    del denoiser, velocity
    assert torch.cuda.memory_allocated() <= before


def test_a_captured_graph_is_refused(bundle: Path) -> None:
    with pytest.raises(BadRequest, match="streams blocks, which no captured CUDA graph does"):
        load(bundle, offload="blocks", cuda_graph=True)


def test_where_not_all_fits_blocks_are_streamed_and_it_is_said(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load(bundle)
    given = on_gpu(whole)
    expected = whole(**given)
    whole.close()
    del whole
    found = fit_blocks(Needs(rest=1, layer=1, layers=LAYERS, activations=0), LAYERS)
    monkeypatch.setattr(fitting, "fit", lambda needs, room: found)
    monkeypatch.setattr(fitting, "fit_blocks", lambda needs, room: found)
    with pytest.warns(WanExportWarning, match=r"GB that cuda:0 has free: .* \(--offload blocks\)"):
        streamed = load(bundle)
    assert streamed.offload == "blocks" and torch.equal(streamed(**given), expected)
