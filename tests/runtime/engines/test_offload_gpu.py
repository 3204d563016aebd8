"""Blocks streamed to a GPU: the same bits in less memory, and no wait of the host."""

import threading
from collections.abc import Sequence
from hashlib import md5
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.oracles.lora_files import write_lora
from wanexport.exporter.build import build
from wanexport.exporter.compare.compare import compare
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.exporter.sets.add import add
from wanexport.graphs.config import PRESETS
from wanexport.runtime import Denoiser, fitting, load
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.drop_in.diffusers import CompiledWanTransformer
from wanexport.runtime.drop_in.official import patch
from wanexport.runtime.errors import BadRequest, WanExportWarning
from wanexport.runtime.gpu_fit import Needs, fit_blocks
from wanexport.runtime.serving.pipeline import Pipeline

pytestmark = pytest.mark.gpu
LAYERS = PRESETS["tiny"].config.num_layers
STREAMED: dict[str, Any] = {"offload": "blocks", "resident_blocks": 1}


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRAs of the tiny model."""
    folder, shapes = tmp_path_factory.mktemp("loras"), parameter_shapes(PRESETS["tiny"].config)
    return [write_lora(folder / f"{seed}.safetensors", shapes, seed) for seed in range(2)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, loras: list[Path]) -> Path:
    """The tiny model with random weights and cuDNN attention, and a set `style`."""
    folder = tmp_path_factory.mktemp("offload") / "bundle"
    build(
        "tiny", random_weights=0, resolution="64x96", frames=9, backends=["aoti"], dtype="bf16",
        attention="cudnn", output=folder,
    )  # fmt: skip
    add(folder, "style", lora=[loras[0]])
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


def styles_of(loras: list[Path]) -> list[dict[str, Any]]:
    """What `use` takes: the base set, another one, and a LoRA merged in memory."""
    return [{}, {"weights": "style"}, {"lora": [(loras[1], 0.7)]}]


def digest(denoiser: Denoiser) -> str:
    return md5(denoiser(**on_gpu(denoiser)).cpu().numpy().tobytes()).hexdigest()


def alone(bundle: Path, styles: Sequence[dict[str, Any]]) -> list[str]:
    """The digest of each style by a resident engine of its own."""
    found = []
    for style in styles:
        denoiser = load(bundle)
        denoiser.use(**style)
        found.append(digest(denoiser))
        denoiser.close()
    assert len(set(found)) == len(styles)
    return found


@pytest.mark.parametrize("resident", [0, 1, LAYERS])
def test_sets_and_loras_take_turns_as_on_a_resident_engine(
    bundle: Path, loras: list[Path], resident: int
) -> None:
    styles = styles_of(loras)
    expected = alone(bundle, styles)
    streamed = load(bundle, offload="blocks", resident_blocks=resident)
    for style in (0, 1, 0, 2, 1, 2, 2, 0):
        streamed.use(**styles[style])
        assert digest(streamed) == expected[style]
    assert streamed.resident_blocks == resident
    streamed.close()
    of_style = load(bundle, weights="style", offload="blocks", resident_blocks=resident)
    assert digest(of_style) == expected[1]


def test_swaps_from_four_threads_are_whole(bundle: Path, loras: list[Path]) -> None:
    styles = styles_of(loras)
    expected, streamed, found = alone(bundle, styles), load(bundle, **STREAMED), list[str]()

    def swap(first: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for number in range(12):
                streamed.use(**styles[(first + number) % len(styles)])
                found.append(digest(streamed))

    threads = [threading.Thread(target=swap, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 48 and set(found) <= set(expected)
    for style, velocity in zip(styles, expected):
        streamed.use(**style)
        assert digest(streamed) == velocity


@pytest.mark.parametrize("weights", [None, "style"])
def test_compare_sees_the_resident_engine_call_by_call(
    bundle: Path, weights: str | None, tmp_path: Path
) -> None:
    whole, streamed = (
        compare(bundle, steps=2, bisect=True, weights=weights, report=tmp_path / name, **options)
        for name, options in (("whole", {}), ("streamed", STREAMED))
    )
    assert whole["passed"] and streamed["passed"]
    errors = [[row["error"] for row in result["steps"]] for result in (whole, streamed)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)  # of the reference's own kernels
    calls = [result["bisect"]["calls"] for result in (whole, streamed)]
    names = ["embed", *(f"block {i}" for i in range(LAYERS)), "head"]
    assert [row["call"] for row in calls[1]] == names
    carried = [[row["carried"] for row in rows] for rows in calls]
    assert carried[1] == pytest.approx(carried[0], rel=1e-3)


class Encoder:
    """Embeddings that follow from the text."""

    def __call__(self, prompts: Sequence[str]) -> list[np.ndarray]:
        seeds = [np.random.default_rng(len(prompt)) for prompt in prompts]
        return [seed.standard_normal((12, 4096), np.float32) for seed in seeds]


def test_a_pipeline_serves_sets_as_with_a_resident_engine(bundle: Path) -> None:
    latents: list[list[np.ndarray]] = []
    for options in ({}, STREAMED):
        with Pipeline(bundle, text_encoder=Encoder(), **options) as pipeline:
            pipeline.prewarm(decode=False)
            asked: dict[str, Any] = {"seed": 1, "steps": 3, "guidance": 4.0, "decode": False}
            order = (None, "style", None)
            made = [pipeline.generate("a red circle", weights=own, **asked) for own in order]
            jobs = [pipeline.submit("two", weights=own, **asked) for own in order]
            latents.append([g.latent for g in [*made, *(job.result() for job in jobs)]])
    assert all(map(np.array_equal, *latents))
    base, style, again = latents[1][:3]
    assert np.array_equal(base, again) and not np.array_equal(base, style)


class Model:
    """What an official pipeline has in the place that the engine takes."""

    def cpu(self) -> "Model":
        return self


def test_an_official_pipeline_gets_the_same_velocities(bundle: Path) -> None:
    given = on_gpu(whole := load(bundle))
    latents = [given["latent"], -given["latent"]]
    expected = [whole(**{**given, "latent": latent}) for latent in latents]
    model = patch(SimpleNamespace(model=Model()), bundle, **STREAMED).model
    found: list[Tensor] = model(
        [latent[0] for latent in latents], torch.tensor([812.0, 812.0], device="cuda"),
        [given["text"][0]] * 2, whole.geometry.num_tokens,
    )  # fmt: skip
    assert all(torch.equal(one, other[0]) for one, other in zip(found, expected, strict=True))


def test_a_transformer_for_diffusers_gives_the_same_velocities(bundle: Path) -> None:
    pytest.importorskip("diffusers")
    given = on_gpu(whole := load(bundle))
    latents = torch.cat([given["latent"], -given["latent"]])
    expected = [whole(**{**given, "latent": latent}) for latent in latents.split(1)]
    model = CompiledWanTransformer(bundle, **STREAMED)
    times = torch.tensor([812.0, 812.0], device="cuda")
    (found,) = model(latents, times, given["text"], return_dict=False)
    assert torch.equal(found, torch.cat(expected))
