"""A causal video for the tests: a small model, a cache's slots by plain rules, and clips."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tests.oracles.causal_oracle import CausalOracle
from tests.oracles.plain_wan64 import as_fp64
from wanexport.graphs.causal import CausalWan
from wanexport.runtime.engines.device import zero_state
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.plain_wan import parameter_shapes
from wanexport.runtime.wan_config import WanConfig

CONFIG = WanConfig("self-forcing", 48, 64, 2, 3, 16, 16, 0, text_dim=20, text_len=12, freq_dim=16)
SIDES = (32, 48)  # pixels: 2 x 3 tokens a frame
TEXT_ROWS = 5

Arrays = Mapping[str, np.ndarray]


def random_weights(config: WanConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights by official name, norms about 1."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in parameter_shapes(config).items():
        values = rng.standard_normal(shape, np.float32)
        scale = shape[-1] ** -0.5 if len(shape) > 1 and "modulation" not in name else 0.3
        is_norm = "norm" in name and name.endswith("weight")
        found[name] = (values * np.float32(scale) + is_norm).astype(np.float32)
    return found


@dataclass
class Slots:
    """Which frame of a video is in which slot of a cache, those attended to always the first ones.

    window, sink and max_attention are Self-Forcing's, in latent frames.
    """

    geometry: Geometry
    window: int | None = None
    sink: int = 0
    max_attention: int | None = None
    kept: list[int] = field(default_factory=list)  # frames, as the official list has them
    places: dict[int, int] = field(default_factory=dict)  # slots by frame

    def place(self, start: int, frames: int) -> dict[str, np.ndarray]:
        """The inputs that say where a chunk is; the same chunk may come again."""
        own = list(range(start, start + frames))
        if own[-1] not in self.places:
            over = len(self.kept) + frames - (self.window or 10**9)
            del self.kept[self.sink : self.sink + max(over, 0)]
            self.kept += own
        read = self.kept[-(self.max_attention or 10**9) :]
        self.places = {f: slot for f, slot in self.places.items() if f in read}
        free = [s for s in range(self.geometry.slots) if s not in self.places.values()]
        for frame in read:
            if frame not in self.places:
                self.places[frame] = free.pop(0)
        assert sorted(self.places.values()) == list(range(len(read))), "holes among the slots"
        filled = [self.places[f] for f in own]
        filled += [self.geometry.slots - 1] * (self.geometry.chunk - frames)
        keys = len(read) * self.geometry.frame_tokens
        numbers = {"position": [start], "slots": filled, "keys": [keys]}
        return {name: np.array(values, np.int64) for name, values in numbers.items()}


Call = Callable[[Arrays, str], Any]  # inputs and a moment -> a velocity


def eager(
    weights: Arrays, geometry: Geometry, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[CausalWan, Call]:
    """The graph with weights, and a video of it that has not begun."""
    graph = CausalWan(CONFIG, geometry, dtype, **options)
    graph.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()})
    return graph, begin(graph)


def begin(graph: CausalWan) -> Call:
    """A video whose text is read at its first call."""
    state = zero_state(graph.program, graph.dtype, torch.device("cpu"))
    of_prompt: dict[str, torch.Tensor] = {}

    def call(inputs: Arrays, moment: str) -> Any:
        given = {name: torch.from_numpy(array) for name, array in inputs.items()}
        with torch.no_grad():
            if not of_prompt:
                of_prompt.update(graph.run(given, state, ("prompt",)))
            written = graph.run({**of_prompt, **given}, state, (moment,))
        return written["velocity"].numpy() if moment == "step" else None

    return call


@dataclass(frozen=True)
class Clip:
    """How a video is cut into chunks, and what of it is attended to."""

    chunks: Sequence[int]  # latent frames of each
    cache: int
    window: int | None = None
    sink: int = 0
    max_attention: int | None = None
    given: int = 0  # chunks at the start that are known: only committed

    @property
    def geometry(self) -> Geometry:
        """Of the engine that makes it."""
        frames = (sum(self.chunks) - 1) * 4 + 1
        return Geometry(*SIDES, frames, chunk=max(self.chunks), cache=self.cache)

    @property
    def policy(self) -> dict[str, Any]:
        """Window, sink and the most that is read."""
        return {n: getattr(self, n) for n in ("window", "sink", "max_attention")}


def video_of(engine: Any, device: str = "cpu", *, tells: bool = False) -> Call:
    """A video of an engine that has not begun, from numpy to numpy; with tells the engine is told
    how many keys count."""
    memory = engine.memory()

    def call(inputs: Mapping[str, np.ndarray], moment: str) -> Any:
        memory.attended = int(inputs["keys"][0]) if tells else None
        given = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
        velocity = engine(given, memory=memory, moment=moment)
        return None if velocity is None else velocity.cpu().numpy()

    return call


TIMES = (1000.0, 833.3333, 312.5)


def compared(
    clip: Clip,
    weights: Arrays,
    call: Call,
    slots: Any = None,
    *,
    commits: bool = True,
    config: WanConfig = CONFIG,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Velocities of each step by a call and by the oracle, on random latents.

    slots places chunks otherwise than `Slots`; without commits, what the last step left is kept.
    """
    rng, geometry = np.random.default_rng(7), clip.geometry
    text = rng.standard_normal((TEXT_ROWS, config.text_dim), np.float32)
    padded = np.zeros((1, config.text_len, config.text_dim), np.float32)
    padded[0, :TEXT_ROWS] = text
    oracle = CausalOracle(
        as_fp64(weights), geometry.grid[1], geometry.grid[2], config.num_heads, config.num_layers,
        torch.from_numpy(text).double(), config.text_len, **clip.policy,
    )  # fmt: skip
    slots = slots or Slots(geometry, **clip.policy)
    start = 0
    for number, frames in enumerate(clip.chunks):
        for time in () if number < clip.given else TIMES:
            latent, times = _drawn(rng, geometry, frames, time)
            inputs = _filled(geometry, latent, times) | slots.place(start, frames)
            velocity = call({"text": padded, **inputs}, "step")[0, :, :frames]
            expected = oracle.velocity(torch.from_numpy(latent).double(), times.tolist(), start)
            yield velocity, expected.numpy()
        latent, times = _drawn(rng, geometry, frames, 0.0)
        inputs = _filled(geometry, latent, times) | slots.place(start, frames)
        if commits:
            assert call({"text": padded, **inputs}, "commit") is None
        oracle.velocity(torch.from_numpy(latent).double(), times.tolist(), start)
        start += frames


def _drawn(
    rng: np.random.Generator, geometry: Geometry, frames: int, time: float
) -> tuple[np.ndarray, np.ndarray]:
    """A latent [16, f, h, w] and a timestep for each of its frames, not all the same."""
    _, height, width = geometry.latent
    latent = rng.standard_normal((16, frames, height, width), np.float32)
    return latent, (time * np.linspace(1, 0.9, frames)).astype(np.float32)


def _filled(geometry: Geometry, latent: np.ndarray, times: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs of a chunk, of as many frames as the engine takes; what fills it up is noise."""
    missing = geometry.chunk - latent.shape[1]
    filled = np.pad(latent, ((0, 0), (0, missing), (0, 0), (0, 0)), constant_values=9.0)
    return {"latent": filled[None], "timestep": np.pad(times, (0, missing), constant_values=5.0)}
