"""`peft-tsd explore` from end to end on tiny models, and one clear line for every bad input."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from peft_tsd import TsdConfig, identify_from_gradients
from peft_tsd.cli.main import main
from peft_tsd.explore import DirectionRecorder, exploring
from support import text_models, tiny


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A base, a model fine-tuned from it as a whole, a TSD adapter, and the trajectory of that."""
    base = text_models.llama_folder(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.add_(0.01 * torch.randn(32, 32))
            layer.mlp.up_proj.weight.add_(0.01 * torch.randn(48, 32))
    model.save_pretrained(tmp_path / "full")
    config = TsdConfig(r=2, prelaunch_steps=2, num_directions=3, target_modules=["q_proj", "v_proj"])
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    recorder = DirectionRecorder(tmp_path / "rates")
    for step in (1, 2, 3):
        tiny.train(adapted, 1)
        recorder.record(adapted, step)
    adapted.save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_base_that_an_adapter_or_a_run_names(place, capsys):
    config = json.loads((place / "adapter" / "adapter_config.json").read_text())
    (place / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "base"}))
    assert main(["explore", "adapter", "--out", "found", "--modules", "v_proj"]) == 0
    run = place / "run"
    run.mkdir()
    (place / "adapter").rename(run / "adapter")
    (run / "recipe.yaml").write_text("model: {name: base}\n")
    assert main(["explore", "run", "--out", "again", "--modules", "v_proj"]) == 0
    capsys.readouterr()
    assert main(["explore", "full", "--out", "none"]) == 2
    assert "'full' names no base model; give it before: peft-tsd explore BASE full" in capsys.readouterr().err


def test_everything_at_once(place, capsys):
    command = ["explore", "base", "full", "adapter", "--out", "found", "--trajectory", "rates", "--true", "4"]
    assert main([*command, "--num-directions", "3"]) == 0
    printed = capsys.readouterr().out
    assert "full (checkpoint), 4 weights changed" in printed
    assert "adapter (TSD), 4 weights changed" in printed
    assert "left out: 10 unchanged" in printed
    assert "left out: 10 not adapted by adapter" in printed
    assert "left out: 1 the output head" in printed
    assert "model.layers.1.mlp.up_proj" in printed
    assert "(two random sets 9.4%, two random changes" in printed
    assert "the 8 directions predicted at each step, against the 4 true ones of full, over 2 weights" in printed
    assert "step 3      precision" in printed
    assert "report   found/report.html" in printed
    found = json.loads((place / "found" / "summary.json").read_text())
    assert [model["kind"] for model in found["models"]] == ["checkpoint", "TSD"]
    assert found["overlap"]["weights"] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert found["agreement"]["steps"] == [1, 2, 3]
    assert found["agreement"]["true"] == 4


