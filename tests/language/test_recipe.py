import pickle
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import hostile
from harness.drawn import Drawn
from peft_tsd.diffusion import recipe as diffusion_recipe
from peft_tsd.diffusion.recipe import DreamBooth
from peft_tsd.errors import RecipeError
from peft_tsd.language.recipe import Recipe, apply_overrides, check_recipe, load_recipe
from peft_tsd.recipes.choices import combinations
from peft_tsd.recipes.reading import choices_of, describe, kind_of, shipped_recipes
from support.places import ROOT

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
        # More than a tensor's float32 holds would end a run at its first step.
        ({"optimizer": {"learning_rate": 1e39}}, ["optimizer.learning_rate=1e+39", "expected less than or equal to"]),
        (
            {"optimizer": {"weight_decay": float("inf")}},
            ["optimizer.weight_decay=inf", "expected less than or equal to"],
        ),
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
        ({"task": {"family": "generate", "scoring": "likelihood"}}, ["task.scoring='likelihood'", "family generate"]),
        ({"task": {"family": "math", "scoring": "likelihood"}}, ["task.scoring='likelihood'", "family math"]),
        ({"task": {"family": "commonsens"}}, ["task.family='commonsens'", "did you mean 'commonsense'"]),
        ({"task": {"family": "commonsense"}}, ["data.name='some/data'", "task.family=commonsense", "remove it"]),
        ({"task": {"family": "commonsense"}, "data": {"tasks": []}}, ["data.tasks=[]", "names no task"]),
        ({"task": {"family": "glue"}, "data": {}}, ["one of GLUE's tasks", "data.tasks=[rte]"]),
        ({"task": {"family": "glue", "prompt": "x"}, "data": {"tasks": ["rte"]}}, ["task.prompt='x'", "family glue"]),
        ({"data": {"name": "a", "folder": "b"}}, ["data.folder=", "task.family=generate"]),
        ({"optimizer": {"warmup_steps": 5, "warmup_ratio": 0.1}}, ["warmup_steps and warmup_ratio", "5 and 0.1"]),
        ({"training": {}}, ["exactly one of steps and epochs", "steps=None"]),
        ({"training": {"steps": 9, "epochs": 1}}, ["exactly one of steps and epochs", "epochs=1"]),
        ({"training": {"steps": 200, "keep_checkpoints": 1}}, ["training.keep_checkpoints=1"]),
        (
            {"training": {"steps": 100}, "directions": {"prelaunch_steps": 100}},
            ["100 steps", "directions.prelaunch_steps=100", "fewer prelaunch_steps"],
        ),
        (
            {"directions": {"prelaunch_steps": "auto"}},
            ["200 steps", "directions.prelaunch_max=200", "fewer prelaunch_max"],
        ),
        ({"directions": {"prelaunch_steps": -1}}, ["directions.prelaunch_steps=-1: expected a number", "or 'auto'"]),
        ({"directions": {"prelaunch_steps": "Auto"}}, ["directions.prelaunch_steps='Auto'"]),
    ],
)
def test_refusals_repeat_what_was_given(sections, parts):
    message = refusal(**sections)
    for part in parts:
        assert part in message


def test_a_suite_has_its_own_defaults():
    suite = {**MINIMAL, "data": {}, "task": {"family": "commonsense"}}
    recipe = check_recipe(suite)
    assert "### Instruction:\n{instruction}\n" in recipe.task.prompt
    assert recipe.task.max_new_tokens == 32
    assert recipe.data.test_size is None
    assert check_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    recipe = check_recipe({**suite, "task": {"family": "commonsense", "prompt": "x", "max_new_tokens": 9}})
    assert (recipe.task.prompt, recipe.task.max_new_tokens) == ("x", 9)
    assert check_recipe(MINIMAL).data.test_size == 200


def test_warmup_as_a_share_of_the_run():
    assert check_recipe({**MINIMAL, "optimizer": {"warmup_ratio": 0.1}}).optimizer.warmup(101) == 11
    assert check_recipe({**MINIMAL, "optimizer": {"warmup_steps": 7}}).optimizer.warmup(101) == 7
    assert check_recipe(MINIMAL).optimizer.warmup(101) == 0


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


def test_three_mistakes_are_three_lines(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path), ["data.nam=x", "training.batch_size=none", "optimizer.learning_rate=-1"])
    assert {line.partition("=")[0] for line in str(caught.value).splitlines()} == {
        "unknown key 'data.nam'; did you mean 'data.name'?",
        "training.batch_size",
        "optimizer.learning_rate",
    }
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path), ["training.steps", "output.x=1", "seed=[1"])
    assert len(str(caught.value).splitlines()) == 3
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)


def test_what_a_file_holds_makes_no_second_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "see\nd": 1}))
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert "\n" not in str(caught.value)


CHOICES = """
choices:
  rank:
    default: 4
    table:
      4: {adapter.r: 4, optimizer.learning_rate: 1.0e-3}
      16: {adapter.r: 16}
  task:
    default: one
    table:
      one: {seed: 1}
      two: {seed: 2, adapter.r: 99}
"""


