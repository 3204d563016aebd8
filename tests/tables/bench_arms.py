"""The arms of the project's own tables, which `wanexport bench` does not offer, on a GPU.

    python -m tests.tables.bench_arms BUNDLE [--profile] [ARM ...]

These are the AOTInductor engine with each kernel of self-attention, diffusers on FlashAttention-2,
and diffusers compiled with max-autotune; by default all of them. Those of `wanexport bench` may be
named beside them. Each runs in a process of bench, and the table is bench's.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from wanexport.exporter.bench.arms import ARMS, Arm
from wanexport.exporter.bench.bench import measure
from wanexport.exporter.bench.subject import choose_subject
from wanexport.exporter.cli.display import show_bench
from wanexport.runtime.engines.engine import EngineOptions
from wanexport.runtime.engines.kernels import KERNELS

OWN = {
    arm.name: arm
    for arm in (
        *(Arm(f"aoti-{kernel}", backend="aoti", attention=kernel) for kernel in KERNELS),
        Arm("diffusers-fa2", peer="diffusers", attention="fa2"),
        Arm(
            "max-autotune",
            peer="diffusers",
            attention="cudnn",
            compiles="max-autotune-no-cudagraphs",
        ),
    )
}


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line, measure, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("arms", nargs="*", metavar="ARM", help=", ".join([*OWN, *ARMS]))
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_intermixed_args(words)
    arms = [(ARMS | OWN)[name] for name in given.arms] or list(OWN.values())
    subject = choose_subject(given.bundle.resolve(), EngineOptions(), arms)
    show_bench(measure(subject, arms, profile=given.profile))


if __name__ == "__main__":
    main()
