"""Streamed layers give what resident ones give, to the bit, whatever is changed meanwhile."""

import gc
import random
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.oracles.lora_files import write_lora
from tests.oracles.simulated_streams import Simulated
from tests.oracles.wan_reference import small_config, small_geometry
from tests.runtime.engines.test_aoti_engine import (
    FUNCTIONS,
    LAYERS,
    PROGRAM,
    FakeRegions,
    Plain,
    engine_of,
    inputs,
    weights,
)
from wanexport.graphs.weights import RandomWeights, write_weights
from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.bundle.signature import parameter_shapes, program_of, weights_layout
from wanexport.runtime.denoiser import Denoiser, WeightsSet
from wanexport.runtime.engines import host_weights
from wanexport.runtime.engines.aoti import AotiEngine
from wanexport.runtime.engines.device_weights import DeviceWeights
from wanexport.runtime.engines.host_weights import FileWeights, HostWeights
from wanexport.runtime.engines.layer_parts import parts_of
from wanexport.runtime.engines.streamed_weights import StreamedWeights
from wanexport.runtime.errors import BadRequest, BundleError, EngineFailure, WanExportWarning
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.lora.merge import LoraStack
from wanexport.runtime.lora.merged_file import MergedFile
from wanexport.runtime.program import Program

CPU = torch.device("cpu")
CONFIG = small_config("t2v-1.3b", num_layers=3)
SHAPES = parameter_shapes(CONFIG)
WAN = program_of(CONFIG, small_geometry(CONFIG))


@pytest.fixture
def files(tmp_path: Path) -> list[PinnedFile]:
    return [pin(weights(tmp_path / f"{seed}.safetensors", seed)) for seed in (0, 1)]


@pytest.fixture
def wan(tmp_path: Path) -> PinnedFile:
    """A weights file of a small Wan in bf16, parts of it in fp32."""
    path = tmp_path / "denoiser.safetensors"
    write_weights(path, CONFIG, "bf16", RandomWeights(CONFIG, 0, ""))
    return pin(path)


@pytest.fixture
def merged(wan: PinnedFile, tmp_path: Path) -> list[PinnedFile]:
    """The same with one LoRA, and with another."""
    loras = [write_lora(tmp_path / f"lora-{seed}.safetensors", SHAPES, seed) for seed in range(2)]
    return [MergedFile(**vars(wan), stack=LoraStack([(path, 1.0)], SHAPES)) for path in loras]


def streamed(file: PinnedFile, resident: int = 0, program: Program = PROGRAM) -> StreamedWeights:
    held = StreamedWeights(file, program, CPU)
    held.keep(resident)
    return held


def tensors(held: StreamedWeights, file: PinnedFile) -> dict[str, torch.Tensor]:
    """A copy of all that is held of a file, layer after layer."""
    found: dict[str, torch.Tensor] = {}
    with held.held(file):
        for call in WAN.calls:
            for index, (names, _) in enumerate(call.layers()):
                if call.name != held.parts.call:
                    found |= {name: held.tensors[name].clone() for name in names}
                    continue
                with held.layer(index, names) as parameters:
                    found |= {n: t.clone() for n, t in zip(names, parameters, strict=True)}
    return found


