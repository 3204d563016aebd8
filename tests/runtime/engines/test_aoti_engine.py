"""The loop over a Program's calls, with functions of PyTorch in the place of compiled packages."""

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import md5
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.bundle.tensorfile import load_arrays, save_arrays
from wanexport.runtime.denoiser import Denoiser, WeightsSet
from wanexport.runtime.engines.aoti import AotiEngine
from wanexport.runtime.engines.aoti_regions import BoundRegions, Regions
from wanexport.runtime.engines.device_weights import DeviceWeights
from wanexport.runtime.engines.engine import Memory
from wanexport.runtime.engines.operators import attention
from wanexport.runtime.errors import BadRequest, BundleError, EngineFailure
from wanexport.runtime.program import Call, Input, Program, TensorSpec

CPU = torch.device("cpu")
LAYERS = 3
# Its text is read once a prompt. A block adds what its layer keeps, and keeps what it gave. Names
# are read in another order than they are written.
PROGRAM = Program(
    inputs={"latent": Input((4,)), "timestep": Input((1,)), "text": Input((2,))},
    outputs={"velocity": TensorSpec((4,))},
    calls=(
        Call("read", ("text",), ("sum", "first"), ("read.w",), when="prompt"),
        Call("embed", ("timestep", "latent"), ("time", "x"), ("embed.w",)),
        Call(
            "block", ("first", "x", "sum"), ("x",), ("blocks.{i}.a", "blocks.{i}.b"),
            state=("kept.{i}",), repeat=LAYERS,
        ),
        Call("head", ("time", "x"), ("velocity",), ("head.w",)),
    ),
    values={
        "sum": TensorSpec((1,)), "first": TensorSpec((1,)), "time": TensorSpec((1,)),
        "x": TensorSpec((4,)),
    },
    state={"kept.{i}": TensorSpec((4,))},
)  # fmt: skip
PARAMETERS = ["read.w", "embed.w", "head.w"]
PARAMETERS += [f"blocks.{i}.{name}" for i in range(LAYERS) for name in "ab"]


def read(w: Tensor, text: Tensor) -> list[Tensor]:
    return [(text * w).sum()[None], text[:1] - w]


def embed(w: Tensor, timestep: Tensor, latent: Tensor) -> list[Tensor]:
    return [timestep / 1000, latent * w]


def block(a: Tensor, b: Tensor, first: Tensor, x: Tensor, total: Tensor, kept: Tensor) -> Any:
    y = x * a + first * b + total + kept
    kept.copy_(y)
    return [y]


def head(w: Tensor, time: Tensor, x: Tensor) -> list[Tensor]:
    return [x * w + time]


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "read": read, "embed": embed, "block": block, "head": head,
}  # fmt: skip


class FakeRegions(Regions):
    """Regions whose packages are functions, and a record of which was called."""

    def __init__(self, program: Program = PROGRAM, **functions: Callable[..., Any]) -> None:
        self.program, self.kernels, self.device = program, {}, CPU
        self.dtype = torch.float32
        self.lock = threading.Lock()
        self.calls: list[str] = []
        runners = {name: self._runner(name, f) for name, f in {**FUNCTIONS, **functions}.items()}
        self.runners = cast(Any, runners)

    def _runner(self, name: str, function: Callable[..., Any]) -> SimpleNamespace:
        def run(arguments: Sequence[Tensor]) -> Any:
            self.calls.append(name)
            return function(*arguments)

        return SimpleNamespace(run=run)


