"""LoRAs merged into device memory: only what changed is read again, and a failure hangs nothing."""

from pathlib import Path

import pytest
import torch

from tests.oracles.lora_files import write_lora
from tests.oracles.wan_reference import small_config
from wanexport.graphs.weights import RandomWeights, write_weights
from wanexport.runtime.bundle import piece_reading
from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.engines.device_weights import DeviceWeights
from wanexport.runtime.errors import BadRequest, BundleError, EngineFailure
from wanexport.runtime.lora.merge import LoraStack
from wanexport.runtime.lora.merged_file import MergedFile

CONFIG = small_config("t2v-1.3b", num_layers=1)
SHAPES = parameter_shapes(CONFIG)
CPU = torch.device("cpu")


@pytest.fixture
def file(tmp_path: Path) -> PinnedFile:
    """A weights file in bf16."""
    path = tmp_path / "denoiser.safetensors"
    write_weights(path, CONFIG, "bf16", RandomWeights(CONFIG, 0, ""))
    return pin(path)


@pytest.fixture
def stacks(tmp_path: Path) -> list[LoraStack]:
    """Two LoRAs."""
    files = [write_lora(tmp_path / f"{seed}.safetensors", SHAPES, seed) for seed in range(2)]
    return [LoraStack([(path, 1.0)], SHAPES) for path in files]


def merged(file: PinnedFile, stack: LoraStack) -> MergedFile:
    return MergedFile(**vars(file), stack=stack)


def held(weights: DeviceWeights, file: PinnedFile) -> dict[str, torch.Tensor]:
    """A copy of what is held of a file."""
    with weights.held(file):
        return {name: tensor.clone() for name, tensor in weights.tensors.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_each_stack_is_merged_into_the_file_alone(
    file: PinnedFile, stacks: list[LoraStack], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piece_reading, "PIECE", 1 << 12)
    weights = DeviceWeights(file, CPU)
    base = held(weights, file)
    expected = [
        {n: s.rounded(n, t) if s.changes(n) else t for n, t in base.items()} for s in stacks
    ]
    changed = [n for n in base if not torch.equal(expected[0][n], base[n])]
    assert len(changed) > 10 and not same(expected[0], expected[1])
    for number in (0, 1, 0, None, 1, None):
        target = file if number is None else merged(file, stacks[number])
        assert same(held(weights, target), base if number is None else expected[number])
    assert weights.generation == 7


def test_of_a_file_that_is_held_only_what_a_lora_changed_is_read_again(
    file: PinnedFile, stacks: list[LoraStack], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = DeviceWeights(file, CPU)
    read: list[int] = []
    real = piece_reading._read

    def counted(handle: int, path: Path, piece: object, target: torch.Tensor) -> None:
        read.append(piece.size)  # type: ignore[attr-defined]
        real(handle, path, piece, target)  # type: ignore[arg-type]

    monkeypatch.setattr(piece_reading, "_read", counted)
    held(weights, merged(file, stacks[0]))
    assert read == []
    held(weights, merged(file, stacks[1]))
    changed = sum(t.nbytes for n, t in weights.tensors.items() if stacks[0].changes(n))
    assert sum(read) == changed < weights.buffer.nbytes


def test_too_little_memory_for_a_merge_is_one_line(
    file: PinnedFile, stacks: list[LoraStack], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = DeviceWeights(file, CPU)
    base = held(weights, file)

    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(LoraStack, "rounded", full)
        with pytest.raises(EngineFailure, match="too little memory free to merge a LoRA, which"):
            held(weights, merged(file, stacks[0]))
    assert same(held(weights, file), base)


def test_a_failure_while_merging_or_reading_ends_at_once_and_mends_at_the_next_call(
    file: PinnedFile, stacks: list[LoraStack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = DeviceWeights(file, CPU)
    base = held(weights, file)
    too_large = LoraStack([(tmp_path / "0.safetensors", 1e300)], SHAPES)
    with pytest.raises(BadRequest, match="becomes NaN or infinite"):
        held(weights, merged(file, too_large))
    assert same(held(weights, file), base)
    held(weights, merged(file, stacks[0]))

    def broken(*_: object) -> None:
        raise BundleError("ended while it was read")

    with monkeypatch.context() as patch:
        patch.setattr(piece_reading, "_read", broken)
        with pytest.raises(BundleError, match="ended while it was read"):
            held(weights, merged(file, stacks[1]))
    assert same(held(weights, file), base)
