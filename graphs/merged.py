"""Weights with LoRAs merged into them, as a source of a weights set."""

import hashlib
import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from wanexport.graphs.source_tensor import SourceTensor, gather
from wanexport.graphs.weights import CheckpointWeights, WeightSource
from wanexport.runtime.lora.merge import LoraStack


class MergedWeights:
    """The parameters of a source with a stack of LoRAs merged in fp32, one parameter at a time."""

    def __init__(self, source: WeightSource, stack: LoraStack) -> None:
        self.source, self.stack = source, stack

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The parameter's elements in order; one that a LoRA changes is one chunk, in fp32."""
        if not self.stack.changes(name):
            yield from self.source.chunks(name)
            return
        base = gather(self.source.chunks(name), self.stack.shapes[name], torch.float32)
        yield self.stack.merge(name, base).reshape(-1)

    def digest(self) -> str:
        """A hash of the source, and of the LoRAs' content and strengths."""
        loras = [(row["sha256"], row["strength"]) for row in self.stack.describe()]
        content = json.dumps([self.source.digest(), loras], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


class BundleWeights(CheckpointWeights):
    """The parameters of a file of a bundle, whose source had the content that its record says."""

    def __init__(self, tensors: Mapping[str, SourceTensor], content: str) -> None:
        super().__init__(tensors)
        self.content = content

    def digest(self) -> str:
        """The hash of the source that the file was converted from."""
        return self.content
