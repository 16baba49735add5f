"""Steps are counted where they are taken: not where `step()` was called and did nothing."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_tsd import advance
from peft_tsd.schedule.taken import steps_of
from peft_tsd.tuner.phase import adapted_layers, steps_taken
from support import tiny


def trained(model) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def counted(model) -> int:
    return steps_taken(adapted_layers(model, "default"), "default")


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=1e-2, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=1e-2, fused=True),
}
one_of_each = pytest.mark.parametrize("kind", OPTIMIZERS)


@one_of_each
def test_micro_batches_of_accelerate(kind):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=3))
    model, optimizer = accelerator.prepare(model, OPTIMIZERS[kind](trained(model)))
    made = []
    for batch in range(20):
        with accelerator.accumulate(model):
            accelerator.backward(tiny.language_loss(model, batch))
            optimizer.step()
            if advance(model, optimizer):
                made.append(batch)
            optimizer.zero_grad()
    assert counted(model) == 5
    assert made == [11]


@one_of_each
@pytest.mark.parametrize("reset", [True, False], ids=["init", "tsd"])
def test_steps_that_a_scaler_leaves_out(kind, reset):
    """The first step is one of those, as it often is in float16, and so is one right after the transition."""
    model = get_peft_model(tiny.llama(), tiny.config("lora-init" if reset else "lora-tsd", prelaunch_steps=1))
    optimizer = OPTIMIZERS[kind](trained(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    counts = []
    for step, overflows in enumerate([True, False, True, True, False]):
        scaler.scale(tiny.language_loss(model, step) * (float("inf") if overflows else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        advance(model, optimizer)
        optimizer.zero_grad()
        counts.append(counted(model))
    assert counts == [0, 1, 1, 1, 2]


def test_advance_by_micro_batch_without_any_wrapper():
    model = get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=2))
    optimizer = torch.optim.SGD(trained(model), lr=1e-2)
    for batch in range(6):
        tiny.language_loss(model, batch).backward()
        if batch % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
        advance(model, optimizer)
    assert counted(model) == 2
    assert model.phase() == "dash"


class Engine:
    """As DeepSpeed's: no optimizer of PyTorch's itself, and `step()` acts at a boundary alone, in parts."""

    def __init__(self, optimizer, every):
        self.optimizer, self.every, self.calls = optimizer, every, 0

    def step(self):
        self.calls += 1
        if self.calls % self.every == 0:
            self.optimizer.step()
            self.optimizer.step()  # ZeRO steps one group after the other
            self.optimizer.zero_grad()


class Sharpness(torch.optim.Optimizer):
    """As SAM: `step()` of its own is never called, but the base optimizer's."""

    def __init__(self, parameters, base):
        super().__init__(parameters, {})
        self.base_optimizer = base

    def second_step(self):
        self.base_optimizer.step()


def test_optimizers_in_others():
    model = get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=2))
    engine = Engine(torch.optim.AdamW(trained(model), lr=1e-2), every=2)
    for batch in range(6):
        tiny.language_loss(model, batch).backward()
        engine.step()
        advance(model, engine)
    assert counted(model) == 3

    model = get_peft_model(tiny.llama(), tiny.config("lora-dash", prelaunch_steps=2))
    optimizer = Sharpness(trained(model), torch.optim.SGD(trained(model), lr=1e-2))
    for batch in range(3):
        tiny.language_loss(model, batch).backward()
        advance(model, optimizer)  # after the first of two passes
        optimizer.second_step()
        advance(model, optimizer)
    assert counted(model) == 3


class Wrapper:
    """Keeps what it wraps where nobody looks."""

    def __init__(self, optimizer):
        self.param_groups, self._parts = optimizer.param_groups, [optimizer]

    def step(self):
        self._parts[0].step()


def test_an_optimizer_that_does_not_tell_counts_as_it_is_called():
    model = get_peft_model(tiny.llama(), tiny.config("lora-dash", prelaunch_steps=2))
    optimizer = Wrapper(torch.optim.SGD(trained(model), lr=1e-2))
    assert steps_of(optimizer) is None
    for step in range(3):
        tiny.language_loss(model, step).backward()
        optimizer.step()
        advance(model, optimizer)
    assert counted(model) == 3


def test_two_optimizers_take_one_step_together_or_in_turns():
    model = get_peft_model(tiny.llama(), tiny.config("lora-dash", prelaunch_steps=9))
    parameters = trained(model)
    both = [torch.optim.SGD(parameters[::2], lr=1e-2), torch.optim.AdamW(parameters[1::2], lr=1e-2)]
    for stepping in (both, both[:1], both[1:], []):
        tiny.language_loss(model, 0).backward()
        for optimizer in stepping:
            optimizer.step()
        advance(model, both)
    assert counted(model) == 3


def test_two_models_with_one_optimizer():
    models = [get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=2)) for _ in range(2)]
    optimizer = torch.optim.SGD([p for model in models for p in trained(model)], lr=1e-2)
    for step in range(3):
        sum(tiny.language_loss(model, step) for model in models).backward()
        if step != 1:
            optimizer.step()
        for model in models:
            advance(model, optimizer)
    assert [counted(model) for model in models] == [2, 2]


def test_a_resumed_optimizer_has_taken_no_step_yet():
    model = get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=9))
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    tiny.train(model, 2, optimizer=optimizer)
    again = torch.optim.AdamW(trained(model), lr=1e-2)
    again.load_state_dict(optimizer.state_dict())
    advance(model, again)
    assert counted(model) == 2
    tiny.train(model, 1, optimizer=again)
    assert counted(model) == 3


def test_a_compiled_step_and_a_learning_rate_of_zero_count():
    model = get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=9))
    optimizer = torch.optim.SGD(trained(model), lr=0.0)
    step = torch.compile(optimizer.step, backend="eager")
    for batch in range(3):
        tiny.language_loss(model, batch).backward()
        step()
        advance(model, optimizer)
    assert counted(model) == 3
