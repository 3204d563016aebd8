"""From a prompt to a video on a GPU, with small parts of the real classes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.exporter.run.test_run import (
    GUIDANCE,
    NEGATIVE,
    PROMPT,
    SIGMAS,
    expected_latent,
    expected_video,
    saved_pictures,
    whole_family,
)
from wanexport.exporter.reference.parity import relative_l2
from wanexport.runtime.serving.pipeline import Pipeline

pytestmark = pytest.mark.gpu
SETTINGS: dict[str, Any] = {
    "negative": NEGATIVE,
    "timesteps": [1000 * sigma for sigma in SIGMAS[:-1]],
    "guidance": GUIDANCE,
    "seed": 5,
}


@pytest.mark.parametrize(("preset", "pictures"), [("t2v-1.3b", 0), ("i2v-14b", 1), ("ti2v-5b", 1)])
def test_a_prompt_becomes_a_video(preset: str, pictures: int, tmp_path: Path) -> None:
    """The engine is fp32; text in bf16 and CLIP in fp16 round otherwise than on a CPU."""
    family = whole_family(preset, tmp_path)
    images = saved_pictures(family, tmp_path, pictures)
    with Pipeline(family.bundle) as pipeline:
        assert torch.device(pipeline.denoiser.device).type == "cuda"
        pipeline.prewarm()
        given = {**SETTINGS, "image": images[0] if images else None}
        made, again = (pipeline.generate(PROMPT, **given) for _ in range(2))
    expected = expected_latent(family, seed=5, images=images)
    assert relative_l2(made.latent, expected) <= 0.02
    assert made.video is not None and again.video is not None
    # Convolutions on a GPU may round their inputs to TF32.
    assert np.abs(made.video - expected_video(made.latent)).max() <= 4  # of 255
    assert not made.prompt_cached and again.prompt_cached
    np.testing.assert_array_equal(made.latent, again.latent)
    np.testing.assert_array_equal(made.video, again.video)


def test_the_text_encoder_leaves_the_gpu(tmp_path: Path) -> None:
    family = whole_family("t2v-1.3b", tmp_path)
    with Pipeline(family.bundle, keep_text_encoder=False) as pipeline:
        pipeline.generate(PROMPT, **SETTINGS)
        freed = torch.cuda.memory_allocated()
    with Pipeline(family.bundle) as pipeline:
        pipeline.generate(PROMPT, **SETTINGS)
        kept = torch.cuda.memory_allocated()
    assert kept - freed > 64 * 4096  # the smallest of what it holds: its table of tokens