@pytest.mark.parametrize("source", ["weight", "gradient"])
def test_an_adapter_trained_along_its_directions(place, capsys, source):
    settings = {"prelaunch_steps": 0} if source == "gradient" else {"prelaunch_steps": 1}
    config = TsdConfig(r=2, num_directions=3, direction_source=source, target_modules=["q_proj"], **settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(place / "base"), config)
    if source == "gradient":
        ids = tiny.tokens(2, 9)
        identify_from_gradients(model, [{"input_ids": ids, "labels": ids}])
    tiny.train(model, 3)
    model.save_pretrained(place / "trained")
    assert main(["explore", "base", "trained", "full", "--out", "found", "--num-directions", "3"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("What this means: ") == 2
    assert ("lora-tsd chose such directions early" in printed) == (source == "weight")
    assert ("lora-tsd was trained along directions of the gradient" in printed) == (source == "gradient")
    first, full = json.loads((place / "found" / "summary.json").read_text())["models"]
    assert (first["along"], first["direction_source"]) == ("lora-tsd", source)
    assert (full["along"], full["mean"]["gradient_energy"]) == (None, None)
    found = {weight["name"]: weight for weight in first["weights"]}
    for name, layer in model.base_model.model.named_modules():
        if name in found:
            change = layer.get_delta_weight("default").detach().double()
            energies = torch.linalg.svdvals(change).square()
            assert found[name]["best_energy"] == pytest.approx(float(energies[:3].sum() / energies.sum()), rel=1e-4)
            if source == "gradient":
                held = model.directions()[name]
                along = (held.u.double().mT @ change @ held.v.double()).diagonal()[:3].square().sum()
                assert found[name]["gradient_energy"] == pytest.approx(float(along / energies.sum()), rel=1e-3)
            else:
                assert found[name]["gradient_energy"] is None


def test_what_is_still_in_prelaunch_was_trained_along_nothing(place, capsys):
    config = TsdConfig(r=2, prelaunch_steps=50, target_modules=["q_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(place / "base"), config)
    tiny.train(model, 2)
    model.save_pretrained(place / "early")
    assert main(["explore", "base", "early", "--out", "found"]) == 0
    assert json.loads((place / "found" / "summary.json").read_text())["models"][0]["along"] is None


def test_a_run_folder_stands_for_its_adapter_and_modules_narrow(place, capsys):
    (place / "run").mkdir()
    (place / "adapter").rename(place / "run" / "adapter")
    assert main(["explore", "base", "run", "--out", "found", "--modules", "v_proj"]) == 0
    assert "run (TSD), 2 weights changed" in capsys.readouterr().out


def test_nothing_changed(place, capsys):
    assert main(["explore", "base", "base", "--out", "found"]) == 0
    assert "No weight that both models have was changed." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base", "full", "--out", "adapter"], "adapter exists and is not overwritten"),
        (["base", "full", "--out", "base/config.json/x"], "config.json is not a folder that can be written to"),
        (["nowhere/at/all", "full"], "BASE='nowhere/at/all': no such file or folder"),
        (["base", "./ful"], "TUNED='./ful': no such file or folder; did you mean 'full'?"),
        (["base", "rates"], "cannot load the model"),
        (["adapter", "full"], "BASE='adapter' is an adapter; give the model it was trained on"),
        (["base", "full", "--modules", "q_prj"], "'q_prj'; did you mean 'q_proj'?"),
        (["base", "full", "--num-directions", "0"], "num_directions must be a positive integer"),
        (["base", "full", "--eps", "-1"], "eps must be positive and finite; got -1.0"),
        (["base", "full", "--true", "0"], "true must be a positive integer"),
        (["base", "full", "--device", "abacus"], "abacus"),
        (["base", "full", "--trajectory", "full"], "holds no trajectory.json"),
        (["base", "full", "--trajectory", "rates", "--modules", "up_proj"], "none of them is measured here"),
    ],
)
def test_bad_input_is_refused_before_any_work(place, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(exploring.Checkpoint, "read", lambda *_: pytest.fail("a weight was read"))
    before = sorted(path.name for path in place.iterdir())
    if "--out" not in arguments:
        arguments = [*arguments, "--out", "found"]
    capsys.readouterr()
    assert main(["explore", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = printed.err.splitlines()
    assert line.startswith("peft-tsd: ")
    assert message in line
    assert sorted(path.name for path in place.iterdir()) == before


def test_an_interrupt_leaves_nothing(place, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_tsd.explore.output.render", interrupt)
    before = sorted(path.name for path in place.iterdir())
    assert main(["explore", "base", "full", "--out", "found"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert sorted(path.name for path in place.iterdir()) == before


def test_a_trajectory_of_another_base_is_refused(place, capsys):
    other = get_peft_model(tiny.gpt2(), LoraConfig(target_modules=["c_attn"], init_lora_weights=False))
    DirectionRecorder("other").record(other, 1)
    assert main(["explore", "base", "full", "--out", "found", "--trajectory", "other"]) == 2
    assert "other holds rates of transformer.h.0.attn.c_attn and 1 more weights" in capsys.readouterr().err
