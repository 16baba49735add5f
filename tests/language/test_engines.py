"""What several processes train by: FSDP2 and DeepSpeed, and what each is refused for."""

import importlib.util
import json
import signal

import pytest

from peft_tsd.errors import InputError
from peft_tsd.language import engines, train
from peft_tsd.language.recipe import load_recipe
from support import text_models
from support.several import assert_same, assert_same_adapter, metrics_of, recipe_in, said, srun, torchrun


@pytest.fixture
def place(tmp_path):
    """A folder with a tiny Llama and 37 rows: 6 to score on, and a last batch of three rows in each epoch."""
    return text_models.place_in(tmp_path, 37)


@pytest.mark.long
def test_a_sharded_run_is_that_of_one_process(place):
    """FSDP2, with the model scored and saved in parts; one process has more rows to score, and so passes to make."""
    changed = {"data": {"test_size": 7}, "task": {"max_new_tokens": 6}, "training": {"steps": 9}}
    recipe = str(recipe_in(place, evaluation={"every": 4, "batch_size": 1}, **changed))
    changes = {"tsd": [], "dash": ["method=lora-dash"], "loss": ["evaluation.during=loss", "evaluation.before=false"]}
    given = {name: [recipe, *change] for name, change in changes.items()}
    sharded = [[*run, "training.sharding=fsdp2", f"output={place / f'two {name}'}"] for name, run in given.items()]
    torchrun(2, sharded, sharded=True)
    for name, change in changes.items():
        train(load_recipe(recipe, [*change, f"output={place / f'one {name}'}"]))
        assert_same(place / f"two {name}", place / f"one {name}")
        assert_same_adapter(place, place / f"two {name}", place / f"one {name}")
    assert metrics_of(place / "two tsd")["score"]["before"] == metrics_of(place / "one tsd")["score"]["before"]


@pytest.mark.long
def test_a_sharded_run_is_stopped_and_continues_in_other_numbers_of_processes(place):
    recipe = recipe_in(place, training={"sharding": "fsdp2"})
    at = {"rank": 1, "step": 7, "signal": int(signal.SIGTERM)}
    given = {"runs": [[str(recipe)]], "at": at, "sharded": True}
    ended = srun(2, json.dumps(given), by="support.in_recipes")
    assert [code for code, _, _ in ended] == [143, 143], said(ended)
    assert (place / "run" / "checkpoints" / "checkpoint-8" / "adapter_model.safetensors").is_file()
    torchrun(4, [[str(recipe), "resume=true"]] * 2, sharded=True)
    train(load_recipe(str(recipe), ["training.sharding=null", f"output={place / 'whole'}"]))
    assert_same(place / "run", place / "whole")
    assert_same_adapter(place, place / "run", place / "whole")


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_as_one_process(place, stage):
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    (place / "zero.json").write_text(json.dumps(config))
    # Of LoRA-TSD the optimizer forgets more than one process's does.
    recipe = str(recipe_in(place, method="lora-dash", evaluation={"every": 4, "batch_size": 1}, data={"test_size": 7}))
    sharded = [[recipe, f"training.deepspeed={place / 'zero.json'}", f"output={place / 'two'}"]]
    given = {"runs": sharded, "sharded": True}
    ended = srun(2, json.dumps(given), by="support.in_recipes", DS_ACCELERATOR="cpu", DS_BUILD_OPS="0")
    assert [code for code, _, _ in ended] == [0, 0], said(ended)
    train(load_recipe(recipe, [f"output={place / 'one'}"]))
    assert_same(place / "two", place / "one")
    assert_same_adapter(place, place / "two", place / "one")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.sharding=fsdp2", ("training.sharding=fsdp2 needs accelerators",)),
        ("training.deepspeed=absent.json", ("absent.json' cannot be read",)),
        ("training.batch_size=5", ("training.batch_size=5", "a multiple of 2")),
        ("method=adalora", ("method=adalora adds a penalty",)),
        ("training.sharding=fsdp1", ("training.sharding", "fsdp2")),
    ],
)
def test_what_several_processes_cannot_do_is_refused(place, monkeypatch, override, parts):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(engines, "can_shard", lambda: False)
    with pytest.raises(InputError) as refused:
        engines.check_processes(load_recipe(str(recipe_in(place)), [override]))
    for part in parts:
        assert part in str(refused.value)


def test_what_shards_is_refused_where_it_cannot(place, monkeypatch):
    recipe = recipe_in(place, training={"sharding": "fsdp2"})
    with pytest.raises(InputError, match="training.sharding=fsdp2 is for processes that a launcher starts"):
        engines.check_processes(load_recipe(str(recipe)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(engines, "can_shard", lambda: True)
    for override, part in {
        "method=lora-ga": "starts from batches",
        "method=loha-dash": "needs its layers whole",
        "method=base": "trains nothing",
        "model.quantization=bnb-4bit": "packs weights",
    }.items():
        with pytest.raises(InputError, match=part):
            engines.check_processes(load_recipe(str(recipe), [override]))
    engine = engines.engine_of(load_recipe(str(recipe)))
    assert engine.is_sharded
    with pytest.raises(InputError, match="was saved by ddp, and this run is trained by fsdp2"):
        engines.check_continues(engine, {"engine": "ddp", "processes": 2}, place / "checkpoint-5")
