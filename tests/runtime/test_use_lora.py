"""LoRAs merged in memory: whole, under threads, and gone when another set is used."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.oracles.lora_files import write_lora
from tests.quick import slow_but
from tests.runtime.test_use import digest
from wanexport.exporter.sets.add import add
from wanexport.graphs.config import PRESETS
from wanexport.runtime import Denoiser, load
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.errors import BadRequest, WanExportError

THREADS = 4


@pytest.fixture
def loras(tmp_path: Path) -> list[Path]:
    """Two LoRAs of the tiny preset."""
    shapes = parameter_shapes(PRESETS["tiny"].config)
    return [write_lora(tmp_path / f"{seed}.safetensors", shapes, seed) for seed in range(2)]


@pytest.fixture
def styles(bundle: Path, loras: list[Path]) -> dict[str, dict[str, Any]]:
    """What `use` is given for each of three styles."""
    add(bundle, "set", lora=[loras[0]])
    return {"base": {}, "set": {"weights": "set"}, "memory": {"lora": [(loras[1], 0.7)]}}


def forward(denoiser: Denoiser) -> str:
    """The digest of a velocity for seeded inputs."""
    rng = np.random.default_rng(0)
    drawn = {n: rng.standard_normal(s.shape, np.float32) for n, s in denoiser.inputs.items()}
    return digest(denoiser(**{**drawn, "timestep": 500.0}))


def alone(bundle: Path, given: dict[str, Any]) -> str:
    """The digest of an engine that never used another style."""
    denoiser = load(bundle, dtype="fp32")
    denoiser.use(**given)
    return forward(denoiser)


@pytest.mark.parametrize("swaps", slow_but([8, 100], 8))
def test_swaps_from_threads_leave_every_call_one_style(
    bundle: Path, styles: dict[str, dict[str, Any]], swaps: int
) -> None:
    expected = {name: alone(bundle, given) for name, given in styles.items()}
    assert len(set(expected.values())) == len(styles)
    denoiser, lock, seen = load(bundle, dtype="fp32"), threading.Lock(), set[str]()

    def swap(first: int) -> None:
        for number in range(swaps // THREADS):
            denoiser.use(**list(styles.values())[(first + number) % len(styles)])
            found = forward(denoiser)
            with lock:
                seen.add(found)

    with ThreadPoolExecutor(THREADS) as pool:
        for future in [pool.submit(swap, first) for first in range(THREADS)]:
            future.result()
    assert seen == set(expected.values())
    for name, given in styles.items():
        denoiser.use(**given)
        assert forward(denoiser) == expected[name], name


@pytest.mark.parametrize("dtype", slow_but(["fp32", "fp16"], "fp16"))
def test_a_style_in_memory_is_that_of_its_set_to_the_bit(
    dtype: str, bundle: Path, loras: list[Path]
) -> None:
    denoiser = load(bundle, dtype=dtype)
    plain = forward(denoiser)
    add(bundle, "set", lora=[loras[0], f"{loras[1]}:-0.5"])
    denoiser.use(lora=[loras[0], f"{loras[1]}:-0.5"])
    merged = forward(denoiser)
    denoiser.use("set")
    assert forward(denoiser) == merged != plain
    denoiser.use()
    assert forward(denoiser) == plain


def test_a_lora_that_cannot_be_used_leaves_the_set_before(
    bundle: Path, loras: list[Path], tmp_path: Path
) -> None:
    denoiser = load(bundle, dtype="fp32")
    denoiser.use(lora=[loras[0]])
    expected, name = forward(denoiser), denoiser.weights
    (tmp_path / "bad.safetensors").write_bytes(loras[0].read_bytes()[:-100])
    wrong: list[Any] = [
        [tmp_path / "gone.safetensors"], [tmp_path / "bad.safetensors"], [(loras[1], np.inf)],
        [(loras[1], 1e300)], [3], {"high_noise": [loras[0]]},
    ]  # fmt: skip
    for given in wrong:
        with pytest.raises(WanExportError) as refused:
            denoiser.use(lora=given)
        assert "\n" not in str(refused.value)
        assert denoiser.weights == name and forward(denoiser) == expected, given


def test_a_file_that_changes_while_it_is_used_is_refused_at_the_next_merge(
    bundle: Path, loras: list[Path]
) -> None:
    denoiser = load(bundle, dtype="fp32")
    denoiser.use(lora=[loras[0]])
    expected = forward(denoiser)
    loras[0].write_bytes(loras[1].read_bytes())
    assert forward(denoiser) == expected
    denoiser.use(lora=[loras[0]])
    assert forward(denoiser) != expected


def test_merged_values_beyond_the_sets_dtype_are_refused(bundle: Path, loras: list[Path]) -> None:
    denoiser = load(bundle, dtype="fp16")
    with pytest.raises(BadRequest, match="values beyond float16 with the LoRAs merged"):
        denoiser.use(lora=[(loras[0], 1e7)])
