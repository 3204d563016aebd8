"""`use` swaps a weights set in place: every call has one set whole, and a failure changes nothing.

The engine is ONNX Runtime's on a CPU; its graph is small, its weights are a bundle's.
"""

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import md5
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime.bundle.small_bundle import change, weights_record
from tests.runtime.engines.small_onnx import expected, inputs, running_bundle, weights_file
from wanexport.exporter.bundle.writer import write_manifest
from wanexport.runtime import load
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.errors import BadRequest, BundleError, EngineFailure, WanExportError
from wanexport.runtime.wan_config import EXPERTS

SETS = ("base", "style")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A model of one expert with two weights sets."""
    return running_bundle(tmp_path / "bundle", *SETS)


def digest(velocity: np.ndarray) -> str:
    return md5(velocity.tobytes()).hexdigest()


def own_digests(bundle: Path, **given: Any) -> dict[str, str]:
    """What an engine that was opened with each set gives."""
    return {name: digest(load(bundle, weights=name)(**inputs(), **given)) for name in SETS}


def test_the_set_in_use_is_the_one_that_computes(bundle: Path) -> None:
    denoiser = load(bundle)
    assert denoiser.weights == "base"
    for name in ("base", "style", "style", "base"):
        denoiser.use(name)
        assert denoiser.weights == name
        np.testing.assert_allclose(
            denoiser(**inputs()), expected(inputs(), weights_file(bundle, name)), atol=1e-3
        )


def test_a_swapped_set_gives_to_the_bit_what_it_gives_alone(bundle: Path) -> None:
    own, denoiser = own_digests(bundle), load(bundle)
    assert len(set(own.values())) == 2
    for name in ("style", "base", "style"):
        denoiser.use(name)
        assert digest(denoiser(**inputs())) == own[name]


def test_a_file_and_a_folder_are_used_by_their_path(bundle: Path, tmp_path: Path) -> None:
    own, denoiser = own_digests(bundle), load(bundle)
    shutil.copytree(weights_file(bundle, "style").parent, tmp_path / "merged")
    for path in (tmp_path / "merged", str(tmp_path / "merged" / "denoiser.safetensors")):
        denoiser.use("base")
        denoiser.use(path)
        assert denoiser.weights == str(path) and digest(denoiser(**inputs())) == own["style"]


def test_a_set_that_came_after_the_engine_was_opened_is_found(bundle: Path) -> None:
    denoiser, before = load(bundle), read_manifest(bundle)
    with pytest.raises(
        BadRequest, match=r"no weights set later .* expected one of base, style, or"
    ):
        denoiser.use("later")
    later = weights_record(bundle, "later", seed=9)
    write_manifest(bundle, replace(before, weights={**before.weights, "later-fp32": later}))
    denoiser.use("later")
    np.testing.assert_allclose(
        denoiser(**inputs()), expected(inputs(), weights_file(bundle, "later")), atol=1e-3
    )


def spoil(bundle: Path, how: str) -> None:
    """Make the set `style` one that cannot be used."""
    path = weights_file(bundle, "style")
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    elif how == "another header":
        content = bytearray(path.read_bytes())
        content[content.index(b"head.head.bias")] = ord("t")
        path.write_bytes(content)
    elif how == "another layout":
        change(bundle, "weights.style-fp32.layout", "0" * 64)
    elif how == "no bundle":
        (bundle / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("gone", BundleError),
        ("cut", BundleError),
        ("another header", BundleError),
        ("another layout", BadRequest),
        ("no bundle", BundleError),
    ],
)
def test_a_set_that_cannot_be_used_leaves_the_one_before(
    bundle: Path, how: str, error: type[WanExportError]
) -> None:
    own, denoiser = own_digests(bundle), load(bundle)
    spoil(bundle, how)
    with pytest.raises(error) as refused:
        denoiser.use("style")
    assert "\n" not in str(refused.value)
    assert denoiser.weights == "base" and digest(denoiser(**inputs())) == own["base"]


def test_a_file_of_another_layout_leaves_the_set_before(bundle: Path, tmp_path: Path) -> None:
    own, denoiser = own_digests(bundle), load(bundle)
    path = weights_file(bundle, "style")
    content = bytearray(path.read_bytes())
    content[content.index(b"head.head.bias")] = ord("t")
    (tmp_path / "other.safetensors").write_bytes(content)
    with pytest.raises(BadRequest, match="laid out for another engine"):
        denoiser.use(tmp_path / "other.safetensors")
    assert denoiser.weights == "base" and digest(denoiser(**inputs())) == own["base"]


def test_swaps_from_two_threads_during_calls_leave_every_call_one_set(bundle: Path) -> None:
    own, denoiser, swaps = own_digests(bundle), load(bundle), 50
    done = threading.Event()

    def swap(first: int) -> None:
        for number in range(swaps):
            denoiser.use(SETS[(first + number) % 2])

    def call() -> set[str]:
        seen = {digest(denoiser(**inputs()))}
        while not done.is_set():
            seen.add(digest(denoiser(**inputs())))
        return seen

    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(call) for _ in range(2)]
        swapping = [pool.submit(swap, first) for first in (0, 1)]
        for future in swapping:
            future.result()
        done.set()
        seen = set.union(*(future.result() for future in calls))
    assert seen <= set(own.values())
    denoiser.use("style")
    assert digest(denoiser(**inputs())) == own["style"]


def test_two_denoisers_of_one_engine_have_each_its_own_set(bundle: Path) -> None:
    """A drop-in's experts share engines: what one asks for, the other must not get."""
    own, first = own_digests(bundle), load(bundle)
    second = first.only("")
    second.use("style")
    assert (first.weights, second.weights) == SETS

    def call(denoiser: Any) -> set[str]:
        return {digest(denoiser(**inputs())) for _ in range(30)}

    with ThreadPoolExecutor(2) as pool:
        seen = list(pool.map(call, (first, second)))
    assert seen == [{own["base"]}, {own["style"]}]


