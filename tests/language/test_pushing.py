"""A run as a repository of the hub: against a hub on this machine."""

import json
import shutil

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_tsd.cli.main import main
from peft_tsd.errors import InputError
from peft_tsd.language.pushing import assemble, push
from peft_tsd.language.recipe import load_recipe
from support import text_models
from support.runs import run
from support.stub_hub import hub


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose base lies in a folder of this machine, and its result."""
    place = tmp_path_factory.mktemp("pushed")
    text_models.place_in(place, 20)
    return place, run(text_models.write_recipe(place))


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def test_what_is_pushed_loads_from_where_it_was_pushed_to(trained, online, tmp_path):
    place, result = trained
    with hub() as (address, kept):
        pushed = push(place / "run", "me/kinship", tmp_path / "files", api=HfApi(endpoint=address, token="hf_stub"))
    assert pushed.url == f"{address}/me/kinship"
    made = kept["repositories"]["me/kinship"]
    assert made.get("private") or made.get("visibility") == "private"
    [commit] = kept["commits"]
    assert commit.pop("repository") == "me/kinship"
    assert sorted(commit) == pushed.files
    assert "unknown" not in kept
    # What came out at the other end is an adapter, plain and native, with its tokenizer.
    there = tmp_path / "there"
    for name, content in commit.items():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(content)
    ids = torch.arange(10)[None]
    expected = result.model.eval()(ids).logits
    for folder, kind in ((there, "LORA"), (there / "native", "TSD")):
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "model"), folder)
        assert loaded.peft_config["default"].peft_type == kind
        torch.testing.assert_close(loaded.eval()(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(there).eos_token == "<end>"
    # Nothing says where things lay on this machine.
    for name in ("README.md", "recipe.yaml"):
        assert str(place) not in commit[name].decode()
    again = yaml.safe_load(commit["recipe.yaml"].decode())
    assert again["data"]["name"] == "data.jsonl"
    assert "output" not in again


def test_the_card_says_what_was_trained_and_how_it_scored(trained, tmp_path):
    place, result = trained
    assemble(place / "run", "me/kinship", tmp_path / "files")
    card = ModelCard.load(tmp_path / "files" / "README.md")
    metrics = result.metrics
    assert card.data["library_name"] == "peft"
    assert {"lora", "lora-tsd", "peft-tsd"} == set(card.data["tags"])
    [found] = card.data.eval_results
    assert (found.metric_type, found.metric_value) == ("exact_match", round(metrics["score"]["after"], 4))
    for part in (
        "**lora-tsd**",
        "identified after step 4, in 4 layers",
        f"{metrics['trainable_parameters']:,} of {metrics['total_parameters']:,}",
        f"data.jsonl, 14 rows (sha256 {metrics['data']['sha256'][:12]})",
        f"| exact_match | {metrics['score']['before']:.4f} before, {metrics['score']['after']:.4f} after |",
        f"| held-out loss | {metrics['score']['loss']:.4f} |",
        'PeftModel.from_pretrained(base, "me/kinship")  # base: model',
        'PeftModel.from_pretrained(base, "me/kinship", subfolder="native")',
    ):
        assert part in card.text, part


def test_from_the_command_line(trained, online, tmp_path, monkeypatch, capsys):
    place, _ = trained
    monkeypatch.chdir(tmp_path)
    run_folder = str(place / "run")
    assert main(["push", run_folder, "kinship", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "native/adapter_model.safetensors" in shown
    assert "## How it scored" in shown
    assert shown.endswith("nothing was pushed\n")
    assert list(tmp_path.iterdir()) == []
    assert main(["push", run_folder, "kinship", "--out", "files"]) == 0
    assert "the files lie in files" in capsys.readouterr().out
    assert (tmp_path / "files" / "README.md").is_file()
    assert main(["push", run_folder, "kinship", "--out", "files"]) == 2
    assert "'files' exists and is not overwritten" in capsys.readouterr().err
    with hub() as (address, kept):
        monkeypatch.setattr(huggingface_hub.hf_api.constants, "ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", "hf_stub")
        assert main(["push", run_folder, "kinship", "--public"]) == 0
        assert kept["repositories"]["me/kinship"].get("visibility", "public") == "public"
        assert not kept["repositories"]["me/kinship"].get("private")
        assert f"{address}/me/kinship" in capsys.readouterr().out
        monkeypatch.setenv("HF_TOKEN", "hf_another")
        assert main(["push", run_folder, "kinship"]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "log in with `hf auth login`" in line


def test_what_cannot_be_pushed_is_refused(trained, tmp_path):
    place, _ = trained
    with pytest.raises(InputError, match="cannot be a repository's name"):
        assemble(place / "run", "me/../kinship", tmp_path / "files")
    with pytest.raises(InputError, match="is no run folder"):
        assemble(place / "model", "kinship", tmp_path / "files")
    broken = tmp_path / "broken"
    shutil.copytree(place / "run", broken)
    (broken / "adapter" / "secret").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="is a symbolic link"):
        assemble(broken, "kinship", tmp_path / "files")
    metrics = json.loads((broken / "metrics.json").read_text())
    (broken / "metrics.json").write_text(json.dumps({**metrics, "status": "running"}))
    with pytest.raises(InputError, match="is not finished; .* resume=true` continues it"):
        assemble(broken, "kinship", tmp_path / "files")
    assert not (tmp_path / "files").exists()


@pytest.mark.parametrize("method", ["lora", pytest.param("loha-dash", marks=pytest.mark.long), "full"])
def test_of_other_methods_what_there_is(trained, tmp_path, method):
    place, _ = trained
    steps = ["training.steps=5", "data.test_size=2", "evaluation.before=false", "task.max_new_tokens=1"]
    run(place / "tiny.yaml", f"method={method}", *steps, f"output={place / method}")
    files = assemble(place / method, "kinship", tmp_path / "files")
    assert not any(name.startswith("native/") for name in files)
    text = (tmp_path / "files" / "README.md").read_text()
    if method == "full":
        assert "model.safetensors" in files
        assert "AutoModel.from_pretrained" in text
    else:
        assert ("import peft_tsd" in text) == (method == "loha-dash")
    assert load_recipe(str(tmp_path / "files" / "recipe.yaml"), ["output=x"]).method == method
