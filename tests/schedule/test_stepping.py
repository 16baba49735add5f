import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import TrainerCallback, TrainerState

from peft_tsd import PrelaunchWarning, TsdCallback, advance
from peft_tsd.tuner.phase import adapted_layers, steps_taken
from support import directions, tiny
from support.trainers import adapter_bits, losses, trainer

# Counting


def test_the_transition_is_made_once_after_t_optimizer_steps(tmp_path):
    callback = TsdCallback()
    run = trainer(tmp_path, callbacks=[callback])
    phases = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            phases.append(model.phase())

    run.add_callback(Watch())
    run.train()
    assert phases == ["pre-launch"] * 3 + ["dash"] * 5
    assert [(made["step"], made["layers"]) for made in callback.transitions] == [(4, 6)]
    assert callback.transitions[0]["seconds"] > 0
    assert steps_taken(adapted_layers(run.model, "default"), "default") == 8


def test_accumulation_picks_the_same_directions_at_the_same_step(tmp_path):
    found = []
    for batch, accumulation in ((8, 1), (2, 4)):
        callback = TsdCallback()
        model = get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=4))
        run = trainer(
            tmp_path,
            model,
            [callback],
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        run.train()
        found.append((directions.of(model), callback.transitions[0]["step"], losses(run)))
    directions.assert_same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] == 4
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-4)


def test_evaluation_and_gradient_checkpointing_change_nothing(tmp_path):
    bits = []
    for changes in ({}, {"eval_strategy": "steps", "eval_steps": 1}, {"gradient_checkpointing": True}):
        model = get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=4))
        run = trainer(tmp_path, model, **changes)
        run.train()
        bits.append(adapter_bits(model, tmp_path / "adapter"))
    for other in bits[1:]:
        assert all(torch.equal(bits[0][key], other[key]) for key in bits[0])


def test_trl(tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset as Table
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(62)} | {"[PAD]": 62, "[EOS]": 63}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]")
    callback = TsdCallback()
    run = SFTTrainer(
        model=get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=2)),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            max_length=16,
        ),
        train_dataset=Table.from_dict({"text": ["w1 w2 w3 w4", "w5 w6 w7"] * 8}),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    run.train()
    assert callback.transitions[0]["step"] == 2
    assert run.model.phase() == "dash"


def test_an_accelerate_loop():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    made = []
    for step in range(4):
        accelerator.backward(tiny.language_loss(model, step))
        optimizer.step()
        optimizer.zero_grad()
        made.append(advance(model, optimizer))
    assert made == [False, True, False, False]


# Resuming


@pytest.mark.parametrize("checkpoint", [2, 4, 6], ids=["before", "at", "after"])
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(method, checkpoint, tmp_path):
    def model():
        return get_peft_model(tiny.llama(), tiny.config(**method, prelaunch_steps=4, lora_dropout=0.1))

    whole = trainer(tmp_path / "run", model(), save_strategy="steps", save_steps=2)
    whole.train()
    expected = adapter_bits(whole.model, tmp_path / "whole")
    again = trainer(tmp_path / "run", model(), save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{checkpoint}"))
    resumed = adapter_bits(again.model, tmp_path / "again")
    assert losses(again) == losses(whole)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)


def test_phase_and_count_live_in_the_saved_adapter(tmp_path):
    model = get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=4))
    tiny.train(model, 3)
    with pytest.warns(PrelaunchWarning):
        model.save_pretrained(tmp_path)
    later = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    assert later.phase() == "pre-launch"
    tiny.train(later, 1)
    assert later.phase() == "dash"


# The optimizer


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def bitsandbytes_optimizers():
    optim = pytest.importorskip("bitsandbytes").optim
    return {
        "AdamW8bit": lambda p: optim.AdamW8bit(p, lr=1e-2, min_8bit_size=16),
        "PagedAdamW8bit": lambda p: optim.PagedAdamW8bit(p, lr=1e-2, min_8bit_size=16),
    }


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("kind", [*OPTIMIZERS, "AdamW8bit", "PagedAdamW8bit"])
def test_restarted_factors_meet_an_optimizer_that_never_saw_them(kind):
    """After the transition A and B move as under a new optimizer; what was not restarted keeps its moments."""
    make = OPTIMIZERS[kind] if kind in OPTIMIZERS else bitsandbytes_optimizers()[kind]
    model = get_peft_model(tiny.llama(), tiny.config("lora-init", modules_to_save=["lm_head"]))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make(list(parameters.values()))
    tiny.train(model, 3, optimizer=optimizer)
    assert model.phase() == "dash"
    start = {name: p.detach().clone() for name, p in parameters.items()}
    tiny.language_loss(model, 9).backward()
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    optimizer.step()

    twins = {name: nn.Parameter(start[name].clone()) for name in gradients}
    for name, twin in twins.items():
        twin.grad = gradients[name]
    make(list(twins.values())).step()
    for name in gradients:
        same = torch.allclose(parameters[name], twins[name], rtol=1e-5, atol=1e-7)
        assert same == (".lora_A." in name or ".lora_B." in name), name


