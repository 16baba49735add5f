"""A subject taught by several processes: the run of one, up to the order in which sums are taken."""

import json
import signal

import numpy as np
import pytest

pytest.importorskip("diffusers")

from PIL import Image

from peft_tsd.diffusion import load_recipe, train
from peft_tsd.diffusion.preparing import prepare
from peft_tsd.errors import RecipeError
from support import tiny_diffusion
from support.several import metrics_of, said, srun, torchrun

pytestmark = pytest.mark.long


@pytest.fixture
def place(tmp_path):
    """A folder with three photos and a pipeline."""
    tiny_diffusion.photos(tmp_path / "photos")
    tiny_diffusion.save("sd15", tmp_path / "sd15")
    return tmp_path


def alone(recipe, *overrides: str) -> None:
    train(load_recipe(str(recipe), overrides))


def assert_same(one, other) -> None:
    mine, theirs = metrics_of(one), metrics_of(other)
    assert mine["status"] == theirs["status"] == "finished"
    losses, expected = ([row["loss"] for row in metrics["loss"]] for metrics in (mine, theirs))
    assert losses == pytest.approx(expected, rel=1e-3)
    assert mine["fixed_loss"] == pytest.approx(theirs["fixed_loss"], rel=1e-3)
    names = sorted(path.relative_to(other) for path in other.rglob("*.png"))
    assert names == sorted(path.relative_to(one) for path in one.rglob("*.png"))
    for name in names:
        drawn, wanted = (np.asarray(Image.open(run / name), dtype=float) for run in (one, other))
        assert np.abs(drawn - wanted).mean() < 2, name


PRIOR = ["prior.prompt=a photo of a block", "prior.num_images=3"]


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        (
            2,
            {
                "plain": [],
                "prior": [*PRIOR, "training.gradient_accumulation=2", "training.batch_size=3"],
                "text": [*PRIOR, "text_encoders.train=true", "method=lora-dash", "training.batch_size=1"],
            },
        ),
        (4, {"prior": PRIOR}),
    ],
)
def test_several_processes_do_the_run_of_one(place, number, changes):
    """Rows of subject and class in a batch that is split between them, and within them; images of both kinds."""
    recipe = tiny_diffusion.write_recipe(place, validation={"num_images": 3})
    torchrun(number, [[str(recipe), *change, f"output={place / f'all-{name}'}"] for name, change in changes.items()])
    for name, change in changes.items():
        alone(recipe, *change, f"output={place / name}")
        assert_same(place / f"all-{name}", place / name)
        assert metrics_of(place / f"all-{name}")["machine"]["processes"] == number


def test_one_that_is_told_to_stop_stops_all_and_one_continues(place):
    recipe = tiny_diffusion.write_recipe(place)
    at = {"rank": 1, "step": 4, "signal": int(signal.SIGTERM)}
    ended = srun(2, json.dumps({"runs": [[str(recipe)]], "at": at}), by="support.in_recipes")
    assert [code for code, _, _ in ended] == [143, 143], said(ended)
    assert said(ended).count("interrupted; to continue:") == 1
    assert metrics_of(place / "run")["status"] == "running"
    alone(recipe, "resume=true")
    alone(recipe, f"output={place / 'alone'}")
    assert_same(place / "run", place / "alone")


def test_what_cannot_be_shared_out_is_refused_once(place):
    recipe = tiny_diffusion.write_recipe(place)
    ended = srun(2, "train", str(recipe), "training.batch_size=3")
    assert [code for code, _, _ in ended] == [2, 2]
    assert said(ended).count("peft-tsd: training.batch_size=3 rows are those of a batch in all") == 1
    assert not (place / "run").exists()


def test_the_class_counts_among_the_rows(place, monkeypatch):
    recipe = load_recipe(str(tiny_diffusion.write_recipe(place)), [*PRIOR, "training.batch_size=1"])
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RecipeError, match="=1 of the subject and as many of the class: these 2 rows are those"):
        prepare(recipe)


def test_another_engine_is_refused(place, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RecipeError, match="configured for DEEPSPEED, and each process has a diffusion model whole"):
        alone(tiny_diffusion.write_recipe(place))
