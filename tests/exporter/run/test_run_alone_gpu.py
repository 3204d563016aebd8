"""A bundle built with --parts on a GPU: parts that open beside the engine, and no compiler."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.exporter.run.test_run import PROMPT, whole_family
from tests.exporter.run.test_run_alone import BLOCKED, FRAMES, REFUSE, in_a_child
from tests.runtime.drop_in.test_diffusers_pipeline import Family
from wanexport.exporter.build import build
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.parts import open as parts_module
from wanexport.runtime.parts.placement import encoder_bytes, needs_of
from wanexport.runtime.serving.pipeline import Pipeline

pytestmark = pytest.mark.gpu
PARTS = ("text_encoder", "vae")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp("alone")
    made = whole_family("t2v-1.3b", folder)
    geometry = made.geometry
    build(
        folder / "model", resolution=f"{geometry.height}x{geometry.width}", frames=9,
        dtype="bf16", backends=["aoti"], device="cuda", output=made.bundle, parts=True,
    )  # fmt: skip
    (folder / "model").rename(folder / "gone")
    return made


def md5(bundle: Path, **options: Any) -> tuple[str, dict[str, str]]:
    """Of the frames of a request, and where its encoders were."""
    with Pipeline(bundle, backend="aoti", **options) as pipeline:
        made = pipeline.generate(PROMPT, steps=2, seed=3)
    assert made.video is not None
    return hashlib.md5(made.video.tobytes()).hexdigest(), pipeline.placement


def test_packages_serve_without_a_compiler(family: Family) -> None:
    code = REFUSE.format(blocked=[*BLOCKED, "onnxruntime", "av", "wanexport.exporter"])
    code += FRAMES.format(bundle=str(family.bundle), prompt=PROMPT)
    told = []
    for _ in range(2):
        child = in_a_child(code)
        assert child.returncode == 0, child.stderr
        told.append(json.loads(child.stdout))
    assert told[0] == told[1] and told[0][0] == told[0][1]


def test_parts_that_open_beside_the_engine_change_no_frame(family: Family) -> None:
    """The engine, being small, captures a CUDA graph while they open."""
    one, placed = md5(family.bundle, cuda_graph=True)
    assert placed == {"text_encoder": "beside"}
    for _ in range(5):
        assert md5(family.bundle, cuda_graph=True, open_parts=PARTS) == (one, placed)


def test_opening_side_by_side_takes_no_more_memory(family: Family) -> None:
    peaks = []
    for parts in ((), PARTS):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        md5(family.bundle, open_parts=parts)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= 1.02 * peaks[0]


@contextmanager
def with_free(size: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(parts_module, "free_bytes", lambda device: size)
        yield


def test_a_prompt_that_is_encoded_elsewhere_gives_the_same_frames(family: Family) -> None:
    """Before each sampling, and before the engine is opened; on the CPU, nearly."""
    one, _ = md5(family.bundle)
    with Pipeline(family.bundle, backend="aoti") as pipeline:
        parts = pipeline._parts
        manifest = read_manifest(family.bundle)
        needs = needs_of(manifest, parts.record, parts._vae_engine())
    text, margin = encoder_bytes(manifest, "text_encoder"), 1 << 30
    resident = needs.engine + needs.vae + margin
    sizes = {"before": resident + text, "first": text + margin, "cpu": margin}
    assert sizes["first"] < sizes["before"]
    for place, size in sizes.items():
        with with_free(size), pytest.warns(match="the text encoder"):
            found = md5(family.bundle, open_parts=PARTS, prompts=[PROMPT, ""])
        assert found[1] == {"text_encoder": place}
        assert place == "cpu" or found[0] == one
