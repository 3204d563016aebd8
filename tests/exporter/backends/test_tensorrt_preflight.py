"""Memory and disk are estimated, and too little is refused before the work."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wanexport.exporter.backends.backend import Request
from wanexport.exporter.backends.tensorrt import room as tensorrt_preflight
from wanexport.exporter.backends.tensorrt.room import check_room, estimate
from wanexport.graphs.config import PRESETS, sampling_defaults
from wanexport.runtime import Geometry, WanExportError
from wanexport.runtime.family import family_of


def request_of(preset: str, baked: bool = False) -> Request:
    config = PRESETS[preset].config
    geometry = Geometry(480, 832, 81, family_of(config).vae.spatial_stride)
    sampling = sampling_defaults(config, (), geometry)
    target = {"device": "cuda", "arch": "sm89", "tensorrt-rtx": "1.7"}
    request = Request(config, geometry, sampling, "tensorrt-rtx", "bf16", "cuda", target)
    return replace(request, baked={"": "hash"} if baked else {})


def test_the_estimate_covers_what_was_measured() -> None:
    # Measured with TensorRT for RTX 1.7.1: resident memory and plan of the build.
    small, large = estimate(request_of("t2v-1.3b")), estimate(request_of("i2v-14b"))
    assert 838e6 < small.host < 1.5e9
    assert 31e6 < small.disk < 100e6
    assert 1110 * 2**20 < large.host < 1.6e9
    assert 48e6 < large.disk < 120e6
    # 1.4 billion parameters of 2 bytes; its builder wants between 1 and 2 GiB for activations.
    assert 2.8e9 + 2**30 < small.gpu < 2.9e9 + 2**31
    assert large.gpu > 32e9


def test_baked_weights_count_on_the_host_and_on_disk() -> None:
    weightless, baked = estimate(request_of("t2v-1.3b")), estimate(request_of("t2v-1.3b", True))
    assert baked.gpu == weightless.gpu
    assert baked.disk - weightless.disk > 2.8e9
    assert baked.host - weightless.host > 2.8e9


@pytest.mark.parametrize(
    ("gpu", "host", "disk", "message"),
    [
        (
            24_000_000_000,
            10**12,
            10**12,
            r"about 3\d\.\d\d GB of GPU memory, there are 24\.00 GB: ",
        ),
        (None, 500_000_000, 10**12, r"GB of host memory, there are 0\.50 GB: close what else"),
        (None, 10**12, 1_000_000, r"GB of disk, there are 0\.00 GB: name a folder elsewhere"),
    ],
)
def test_too_little_is_refused_with_the_figures(
    gpu: int | None,
    host: int,
    disk: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(tensorrt_preflight, "available_bytes", lambda: host)
    usage: Any = SimpleNamespace(free=disk)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(WanExportError, match=message) as caught:
        check_room(request_of("i2v-14b"), tmp_path, gpu)
    assert str(caught.value).startswith("tensorrt-rtx-bf16-sm89 needs about ")
    assert "\n" not in str(caught.value)


def test_the_figures_are_recorded_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tensorrt_preflight, "available_bytes", lambda: 10**12)
    request = request_of("t2v-1.3b")
    room = check_room(request, tmp_path, 80_000_000_000)
    assert room == {name: getattr(estimate(request), name) for name in ("gpu", "host", "disk")}


def test_the_state_of_a_causal_model_counts() -> None:
    geometry = Geometry(480, 832, 81, chunk=3, cache=21)
    causal = replace(request_of("self-forcing-1.3b"), geometry=geometry)
    larger = replace(causal, geometry=replace(geometry, cache=22))
    frame = 2 * 1536 * 1560  # bytes of one latent frame's keys, or values, of one layer
    # Kept in every layer, and in one a second time, as its plan writes a chunk into a copy.
    assert estimate(larger).gpu - estimate(causal).gpu == (2 * 30 + 2) * frame
    # Its cache has a slot for what fills a short chunk up; the rows of a chunk come out beside it.
    assert estimate(causal).gpu > 2.8e9 + 2 * 30 * (22 + 3) * frame
    # Of the text there are no rows: beside its keys and values are activations of 0.16 GB.
    text = 2 * 30 * 512 * 1536 * 2
    most = 2.9e9 + (2 * 30 * (22 + 3) + 2 * 22) * frame + text + 0.2e9
    assert estimate(causal).gpu < most
    assert estimate(causal).disk == 3 * estimate(request_of("t2v-1.3b")).disk


def test_a_causal_model_that_does_not_fit_is_told_of_its_cache(tmp_path: Path) -> None:
    """How long its video is decides nothing where the cache is named."""
    geometry = Geometry(480, 832, 81, chunk=3, cache=21)
    causal = replace(request_of("self-forcing-1.3b"), geometry=geometry)
    with pytest.raises(WanExportError, match=r"8\.00 GB: choose .* or --cache$"):
        check_room(causal, tmp_path, 8_000_000_000)