def weights(path: Path, seed: int) -> Path:
    """A weights file of the program's parameters."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(1, generator=generator) for name in PARAMETERS}
    save_arrays(path, {name: tensor.numpy() for name, tensor in drawn.items()})
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[PinnedFile]:
    return [pin(weights(tmp_path / f"{seed}.safetensors", seed)) for seed in (0, 1)]


def engine_of(file: PinnedFile, regions: Regions | None = None) -> AotiEngine:
    return AotiEngine(regions or FakeRegions(), DeviceWeights(file, CPU), file)


def inputs(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {n: torch.randn(s.shape, generator=generator) for n, s in PROGRAM.inputs.items()}
    return {**drawn, "timestep": torch.tensor([500.0])}


class Plain:
    """The same maths written out, in fp64: the weights of a file, and what its layers keep."""

    def __init__(self, file: PinnedFile) -> None:
        self.use(file)
        self.kept = [torch.zeros(4, dtype=torch.float64)] * LAYERS

    def use(self, file: PinnedFile) -> None:
        self.w = {n: torch.from_numpy(a).double() for n, a in load_arrays(file.path).items()}

    def __call__(self, given: Mapping[str, Tensor]) -> Tensor:
        w, text = self.w, given["text"].double()
        x = given["latent"].double() * w["embed.w"]
        for i in range(LAYERS):
            x = x * w[f"blocks.{i}.a"] + (text[0] - w["read.w"]) * w[f"blocks.{i}.b"]
            x = x + (text * w["read.w"]).sum() + self.kept[i]
            self.kept[i] = x
        return (x * w["head.w"] + given["timestep"].double() / 1000).float()


def test_values_go_by_name_through_every_layer(files: list[PinnedFile]) -> None:
    engine = engine_of(files[0])
    for seed in range(3):  # without a memory of the caller's, each call begins anew
        torch.testing.assert_close(engine(inputs(seed)), Plain(files[0])(inputs(seed)))


def test_a_session_keeps_its_state_and_reads_its_text_once(files: list[PinnedFile]) -> None:
    regions = FakeRegions()
    engine, plain, other = engine_of(files[0], regions), Plain(files[0]), Plain(files[0])
    mine, theirs = engine.memory(), engine.memory()
    text = inputs()["text"]
    for seed in range(3):
        given = {**inputs(seed), "text": text}
        torch.testing.assert_close(engine(given, files[0], mine), plain(given))
        if seed:  # another session has begun later, and is at another step
            torch.testing.assert_close(engine(given, files[0], theirs), other(given))
    assert regions.calls.count("read") == 2
    assert regions.calls.count("embed") == 5 and regions.calls.count("block") == 5 * LAYERS


def test_what_the_prompt_gave_is_computed_anew_for_other_weights(files: list[PinnedFile]) -> None:
    regions = FakeRegions()
    engine, plain, memory = engine_of(files[0], regions), Plain(files[0]), None
    memory = engine.memory()
    for file in (files[0], files[1], files[1], files[0]):
        plain.use(file)
        torch.testing.assert_close(engine(inputs(), file, memory), plain(inputs()))
    assert regions.calls.count("read") == 3


def test_a_commit_runs_the_blocks_code_again_and_gives_nothing(files: list[PinnedFile]) -> None:
    """Blocks 0 and 1, and for the last layer a function of its own; the prompt's calls run once."""

    def keep(w: Tensor, x: Tensor, kept: Tensor) -> list[Tensor]:
        kept.copy_(-x)
        return []

    own = PROGRAM.calls[2]
    calls = (
        *PROGRAM.calls,
        Call("again", ("timestep", "latent"), ("time", "x"), ("embed.w",), when="commit",
             code="embed"),
        Call("more", own.reads, own.writes, own.parameters, own.state, LAYERS - 1, "commit",
             code="block"),
        Call("keep", ("x",), (), ("head.w",), own.state, when="commit", first=LAYERS - 1),
    )  # fmt: skip
    regions = FakeRegions(replace(PROGRAM, calls=calls), keep=keep)
    engine = engine_of(files[0], regions)
    memory, stepped = engine.memory(), engine.memory()
    engine(inputs(), files[0], stepped)
    del regions.calls[:]
    assert engine(inputs(), files[0], memory, "commit") is None
    assert regions.calls == ["read", "embed", "block", "block", "keep"]
    for name in ("kept.0", "kept.1"):
        torch.testing.assert_close(memory.state[name], stepped.state[name])
    torch.testing.assert_close(memory.state["kept.2"], -memory.state["kept.1"])
    del regions.calls[:]
    engine(inputs(), files[0], memory, "commit")
    assert "read" not in regions.calls