def test_both_experts_change_together(tmp_path: Path) -> None:
    bundle = running_bundle(tmp_path / "bundle", *SETS, experts=EXPERTS)
    denoiser = load(bundle)
    for name in ("style", "base"):
        denoiser.use(name)
        for timestep, expert in ((950.0, "high_noise"), (100.0, "low_noise")):
            given = {**inputs(), "timestep": np.full(1, timestep, np.float32)}
            file = weights_file(bundle, name, expert)
            np.testing.assert_allclose(denoiser(**given), expected(given, file), atol=1e-3)


def test_a_set_that_lacks_an_expert_changes_neither(tmp_path: Path) -> None:
    bundle = running_bundle(tmp_path / "bundle", *SETS, experts=EXPERTS)
    denoiser = load(bundle)
    weights_file(bundle, "style", "low_noise").unlink()
    with pytest.raises(BundleError, match="is missing from the bundle"):
        denoiser.use("style")
    manifest = read_manifest(bundle)
    weights = dict(manifest.weights)
    del weights["style-low_noise-fp32"]
    write_manifest(bundle, replace(manifest, weights=weights))
    with pytest.raises(BundleError, match="weights set style lacks low_noise"):
        denoiser.use("style")
    assert denoiser.weights == "base"
    for timestep, expert in ((950.0, "high_noise"), (100.0, "low_noise")):
        given = {**inputs(), "timestep": np.full(1, timestep, np.float32)}
        file = weights_file(bundle, "base", expert)
        np.testing.assert_allclose(denoiser(**given), expected(given, file), atol=1e-3)


def test_a_cpu_offloads_nothing_and_has_no_options_of_a_provider(tmp_path: Path) -> None:
    bundle = running_bundle(tmp_path / "bundle", *SETS, experts=EXPERTS)
    wrong: list[dict[str, Any]] = [{"offload": "experts"}, {"provider_options": {"a": "b"}}]
    for options in wrong:
        with pytest.raises(BadRequest, match="on a CPU offloads nothing and has no provider opt"):
            load(bundle, device="cpu", **options)


def test_a_set_of_a_name_is_loaded_by_it(bundle: Path) -> None:
    own = own_digests(bundle)
    assert digest(load(bundle)(**inputs())) == own["base"] != own["style"]
    with pytest.raises(BadRequest, match=r"no weights set other .* expected one of base, style"):
        load(bundle, weights="other")


def test_a_bundle_without_a_base_set_serves_by_name(tmp_path: Path) -> None:
    bundle = running_bundle(tmp_path / "bundle", "style")
    with pytest.raises(BundleError, match="has no weights for engine"):
        load(bundle)
    assert load(bundle, weights="style").weights == "style"


def test_after_close_neither_calls_nor_swaps_are_served(bundle: Path) -> None:
    denoiser = load(bundle)
    session = denoiser.session(text=inputs()["text"])
    denoiser.close()
    denoiser.close()
    given = {name: value for name, value in inputs().items() if name != "text"}
    calls: list[Callable[[], Any]] = [lambda: denoiser(**inputs()), lambda: session(**given)]
    for call in calls:
        with pytest.raises(EngineFailure, match="was closed: load it again"):
            call()
    with pytest.raises(EngineFailure, match="was closed"):
        denoiser.use("style")
    assert load(bundle)(**inputs()).shape == inputs()["latent"].shape
