from pathlib import Path

import pytest
import yaml

from peft_tsd.recipe import Recipe, RecipeError, apply_overrides, check_recipe, load_recipe, shipped_recipes

MINIMAL = {
    "model": {"name": "some/model"},
    "data": {"name": "some/data"},
    "task": {"family": "generate"},
    "training": {"steps": 200},
    "output": "runs/x",
}


def refusal(content=None, **sections) -> str:
    with pytest.raises(RecipeError) as caught:
        check_recipe({**MINIMAL, **sections} if content is None else content)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_spelled_out_and_read_back():
    recipe = check_recipe(MINIMAL)
    again = check_recipe(yaml.safe_load(recipe.to_yaml()))
    assert again == recipe
    assert again.adapter.r == 8
    assert "resume" not in yaml.safe_load(recipe.to_yaml())


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"optimizer": {"learning_rat": 1.0}}, ["'optimizer.learning_rat'", "did you mean 'optimizer.learning_rate'"]),
        ({"trainin": {}}, ["'trainin'", "did you mean 'training'"]),
        ({"adapter": {"lora_dropot": 0.1}}, ["'adapter.lora_dropot'", "did you mean 'adapter.lora_dropout'"]),
        ({"optimizer": {"zzz": 1}}, ["'optimizer.zzz'", "known: ", "weight_decay"]),
        ({"adapter": {"r": "eight"}}, ["adapter.r='eight' (str)", "expected a valid integer"]),
        ({"adapter": {"r": 0}}, ["adapter.r=0", "expected greater than or equal to 1"]),
        ({"training": {"steps": 1.5}}, ["training.steps=1.5 (float)", "integer"]),
        ({"training": {"steps": True}}, ["training.steps=True (bool)", "integer"]),
        ({"optimizer": {"learning_rate": "fast"}}, ["optimizer.learning_rate='fast'", "expected a valid number"]),
        ({"optimizer": {"learning_rate": float("nan")}}, ["optimizer.learning_rate=nan"]),
        ({"method": "lora-tds"}, ["method='lora-tds'", "did you mean 'lora-tsd'"]),
        ({"model": {}}, ["'model.name' is missing", "model.name=VALUE"]),
        ({"data": {}}, ["exactly one of name and generator", "name=None"]),
        ({"data": {"name": "a", "generator": "b"}}, ["exactly one of name and generator", "generator='b'"]),
        ({"data": {"generator": "b"}}, ["data.train_size"]),
        ({"data": {"generator": "b", "train_size": 9, "subset": "s"}}, ["data.subset='s'", "generator"]),
        ({"data": {"name": "a", "parameters": {"n": 1}}}, ["data.parameters={'n': 1}", "belong to a generator"]),
        ({"data": {"name": "a", "test_name": "b", "test_split": "c"}}, ["test_name and test_split", "'b'", "'c'"]),
        ({"task": {"family": "classify", "chat": True}}, ["task.chat=True", "family classify"]),
        ({"task": {"family": "generate", "labels": ["a", "b"]}}, ["task.labels", "family generate"]),
        ({"task": {"family": "classify", "labels": ["a", "a"]}}, ["two or more different labels", "['a', 'a']"]),
        ({"training": {}}, ["exactly one of steps and epochs", "steps=None"]),
        ({"training": {"steps": 9, "epochs": 1}}, ["exactly one of steps and epochs", "epochs=1"]),
        ({"training": {"steps": 200, "keep_checkpoints": 1}}, ["training.keep_checkpoints=1"]),
        ({"training": {"steps": 100}}, ["100 steps", "directions.prelaunch_steps=100", "fewer prelaunch_steps"]),
    ],
)
def test_refusals_repeat_what_was_given(sections, parts):
    message = refusal(**sections)
    for part in parts:
        assert part in message


def test_plain_lora_has_no_prelaunch_to_outlast():
    assert check_recipe({**MINIMAL, "training": {"steps": 3}, "method": "lora"}).method == "lora"


def test_epochs_are_optimizer_steps():
    training = check_recipe(
        {**MINIMAL, "training": {"epochs": 3, "batch_size": 4, "gradient_accumulation": 2}}
    ).training
    assert training.total_steps(17) == 3 * 3  # 5 batches, in 3 groups


def test_overrides_are_dotted_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in MINIMAL.items() if k != "output"}))
    recipe = load_recipe(
        str(path),
        ["adapter.target_modules=[q, v]", "optimizer.learning_rate=2e-4", "adapter.bias=none", "resume=true"],
    )
    assert recipe.adapter.target_modules == ["q", "v"]
    assert recipe.optimizer.learning_rate == 2e-4
    assert recipe.adapter.model_extra == {"bias": "none"}
    assert recipe.resume
    assert recipe.output.endswith("runs/mine")
    assert apply_overrides(recipe, ["seed=4"]).seed == 4


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("training.steps", "key=value"),
        ("output.x=1", "'output' is a single value"),
        ("seed=[1", "not valid YAML"),
        ("data.nam=x", "did you mean 'data.name'"),
    ],
)
def test_overrides_refused(tmp_path, override, part):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(RecipeError, match=part.replace("[", r"\[")) as caught:
        load_recipe(str(path), [override])
    assert override.partition("=")[0] in str(caught.value)


def test_files_refused(tmp_path):
    with pytest.raises(RecipeError, match="no recipe 'smollm2-famly'.*did you mean 'smollm2-family'"):
        load_recipe("smollm2-famly")
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(str(tmp_path))
    twice = tmp_path / "twice.yaml"
    twice.write_text("seed: 1\nseed: 2\n")
    with pytest.raises(RecipeError, match="'seed' is given twice"):
        load_recipe(str(twice))
    twice.write_text("- 1\n")
    with pytest.raises(RecipeError, match="a recipe is a mapping of keys; got list"):
        load_recipe(str(twice))


def test_yaml_numbers_as_people_write_them(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "optimizer: {learning_rate: 1e-3}\n")
    assert load_recipe(str(path)).optimizer.learning_rate == 1e-3


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid_and_open_with_their_command(name):
    path = shipped_recipes()[name]
    assert path.read_text().startswith(f"# peft-tsd train {name}\n")
    recipe = load_recipe(name)
    assert recipe.description
    assert recipe.output.endswith(f"runs/{name}")


def test_the_docs_list_every_key():
    docs = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        keys = [name] if not hasattr(section, "model_fields") else [f"{name}.{key}" for key in section.model_fields]
        for key in keys:
            assert f"`{key}`" in docs, key