def test_the_state_is_written_in_place(files: list[PinnedFile]) -> None:
    engine = engine_of(files[0])
    memory = engine.memory()
    kept = dict(memory.state)
    assert list(kept) == ["kept.0", "kept.1", "kept.2"]
    assert not any(tensor.any() for tensor in kept.values())
    engine(inputs(), files[0], memory)
    assert all(memory.state[name] is tensor and tensor.all() for name, tensor in kept.items())


def test_a_parameter_that_the_weights_lack_is_one_line(files: list[PinnedFile]) -> None:
    tensors = dict(DeviceWeights(files[0], CPU).tensors)
    del tensors["blocks.1.b"]
    with pytest.raises(BundleError, match=r"takes a parameter 'blocks\.1\.b' that its weights"):
        BoundRegions(FakeRegions(), tensors)


def test_kernels_are_chosen_for_the_time_of_a_call(files: list[PinnedFile]) -> None:
    def attend(w: Tensor, time: Tensor, x: Tensor) -> list[Tensor]:
        q = torch.ones(1, 4, 1, 1)
        return [attention(q, q, q, "self").flatten() * 0 + x * w + time]

    regions = FakeRegions(head=attend)
    engine, seen = engine_of(files[0], regions), list[str]()

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append("self")
        return v

    regions.kernels = {"self": kernel}
    torch.testing.assert_close(engine(inputs()), Plain(files[0])(inputs()))
    assert seen == ["self"]
    q = torch.ones(1, 4, 1, 1)
    assert attention(q, q, q, "self").shape == q.shape and seen == ["self"]
    regions.kernels = {"text": kernel}
    with pytest.raises(BadRequest, match="no kernel is chosen for attention of kind self, only"):
        engine(inputs())