def expected(file: PinnedFile, shared: DeviceWeights) -> dict[str, torch.Tensor]:
    with shared.held(file):
        return {name: tensor.clone() for name, tensor in shared.tensors.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("resident", range(LAYERS + 1))
def test_an_engine_gives_the_same_with_any_number_of_layers_on_the_device(
    resident: int, files: list[PinnedFile]
) -> None:
    engine = AotiEngine(FakeRegions(), streamed(files[0], resident), files[0])
    whole = engine_of(files[0])
    memories = engine.memory(), whole.memory()
    for number, file in enumerate((files[0], files[0], files[1], files[1], files[0])):
        given = {**inputs(number), "text": inputs()["text"]}
        ours, theirs = engine(given, file, memories[0]), whole(given, file, memories[1])
        assert torch.equal(ours, theirs)
    assert engine.weights is not None and engine.weights.generation == 3
    engine.close()
    with pytest.raises(EngineFailure, match="was closed"):
        engine(inputs())


class LaterRegions(FakeRegions):
    """Functions that run when the simulated streams come to them."""

    def __init__(self, streams: Simulated) -> None:
        super().__init__()
        self.streams = streams
        specs = {**PROGRAM.values, **PROGRAM.outputs}
        for call in PROGRAM.calls:
            shapes = [specs[name].shape for name in call.writes]
            run = self._later(FUNCTIONS[call.name], shapes)
            cast(Any, self.runners)[call.name] = SimpleNamespace(run=run)

    def _later(
        self, function: Callable[..., Any], shapes: Sequence[tuple[int, ...]]
    ) -> Callable[[Sequence[torch.Tensor]], Any]:
        def run(arguments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            results, first = [torch.empty(shape) for shape in shapes], list[torch.Tensor]()

            def begin() -> None:
                first.extend(t.clone() for t in arguments)

            def end() -> None:  # what it read did not change while it ran
                assert all(torch.equal(a, b) for a, b in zip(first, arguments))
                for result, value in zip(results, function(*arguments)):
                    result.copy_(value)

            self.streams.work(begin, end)
            return results

        return run


@pytest.mark.parametrize("seed", range(12))
def test_callers_on_several_streams_and_two_experts_get_their_own_values(
    seed: int, files: list[PinnedFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    streams, copy = Simulated(chance), HostWeights.copy

    def later(self: HostWeights, number: int, target: torch.Tensor) -> None:
        def begin() -> None:
            target.fill_(255)  # NaN, as what is half copied might be

        streams.work(begin, lambda: copy(self, number, target))

    monkeypatch.setattr(HostWeights, "copy", later)
    held = StreamedWeights(files[0], PROGRAM, CPU, streams=cast(Any, streams))
    held.keep(chance.randint(0, 1))
    engine, plain = AotiEngine(LaterRegions(streams), held, files[0]), list[Any]()
    for number in range(8):
        file, given = files[chance.randint(0, 1)], inputs(number)
        streams.current = chance.choice(["one", "other"])
        plain.append((engine(given, file), Plain(file)(given)))
        if chance.random() < 0.3:
            streams.run()
    streams.run()
    for ours, theirs in plain:
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("resident", [0, 1, 3])
def test_sets_and_loras_take_turns(
    resident: int, wan: PinnedFile, merged: list[PinnedFile], tmp_path: Path
) -> None:
    path = tmp_path / "style.safetensors"
    write_weights(path, CONFIG, "bf16", RandomWeights(CONFIG, 1, ""))
    held, shared = streamed(wan, resident, WAN), DeviceWeights(wan, CPU)
    for file in (wan, merged[0], merged[1], pin(path), wan, merged[0]):
        assert same(tensors(held, file), expected(file, shared))


def test_layers_come_in_one_piece_each(wan: PinnedFile) -> None:
    parts = streamed(wan, program=WAN).parts
    assert parts.call == "block" and len(parts.layers) == 3 and parts.layer_bytes % 256 == 0
    assert {tuple(part.offsets.values()) for part in parts.layers} == {
        tuple(parts.layers[0].offsets.values())
    }
    assert not any(name.startswith("blocks.") for name in parts.rest.offsets)
    assert parts.size == sum(
        -(-entry.size // 256) * 256 for entry in streamed(wan).entries.values()
    )


def test_calls_of_every_moment_share_the_layers_of_a_causal_model() -> None:
    config = replace(CONFIG, family="self-forcing")
    program = program_of(config, Geometry(32, 48, 13, chunk=2, cache=4))
    _, entries = weights_layout(config, "bf16")
    parts = parts_of(entries, program)
    own = [{n for n in entries if n.startswith(f"blocks.{i}.")} for i in range(3)]
    assert [set(part.offsets) for part in parts.layers] == own
    assert set(parts.rest.offsets) == set(entries) - set().union(*own)
    layers = {
        call.name: [parts.layer_of(names) for names, _ in call.layers()] for call in program.calls
    }
    assert layers == {
        "text": [None], "text_block": [0, 1, 2], "embed": [None], "block": [0, 1, 2],
        "head": [None], "commit_embed": [None], "commit_block": [0, 1], "commit_keep": [2],
    }  # fmt: skip


def test_what_memory_does_not_hold_is_read_from_the_file_and_said(
    wan: PinnedFile, merged: list[PinnedFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_weights, "available_bytes", lambda: 1 << 30)
    with pytest.warns(WanExportWarning, match="GB are free.*layers are read from the file at ev"):
        held = streamed(wan, 1, WAN)
    assert isinstance(held._source.host, FileWeights)
    shared = DeviceWeights(wan, CPU)
    for _ in range(2):
        assert same(tensors(held, wan), expected(wan, shared))
    with pytest.raises(EngineFailure, match="merge its LoRAs into a set with wanexport add"):
        tensors(held, merged[0])
    wan.path.write_bytes(wan.path.read_bytes())
    with pytest.warns(WanExportWarning), pytest.raises(BundleError, match="was changed since"):
        tensors(held, wan)


def test_where_memory_holds_one_file_the_others_go(
    files: list[PinnedFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = streamed(files[0])
    monkeypatch.setattr(
        host_weights, "available_bytes", lambda: (2 << 30) if not held._hosts else 0
    )
    held.read_ahead(files[1])  # for which there is no room beside the other
    assert list(held._hosts) == [files[0].identity]
    engine = AotiEngine(FakeRegions(), held, files[0])
    for file in (files[1], files[0]):
        torch.testing.assert_close(engine(inputs(), file), Plain(file)(inputs()))
        assert list(held._hosts) == [file.identity]


def test_engines_of_a_process_share_one_copy_until_one_merges_a_lora(
    wan: PinnedFile, merged: list[PinnedFile]
) -> None:
    one, other = streamed(wan, program=WAN), streamed(wan, 2, WAN)
    assert one._source.host is other._source.host
    base = tensors(one, wan)
    changed = tensors(one, merged[0])
    assert not same(changed, base) and same(tensors(other, wan), base)
    assert one._source.host is not other._source.host
    own = one._source.host
    tensors(one, merged[1])
    assert one._source.host is own  # in place: nobody else has it
    del one, own
    gc.collect()
    assert same(tensors(streamed(wan, program=WAN), wan), base)


def test_a_hundred_forwards_leave_nothing_behind(files: list[PinnedFile]) -> None:
    engine = AotiEngine(FakeRegions(), streamed(files[0], 1), files[0])
    engine.regions.calls = cast(Any, SimpleNamespace(append=lambda name: None))  # type: ignore[attr-defined]

    def held() -> int:
        gc.collect()
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    for file in files:
        engine(inputs(), file)
    before = held()
    for number in range(100):
        engine(inputs(number), files[number // 10 % 2])
    assert held() == before


def test_a_closed_engine_frees_its_buffers_at_once(files: list[PinnedFile]) -> None:
    held = streamed(files[0], 1)
    engine, alive = AotiEngine(FakeRegions(), held, files[0]), weakref.ref(held)
    gc.disable()  # which would find it in a circle
    try:
        del held
        engine.close()
        assert alive() is None
    finally:
        gc.enable()


def test_a_denoiser_reads_both_experts_of_a_set_ahead(files: list[PinnedFile]) -> None:
    held = streamed(files[0])
    experts = ("high_noise", "low_noise")
    engines = {name: AotiEngine(FakeRegions(), held, files[0]) for name in experts}
    sets = WeightsSet("style", dict(zip(experts, (files[1], files[0]))))
    record = cast(Any, SimpleNamespace(name="an engine"))
    denoiser = Denoiser(
        record, engines, WeightsSet("base", dict.fromkeys(experts, files[0])),
        lambda *_, **__: sets, offload="blocks",
    )  # fmt: skip
    denoiser.use("style")
    assert held.holds(files[1]) and set(held._hosts) == {file.identity for file in files}
    assert denoiser.resident_blocks == 0 and denoiser.offload == "blocks"


def test_what_cannot_be_is_one_line(files: list[PinnedFile]) -> None:
    with pytest.raises(BadRequest, match="4 resident blocks: expected from 0 to 3"):
        streamed(files[0]).keep(4)
    with pytest.raises(BadRequest, match="no call that repeats: leave --offload blocks out"):
        StreamedWeights(files[0], PROGRAM.whole(), CPU)
