"""What the record of a run says of its engine is what the command line reads back."""

import pytest

from wanexport.exporter.cli.main import cli
from wanexport.exporter.cli.options import take
from wanexport.exporter.run.record import engine_words
from wanexport.runtime.engines.engine import EngineOptions


def read_back(words: list[str]) -> EngineOptions:
    """The options that `wanexport run` makes of words."""
    needed = ["bundle", "--prompt", "x", "-o", "x.mp4"]
    context = cli.commands["run"].make_context("run", [*needed, *words])
    return EngineOptions(**take(context.params, EngineOptions))


@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(),
        EngineOptions(backend="onnx", device="cuda:1", resolution="480x832", frames=81),
        EngineOptions(chunk=3, cache=21),
        EngineOptions(dtype="bf16", weights="a style", attention="fa4", offload="experts"),
        EngineOptions(cuda_graph=True),
        EngineOptions(
            cuda_graph=False, provider="tensorrt", provider_options={"a": "1=2", "b": "c"}
        ),
    ],
)
def test_options_survive_as_words(options: EngineOptions) -> None:
    assert read_back(engine_words(options)) == options
