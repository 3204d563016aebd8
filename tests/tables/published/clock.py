"""Times of calls on a CPU or a GPU: medians of several rounds, in which the arms take turns.

In turns, because a machine drifts: a ratio is the median of the ratios of each round. On a GPU they
are times of its clock, from launch to end. On a CPU with one thread they are times of the
processor, which other programs of the machine do not enter; with more threads, of the wall clock.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

ROUNDS = 7
Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Milliseconds of the same call, one for each round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Their median."""
        return statistics.median(self.values)

    def __str__(self) -> str:
        return spread(self.values)


def number(value: float) -> str:
    """Three significant digits, and no exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(values: tuple[float, ...]) -> str:
    """The median, and from the least to the greatest."""
    least, most = number(min(values)), number(max(values))
    return f"{number(statistics.median(values))} ({least} to {most})"


def ratio(slow: Times, fast: Times) -> str:
    """How many times as long one takes as the other: of the rounds, median and spread."""
    shares = tuple(a / b for a, b in zip(slow.values, fast.values, strict=True))
    least, most = min(shares), max(shares)
    return f"{statistics.median(shares):.3f} ({least:.3f} to {most:.3f})"


def share(part: Times, whole: Times, times: int = 1) -> str:
    """What share of a call another one takes that runs in it so many times."""
    return f"{100 * times * part.median / whole.median:.1f} %"


def in_turns(
    arms: Mapping[str, Call], device: str, rounds: int = ROUNDS, warmups: int = 2
) -> dict[str, Times]:
    """Times of each arm."""
    for call in arms.values():
        for _ in range(warmups):
            call()
    measured: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, call in arms.items():
            measured[name].append(_milliseconds(call, device))
    return {name: Times(tuple(values)) for name, values in measured.items()}


def clock_of_process(device: str) -> Callable[[], float]:
    """Seconds: of the processor where one thread of it computes, else of the wall clock."""
    alone = device == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def _milliseconds(call: Call, device: str) -> float:
    if device == "cpu":
        clock = clock_of_process(device)
        started = clock()
        call()
        return (clock() - started) * 1e3
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
