"""diffusers' own Wan transformer as an engine: a reference that shares no code with our graph."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from wanexport.graphs.checkpoint import SourceTensor, official_name
from wanexport.graphs.wan import parameter_dtype
from wanexport.graphs.weights import DTYPES, read_tensor
from wanexport.runtime.drop_in.diffusers import diffusers_names
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.wan_config import IMAGE_DIM, WanConfig

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
        self.device = device
        self.model = _empty_model(config, device)
        kept = set(self.model._keep_in_fp32_modules)
        state = {}
        for name in self.model.state_dict():
            official = official_name(name)
            own = parameter_dtype(official, DTYPES[rounded])
            tensor = read_tensor(tensors[official], fits=own).to(device).to(own)
            keep = kept & set(name.split("."))
            state[name] = tensor.to(torch.float32 if keep else self.dtype)
        self.model.load_state_dict(state, assign=True)
        self.model.eval().requires_grad_(False)

    def __call__(self, inputs: Mapping[str, Any]) -> Any:
        """Run the model and return its velocity: numpy for numpy, a tensor for tensors."""
        given = {name: torch.as_tensor(value).to(self.device) for name, value in inputs.items()}
        latent = given["latent"]
        if "condition" in given:
            latent = torch.cat([latent, given["condition"]], dim=1)
        image = given.get("image")
        if image is not None:
            image = image.reshape(-1, _CLIP_TOKENS, IMAGE_DIM).to(self.dtype)
        with torch.no_grad():
            (velocity,) = self.model(
                hidden_states=latent.to(self.dtype),
                timestep=self._timestep(given["timestep"]),
                encoder_hidden_states=given["text"].to(self.dtype),
                encoder_hidden_states_image=image,
                return_dict=False,
            )
        output = velocity.float()
        return output if isinstance(inputs["latent"], Tensor) else output.cpu().numpy()

    def _timestep(self, timestep: Tensor) -> Tensor:
        """[1] as it is; TI2V's [F] as diffusers takes it, one for each token: [1, L]."""
        if not self.config.per_frame_timestep:
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
