"""Weights in one buffer: what it holds, who shares it, and what a failed switch leaves."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wanexport.graphs.config import PRESETS
from wanexport.graphs.weights import RandomWeights, write_weights
from wanexport.runtime import WanExportError
from wanexport.runtime.bundle.pinned_file import pin
from wanexport.runtime.engines.device_weights import DeviceWeights, device_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two weights files of one layout."""
    folder, config = tmp_path_factory.mktemp("weights"), PRESETS["tiny"].config
    paths = [folder / f"{seed}.safetensors" for seed in (0, 1)]
    for seed, path in enumerate(paths):
        write_weights(path, config, "bf16", RandomWeights(config, seed, ""))
    return paths


def assert_holds(weights: DeviceWeights, file: Path) -> None:
    expected = load_file(file)
    assert weights.tensors.keys() == expected.keys()
    for name, tensor in weights.tensors.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.is_contiguous() and tensor.storage_offset() * tensor.itemsize % 256 == 0


def test_the_buffer_holds_the_file_and_then_the_other(files: list[Path]) -> None:
    weights = DeviceWeights(files[0], CPU)
    assert_holds(weights, files[0])
    kept = weights.tensors["head.head.weight"]
    weights.use(files[0])
    assert not weights.switches
    weights.use(files[1])
    assert_holds(weights, files[1])
    assert weights.tensors["head.head.weight"] is kept and len(weights.switches) == 1


def test_weights_opened_in_inference_mode_can_be_written_outside(files: list[Path]) -> None:
    with torch.inference_mode():
        weights = DeviceWeights(files[0], CPU)
    assert_holds(weights, files[0])
    for tensor in (weights.buffer, weights.tensors["head.head.bias"]):
        tensor.zero_()


def test_a_failed_switch_is_made_good_by_the_next(files: list[Path], tmp_path: Path) -> None:
    weights = DeviceWeights(files[0], CPU)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(files[1].read_bytes()[:-1000])
    with pytest.raises(WanExportError, match="ended while it was read"):
        weights.use(cut)
    weights.use(files[0])
    assert_holds(weights, files[0])


def test_weights_of_another_layout_are_refused_at_the_switch(
    files: list[Path], tmp_path: Path
) -> None:
    weights, blank = DeviceWeights(files[0], CPU), tmp_path / "blank.safetensors"
    content = files[1].read_bytes()
    length = int.from_bytes(content[:8], "little")
    blank.write_bytes(content[:8] + b"{}".ljust(length) + content[8 + length :])
    with pytest.raises(WanExportError, match=f"{blank} is laid out otherwise"):
        weights.use(blank)
    weights.use(files[0])
    assert_holds(weights, files[0])


@pytest.mark.parametrize("what", ["rewritten", "gone", "a folder"])
def test_a_file_that_changed_since_it_was_pinned_is_one_line(
    what: str, files: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(files[1].read_bytes())
    weights, pinned = DeviceWeights(files[0], CPU), pin(path)
    path.unlink()
    if what == "rewritten":
        path.write_bytes(files[1].read_bytes())
    elif what == "a folder":
        path.mkdir()
    with pytest.raises(WanExportError, match=f"{path} ") as caught:
        weights.use(pinned)
    assert "\n" not in str(caught.value)
    weights.use(files[0])
    assert_holds(weights, files[0])


def test_the_switches_of_a_server_that_runs_for_ever_are_not_all_kept(files: list[Path]) -> None:
    weights = DeviceWeights(files[0], CPU)
    weights.switches.extend([0.0] * 5000)
    assert len(weights.switches) == 1000


def test_one_file_is_read_once_while_anyone_holds_it(files: list[Path], tmp_path: Path) -> None:
    first = device_weights(files[0], CPU)
    assert device_weights(files[0], CPU) is first
    assert device_weights(files[1], CPU) is not first
    assert device_weights(files[0], CPU, private=True) is not first
    (tmp_path / "link.safetensors").symlink_to(files[0])
    assert device_weights(tmp_path / "link.safetensors", CPU) is first
    for path in (tmp_path / "link.safetensors", files[0]):
        first.use(path)  # which already is its content
    assert not first.switches
    alive = weakref.ref(first)
    del first
    gc.collect()
    assert alive() is None