@pytest.fixture
def choosing(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(CHOICES + yaml.safe_dump({k: v for k, v in MINIMAL.items() if k != "output"}))
    return str(path)


def test_a_choice_is_a_row_of_overrides(choosing):
    recipe = load_recipe(choosing)
    assert (recipe.adapter.r, recipe.optimizer.learning_rate, recipe.seed) == (4, 1e-3, 1)
    assert recipe.output.endswith("runs/mine-4-one")
    recipe = load_recipe(choosing, ["rank=16", "seed=5"])
    assert (recipe.adapter.r, recipe.optimizer.learning_rate, recipe.seed) == (16, 5e-4, 5)
    assert recipe.output.endswith("runs/mine-16-one")
    # A row's own keys give way to the command line's, whatever the order.
    assert load_recipe(choosing, ["adapter.r=7", "task=two"]).adapter.r == 7
    # A whole section under a choice's name is not a row of it.
    assert load_recipe(choosing, ["task={family: generate, chat: true}"]).task.chat
    # What is kept of a run leaves nothing to choose.
    assert "choices" not in yaml.safe_load(recipe.to_yaml())
    assert combinations(choices_of(choosing)) == [
        ["rank=4", "task=one"],
        ["rank=4", "task=two"],
        ["rank=16", "task=one"],
        ["rank=16", "task=two"],
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("default: 4", "default: 5", "choices.rank must have a table of rows and a default that is one of them"),
        ("  rank:\n", "  rank: 4\n  other:\n", "choices.rank must have a table"),
        ("16: {adapter.r: 16}", "16: 16", "row 16 of choices.rank must be a mapping of dotted keys"),
        ("adapter.r: 4,", "adapter.q: 4,", "unknown key 'adapter.q'"),
        ("adapter.r: 4,", "output.x: 4,", "choices.rank.table.4: output.x=4"),
    ],
)
def test_choices_refused(choosing, old, new, message):
    path = Path(choosing)
    path.write_text(path.read_text().replace(old, new) + "output: runs/x\n")
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(choosing)
    assert "\n" not in str(caught.value)


def test_an_unknown_row_is_refused(choosing):
    with pytest.raises(RecipeError, match=r"'rank=5' is no choice of this recipe: it has rank=4\|16"):
        load_recipe(choosing, ["rank=5"])
    with pytest.raises(RecipeError, match=r"it has task=one\|two; did you mean 'task=two'"):
        load_recipe(choosing, ["task=tow"])


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
    load = load_recipe if kind_of(name) is None else diffusion_recipe.load_recipe
    recipe = load(name)
    assert recipe.description == describe(name) != ""
    # Runs with other choices are other runs.
    chosen = [choice.default for choice in choices_of(name).values()]
    assert recipe.output.endswith("/".join(["runs", "-".join([name, *chosen])]))
    for overrides in combinations(choices_of(name)):
        assert load(name, overrides).output.endswith("-".join(part.partition("=")[2] for part in overrides))


# The paper's settings, by rank.
RATES = {
    "llama-7b-commonsense": {4: 5e-4, 8: 4e-4, 16: 5e-4, 32: 1e-4, 64: 0.9e-4},
    "llama2-7b-commonsense": {16: 2e-4, 32: 1e-4},
    "llama3-8b-commonsense": {16: 2e-4, 32: 0.8e-4},
}


@pytest.mark.parametrize("name", RATES)
def test_commonsense_as_in_the_paper(name):
    assert [int(rank) for rank in choices_of(name)["rank"].table] == list(RATES[name])
    for rank, rate in RATES[name].items():
        recipe = load_recipe(name, [f"rank={rank}"])
        assert (recipe.adapter.r, recipe.adapter.lora_alpha) == (rank, 2 * rank)
        assert recipe.optimizer.learning_rate == rate
        assert (recipe.training.epochs, recipe.training.batch_size, recipe.task.max_length) == (3, 16, 256)
        assert (recipe.optimizer.warmup_steps, recipe.adapter.lora_dropout) == (100, 0.05)
        assert (recipe.directions.prelaunch_steps, recipe.directions.num_directions) == (100, 8)


@pytest.mark.parametrize("name", ["deberta-v3-base-glue", "llama3.1-8b-glue", "qwen2.5-7b-glue"])
def test_glue_as_in_the_paper(name):
    table = choices_of(name)
    assert list(table["rank"].table) == ["2", "8"]
    settings = {}
    for task in table["task"].table:
        recipe = load_recipe(name, [f"task={task}", "rank=2"])
        assert (recipe.adapter.r, recipe.adapter.lora_alpha, recipe.data.tasks) == (2, 4, [task])
        settings[task] = (recipe.optimizer.learning_rate, recipe.training.epochs, recipe.task.max_length)
    assert settings == {
        "mnli": (5e-4, 12, 256),
        "sst2": (8e-4, 24, 128),
        "cola": (8e-4, 25, 64),
        "qqp": (1e-3, 5, 320),
        "qnli": (5e-4, 5, 512),
        "rte": (1.2e-3, 50, 320),
        "mrpc": (1e-3, 30, 320),
        "stsb": (5e-4, 25, 128),
    }


@pytest.mark.parametrize(("schema", "pages"), [(Recipe, ["recipes"]), (DreamBooth, ["recipes", "dreambooth"])])
def test_the_docs_list_every_key(schema, pages):
    folder = ROOT / "docs"
    docs = "".join((folder / f"{page}.md").read_text(encoding="utf-8") for page in pages)
    for name, field in schema.model_fields.items():
        section = field.annotation
        keys = [name] if not hasattr(section, "model_fields") else [f"{name}.{key}" for key in section.model_fields]
        for key in keys:
            assert f"`{key}`" in docs, key


@settings(max_examples=150)
@given(st.data())
def test_whatever_a_recipe_holds_it_is_read_or_refused_in_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("hostile") / "recipe.yaml"
    known = [f"{s}.{key}" for s in ("model", "training") for key in Recipe.model_fields[s].annotation.model_fields]
    path.write_bytes(hostile.change_recipe(Drawn(data), check_recipe(MINIMAL).model_dump(), known))
    try:
        load_recipe(str(path), hostile.overrides(Drawn(data), known))
    except RecipeError as error:
        hostile.assert_one_line(error)
