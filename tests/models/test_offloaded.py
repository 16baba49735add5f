"""Models that Accelerate offloads: directions, training and outputs as in memory, or a refusal that says why."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoHaConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM
from transformers.trainer_callback import TrainerState

from peft_tsd import DashConfig, TsdCallback, TsdConfig, identify_from_gradients
from peft_tsd.tuner.phase import adapted_layers
from support import tiny
from support.gradients import BATCHES

CPU = torch.device("cpu")
ON_DISK = {
    **dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"], "cpu"),
    "model.layers.1": "disk",
}

OFFLOADS = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device=CPU),
    "dispatched": lambda model, folder: dispatch_model(model, ON_DISK, main_device="cpu", offload_dir=folder),
}


def adapted(base, **changes):
    torch.manual_seed(0)
    return get_peft_model(base, TsdConfig(r=4, target_modules=tiny.LLAMA_TARGETS, **changes))


def trained_steps(model) -> list[float]:
    """The losses of three steps from directions of the gradient."""
    identify_from_gradients(model, BATCHES)
    return tiny.train(model, 3)


def put_away(model) -> list[bool]:
    """Of every adapted layer, whether its base weight is."""
    return [layer.weight_device.type == "meta" for layer in adapted_layers(model, "default").values()]


def assert_trains_as_in_memory(model, twin):
    assert trained_steps(model) == pytest.approx(trained_steps(twin), rel=1e-6)
    assert any(put_away(model))
    expected, twins = twin.directions(), adapted_layers(twin, "default")
    assert len(expected) == 6
    for name, found in model.directions().items():
        torch.testing.assert_close(found.sigma, expected[name].sigma, rtol=1e-5, atol=0)
        for mine, theirs in ((found.u, expected[name].u), (found.v, expected[name].v)):
            mine, theirs = mine.double(), theirs.double()  # the same sets, whatever their order and signs
            assert torch.linalg.matrix_norm(mine - theirs @ (theirs.mT @ mine), 2) < 1e-4
        change = twins[name].get_delta_weight("default")
        difference = adapted_layers(model, "default")[name].get_delta_weight("default") - change
        assert difference.norm() < 1e-4 * change.norm()


@pytest.mark.parametrize("kind", OFFLOADS)
def test_directions_of_the_gradient_on_an_offloaded_base_are_those_in_memory(kind, tmp_path):
    model = adapted(OFFLOADS[kind](tiny.llama().double(), str(tmp_path)))
    assert put_away(model) == [kind != "dispatched"] * 3 + [True] * 3
    assert not any(p.is_meta for p in model.parameters() if p.requires_grad)
    assert_trains_as_in_memory(model, adapted(tiny.llama().double()))


@pytest.mark.parametrize("method", ["lora-dash", "lora-init"])
def test_other_methods_on_an_offloaded_base(method):
    model = adapted(cpu_offload(tiny.llama().double(), execution_device=CPU), method=method)
    assert_trains_as_in_memory(model, adapted(tiny.llama().double(), method=method))


def test_base_layers_that_are_offloaded_under_an_adapter():
    model = adapted(tiny.llama().double())
    for layer in adapted_layers(model, "default").values():
        cpu_offload(layer.base_layer, execution_device=CPU)
    assert_trains_as_in_memory(model, adapted(tiny.llama().double()))


def test_directions_of_a_weight_that_is_put_away_are_refused():
    model = adapted(cpu_offload(tiny.llama(), execution_device=CPU), direction_source="weight", prelaunch_steps=0)
    with pytest.raises(ValueError, match=r"q_proj': its base weight is offloaded \(on the meta device\)"):
        identify_from_gradients(model, BATCHES)


def test_an_adapter_that_is_put_away_is_not_trained():
    model = adapted(tiny.llama())
    cpu_offload(model, execution_device=CPU)
    message = r"q_proj': its adapter is offloaded \(on the meta device\).*offload the base model, .*before the adapter"
    with pytest.raises(ValueError, match=message):
        identify_from_gradients(model, BATCHES)
    with pytest.raises(ValueError, match=message):
        TsdCallback(batches=BATCHES).on_train_begin(None, TrainerState(max_steps=9), None, model=model)


def test_an_adapter_without_numbers_says_so():
    with torch.device("meta"):
        nowhere = adapted(tiny.llama())
    beside = DashConfig(peft=LoHaConfig(r=2, target_modules=tiny.LLAMA_TARGETS))  # PEFT's, which stays beside its base
    for model in (nowhere, get_peft_model(cpu_offload(tiny.llama(), execution_device=CPU), beside)):
        with pytest.raises(ValueError, match="The adapter is on the meta device, which holds no numbers: make it on"):
            identify_from_gradients(model, BATCHES)


@pytest.mark.parametrize("kind", OFFLOADS)
def test_a_trained_model_that_is_put_away_computes_the_same(kind, trained, tmp_path):
    ids = tiny.tokens(seed=9)
    with torch.no_grad():
        expected = trained(ids).logits
        base = trained.base_model.model
        trained.base_model.model = OFFLOADS[kind](base, str(tmp_path))
        parts = list(adapted_layers(trained, "default").values())[-1].lora_A
        assert parts["default"].weight.is_meta
        for _ in range(2):
            torch.testing.assert_close(trained(ids).logits, expected)
        assert parts["default"].weight.is_meta  # put away again


def test_an_adapter_is_loaded_onto_a_base_on_disk(trained, tmp_path, monkeypatch):
    ids = tiny.tokens(seed=9)
    # PEFT writes what is on disk anew, for a folder of such a name, and by a path that begins here.
    folder = tmp_path / "models--tiny"
    monkeypatch.chdir(tmp_path)
    tiny.llama().save_pretrained(folder)
    trained.save_pretrained(tmp_path / "adapter")

    def base():
        return LlamaForCausalLM.from_pretrained(folder, device_map=dict(ON_DISK), offload_folder=tmp_path / "off")

    places = {f"base_model.model.{name}": place for name, place in ON_DISK.items()}
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter", device_map=places, offload_dir=tmp_path / "put")
    beside = adapted(base())
    beside.load_adapter(tmp_path / "adapter", "second")
    beside.set_adapter("second")
    with torch.no_grad():
        expected = trained(ids).logits
        for model in (loaded, beside):
            assert any(p.is_meta for p in model.parameters())
            torch.testing.assert_close(model.eval()(ids).logits, expected)
