"""Recipes that quantize their model."""

import importlib.util
import shutil

import pytest
import torch
from safetensors.torch import load_file

from peft_tsd.errors import InputError
from peft_tsd.language import training
from peft_tsd.language.evaluating import evaluate
from peft_tsd.language.recipe import load_recipe
from peft_tsd.runs.folder import RunFolder
from peft_tsd.tuner.quantized import QuantizedLayer
from support import text_models
from support.quantized_models import layers_of, loaded

pytestmark = pytest.mark.filterwarnings("ignore:(Unm|M)erge lora module")


@pytest.fixture
def place(tmp_path):
    """A folder with a tiny Llama and 20 rows of data."""
    return text_models.place_in(tmp_path, 20)


@pytest.mark.parametrize("quantization", ["bnb-4bit", "bnb-8bit"])
def test_a_recipe_quantizes_its_model(quantization, place):
    recipe = load_recipe(str(text_models.write_recipe(place)), [f"model.quantization={quantization}"])
    result = training.train(recipe)
    layers = layers_of(result.model)
    assert len(layers) == 4
    assert all(isinstance(layer, QuantizedLayer) for layer in layers.values())
    metrics = result.folder.read_metrics()
    assert metrics["status"] == "finished"
    assert metrics["loss"][-1]["loss"] < metrics["loss"][0]["loss"]
    again = evaluate(str(result.folder.path))
    assert again["score"] == metrics["score"]["after"]
    unquantized = load_recipe(str(result.folder.recipe), ["model.quantization=null"])
    assert evaluate(str(result.folder.path), unquantized)["questions"] == again["questions"]
    stopped = load_recipe(str(text_models.write_recipe(place)), [f"model.quantization={quantization}"])
    stopped = stopped.model_copy(update={"output": str(place / "stopped")})
    shutil.copytree(result.folder.path, stopped.output)
    other = RunFolder(stopped.output)
    for path in (other.adapter, other.adapter_lora, other.checkpoints / "checkpoint-12"):
        shutil.rmtree(path)
    other.write_metrics({**metrics, "status": "running", "loss": metrics["loss"][:10]})
    continued = training.train(stopped.model_copy(update={"resume": True}))
    for name, tensor in load_file(result.folder.adapter / "adapter_model.safetensors").items():
        assert torch.equal(tensor, load_file(continued.folder.adapter / "adapter_model.safetensors")[name]), name


def test_a_model_that_was_saved_quantized_is_used_as_it_is(place):
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    loaded(place / "model", quantization).save_pretrained(place / "packed")
    for file in (place / "model").glob("tokenizer*"):
        shutil.copy(file, place / "packed")
    recipe = text_models.write_recipe(place)
    result = training.train(load_recipe(str(recipe), [f"model.name={place / 'packed'}"]))
    assert all(isinstance(layer, QuantizedLayer) for layer in layers_of(result.model).values())
    with pytest.raises(InputError, match=r"model.quantization=bnb-8bit is for full weights, .*quantized already"):
        training.train(
            load_recipe(
                str(recipe),
                [f"model.name={place / 'packed'}", "model.quantization=bnb-8bit", f"output={place / 'other'}"],
            )
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.quantization=bnb-2bit"], "model.quantization"),
        (["model.quantization=bnb-4bit", "method=full"], "is for the methods .*got method=full"),
        (["model.quantization=bnb-4bit", "method=loha-dash"], "is for the methods .*got method=loha-dash"),
        (
            ["model.quantization=bnb-4bit", "task.family=classify", "task.max_new_tokens=16"],
            "for models that write; got task.family=classify",
        ),
    ],
)
def test_recipes_that_cannot_be_quantized_are_refused(overrides, message, place):
    with pytest.raises(InputError, match=message):
        load_recipe(str(text_models.write_recipe(place)), overrides)


def test_a_gguf_file_is_not_quantized_again(place):
    (place / "model.gguf").write_bytes(b"GGUF")
    recipe = load_recipe(
        str(text_models.write_recipe(place)), [f"model.name={place / 'model.gguf'}", "model.quantization=bnb-4bit"]
    )
    with pytest.raises(InputError, match=r"quantization=bnb-4bit is for full weights, .*model.gguf' is a GGUF file"):
        training.train(recipe)


def test_a_missing_bitsandbytes_is_said(place, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    recipe = load_recipe(str(text_models.write_recipe(place)), ["model.quantization=bnb-8bit"])
    with pytest.raises(InputError, match="quantization=bnb-8bit needs the package bitsandbytes: pip install it"):
        training.train(recipe)
