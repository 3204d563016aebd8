"""The opening of a pipeline: its parts beside its engine, each in a thread of its own."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.engines.engine import EngineKeywords, EngineOptions
from wanexport.runtime.load import chosen, fitted
from wanexport.runtime.parts.open import Parts
from wanexport.runtime.parts.placement import FIRST
from wanexport.runtime.parts.text_encoder import clean_prompt
from wanexport.runtime.serving.generator import encode_texts
from wanexport.runtime.serving.prompt_cache import PromptCache


@dataclass
class Opening:
    """What a pipeline is opened with; `parts` are those that were begun beside the engine."""

    bundle: Path
    model: str | Path | None
    given: Mapping[str, Any]
    vae_tiling: bool | None
    keeps_text: bool
    load_options: EngineKeywords
    parts: Parts | None = field(default=None, init=False)

    @contextmanager
    def beside(
        self, names: Sequence[str], prompts: Sequence[str], cache: PromptCache
    ) -> Iterator[None]:
        """Begin to open these parts, and let the block open the engine meanwhile.

        Prompts are encoded before it where the GPU does not hold both, and an encoder that is to be
        freed before each call is opened after the engine: what `load` keeps on the GPU follows from
        the room that it finds there. Raises BundleError before any is opened when a part is
        missing, and as `load` does; closes what was opened when the block fails.
        """
        if not names:
            yield
            return
        with warnings.catch_warnings(action="ignore"):  # `load` says it
            record, device = chosen(self.bundle, **self.load_options)
        self.parts = parts = self._parts(record, device, precedes=True, first=bool(prompts))
        try:
            parts.find(names)
            parts.begin([name for name in names if name not in parts.later])
            if parts.placement.get("text_encoder") == FIRST:
                texts = list(filter(None, dict.fromkeys(map(clean_prompt, prompts))))
                encode_texts(parts, cache, texts, gpu=gpu_number(device))
                parts.spare("text_encoder", keep=True)
            yield
            parts.begin([name for name in names if name in parts.later])
        except BaseException:
            parts.close()
            raise

    def parts_of(self, denoiser: Denoiser) -> Parts:
        """Those that were begun; others where a build has replaced the engine meanwhile."""
        parts, record = self.parts, denoiser.record
        if parts is not None and parts.record == record:
            parts.engine_is_open(denoiser.device)
            return parts
        if parts is not None:
            parts.close()
        return self._parts(record, denoiser.device, precedes=False, first=False)

    def _parts(self, record: Any, device: str, *, precedes: bool, first: bool) -> Parts:
        """The parts around an engine, placed."""
        parts = Parts(
            self.bundle, self.model, record, device, self.given, vae_tiling=self.vae_tiling
        )
        options = EngineOptions(**self.load_options)
        if precedes:
            with warnings.catch_warnings(action="ignore"):  # `load` says it
                options = fitted(self.bundle, record, device, options)
        parts.place(keeps_text=self.keeps_text, options=options, precedes=precedes, first=first)
        return parts


def gpu_number(device: str) -> int | None:
    """The number of the GPU of PyTorch's name, the first where it has none; None for a CPU."""
    kind, _, number = device.partition(":")
    return int(number or 0) if kind == "cuda" else None
