"""Directions are buffers: whatever is done to a model's parameters or state dict, what is saved is a whole adapter."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.optimizers import create_lorafa_optimizer
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from transformers import TrainerControl, TrainerState, TrainingArguments

from peft_tsd import DashConfig, TsdCallback, advance, check_adapter, export_lora
from peft_tsd.errors import AdapterError
from peft_tsd.tuner.checking import check_onto
from peft_tsd.tuner.held import FixedDirections
from peft_tsd.tuner.phase import adapted_layers
from support import tiny
from support.layers import One

OLD = Path(__file__).parent / "saved_by_0_1_0"
"""Of `One(nn.Linear(6, 5))`, after five steps."""

AVERAGES = {
    "swa": {},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "ema, one by one": {"avg_fn": get_ema_avg_fn(0.9)},
}


def logits(model):
    with torch.no_grad():
        return model.eval()(tiny.tokens()).logits


def fixed_of(model, adapter: str = "default") -> dict[str, FixedDirections]:
    return {name: layer.fixed(adapter) for name, layer in adapted_layers(model, adapter).items()}


def assert_whole(model, folder, expected: PeftModel) -> None:
    """`model` has the directions of `expected`; it is saved, checked, loaded and exported to the same function."""
    out = logits(model)
    for name, fixed in fixed_of(expected).items():
        assert fixed_of(model)[name].digest() == fixed.digest()
    model.save_pretrained(folder / "adapter")
    check_adapter(folder / "adapter")
    # Not to the last bit: the base weights were averaged too, and are rounded.
    loaded = PeftModel.from_pretrained(tiny.llama(), folder / "adapter")
    torch.testing.assert_close(logits(loaded), out, rtol=1e-4, atol=1e-5)
    export_lora(model, folder / "lora")
    plain = PeftModel.from_pretrained(tiny.llama(), folder / "lora")
    torch.testing.assert_close(logits(plain), out, rtol=1e-4, atol=1e-5)


def adapted(method: str = "lora-tsd", **changes) -> PeftModel:
    return get_peft_model(tiny.llama(), tiny.config(method, **changes))


def optimizer_of(model) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


# Averages


def test_averages_begun_before_and_after_the_transition_are_whole_adapters(method, tmp_path):
    model = adapted(**method)
    optimizer = optimizer_of(model)
    averages = {}
    a = next(iter(adapted_layers(model, "default").values())).lora_A["default"].weight
    seen = []
    for step in range(7):
        for name, how in AVERAGES.items():
            if step in (0, 4):
                averages[name, step] = AveragedModel(model, **how)
        tiny.train(model, 1, optimizer=optimizer)
        seen.append(a.detach().clone())
        for average in averages.values():
            average.update_parameters(model)
    assert model.phase() == "dash"
    for (name, begun), average in averages.items():
        assert_whole(average.module, tmp_path / f"{name} {begun}", model)
        mine = next(iter(adapted_layers(average.module, "default").values())).lora_A["default"].weight
        if name == "swa":
            torch.testing.assert_close(mine, torch.stack(seen[begun:]).mean(0))
        assert not torch.equal(mine, a)


def test_an_average_beside_another_method(tmp_path):
    inner = LoHaConfig(r=2, target_modules=tiny.LLAMA_TARGETS)
    model = get_peft_model(tiny.llama(), DashConfig(peft=inner, prelaunch_steps=3, num_directions=2))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = optimizer_of(model)
    for _ in range(6):
        tiny.train(model, 1, optimizer=optimizer)
        average.update_parameters(model)
    assert_whole(average.module, tmp_path, model)


def test_averaged_buffers_are_refused_and_can_be_mended(tmp_path):
    model = adapted()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = optimizer_of(model)
    for _ in range(6):
        tiny.train(model, 1, optimizer=optimizer)
        average.update_parameters(model)
    with pytest.raises(
        ValueError, match=r"an average of positions in a spectrum.*use_buffers at False.*a\.copy_\(b\)"
    ):
        average.module.save_pretrained(tmp_path / "averaged")
    for a, b in zip(average.module.buffers(), model.buffers(), strict=True):
        a.copy_(b)
    assert_whole(average.module, tmp_path, model)


def mean(states: list[dict]) -> dict:
    """As federated averaging does it: every tensor alike, weighted."""
    return {key: sum(0.5 * state[key] for state in states) for key in states[0]}


def clients(model) -> list[PeftModel]:
    """Two that go on from `model`, each on data of its own."""
    found = [copy.deepcopy(model) for _ in range(2)]
    for seed, client in enumerate(found):
        optimizer = optimizer_of(client)
        for step in range(3):
            tiny.language_loss(client, 10 * seed + step).backward()
            optimizer.step()
            optimizer.zero_grad()
            advance(client, optimizer)
    return found


@pytest.mark.parametrize("steps", [0, 6])
def test_an_average_of_the_state_dicts_of_clients_with_the_same_directions(steps, tmp_path):
    model = adapted(prelaunch_steps=5)
    tiny.train(model, steps)
    one, other = clients(model)
    model.load_state_dict(mean([one.state_dict(), other.state_dict()]))
    tensors = zip(*(m.parameters() for m in (model, one, other)), strict=True)
    assert all(torch.allclose(p, (p1 + p2) / 2) for p, p1, p2 in tensors)
    assert {int(fixed.step) for fixed in fixed_of(model).values()} == {steps + 3}
    assert_whole(model, tmp_path, one)
    again = adapted(prelaunch_steps=5)
    set_peft_model_state_dict(again, mean([get_peft_model_state_dict(client) for client in (one, other)]))
    assert torch.equal(logits(again), logits(model))


def test_an_average_of_adapters_with_directions_of_their_own(tmp_path):
    """Of parameters, it has the directions of the one it is written to; of state dicts, it is refused."""
    one, other = clients(adapted(prelaunch_steps=2))
    found = copy.deepcopy(one)
    with torch.no_grad():
        for mine, theirs in zip(found.parameters(), other.parameters(), strict=True):
            mine.lerp_(theirs, 0.5)
    assert_whole(found, tmp_path, one)
    assert [d.indices.tolist() for d in one.base_model.directions().values()] != [
        d.indices.tolist() for d in other.base_model.directions().values()
    ]
    with pytest.raises(
        RuntimeError, match=r"lora_directions.default.indices holds .*Average their parameters, or exp"
    ):
        found.load_state_dict(mean([one.state_dict(), other.state_dict()]))


# What trains, and what is cast


def test_parameters_of_an_adapter_are_what_peft_takes_them_for(trained):
    layer = next(iter(adapted_layers(trained, "default").values()))
    names = {name for name, _ in layer.named_parameters() if "lora_" in name}
    assert names == {name for name, p in layer.named_parameters() if p.is_floating_point() and "base" not in name}
    assert not any("directions" in name for name in names)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        trained.to(dtype)
        assert {p.dtype for p in trained.parameters()} == {dtype}
        held = [buffer for fixed in fixed_of(trained).values() for buffer in fixed.buffers()]
        assert {buffer.dtype for buffer in held} == {dtype, torch.int64}
    trained.half()
    steps = {(fixed.step.dtype, int(fixed.step)) for fixed in fixed_of(trained).values()}
    assert steps == {(torch.int64, 6)}


@pytest.mark.parametrize("which", ["by name", "all"])
def test_what_may_require_gradients(which, method):
    model = adapted(**method)
    if which == "all":
        model.requires_grad_(True)
    else:
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.requires_grad = True
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    assert (which == "all") == any("base_layer" in name for name in before)
    tiny.train(model, 5, lr=1e-3)
    assert model.phase() == "dash"
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before
    assert not any(buffer.requires_grad for fixed in fixed_of(model).values() for buffer in fixed.buffers())


@pytest.mark.parametrize("autocast_adapter", [True, False])
@pytest.mark.parametrize("loaded", [False, True])
def test_directions_are_in_the_dtype_of_the_adapter(loaded, autocast_adapter, tmp_path):
    model = adapted(init_reading="svd")
    if loaded:
        tiny.train(model, 4)
        model.save_pretrained(tmp_path)
        base, options = tiny.llama().bfloat16(), {"autocast_adapter_dtype": autocast_adapter}
        model = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True, **options)
    else:
        model = get_peft_model(tiny.llama().bfloat16(), tiny.config(), autocast_adapter_dtype=autocast_adapter)
    for layer in adapted_layers(model, "default").values():
        fixed = layer.fixed("default")
        dtypes = {
            layer.lora_A["default"].weight.dtype,
            *(t.dtype for t in (fixed.u, fixed.v, fixed.to_unit, fixed.taken)),
        }
        assert dtypes == {torch.float32 if autocast_adapter else torch.bfloat16}
        assert not any(buffer.is_meta for buffer in fixed.buffers())


def test_factors_cast_alone_meet_directions_as_they_are():
    """As FSDP's mixed precision does it, and diffusers' cast_training_params."""
    model = adapted()
    tiny.train(model, 5)
    expected = logits(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model(tiny.tokens()).logits.float().square().mean().backward()
    torch.testing.assert_close(logits(model).float(), expected, rtol=0.1, atol=0.1)


def lorafa(model, lr: float = 1e-2) -> list[torch.optim.Optimizer]:
    """As docs/method.md says: LoRA-FA pairs all that bears "lora" in its name, and Δσ is of no pair."""
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=lr)
    (group,) = optimizer.param_groups
    pairs = [i for i, name in enumerate(group["names"]) if "lora_dash" not in name]
    group.update({key: [group[key][i] for i in pairs] for key in ("params", "names", "scaling_factors")})
    scalars = [parameter for name, parameter in model.named_parameters() if "lora_dash" in name]
    return [optimizer, torch.optim.AdamW(scalars, lr=lr)] if scalars else [optimizer]


def test_lora_fa(method):
    model = adapted(**method)
    optimizers = [create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)]
    if method["method"] != "lora-init":
        optimizers = lorafa(model)
    layer = next(iter(adapted_layers(model, "default").values()))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert not a.requires_grad
    held = []
    for step in range(5):
        if step == 3 and method["method"] != "lora-dash":
            # A and B started anew, and the optimizer has forgotten what it knew of them.
            assert not any(str(key).endswith("lora") for key in optimizers[0].state)
        tiny.language_loss(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        held.append((a.clone(), b.clone()))
        assert advance(model, optimizers) == (step == 2)
    assert torch.equal(held[3][0], held[4][0])
    assert torch.equal(held[0][0], held[2][0])
    assert not torch.equal(held[3][1], held[4][1])
    assert torch.equal(held[2][0], held[3][0]) == (method["method"] == "lora-dash")
    if method["method"] != "lora-init":
        assert layer.lora_dash["default"].weight.any()


def test_the_callback_takes_an_adapter_of_which_a_is_frozen(tmp_path):
    model = adapted()
    optimizers = lorafa(model)
    callback = TsdCallback()
    state, control = TrainerState(max_steps=5), TrainerControl()
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    callback.on_train_begin(arguments, state, control, model=model)
    for step in range(5):
        tiny.language_loss(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        state.global_step = step + 1
        callback.on_step_end(arguments, state, control, model=model, optimizer=optimizers[0])
    assert [made["step"] for made in callback.transitions] == [3]
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_dash" in name
    assert not advance(model, optimizers)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no active, trainable TSD adapter"):
        advance(model, optimizers)


# What 0.1.0 saved


def test_what_0_1_0_saved_is_loaded(tmp_path):
    torch.manual_seed(0)
    base = One(nn.Linear(6, 5))
    old = torch.load(OLD / "state.pt", weights_only=True)
    config = check_adapter(OLD)
    check_onto(OLD, config, One(nn.Linear(6, 5, device="meta")), "base")
    for low_cpu_mem_usage in (False, True):
        model = PeftModel.from_pretrained(copy.deepcopy(base), OLD, low_cpu_mem_usage=low_cpu_mem_usage)
        torch.testing.assert_close(model(old["x"]), old["out"])
        assert model.base_model.directions().prelaunch_steps == 2
        resumed = get_peft_model(copy.deepcopy(base), model.peft_config["default"])
        resumed.load_state_dict(old["state"], assign=low_cpu_mem_usage)
        # The start of LoRA-TSD, which 0.1.0 kept beside the directions, is one with them now.
        new, was = resumed.state_dict(), old["state"]
        apart = {key for key in was if key.endswith((".u", ".v", ".a0", ".b0"))}
        assert was.keys() - apart <= new.keys()
        assert all(torch.equal(new[key], was[key]) for key in was.keys() - apart)
        torch.testing.assert_close(resumed(old["x"]), old["out"])
        resumed.save_pretrained(tmp_path)
        assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(old["x"]), model(old["x"]))
    export_lora(OLD, tmp_path / "lora")
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path / "lora")(old["x"]), old["out"])


def test_directions_that_deepspeed_left_out_of_a_checkpoint_of_0_1_0_are_read_from_the_adapter_in_it(tmp_path):
    expected = adapted()
    tiny.train(expected, 4)
    checkpoint = tmp_path / "checkpoint-4"
    expected.save_pretrained(checkpoint)
    state, arguments = TrainerState(global_step=4, max_steps=6), TrainingArguments(str(tmp_path), report_to="none")

    def begin(model) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter._hp_mapping = None  # as ZeRO marks what it trains a copy of
        TsdCallback().on_train_begin(arguments, state, TrainerControl(), model=model)

    model = adapted()
    begin(model)
    assert {n: f.digest() for n, f in fixed_of(model).items()} == {
        n: f.digest() for n, f in fixed_of(expected).items()
    }
    shutil.rmtree(checkpoint)
    with pytest.raises(
        ValueError, match=r"cannot be read from .*checkpoints of peft-tsd 0\.1\.0 do not hold directions"
    ):
        begin(adapted())
    adapted(target_modules=["q_proj"]).save_pretrained(checkpoint)
    with pytest.raises(ValueError, match=r"does not hold .*v_proj.lora_directions.step of shape \(1,\)"):
        begin(adapted())


def test_whole_numbers_in_another_type_are_still_refused_in_a_file(tmp_path):
    from safetensors.torch import load_file, save_file

    model = adapted()
    tiny.train(model, 4)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor.float() for key, tensor in load_file(path).items()}, path)
    with pytest.raises(AdapterError, match=r"candidates|identified_at|indices|step"):
        check_adapter(tmp_path)
