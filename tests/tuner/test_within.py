"""Adapters in models without PEFT's wrapper: transformers' `add_adapter`, and sentence-transformers' own."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_tsd import TsdCallback, TsdConfig, directions_in, export_lora
from support import text_models, tiny
from support.trainers import trainer
from support.versions import needs_add_adapter


def test_of_a_peft_model_they_are_its_own():
    model = get_peft_model(tiny.llama(), tiny.config())
    with pytest.raises(ValueError, match="no directions yet: it has taken 0 of its 3 pre-launch steps"):
        directions_in(model)
    tiny.train(model, 5)
    assert str(directions_in(model)) == str(model.directions())
    with pytest.raises(ValueError, match="no TSD layer with an adapter 'other'"):
        directions_in(model, "other")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no active TSD adapter"):
        directions_in(tiny.llama())


@needs_add_adapter
def test_of_transformers_add_adapter(tmp_path):
    model = tiny.llama()
    model.add_adapter(tiny.config(prelaunch_steps=4, task_type="CAUSAL_LM"))
    trainer(tmp_path, model).train()
    found = directions_in(model)
    assert found.prelaunch_steps == 4
    # As in the bare model, and as the same adapter in PEFT's wrapper.
    assert list(found) == [
        name for name, module in tiny.llama().named_modules() if name.endswith(tuple(tiny.LLAMA_TARGETS))
    ]
    export_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(tiny.llama(), tmp_path / "lora").eval()
    ids = tiny.tokens()
    torch.testing.assert_close(plain(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-6)


def test_of_sentence_transformers(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    model = sentence_transformers.SentenceTransformer(str(text_models.bert_folder(tmp_path / "bert")), device="cpu")
    model.add_adapter(TsdConfig(r=2, prelaunch_steps=2, num_directions=3, target_modules=["query", "value"]))
    rows = datasets.Dataset.from_dict(
        {"one": text_models.WORDS[:8], "other": text_models.WORDS[1:9], "score": [0.0, 1.0] * 4}
    )
    args = sentence_transformers.SentenceTransformerTrainingArguments(
        str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=4, report_to="none", use_cpu=True,
        save_strategy="no", learning_rate=1e-2,
    )  # fmt: skip
    sentence_transformers.SentenceTransformerTrainer(
        model=model, args=args, train_dataset=rows, loss=CosineSimilarityLoss(model), callbacks=[TsdCallback()]
    ).train()
    found = directions_in(model)
    assert found.prelaunch_steps == 2
    assert len(found) == 4
    assert all(layer.delta_sigma.abs().sum() > 0 for layer in found.values())
    # Kept and brought back as sentence-transformers does it.
    expected = model.encode(["one", "two"])
    model.save_pretrained(str(tmp_path / "kept"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "kept"), device="cpu")
    assert again.encode(["one", "two"]) == pytest.approx(expected, abs=1e-5)
    assert str(directions_in(again)).split("\n")[1:] == str(found).split("\n")[1:]


def test_an_adapter_that_was_made_before_and_is_loaded_to_train(tmp_path):
    """How LLaMA-Factory (`adapter_name_or_path`) and axolotl (`lora_model_dir`) come by another adapter."""
    base = text_models.llama_folder(tmp_path / "base")
    config = tiny.config(prelaunch_steps=4, task_type="CAUSAL_LM")
    start = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with pytest.warns(UserWarning, match="still in pre-launch"):
        start.save_pretrained(tmp_path / "start")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "start", is_trainable=True
    )
    trainer(tmp_path, model).train()
    assert model.phase() == "dash"
    assert model.directions().prelaunch_steps == 4