def test_the_learning_rate_schedule_goes_on(tmp_path):
    run = trainer(tmp_path, lr_scheduler_type="linear", learning_rate=8e-3)
    run.train()
    rates = [row["learning_rate"] for row in run.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([(8 - i) * 1e-3 for i in range(8)])


def test_dash_keeps_the_moments_of_a_and_b():
    model = get_peft_model(tiny.llama(), tiny.config("lora-dash"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tiny.train(model, 3, optimizer=optimizer)
    layer = next(iter(adapted_layers(model, "default").values()))
    assert optimizer.state[layer.lora_A["default"].weight]["step"] == 3


def test_several_optimizers():
    model = get_peft_model(tiny.llama(), tiny.config("lora-init"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = [torch.optim.AdamW(parameters[::2], lr=1e-2), torch.optim.SGD(parameters[1::2], lr=1e-2)]
    for step in range(3):
        tiny.language_loss(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        advance(model, optimizers)
    assert model.phase() == "dash"
    assert not optimizers[0].state


def test_an_optimizer_without_the_factors_is_refused_before_anything_changes():
    model = get_peft_model(tiny.llama(), tiny.config("lora-init", prelaunch_steps=1))
    before = {name: t.clone() for name, t in model.state_dict().items() if "step" not in name}
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    other.step()
    with pytest.raises(
        ValueError, match=r"The optimizer given \(SGD\) does not hold 12 of the 12 A and B that restart"
    ):
        advance(model, other)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items() if "step" not in name)


# What can go wrong


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "base_layer"])
def test_a_non_finite_layer_stops_by_name_and_loses_nothing(method, part, tmp_path):
    model = get_peft_model(tiny.llama(), tiny.config(**method))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tiny.train(model, 2, optimizer=optimizer)
    optimizer.step()
    layer = adapted_layers(model, "default")["model.layers.1.self_attn.v_proj"]
    broken = (layer.base_layer if part == "base_layer" else getattr(layer, part)["default"]).weight
    value = broken.data[0, 0].item()
    broken.data[0, 0] = float("nan")
    before = {name: t.clone() for name, t in model.state_dict().items() if not name.endswith("step")}
    with pytest.raises(
        ValueError, match="layer 'model.layers.1.self_attn.v_proj': .* holds 1 NaN.*Nothing was changed"
    ):
        advance(model, optimizer)
    for name, tensor in model.state_dict().items():
        assert name.endswith("step") or torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name
    assert model.phase() == "pre-launch"
    broken.data[0, 0] = value  # mended: the next step makes the transition that was missed
    optimizer.step()
    assert advance(model, optimizer)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.empty(32, 32, device="meta"), r"q_proj': its base weight is offloaded \(on the meta device\)"),
        (torch.zeros(1024), r"q_proj': its base weight is flattened to shape \(1024,\), as FSDP1 does"),
    ],
)
def test_a_weight_that_is_not_here_is_named(weight, message):
    model = get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=1))
    layer = adapted_layers(model, "default")["model.layers.0.self_attn.q_proj"]
    layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=message):
        TsdCallback().on_train_begin(None, TrainerState(max_steps=9), None, model=model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer.step()
    with pytest.raises(ValueError, match=message):
        advance(model, optimizer)


def test_flattened_weights_are_refused_for_directions_of_the_gradient_too(tmp_path):
    """A and B are flattened with them, and could not be started from the directions."""
    model = get_peft_model(tiny.llama(), tiny.config(direction_source="gradient", prelaunch_steps=0))
    layer = adapted_layers(model, "default")["model.layers.0.self_attn.q_proj"]
    layer.base_layer.weight = nn.Parameter(torch.zeros(1024), requires_grad=False)
    with pytest.raises(ValueError, match=r"q_proj': its base weight is flattened to shape \(1024,\), as FSDP1 does"):
        trainer(tmp_path, model).train()


def test_a_model_without_a_trainable_adapter(tmp_path, trained):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no active, trainable TSD adapter"):
        trainer(tmp_path, tiny.llama()).train()
    with pytest.raises(ValueError, match="no TSD layer with an adapter 'other'"):
        advance(trained, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), adapter_name="other")


def test_a_run_without_the_callback_says_so(tmp_path):
    run = trainer(tmp_path, callbacks=[])
    with pytest.warns(PrelaunchWarning, match="nobody counted, .*: pass callbacks"):
        run.train()


def test_a_run_too_short_says_so_before_it_starts(tmp_path):
    run = trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1)
    with pytest.warns(PrelaunchWarning) as told:
        run.train()
        run.model.save_pretrained(tmp_path / "adapter")
    messages = [str(w.message) for w in told if issubclass(w.category, PrelaunchWarning)]
    assert len(messages) == 1
    assert "needs 4 more optimizer steps, will train for only 3, and so end while still in pre-launch" in messages[0]


def test_an_interrupted_run_says_so_when_it_ends(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            control.should_training_stop = state.global_step == 2

    run = trainer(tmp_path, callbacks=[TsdCallback(), Stop()], save_strategy="steps", save_steps=1)
    with pytest.warns(PrelaunchWarning) as told:
        run.train()
    messages = [str(w.message) for w in told if issubclass(w.category, PrelaunchWarning)]
    assert len(messages) == 1
    assert "ends its training while still in pre-launch" in messages[0]
    assert "counted 2 of its 4" in messages[0]


def test_checkpoints_on_the_way_do_not_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrelaunchWarning)
        run = trainer(tmp_path, save_strategy="steps", save_steps=1)
        run.train()
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["global_step"] == 8
