"""The LoRAs that a command is given: for which expert each is, and merged into what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wanexport.exporter.model_source import ModelSource
from wanexport.graphs.merged import MergedWeights
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.errors import BadRequest, printable
from wanexport.runtime.lora.given import Given, expert_of, parse_all
from wanexport.runtime.lora.merge import LoraStack, open_stacks
from wanexport.runtime.wan_config import WanConfig


@dataclass(frozen=True)
class LoraOptions:
    """LoRAs to merge, in order: of the model or of both experts, and of one of them.

    With `partial`, tensors that have no place in the model are left out.
    """

    both: Sequence[Given] = ()
    high: Sequence[Given] = ()
    low: Sequence[Given] = ()
    partial: bool = False

    def __bool__(self) -> bool:
        return bool(self.both or self.high or self.low)

    def of_expert(self, expert: str) -> list[tuple[Path, float]]:
        """The files and strengths for one expert, those for both first."""
        own: Mapping[str, Sequence[Given]] = {"high_noise": self.high, "low_noise": self.low}
        return [*parse_all(self.both), *parse_all(own.get(expert, ()))]

    def check(self, experts: Sequence[str]) -> None:
        """Raise BadRequest for a LoRA of an expert that the model has not, or of the other one."""
        if (self.high or self.low) and not experts:
            raise BadRequest(
                "--lora-high and --lora-low are for a model of two experts, this one is one: "
                "pass --lora"
            )
        if not experts:
            return
        for option, expert, files in (
            ("--lora", "", self.both),
            ("--lora-high", "high_noise", self.high),
            ("--lora-low", "low_noise", self.low),
        ):
            for path, _ in parse_all(files):
                if (named := expert_of(path)) not in ("", expert):
                    right = "--lora-high" if named == "high_noise" else "--lora-low"
                    raise BadRequest(
                        f"{printable(path)} is named as of the {named.replace('_', '-')} expert: "
                        f"pass it with {right}, not {option}"
                    )


def opened(loras: LoraOptions, config: WanConfig, experts: Sequence[str]) -> dict[str, LoraStack]:
    """The stack of each expert that has one. Raises as LoraOptions.check and open_stacks do."""
    loras.check(experts)
    files = {expert: loras.of_expert(expert) for expert in experts or ("",)}
    return open_stacks(files, parameter_shapes(config), partial=loras.partial)


def merged(source: ModelSource, stacks: Mapping[str, LoraStack]) -> ModelSource:
    """The source with LoRAs merged into its experts, which its records say."""
    weights: dict[str, Any] = {
        expert: MergedWeights(own, stacks[expert]) if expert in stacks else own
        for expert, own in source.weights.items()
    }
    described = {expert: stack.describe() for expert, stack in stacks.items()}
    return replace(source, weights=weights, loras=described)
