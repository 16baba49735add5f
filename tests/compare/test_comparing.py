"""Whole comparisons of tiny models: what they leave, and that a killed one ends in the same results."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from peft_tsd.cli.main import main
from peft_tsd.compare import METHODS, compare, make_plan
from peft_tsd.errors import InputError
from peft_tsd.runs.folder import RunFolder
from support import text_models
from support.comparisons import computed


@pytest.fixture
def place(tmp_path):
    return text_models.place_in(tmp_path, 30)


@pytest.mark.long
def test_every_method_is_run_alike_and_shown(place, capsys):
    recipe, out = text_models.write_recipe(place, training={"save_every": 100}), place / "out"
    arguments = ["compare", str(recipe), "--seeds", "0", "--ranks", "2", "--jobs", "2", "--out", str(out)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    content = json.loads((out / "results.json").read_text())
    rows = {(row["method"], row["rank"]): row for row in content["runs"]}
    assert rows.keys() == {(m, None if m in ("base", "full") else 2) for m in METHODS}
    assert all(row["status"] == "finished" for row in rows.values())
    assert len({row["data"]["sha256"] for row in rows.values()}) == 1
    assert {row["steps"] for (method, _), row in rows.items() if method != "base"} == {12}
    for (method, rank), row in rows.items():
        assert row["recipe"]["method"] == method
        assert row["recipe"]["adapter"]["lora_alpha"] == 2 * row["recipe"]["adapter"]["r"]
        folder = RunFolder(out / "runs" / (method if rank is None else f"{method}-r{rank}") / "seed-0")
        assert not folder.checkpoints.exists()
        assert folder.adapter.is_dir() == (method not in ("base", "full"))
        assert folder.model.is_dir() == (method == "full")
        if method != "base":
            assert row["loss"][-1][1] < row["loss"][0][1]
            # The kept adapter, or model, scores what the run scored.
            capsys.readouterr()
            assert main(["evaluate", str(folder.path)]) == 0
            assert json.loads(capsys.readouterr().out)["score"] == pytest.approx(row["score"])

    def trained(method, rank=None):
        return rows[method, rank]["trainable_parameters"]

    # q_proj 32 x 32 and down_proj 32 x 48 in two layers, and Δσ of three directions.
    assert trained("lora", 2) == 2 * 2 * (64 + 80)
    assert trained("lora-init", 2) == trained("pissa", 2) == trained("lora", 2)
    assert trained("lora-dash", 2) == trained("lora-tsd", 2) == trained("lora", 2) + 4 * 3
    assert trained("dora", 2) == trained("lora", 2) + 4 * 32
    assert trained("full") == rows["base", None]["total_parameters"]
    assert trained("base") == 0
    for text in (shown, (out / "results.md").read_text()):
        assert "| lora-tsd r2  |" in text

    # The same again does nothing again, and a larger comparison keeps what is there.
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/metrics.json")}
    assert len(before) == 9
    assert main([*arguments, "--methods", "lora,lora-dash"]) == 0
    assert main([*arguments, "--methods", "lora", "--ranks", "2,3", "--seeds", "0,1"]) == 0
    assert len(list(out.glob("runs/*/*/metrics.json"))) == 12
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())


@pytest.mark.long
def test_killed_at_any_point_it_ends_in_the_same_results(place):
    recipe = text_models.write_recipe(place, training={"save_every": 3})
    command = [
        *(sys.executable, "-m", "peft_tsd.cli", "compare", str(recipe), "--methods", "adalora,lora-tsd"),
        *("--seeds", "0", "--tune", "lr=0.01,0.003", "--validation-size", "5", "--jobs", "2", "--out"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed = place / "whole", place / "killed"
    subprocess.run([*command, str(whole)], check=True, capture_output=True, env=environment)
    for begun in (2, 5):  # of six runs
        process = subprocess.Popen(
            [*command, str(killed)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and len(list(killed.rglob("metrics.json"))) < begun:
            time.sleep(0.02)
        process.kill()
        process.wait()
    # Its runs have ended with it: no one else works on the folder now.
    subprocess.run([*command, str(killed)], check=True, capture_output=True, env=environment)
    assert computed(killed) == computed(whole)
    runs, tuned = computed(whole)
    assert (len(runs), len(tuned)) == (2, 4)
    for run in (path.parent for path in whole.glob("runs/*/*/metrics.json")):
        for weights in run.rglob("*.safetensors"):
            other = killed / weights.relative_to(whole)
            left, right = load_file(weights), load_file(other)
            assert left.keys() == right.keys()
            assert all(torch.equal(left[name], right[name]) for name in left), weights


@pytest.mark.long
def test_the_tuned_value_is_the_best_on_validation_rows(place):
    recipe = text_models.write_recipe(place)
    plan = make_plan(str(recipe), methods=["lora"], seeds=[1], tune=("lr", [1e-30, 0.03]), validation_size=12)
    result = compare(plan, place / "out")
    losses = {row["value"]: row["held_out_loss"] for row in result.tuned}
    assert {row["data"]["train"] for row in [*result.tuned, *result.rows]} == {12}
    assert {row["questions"] for row in result.tuned} == {12}
    assert {row["questions"] for row in result.rows} == {6}
    best = min(losses, key=losses.__getitem__)
    assert [row["learning_rate"] for row in result.rows] == [best]


def test_a_run_that_diverges_is_reported_and_the_others_go_on(place, capsys):
    recipe = text_models.write_recipe(place)
    plan = make_plan(str(recipe), methods=["lora"], seeds=[0], vary={"optimizer.weight_decay": [0.0, 1e18]})
    result = compare(plan, place / "out")
    assert [row["status"] for row in result.rows] == ["finished", "failed"]
    assert "training diverged" in result.rows[1]["error"]
    assert "training diverged" in result.document
    assert json.loads((place / "out" / "results.json").read_text())["runs"][1]["status"] == "failed"


def test_a_folder_named_from_where_one_is(place, monkeypatch, capsys):
    """As the README's commands name it, and `make demo`."""
    recipe = text_models.write_recipe(place, training={"steps": 6}, directions={"prelaunch_steps": 2})
    monkeypatch.chdir(place)
    assert main(["compare", str(recipe), "--methods", "lora", "--seeds", "0", "--out", "comparisons/demo"]) == 0
    assert "lora" in capsys.readouterr().out
    [row] = json.loads((place / "comparisons/demo/results.json").read_text())["runs"]
    assert row["status"] == "finished"


