"""diffusers' own Wan transformer as an engine: a reference that shares no code with our graph."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from wanexport.graphs.graph import parameter_dtype
from wanexport.graphs.source_tensor import SourceTensor
from wanexport.graphs.weights import DTYPES, bundle_tensors, read_tensor
from wanexport.runtime.arrays import Array
from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.drop_in.diffusers import diffusers_names
from wanexport.runtime.engines.device import to_device
from wanexport.runtime.engines.engine import CLOSED, Memory
from wanexport.runtime.errors import EngineFailure
from wanexport.runtime.family import family_of
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import IMAGE_DIM, WanConfig
from wanexport.runtime.wan_keys import official_name

_CLIP_TOKENS = 257  # of one image


class DiffusersEngine:
    """`WanTransformer3DModel` on a device with tensors under the official names; fp32 in and out.

    Arguments are `EagerEngine`'s; the model is always resident. In bf16 and fp16 the modules that
    diffusers keeps in fp32 stay so. Tensors are cast on the device, one at a time.
    """

    def __init__(
        self,
        config: WanConfig,
        geometry: Geometry,
        dtype: str,
        tensors: Mapping[str, SourceTensor],
        *,
        rounded: str = "fp32",
        device: str = "cpu",
    ) -> None:
        self.config, self.geometry, self.dtype = config, geometry, DTYPES[dtype]
        self.device, self.rounded = device, DTYPES[rounded]
        self.model = _empty_model(config, device)
        self._file: PinnedFile | None = None
        self._read(tensors)

    def _read(self, tensors: Mapping[str, SourceTensor]) -> None:
        kept = set(self.model._keep_in_fp32_modules)
        state = {}
        for name in self.model.state_dict():
            official = official_name(name)
            own = parameter_dtype(official, self.rounded)
            tensor = read_tensor(tensors[official], fits=own).to(self.device).to(own)
            keep = kept & set(name.split("."))
            state[name] = tensor.to(torch.float32 if keep else self.dtype)
        self.model.load_state_dict(state, assign=True)
        self.model.eval().requires_grad_(False)

    def array(self, value: Array) -> Tensor:
        """An fp32 tensor on the device."""
        return to_device(value, torch.device(self.device))

    def memory(self) -> Memory:
        """Nothing: diffusers' model keeps no state."""
        return Memory()

    def use(self, weights: PinnedFile) -> None:
        """Read parameters from another file of a bundle."""
        if weights != self._file:
            names = parameter_shapes(self.config)
            self._read(bundle_tensors(weights.path, {name: name for name in names}))
            self._file = weights

    def close(self) -> None:
        """Let go of the model; a call then raises EngineFailure."""
        self.model = None

    def __call__(
        self,
        inputs: Mapping[str, Any],
        weights: PinnedFile | None = None,
        memory: Memory | None = None,
        moment: str = "step",
    ) -> Any:
        """Run the model and return its velocity: numpy for numpy, a tensor for tensors.

        Raises EngineFailure after `close`.
        """
        if self.model is None:
            raise EngineFailure(CLOSED)
        if weights is not None:
            self.use(weights)
        given = {name: self.array(value) for name, value in inputs.items()}
        with torch.no_grad():
            (velocity,) = self.model(**self._named(given), return_dict=False)
        output = velocity.float()
        is_torch = any(isinstance(value, Tensor) for value in inputs.values())
        return output if is_torch else output.cpu().numpy()

    def _named(self, given: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """The inputs as diffusers names and shapes them."""
        latent = given["latent"]
        if "condition" in given:
            latent = torch.cat([latent, given["condition"]], dim=1)
        image = given.get("image")
        if image is not None:
            image = image.reshape(-1, _CLIP_TOKENS, IMAGE_DIM).to(self.dtype)
        return {
            "hidden_states": latent.to(self.dtype),
            "timestep": self._timestep(given["timestep"]),
            "encoder_hidden_states": given["text"].to(self.dtype),
            "encoder_hidden_states_image": image,
        }

    def _timestep(self, timestep: Tensor) -> Tensor:
        """[1] as it is; TI2V's [F] as diffusers takes it, one for each token: [1, L]."""
        if not family_of(self.config).blends_first_frame:
            return timestep
        _, rows, columns = self.geometry.grid
        return timestep.repeat_interleave(rows * columns)[None]


def _empty_model(config: WanConfig, device: str) -> Any:
    """The model with parameters on the meta device; its RoPE tables are real, on `device`."""
    from diffusers import WanTransformer3DModel

    settings = diffusers_names(config)
    with torch.device("meta"):
        model = WanTransformer3DModel(**settings)
    model.rope = type(model.rope)(config.head_dim, settings["patch_size"], 1024).to(device)
    return model
