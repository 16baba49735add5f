"""Whatever a model is wrapped in, files and messages name its layers as the bare model does, or it is refused."""

import copy
import json
import socket

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import compile_regions
from peft import LoHaConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from peft_tsd import DashConfig, advance, check_adapter, export_lora, identify_from_gradients
from peft_tsd.explore import DirectionRecorder, Trajectory
from peft_tsd.models.wrapped import adapted_model, unwrapped
from peft_tsd.tuner.checking import check_fits
from support import tiny
from support.versions import needs_add_adapter


class Own(nn.Module):
    """As a module of Lightning's: it holds the adapted model, and calls it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model
        self.other = nn.Linear(2, 2)

    def forward(self, *args, **kwargs):
        return self.net(*args, **kwargs)


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def one_process() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=0, world_size=1)


@pytest.fixture(autouse=True)
def run_as_written(request):
    """Compiled modules are there with their names, and nothing is compiled, which takes a minute a case."""
    with torch.compiler.set_stance("default" if request.node.get_closest_marker("long") else "force_eager"):
        yield


@pytest.fixture
def processes():
    one_process()
    yield
    torch.distributed.destroy_process_group()


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


AROUND = {
    "compiled": compiled,
    "compiled in place": in_place,
    "DataParallel": nn.DataParallel,
    "DDP": nn.parallel.DistributedDataParallel,
    "DDP of compiled": lambda model: nn.parallel.DistributedDataParallel(compiled(model)),
    "Accelerate": lambda model: Accelerator(cpu=True).prepare(model),
    "regions": lambda model: compile_regions(model, backend="eager"),
    "average": AveragedModel,
    "own": Own,
    "own of compiled": lambda model: Own(compiled(model)),
}


def blocks(wrap):
    def wrapped(model: nn.Module) -> nn.Module:
        layers = unwrapped(model).get_submodule("base_model.model.model.layers")
        for i, block in enumerate(layers):
            layers[i] = wrap(block)
        return model

    return wrapped


INSIDE = {
    "blocks compiled": blocks(compiled),
    "blocks compiled in place": blocks(in_place),
    "blocks in checkpoints": blocks(checkpoint_wrapper),
    "blocks compiled, DataParallel": lambda model: nn.DataParallel(blocks(compiled)(model)),
}

NAMES = {
    f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
}


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.tokens()).logits


def adapted(**changes):
    return get_peft_model(tiny.llama(), tiny.config(**changes))


@pytest.mark.parametrize("wrap", [*AROUND.values(), *INSIDE.values()], ids=[*AROUND, *INSIDE])
def test_all_that_takes_a_model(wrap, tmp_path, processes):
    plain = adapted(prelaunch_steps=0, rank_pattern={"layers.0.self_attn.q_proj": 2})
    wrapped = wrap(plain)
    recorder = DirectionRecorder(tmp_path / "rates")
    batch = {"input_ids": tiny.tokens(4, 9), "labels": tiny.tokens(4, 9)}
    identify_from_gradients(wrapped, [batch])
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    for step in range(2):
        tiny.language_loss(wrapped, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        advance(wrapped, optimizer)
    recorder.record(wrapped, 2)
    assert set(Trajectory.read(tmp_path / "rates").weights) == NAMES

    model = adapted_model(wrapped)
    model.eval()
    assert set(model.directions()) == NAMES
    report = export_lora(wrapped, tmp_path / "out")
    assert set(report.ranks) == NAMES
    check_adapter(tmp_path / "out")
    expected = output(wrapped)
    found = output(PeftModel.from_pretrained(tiny.llama(), tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found - output(tiny.llama())).norm() > 1e-3 * found.norm()

    model.save_pretrained(tmp_path / "native")
    check_fits(tmp_path / "native", wrapped, "default")
    check_fits(
        tmp_path / "native", adapted(prelaunch_steps=0, rank_pattern={"layers.0.self_attn.q_proj": 2}), "default"
    )
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "native")
    torch.testing.assert_close(output(again), expected, rtol=1e-5, atol=1e-6)
    for folder in ("native", "out"):
        assert not any(
            "_orig" in key or "_wrapped" in key for key in load_file(tmp_path / folder / "adapter_model.safetensors")
        )


@pytest.mark.parametrize(
    "targets",
    [
        pytest.param(tiny.LLAMA_TARGETS, id="names"),
        pytest.param("all-linear", id="all", marks=pytest.mark.long),
        pytest.param(r".*\.(q|v)_proj", id="regex", marks=pytest.mark.long),
    ],
)
def test_a_base_that_was_compiled_before_it_was_adapted(targets, tmp_path):
    for name, base in (("whole", compiled(tiny.llama())), ("blocks", tiny.llama())):
        if name == "blocks":
            for i, block in enumerate(base.model.layers):
                base.model.layers[i] = compiled(block)
        model = get_peft_model(
            base, tiny.config(target_modules=targets, alpha_pattern={"layers.0.self_attn.q_proj": 3})
        )
        tiny.train(model, 5)
        model.eval().save_pretrained(tmp_path / name / "native")
        export_lora(model, tmp_path / name / "out")
        for folder in ("native", "out"):
            config = json.loads((tmp_path / name / folder / "adapter_config.json").read_text())
            assert "_orig_mod" not in str(config["target_modules"])
            found = output(PeftModel.from_pretrained(tiny.llama(), tmp_path / name / folder))
            torch.testing.assert_close(found, output(model), rtol=1e-5, atol=1e-6)


def test_an_adapter_is_loaded_onto_compiled_blocks(tmp_path):
    model = adapted()
    tiny.train(model, 5)
    model.eval().save_pretrained(tmp_path / "native")
    base = tiny.llama()
    for i, block in enumerate(base.model.layers):
        base.model.layers[i] = compiled(block)
    torch.testing.assert_close(output(PeftModel.from_pretrained(base, tmp_path / "native")), output(model))


def test_directions_beside_another_method(tmp_path):
    config = DashConfig(peft=LoHaConfig(r=2, target_modules=["q_proj"]), prelaunch_steps=2, num_directions=3)
    model = get_peft_model(tiny.llama(), config)
    tiny.train(model, 4)
    expected = output(model.eval())
    blocks(compiled)(model)
    export_lora(nn.DataParallel(model), tmp_path / "out", rank=8)
    found = output(PeftModel.from_pretrained(tiny.llama(), tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "native")
    torch.testing.assert_close(output(PeftModel.from_pretrained(tiny.llama(), tmp_path / "native")), expected)


@needs_add_adapter
def test_injected_without_a_peft_model(tmp_path):
    model = tiny.llama()
    model.add_adapter(tiny.config())
    tiny.train(model, 5)
    for i, wrapped in enumerate(
        (compiled(model), Own(model), nn.DataParallel(model), AveragedModel(copy.deepcopy(model)))
    ):
        export_lora(wrapped, tmp_path / str(i))
        found = output(PeftModel.from_pretrained(tiny.llama(), tmp_path / str(i)))
        torch.testing.assert_close(found, output(model.eval()), rtol=1e-5, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("source", ["weight", "gradient"])
def test_directions_from_gradients_of_what_was_compiled_before(source):
    """Hooks are not called in a block that was compiled without them."""
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for wrap in (lambda block: block, compiled, in_place):
        torch.manual_seed(0)
        settings = {"prelaunch_steps": 0, "direction_source": source, "target_modules": ["0.0", "1.0"], "r": 2}
        base = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)))
        model = get_peft_model(base, tiny.config("lora-dash", **settings))
        inner = model.base_model.model
        for i in range(2):
            inner[i] = wrap(inner[i])
        model(x).square().sum().backward()
        model.zero_grad()
        identify_from_gradients(model, [x], loss=lambda model, batch: model(batch).square().sum())
        found.append(model.directions())
    for other in found[1:]:
        assert list(other) == list(found[0]) == ["0.0", "1.0"]
        for name, layer in found[0].items():
            torch.testing.assert_close(other[name].u.abs(), layer.u.abs(), rtol=1e-4, atol=1e-4)


def test_refused_by_name(tmp_path):
    both = nn.ModuleDict({"one": adapted(), "two": adapted()})
    with pytest.raises(ValueError, match="several adapted models, one, two; give one of them, model.one"):
        export_lora(both, tmp_path / "out")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no adapter"):
        export_lora(tiny.llama(), tmp_path / "out")
    model = blocks(nn.DataParallel)(adapted())
    for save in (lambda: export_lora(model, tmp_path / "out"), lambda: model.save_pretrained(tmp_path / "native")):
        with pytest.raises(
            ValueError, match=r"layers.0 is wrapped by itself, in a DataParallel.*Put .*layers.0.module"
        ):
            save()
    assert not (tmp_path / "out").exists()


def test_a_file_with_names_that_the_base_does_not_have_is_not_written(tmp_path, monkeypatch):
    model = adapted()
    tiny.train(model, 4)
    monkeypatch.setattr("peft_tsd.tuner.model.plain_name", lambda name: name)
    with pytest.raises(ValueError, match="the model has no layer '.*_orig_mod.*_proj'"):
        export_lora(blocks(compiled)(model), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