def test_a_folder_of_other_runs_is_refused(place):
    recipe = text_models.write_recipe(place, training={"steps": 6}, directions={"prelaunch_steps": 2})
    compare(make_plan(str(recipe), methods=["lora"], seeds=[0]), place / "out")
    other = make_plan(str(recipe), ["optimizer.learning_rate=0.5"], methods=["lora"], seeds=[0, 1])
    with pytest.raises(InputError, match=r"optimizer.learning_rate=0.5 differs from 0.01"):
        compare(other, place / "out")
    assert not (place / "out" / "runs" / "lora-r2" / "seed-1").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"name": "nowhere.jsonl"}}, "no file"),
        ({"data": {"answer": "anser"}}, "no column 'anser'"),
        ({"adapter": {"target_modules": ["q_prj"]}}, "did you mean 'q_proj'?"),
        ({"data": {"validation_size": 500}}, "data.validation_size=500 of 24 training rows leaves none"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(place, changes, message):
    plan = make_plan(str(text_models.write_recipe(place, **changes)), seeds=[0])
    with pytest.raises(InputError, match=".*") as error:
        compare(plan, place / "out")
    assert message in str(error.value)
    assert not (place / "out" / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "4,x"], "--ranks='4,x' must be whole numbers"),
        (["--tune", "lr"], "--tune 'lr' must be a key and its values"),
        (["--jobs", "0"], "--jobs must be 1 or more; got 0"),
    ],
)
def test_wrong_options_are_one_line(place, capsys, arguments, message):
    recipe = text_models.write_recipe(place)
    assert main(["compare", str(recipe), "--out", str(place / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_grid_of_rates_is_shown_by_task_and_chosen_by_validation_rows(place):
    recipe = text_models.write_recipe(
        place,
        data={"validation_size": 5},
        training={"steps": 6},
        directions={"prelaunch_steps": 2},
        evaluation={"every": 3, "during": "loss"},
    )
    table = {"lora": {"method": "lora"}, "ours": {"method": "lora-init"}}
    with recipe.open("a") as file:
        file.write(json.dumps({"choices": {"variant": {"default": "lora", "table": table}}})[1:-1] + "\n")
    plan = make_plan(str(recipe), variants=["lora", "ours"], seeds=[0], rates=[1e-4, 0.03])
    result = compare(plan, place / "out")
    assert len(result.rows) == 4
    chosen = {name: [row for row in result.rows if row["variant"] == name] for name in ("lora", "ours")}
    best = [min(own, key=lambda row: row["validation_loss"])["learning_rate"] for own in chosen.values()]
    grids = json.loads((place / "out" / "results.json").read_text())["grid"]
    assert [grid["best_rate"] for grid in grids] == best
    assert "| held-out loss |" in result.document
    assert "Final held-out loss by learning rate" in (place / "out" / "report.html").read_text()
