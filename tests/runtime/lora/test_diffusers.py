"""A merge is what diffusers makes of a file that it saves itself."""

from pathlib import Path

import torch
from diffusers import WanPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from tests.oracles.wan_reference import diffusers_model, official_state, small_config
from tests.runtime.lora.tiny import is_close, wide
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.lora.merge import LoraStack


def test_a_file_that_diffusers_saves_merges_as_diffusers_fuses_it(tmp_path: Path) -> None:
    config = small_config("t2v-1.3b", num_layers=1)
    model = diffusers_model(config)
    before = {name: value.clone() for name, value in official_state(model).items()}
    targets = ["to_q", "to_out.0", "net.0.proj", "net.2"]
    model.add_adapter(LoraConfig(r=4, lora_alpha=10, target_modules=targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    WanPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    model.fuse_lora()
    model.unload_lora()
    file = tmp_path / "pytorch_lora_weights.safetensors"
    lora = LoraStack([(file, 1.0)], parameter_shapes(config))
    assert lora.describe()[0]["changes"] == {"low rank": 6}
    for name, value in official_state(model).items():
        assert is_close(lora.merge(name, before[name]), wide(value)), name
