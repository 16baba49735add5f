"""What is run in a comparison."""

from pathlib import Path

import pytest
import yaml

from peft_tsd.compare import METHODS, make_plan
from peft_tsd.compare.plan import Cell
from peft_tsd.errors import InputError


@pytest.fixture
def recipe(tmp_path):
    content = {
        "model": {"name": "some/model"},
        "data": {"name": "some/data"},
        "task": {"family": "generate"},
        "adapter": {"r": 4, "lora_alpha": 12},
        "training": {"steps": 50},
        "directions": {"prelaunch_steps": 10},
    }
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_every_method_rank_and_seed_once(recipe):
    plan = make_plan(recipe, ranks=[2, 8], seeds=[0, 1, 2])
    cells = plan.cells()
    assert len(cells) == len(set(cells)) == 3 * (2 + 7 * 2)
    assert {cell.method for cell in cells} == set(METHODS)
    # A comparison that is stopped has whole seeds.
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    assert len({cell.path for cell in cells}) == len(cells)


def test_all_but_what_is_compared_is_equal(recipe):
    plan = make_plan(recipe, ["optimizer.learning_rate=0.002"], ranks=[2, 8])
    recipes = {cell: plan.recipe_of(cell, "/out") for cell in plan.cells()}
    for cell, made in recipes.items():
        assert (made.method, made.seed) == (cell.method, cell.seed)
        assert made.optimizer.learning_rate == 0.002
        if cell.rank is not None:
            assert (made.adapter.r, made.adapter.lora_alpha) == (cell.rank, 3 * cell.rank)
    same = [{"method", "seed", "adapter", "output"}] * 2
    contents = [made.model_dump(exclude=same[0]) for made in recipes.values()]
    assert all(content == contents[0] for content in contents)


def test_a_choice_of_rank_or_task_is_taken_with_its_settings():
    plan = make_plan("llama-7b-commonsense", methods=["lora"], ranks=[4, 5], seeds=[0])
    four, five = (plan.recipe_of(cell, "/out") for cell in plan.cells())
    assert (four.adapter.r, four.adapter.lora_alpha, four.optimizer.learning_rate) == (4, 8, 5e-4)
    assert (five.adapter.r, five.adapter.lora_alpha) == (5, 10)
    plan = make_plan("deberta-v3-base-glue", methods=["lora"], ranks=[2], seeds=[0], tasks=["cola", "rte"])
    made = [plan.recipe_of(cell, "/out") for cell in plan.cells()]
    assert [(one.data.tasks, one.training.epochs, one.adapter.r) for one in made] == [
        (["cola"], 25, 2),
        (["rte"], 50, 2),
    ]


def test_a_key_is_varied_for_the_methods_that_use_it(recipe):
    vary = {"directions.init_reading": ["svd", "orthonormal"], "directions.num_directions": [4, 8]}
    plan = make_plan(recipe, methods=["full", "lora", "lora-dash", "lora-init", "lora-tsd"], seeds=[0], vary=vary)
    count = {method: sum(cell.method == method for cell in plan.cells()) for method in plan.methods}
    assert count == {"full": 1, "lora": 1, "lora-dash": 2, "lora-init": 2, "lora-tsd": 4}
    cell = next(cell for cell in plan.cells() if cell.method == "lora-tsd")
    assert cell.group.label == "lora-tsd r4, init_reading=svd, num_directions=4"
    made = plan.recipe_of(cell, "/out")
    assert (made.directions.init_reading, made.directions.num_directions) == ("svd", 4)


