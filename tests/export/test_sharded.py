"""What is sharded over processes (FSDP2) is refused by an export, which is made of the whole adapter."""

import pytest
import torch
from peft import LoHaConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from peft_tsd import DashConfig, export_lora
from support import tiny


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded(config):
    model = get_peft_model(tiny.llama(), config)
    for block in model.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(model)
    return model


CONFIGS = {
    "tsd": tiny.config(prelaunch_steps=2),
    "beside another": DashConfig(peft=LoHaConfig(r=2, target_modules=["q_proj"]), prelaunch_steps=2),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_sharded_adapter_is_refused_and_nothing_is_written(one_process, tmp_path, kind):
    model = sharded(CONFIGS[kind])
    with pytest.raises(ValueError, match="'default' is sharded over processes. Save it .* and export the folder"):
        export_lora(model, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_what_the_refusal_says_to_do_works(one_process, tmp_path):
    model = sharded(tiny.config(prelaunch_steps=2))
    tiny.train(model, 4)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    model.save_pretrained(tmp_path / "native", state_dict=state)
    alone = get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=2))
    tiny.train(alone, 4)
    alone.save_pretrained(tmp_path / "alone")
    one, other = (export_lora(tmp_path / name, tmp_path / f"{name}-lora") for name in ("native", "alone"))
    assert one.ranks == other.ranks


def test_a_sharded_denoiser_is_refused_too(one_process, tmp_path):
    pytest.importorskip("diffusers")
    from peft_tsd.diffusion import save_lora_weights
    from support import tiny_diffusion

    unet = tiny_diffusion.unet()
    unet.add_adapter(tiny.config(target_modules=["to_q"], prelaunch_steps=2))
    fully_shard(unet)
    with pytest.raises(ValueError, match="is sharded over processes"):
        save_lora_weights(tmp_path / "out", unet=unet)
    assert list(tmp_path.iterdir()) == []
