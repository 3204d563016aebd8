"""Damage to a manifest: one to three things changed at random, by a seed that repeats it.

    python -m tests.runtime.bundle.mutations NUMBER

damages the manifest of a bundle made by hand, and prints what failed.

A mutant is text: some are no JSON, as a disk or an editor leaves them.
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Place = tuple[Any, Any]  # a list or an object, and a place in it

_DEEP: Any = []
for _ in range(500):
    _DEEP = [_DEEP]
_WIDE: Any = {str(i): [0] * 100 for i in range(300)}
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 1.5, -0.0, 0.1, 10**9, 2**31, 2**53, 2**63, 2**64, 10**400,
    -(10**400), 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"),
    "", ".", "..", "/", "/etc/passwd", "../../x", "a\\b", "a//b", "~", "\0", "\x1b[2J", "a\nb",
    "\ud800", "a\u202eb", "[/bold]", "[red]", "%s", "{}", "x" * 300, "x" * 100_000,
    "manifest.json", ".lock", "nan", "1e999", "0" * 64, "fp8", "onnx", "aoti", "tensorrt",
    "cuda", "cpu", "sm90", "high_noise", "https://a/b",
    "helios", "t2v", "vae", "denoiser", "{i}", "prompt", "block",
    [], [[]], [0], [1, 16, 2, 0, 8], [None], ["a"], {}, {"a": {}}, {"": 0}, _DEEP, _WIDE,
)  # fmt: skip


def mutant(data: Any, seed: int) -> str:
    """The JSON text of data with one to three changes; data itself stays as it is."""
    rng = random.Random(seed)
    data = _copied(data)
    try:
        for _ in range(rng.choice([1, 1, 2, 3])):
            if places := _places(data):
                rng.choice(_CHANGES)(places, rng)
        text = json.dumps(data)
    except RecursionError:  # something deep in something deep
        text = '{"config": ' * 5000
    if rng.random() < 0.1:
        text = _spoiled(text, rng)
    return text


def _copied(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _places(data: Any) -> list[Place]:
    """Every place in the data that a change can fall on."""
    found: list[Place] = []
    owners = [data]
    for owner in owners:
        pairs = owner.items() if isinstance(owner, dict) else enumerate(owner)
        for key, value in pairs:
            found.append((owner, key))
            if isinstance(value, dict | list):
                owners.append(value)
    return found


def _set(places: list[Place], rng: random.Random) -> None:
    owner, key = rng.choice(places)
    owner[key] = _copied(rng.choice(HOSTILE))


def _drop(places: list[Place], rng: random.Random) -> None:
    owner, key = rng.choice(places)
    del owner[key]


def _add(places: list[Place], rng: random.Random) -> None:
    owner, _ = rng.choice(places)
    name = rng.choice(["later", "", "size", "unknown", "device", "a\nb", "\0", "[/x]", "x" * 300])
    if isinstance(owner, dict):
        owner[name] = _copied(rng.choice(HOSTILE))
    else:
        owner.append(_copied(rng.choice(HOSTILE)))


def _copy(places: list[Place], rng: random.Random) -> None:
    """A subtree in the place of another."""
    (owner, key), (other, name) = rng.choice(places), rng.choice(places)
    owner[key] = _copied(other[name])


def _retype(places: list[Place], rng: random.Random) -> None:
    """The same value as another type."""
    owner, key = rng.choice(places)
    kinds: list[Callable[[Any], Any]] = [str, lambda v: [v], lambda v: {"a": v}, json.dumps, bool]
    owner[key] = rng.choice(kinds)(owner[key])


def _repeat(places: list[Place], rng: random.Random) -> None:
    """One list made long."""
    lists = [owner[key] for owner, key in places if isinstance(owner[key], list) and owner[key]]
    if lists:
        chosen = rng.choice(lists)
        chosen *= rng.choice([2, 10, 2000])


def _nudge(places: list[Place], rng: random.Random) -> None:
    """A number a little off."""
    numbers = [(o, k) for o, k in places if type(o[k]) in (int, float)]
    if not numbers:
        return
    owner, key = rng.choice(numbers)
    owner[key] = rng.choice([owner[key] + 1, owner[key] - 1, owner[key] * 2, -owner[key]])


_CHANGES = (_set, _set, _set, _set, _drop, _add, _copy, _retype, _repeat, _nudge)


def _spoiled(text: str, rng: random.Random) -> str:
    """The text cut, or with other bytes somewhere."""
    start = rng.randrange(len(text))
    noise = rng.choice(
        ["", "\0", '"', "{", "}", "[" * 5000, ",", "9" * 400, "1e999", '"schema": 2,']
    )
    end = rng.choice([start, start + 1, len(text)])
    return text[:start] + noise + text[end:]


def failures(bundle: Path, seeds: range, work: Callable[[Path], None]) -> list[str]:
    """The seeds whose mutant of the bundle's manifest made work fail as it must not, with how.

    WanExportError is how it may, in one line; 5 seconds are what it may take.
    """
    from wanexport.runtime.errors import WanExportError

    path = bundle / "manifest.json"
    whole = path.read_text()
    found = []
    for seed in seeds:
        path.write_text(mutant(json.loads(whole), seed))
        started = time.perf_counter()
        try:
            work(bundle)
        except WanExportError as error:
            message = str(error)
            if not message.isprintable():
                found.append(f"{seed}: {message!r:.300}")
        except Exception as error:
            found.append(f"{seed}: {type(error).__name__}: {str(error)!r:.300}")
        if time.perf_counter() - started > 5:
            found.append(f"{seed}: {time.perf_counter() - started:.1f} s")
    path.write_text(whole)
    return found


def read_inspect_choose(bundle: Path) -> None:
    """What reads a manifest without opening an engine, and shows it."""
    from wanexport.exporter.cli.display_bundle import show_inspect
    from wanexport.exporter.inspection import inspect
    from wanexport.runtime.bundle.manifest import read_manifest
    from wanexport.runtime.engines.choose import choose_engine
    from wanexport.runtime.engines.engine import EngineOptions
    from wanexport.runtime.errors import WanExportError

    manifest = read_manifest(bundle)
    record = inspect(bundle)
    json.dumps(record, allow_nan=False)
    show_inspect(record)
    for backend in (None, "onnx", "aoti", "tensorrt"):
        try:
            choose_engine(bundle, manifest, EngineOptions(backend=backend))
        except WanExportError as error:
            if not str(error).isprintable():
                raise AssertionError(f"{error!r:.300}") from error


if __name__ == "__main__":
    from tests.runtime.bundle.small_bundle import small_bundle

    with tempfile.TemporaryDirectory() as name:
        bundle = small_bundle(Path(name) / "bundle", "onnx", "aoti", "tensorrt")
        failed = failures(bundle, range(int(sys.argv[1])), read_inspect_choose)
    print("\n".join(failed) or f"{sys.argv[1]} mutants, none failed", file=sys.stderr)
    sys.exit(bool(failed))