def test_what_pytorch_refuses_is_one_line(files: list[PinnedFile]) -> None:
    def full(*arguments: Tensor) -> list[Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    engine = engine_of(files[0], FakeRegions(head=full))
    with pytest.raises(EngineFailure, match=r"failed on cpu .CUDA out of memory") as refused:
        engine(inputs())
    assert "\n" not in str(refused.value)


def digest(velocity: Tensor) -> str:
    return md5(velocity.numpy().tobytes()).hexdigest()


def slowly(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function after a while, in which other threads run."""

    def run(*arguments: Tensor) -> Any:
        time.sleep(0.0005)
        return function(*arguments)

    return run


def denoiser_of(files: Sequence[PinnedFile], regions: Regions) -> Denoiser:
    """A denoiser whose sets are called 0 and 1."""
    record: Any = SimpleNamespace(
        geometry=SimpleNamespace(chunk=0),
        name="engine", program=regions.program, inputs=regions.program.inputs,
        output=regions.program.output, sampling=SimpleNamespace(boundary=None),
    )  # fmt: skip
    sets = {str(n): WeightsSet(str(n), {"": file}) for n, file in enumerate(files)}

    def find(name: object, **_: object) -> WeightsSet:
        if str(name) not in sets:
            raise BadRequest(f"no weights set {name}")
        return sets[str(name)]

    return Denoiser(record, {"": engine_of(files[0], regions)}, sets["0"], find)


def test_swaps_from_two_threads_during_forwards_leave_every_forward_one_set(
    files: list[PinnedFile],
) -> None:
    """Every layer reads its weights late, so that a swap within a forward would be seen."""
    plain = replace(PROGRAM, state={}, calls=tuple(replace(c, state=()) for c in PROGRAM.calls))
    slow = {name: slowly(f) for name, f in FUNCTIONS.items()}
    slow["block"] = slowly(lambda *given: FUNCTIONS["block"](*given, torch.zeros(4)))
    denoiser, done = denoiser_of(files, FakeRegions(plain, **slow)), threading.Event()
    own = []
    for name in ("0", "1"):
        denoiser.use(name)
        own.append(digest(denoiser(**inputs())))
    assert own[0] != own[1]

    def swap(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(50):
            denoiser.use(rng.choice("01"))
            time.sleep(rng.random() * 0.005)

    def call() -> list[str]:
        seen = []
        while not done.is_set():
            seen.append(digest(denoiser(**inputs())))
        return seen

    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(call) for _ in range(2)]
        for future in [pool.submit(swap, seed) for seed in (0, 1)]:
            future.result()
        done.set()
        seen = [one for future in calls for one in future.result()]
    assert len(seen) > 20 and set(seen) == set(own)


def test_a_swap_that_fails_leaves_the_set_before(files: list[PinnedFile], tmp_path: Path) -> None:
    gone = pin(weights(tmp_path / "gone.safetensors", 2))
    gone.path.unlink()
    save_arrays(tmp_path / "other", {"head.w": torch.ones(1).numpy()})
    denoiser = denoiser_of([*files, gone, pin(tmp_path / "other")], FakeRegions())
    files[0].path.unlink()  # what is on the device needs no file
    session = denoiser.session(text=inputs()["text"])
    before = session(latent=inputs()["latent"], timestep=500.0)
    for name, error, said in (
        ("2", BundleError, "cannot read .*gone"),
        ("3", BundleError, "other is laid out otherwise"),
        ("4", BadRequest, "no weights set 4"),
    ):
        with pytest.raises(error, match=said):
            denoiser.use(name)
        assert denoiser.weights == "0"
        again = denoiser.session(text=inputs()["text"])
        assert torch.equal(again(latent=inputs()["latent"], timestep=500.0), before)


def test_a_program_with_state_is_served_by_sessions_alone(files: list[PinnedFile]) -> None:
    denoiser = denoiser_of(files, FakeRegions())
    with pytest.raises(BadRequest, match="keeps a state from step to step: call what session"):
        denoiser(**inputs())
    session, plain = denoiser.session(text=inputs()["text"]), Plain(files[0])
    for seed in range(3):
        given = {**inputs(seed), "text": inputs()["text"]}
        own = {name: value for name, value in given.items() if name != "text"}
        torch.testing.assert_close(session(**own), plain(given))
    denoiser.use("1")  # the session goes on: its state stays, its text is read anew
    plain.use(files[1])
    given = {**inputs(7), "text": inputs()["text"]}
    own = {name: value for name, value in given.items() if name != "text"}
    torch.testing.assert_close(session(**own), plain(given))


def test_a_text_that_changes_within_a_session_is_read_at_each_call(
    files: list[PinnedFile],
) -> None:
    denoiser, plain = denoiser_of(files, FakeRegions()), Plain(files[0])
    session = denoiser.session()
    for seed in range(3):
        torch.testing.assert_close(session(**inputs(seed)), plain(inputs(seed)))


def test_a_closed_engine_says_so_and_lets_go(files: list[PinnedFile]) -> None:
    engine = engine_of(files[0])
    memory = engine.memory()
    engine.close()
    engine.close()
    assert engine.weights is None and engine.bound is None
    for call in (
        lambda: engine(inputs(), files[0], memory),
        lambda: engine(inputs()),
        lambda: engine.use(files[1]),
    ):
        with pytest.raises(EngineFailure, match="was closed: load it again"):
            call()


def test_an_engine_closed_while_a_call_waits_fails_that_call(files: list[PinnedFile]) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def wait(w: Tensor, timestep: Tensor, latent: Tensor) -> list[Tensor]:
        begun.set()
        go_on.wait(5)
        return embed(w, timestep, latent)

    engine = engine_of(files[0], FakeRegions(embed=wait))
    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(engine, inputs())
        assert begun.wait(5)
        waiting = pool.submit(engine, inputs())
        time.sleep(0.05)
        closing = pool.submit(engine.close)
        time.sleep(0.05)
        go_on.set()
        torch.testing.assert_close(running.result(), Plain(files[0])(inputs()))
        closing.result()
        try:  # whichever of the two came first to the lock
            waiting.result()
        except EngineFailure as error:
            assert "was closed" in str(error)
    with pytest.raises(EngineFailure):
        engine(inputs())


def test_a_cpu_runs_nothing_when_an_engine_is_opened(files: list[PinnedFile]) -> None:
    regions = FakeRegions()
    engine = engine_of(files[0], regions)
    assert regions.calls == [] and (engine.launch_seconds, engine.block_seconds) == (0.0, 0.0)
    assert engine.graph is None and engine.device == "cpu"
    assert Memory().values is None