def test_tuning_never_sees_the_test_rows(recipe):
    plan = make_plan(recipe, ranks=[2, 8], seeds=[3, 4], tune=("lr", [1e-4, 1e-3]), validation_size=7)
    tuned = plan.tuned_cells()
    # Each method but base, at the first rank, with the first seed.
    assert len(tuned) == len(METHODS) - 1
    assert {cell.seed for cell in tuned} == {3}
    assert {cell.rank for cell in tuned} == {None, 2}
    for cell in tuned:
        made = plan.recipe_of(cell, "/out", 1e-4, validate=True)
        assert made.optimizer.learning_rate == 1e-4
        assert made.evaluation.on == "validation"
    for cell in plan.cells():
        made = plan.recipe_of(cell, "/out", 1e-3)
        assert made.evaluation.on == "test"
        assert made.data.validation_size == 7  # the same rows are held out of every run
        assert cell.method == "base" or plan.tuned_cell(cell) in tuned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["lora", "lora-dsh"]}, "--methods: 'lora-dsh' is no method; did you mean 'lora-dash'?"),
        ({"methods": []}, "--methods must name one or more, each once; got none"),
        ({"ranks": [4, 4]}, "--ranks must name one or more, each once; got 4, 4"),
        ({"ranks": [0]}, "adapter.r=0"),
        ({"seeds": [-1]}, "seed=-1"),
        ({"tasks": ["cola"]}, "has no choice of task"),
        ({"vary": {"directions.prelaunch_step": [5]}}, "did you mean 'directions.prelaunch_steps'?"),
        ({"vary": {"directions.prelaunch_steps": [60]}}, "training is 50 steps long"),
        ({"vary": {"seed": [1, 2]}}, "'seed' can be neither varied nor tuned; give --seeds"),
        ({"tune": ("lr", [1e-3])}, "--tune lr needs two values or more"),
        ({"tune": ("lr", [1e-3, "high"])}, "optimizer.learning_rate='high'"),
        ({"overrides": ["method=lora"]}, "compare sets method itself; give --methods"),
    ],
)
def test_what_cannot_be_compared_is_refused(recipe, options, message):
    with pytest.raises(InputError, match=".*") as error:
        make_plan(recipe, options.pop("overrides", ()), **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_tasks_are_refused():
    with pytest.raises(InputError, match=r"--tasks: the recipe has no 'rtee'; did you mean 'rte'\?"):
        make_plan("deberta-v3-base-glue", tasks=["rtee"])


def test_paths_hold_no_odd_characters():
    cell = Cell("a b", "lora-tsd", 4, (("data.name", "x/../../y"),), 0)
    assert cell.path == "a_b/lora-tsd-r4-name=x_.._.._y/seed-0"


@pytest.fixture
def with_variants(recipe):
    content = yaml.safe_load(Path(recipe).read_text())
    table = {
        "lora": {"method": "lora"},
        "alpha": {"method": "lora", "adapter.lora_alpha": 48},
        "wide": {"method": "lora", "adapter.r": 16, "adapter.lora_alpha": 48},
        "bare": {"method": "base"},
        "ours": {"method": "lora-init", "directions.prelaunch_steps": 0, "directions.direction_source": "gradient"},
    }
    content["choices"] = {"variant": {"default": "lora", "table": table}}
    Path(recipe).write_text(yaml.safe_dump(content))
    return recipe


def test_variants_of_one_method_stand_side_by_side(with_variants):
    plan = make_plan(with_variants, variants=["lora", "alpha", "wide", "ours"], seeds=[0])
    made = {cell.variant: plan.recipe_of(cell, "/out") for cell in plan.cells()}
    assert [cell.group.label for cell in plan.cells()] == ["lora r4", "alpha r4", "wide r16", "ours r4"]
    assert len({cell.path for cell in plan.cells()}) == 4
    assert [(one.method, one.adapter.r, one.adapter.lora_alpha) for one in made.values()] == [
        ("lora", 4, 12),
        ("lora", 4, 48),
        ("lora", 16, 48),
        ("lora-init", 4, 12),
    ]
    assert made["ours"].directions.direction_source == "gradient"
    assert made["lora"].directions.direction_source == "weight"
    # At ranks that are given, alpha keeps each variant's own proportion.
    plan = make_plan(with_variants, variants=["lora", "alpha", "wide"], ranks=[2], seeds=[0])
    adapters = [plan.recipe_of(cell, "/out").adapter for cell in plan.cells()]
    assert [(one.r, one.lora_alpha) for one in adapters] == [(2, 6), (2, 24), (2, 6)]


def test_variants_are_tuned_like_methods(with_variants):
    plan = make_plan(with_variants, variants=["lora", "wide", "bare"], seeds=[0, 1], tune=("lr", [1e-4, 1e-3]))
    assert {plan.tuned_cell(cell) for cell in plan.cells() if cell.method != "base"} == set(plan.tuned_cells())


def test_every_seed_is_run_at_every_rate(with_variants):
    plan = make_plan(with_variants, variants=["lora", "ours", "bare"], seeds=[0, 1], rates=[1e-4, 1e-3, 1e-2])
    cells = plan.cells()
    # What trains nothing has no rate.
    assert {name: sum(cell.variant == name for cell in cells) for name in ("lora", "ours", "bare")} == {
        "lora": 6,
        "ours": 6,
        "bare": 2,
    }
    for cell in cells:
        rate = plan.recipe_of(cell, "/out").optimizer.learning_rate
        assert cell.group.rate == (None if cell.variant == "bare" else rate)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variants": ["loar"]}, "--variants: the recipe has no 'loar'; did you mean 'lora'?"),
        ({"variants": ["lora"], "methods": ["lora"]}, "--methods and --variants"),
        ({"variants": ["lora"], "rates": [1e-3, 1e-3]}, "--rates must name one or more, each once"),
        ({"rates": [1e-3], "tune": ("lr", [1e-3, 1e-4])}, "is varied, and cannot be tuned too"),
        ({"rates": [-1.0]}, "optimizer.learning_rate=-1.0"),
    ],
)
def test_wrong_variants_and_rates_are_refused(with_variants, settings, message):
    with pytest.raises(InputError) as error:
        make_plan(with_variants, seeds=[0], **settings)
    assert message in str(error.value)


def test_a_recipe_without_variants_says_so(recipe):
    with pytest.raises(InputError, match="--variants=lora: the recipe .* has no choice of variant"):
        make_plan(recipe, variants=["lora"], seeds=[0])
