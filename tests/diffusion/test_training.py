"""A DreamBooth run on complete tiny pipelines: what it leaves, that it learns, and that it can be stopped anywhere."""

import json
import re
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from peft_tsd.diffusion import preparing

pytest.importorskip("diffusers")

from peft_tsd.cli.main import main
from peft_tsd.diffusion import load_recipe, train, training
from peft_tsd.errors import InputError
from peft_tsd.runs.folder import RunFolder
from peft_tsd.runs.stopping import Interrupted
from support import tiny_diffusion
from support.text_models import DIVERGES
from support.waiting import signalled


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a pipeline of each family."""
    folder = tmp_path_factory.mktemp("models")
    for family in tiny_diffusion.FAMILIES:
        tiny_diffusion.save(family, folder / family)
    return folder


@pytest.fixture
def place(tmp_path, models):
    """A folder with three photos and the pipelines."""
    tiny_diffusion.photos(tmp_path / "photos")
    for family in tiny_diffusion.FAMILIES:
        (tmp_path / family).symlink_to(models / family)
    return tmp_path


def run(recipe, *overrides: str) -> training.Result:
    return train(load_recipe(str(recipe), overrides))


def adapter_tensors(folder: RunFolder) -> dict:
    files = sorted(folder.adapter.rglob("*.safetensors"))
    assert files
    return {f"{path.parent.name}.{key}": x for path in files for key, x in load_file(path).items()}


def assert_same_result(one: RunFolder, other: RunFolder) -> None:
    left, right = adapter_tensors(one), adapter_tensors(other)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
    for path in sorted((one.path / "images").iterdir()):
        assert path.read_bytes() == (other.path / "images" / path.name).read_bytes(), path.name
    left, right = one.read_metrics(), other.read_metrics()
    for key in ("loss", "fixed_loss", "steps", "trainable_parameters", "status", "data"):
        assert left[key] == right[key], key
    assert left["phase_change"]["step"] == right["phase_change"]["step"]


def interrupt_at(monkeypatch, start: str, number: int = signal.SIGINT) -> None:
    """A signal as the log line beginning with `start` is written."""
    write = training.file_only

    def watched(message: str) -> None:
        write(message)
        if message.startswith(start):
            signal.raise_signal(number)

    monkeypatch.setattr(training, "file_only", watched)


@pytest.mark.parametrize("family", ["sd15", *(pytest.param(one, marks=pytest.mark.long) for one in ("sdxl", "sd3"))])
def test_a_run_learns_and_leaves_everything(place, family):
    """On real photos where they are, and on painted ones elsewhere."""
    real = tiny_diffusion.PHOTOS / "backpack"
    folder = str(real if real.is_dir() else place / "photos")
    recipe = tiny_diffusion.write_recipe(
        place,
        family,
        data={"folder": folder},
        adapter={"target_modules": ["to_q", "to_k", "to_v", "to_out.0"]},
        training={"steps": 20, "save_every": 20},
        optimizer={"learning_rate": 0.01},
        validation={"every": 10, "num_images": 2},
    )
    result = run(recipe)
    metrics, [denoiser] = result.metrics, result.adapters
    assert metrics["fixed_loss"]["after"] < 0.99 * metrics["fixed_loss"]["before"]
    assert metrics["phase_change"]["step"] == 3
    assert metrics["phase_change"]["layers"] == len(result.adapters[denoiser].directions())
    assert {model.phase() for model in result.adapters.values()} == {"dash"}
    assert [entry["step"] for entry in metrics["loss"]] == list(range(1, 21))
    written = {path.relative_to(place / "run").as_posix() for path in (place / "run").rglob("*")}
    assert {
        "recipe.yaml",
        "metrics.json",
        "train.log",
        "images/step-000010.png",
        "images/final.png",
        "adapter-lora/pytorch_lora_weights.safetensors",
        f"adapter/{denoiser}/adapter_model.safetensors",
    } <= written
    assert [name for name in written if name.rpartition("/")[2].startswith(".")] == [".lock"]
    # What was kept as the recipe is the recipe.
    assert load_recipe(str(result.folder.recipe)) == load_recipe(str(recipe))
    assert train(load_recipe(str(recipe), ["resume=true"])).metrics == metrics


@pytest.mark.parametrize("method", ["lora-dash", "lora-init", "lora"])
def test_every_method(place, method):
    result = run(tiny_diffusion.write_recipe(place), f"method={method}")
    assert result.metrics["fixed_loss"]["after"] < result.metrics["fixed_loss"]["before"]
    assert (result.metrics["phase_change"] is None) == (method == "lora")


def test_the_short_names_of_the_command_line(place, models, capsys):
    recipe = tiny_diffusion.write_recipe(place, model={"name": "nowhere"}, data={"folder": None, "prompt": None})
    photos, model = place / "photos", models / "sd15"
    assert main(["train", str(recipe), f"model={model}", f"data={photos}", "prompt=a photo of sks block"]) == 0
    printed = capsys.readouterr()
    assert "directions identified after step 3" in printed.out
    assert "pipe.load_lora_weights(" in printed.out
    assert "left out, no photos: notes.txt" in printed.err
    assert json.loads((place / "run" / "metrics.json").read_text())["left_out"] == ["notes.txt"]


@pytest.mark.long
def test_a_stopped_run_continues_to_the_same_bits(place, monkeypatch):
    """Stopped in pre-launch, at the transition and after it; by Ctrl-C and by SIGTERM."""
    options = {
        "prior": {"prompt": "a photo of a block", "num_images": 2},
        "adapter": {"lora_dropout": 0.1},
        "training": {"gradient_accumulation": 2, "min_snr_gamma": 5.0},
    }
    recipe = tiny_diffusion.write_recipe(place, **options)
    whole = run(recipe).folder
    for moment, number in (("step 2:", signal.SIGINT), ("step 3:", signal.SIGTERM), ("step 5:", signal.SIGINT)):
        folder = RunFolder(place / f"stopped-{moment[5]}")
        with monkeypatch.context() as patch:
            interrupt_at(patch, moment, number)
            with pytest.raises(Interrupted):
                run(recipe, f"output={folder.path}")
        assert folder.read_metrics()["status"] == "running"
        assert not folder.adapter.exists()
        run(recipe, f"output={folder.path}", "resume=true")
        assert_same_result(whole, folder)


@pytest.mark.long
def test_an_automatic_pre_launch_continues_too(place, monkeypatch):
    recipe = tiny_diffusion.write_recipe(
        place, directions={"prelaunch_steps": "auto", "prelaunch_min": 2, "prelaunch_max": 4}
    )
    whole = run(recipe).folder
    assert 2 <= whole.read_metrics()["phase_change"]["step"] <= 4
    with monkeypatch.context() as patch:
        interrupt_at(patch, "step 2:")
        with pytest.raises(Interrupted):
            run(recipe, f"output={place / 'stopped'}")
    run(recipe, f"output={place / 'stopped'}", "resume=true")
    assert_same_result(whole, RunFolder(place / "stopped"))


@pytest.mark.long
def test_a_run_with_text_encoders_continues_too(place, monkeypatch):
    recipe = tiny_diffusion.write_recipe(place, text_encoders={"train": True, "learning_rate": 1e-4})
    result = run(recipe)
    assert list(result.adapters) == ["unet", "text_encoder"]
    assert {model.phase() for model in result.adapters.values()} == {"dash"}
    with monkeypatch.context() as patch:
        interrupt_at(patch, "step 4:")
        with pytest.raises(Interrupted):
            run(recipe, f"output={place / 'stopped'}")
    again = run(recipe, f"output={place / 'stopped'}", "resume=true")
    assert_same_result(result.folder, again.folder)


@pytest.mark.long
def test_stopped_while_it_draws(place, monkeypatch):
    """Among the class's images, and among the validation's: what was drawn before is kept."""
    recipe = tiny_diffusion.write_recipe(place, prior={"prompt": "a photo of a block", "num_images": 3})
    whole = run(recipe).folder
    drawn = training.draw
    for stop_after in (2, 4):
        folder = RunFolder(place / f"stopped-{stop_after}")
        count = 0

        def stopping(*args, last=stop_after, **kwargs):
            nonlocal count
            for image in drawn(*args, **kwargs):
                count += 1
                if count == last:
                    signal.raise_signal(signal.SIGINT)
                yield image

        with monkeypatch.context() as patch:
            patch.setattr(training, "draw", stopping)
            with pytest.raises(Interrupted):
                run(recipe, f"output={folder.path}")
        assert len(list((folder.path / "prior").glob("*.png"))) == min(stop_after, 3)
        run(recipe, f"output={folder.path}", "resume=true")
        assert_same_result(whole, folder)


@pytest.mark.long
def test_sigterm_to_a_process(place):
    """Exit code 143, no traceback, and the command to type next."""
    recipe = tiny_diffusion.write_recipe(place, training={"save_every": 1000}, validation={"every": None})
    folder = RunFolder(place / "run")
    code, errors = signalled(signal.SIGTERM, "step 5:", folder.log, ["train", str(recipe)], training.__name__)
    assert code == 143
    assert "Traceback" not in errors
    assert "peft-tsd train run/recipe.yaml resume=true" in errors
    assert folder.last_complete()[1]["step"] == 5


@pytest.mark.long
def test_accumulation_and_checkpointing_change_nothing_but_memory(place):
    """Two halves of a batch are the batch: the step, and the transition, count once."""
    recipe = tiny_diffusion.write_recipe(place, training={"batch_size": 3, "steps": 5})
    plain = run(recipe)
    checked = run(recipe, "training.gradient_checkpointing=true", f"output={place / 'checked'}")
    assert [e["loss"] for e in checked.metrics["loss"]] == pytest.approx([e["loss"] for e in plain.metrics["loss"]])
    halves = run(recipe, "training.gradient_accumulation=2", f"output={place / 'halves'}")
    assert halves.metrics["phase_change"]["step"] == plain.metrics["phase_change"]["step"] == 3


@pytest.mark.long
def test_bfloat16_and_convolutions(place):
    result = run(
        tiny_diffusion.write_recipe(place),
        "model.dtype=bfloat16",
        "adapter.target_modules=[to_q, conv1, conv_shortcut]",
        "validation.every=null",
    )
    weights = adapter_tensors(result.folder)
    assert any("conv1" in name for name in weights)
    trained = [p for p in result.adapters["unet"].parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert result.pipe.unet.conv_in.weight.dtype == torch.bfloat16
    assert result.metrics["phase_change"]["step"] == 3
    assert result.metrics["fixed_loss"]["after"] < result.metrics["fixed_loss"]["before"]


@pytest.mark.long
def test_the_prior_is_preserved(place):
    """With the class trained beside the subject, the loss of the class rises less."""
    shutil.copytree(place / "photos", place / "class")
    recipe = tiny_diffusion.write_recipe(
        place, prior={"prompt": "a photo of a block", "folder": str(place / "class"), "weight": 0.5}
    )
    result = run(recipe)
    assert result.metrics["data"]["prior"]["photos"] == 3
    # The class's share of the loss is its weight: here both groups are the same photos.
    without = run(recipe, "prior={}", f"output={place / 'without'}")
    ratio = result.metrics["loss"][0]["loss"] / without.metrics["loss"][0]["loss"]
    assert 1.2 < ratio < 1.8


REFUSED = {
    "no folder": (["data={place}/nowhere"], "no such folder"),
    "a file": (["data={place}/tiny.yaml"], "is a file; give the folder it is in"),
    "an empty folder": (["data={place}/empty"], "is empty; put the photos there"),
    "no images": (["data={place}/texts"], "holds notes.txt and no photo"),
    "a corrupt photo": (["data={place}/corrupt"], r"the photo .*cut\.jpg' cannot be read: .*; replace it"),
    "no data": (["data.folder=null"], "data.folder is missing; give data.folder=FOLDER"),
    "no prompt": (["data.prompt=null"], "data.prompt is missing"),
    "an unknown key": (["training.step=3"], "unknown key 'training.step'; did you mean 'training.steps'"),
    "an unknown module": (["adapter.target_modules=[to_qq]"], "no module of the model is named 'to_qq'; did you mean"),
    "a component": (["model={place}/sd15/unet"], "is one component of a pipeline; give the folder above it"),
    "no pipeline": (["model={place}/photos"], "holds no model_index.json"),
    "a missing component": (["model={place}/lacking"], "lacks the folder vae/"),
    "missing weights": (["model={place}/weightless"], r"has no weights in unet/"),
    "another's component": (["model={place}/mixed"], "do not fit each other"),
    "another kind of pipeline": (["model={place}/other"], "is a FluxPipeline, which cannot be trained here; known:"),
    "a checkpoint file": (["model={place}/tiny.yaml"], "is a file; give a folder in diffusers' layout"),
    "a resolution": (["data.resolution=33"], "data.resolution=33 is no multiple of 2, as this model needs; give 3"),
    "no GPU": (["model.dtype=float16"], "model.dtype=float16 needs a GPU"),
    "min-SNR of a flow": (["model={place}/sd3", "training.min_snr_gamma=5"], "no meaning for a rectified-flow model"),
    "no pre-launch": (
        ["directions.prelaunch_steps=0"],
        "directions.prelaunch_steps=0 finds directions from gradients",
    ),
    "a short run": (["training.steps=3"], "training is 3 steps long"),
    "a prior without words": (["prior.folder={place}/photos"], "needs prior.prompt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_before_anything_is_written(place, capsys, monkeypatch, case):
    if case == "no GPU":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("empty", "texts", "corrupt"):
        (place / name).mkdir()
    (place / "texts" / "notes.txt").write_text("-")
    (place / "corrupt" / "cut.jpg").write_bytes((place / "photos" / "1.jpg").read_bytes()[:300])
    for name in ("lacking", "weightless", "mixed"):
        shutil.copytree(place / "sd15", place / name)
    shutil.rmtree(place / "lacking" / "vae")
    (place / "weightless" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.rmtree(place / "mixed" / "unet")
    shutil.copytree(place / "sdxl" / "unet", place / "mixed" / "unet")
    (place / "other").mkdir()
    (place / "other" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    overrides, message = REFUSED[case]
    recipe = tiny_diffusion.write_recipe(place)
    monkeypatch.setattr(training, "load_pipeline", None)  # no weight is read
    assert main(["train", str(recipe), *(override.format(place=place) for override in overrides)]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("peft-tsd: ")]
    assert re.search(message, line), line
    assert not (place / "run").exists()


def test_too_little_memory_is_refused_before_and_said_when_it_happens(place, monkeypatch):
    recipe = tiny_diffusion.write_recipe(place)
    monkeypatch.setattr(preparing, "free_memory", lambda: 2**20)
    with pytest.raises(InputError, match=r"needs about .* GiB .*gradient_checkpointing=true.*smaller data.resolution"):
        run(recipe)
    monkeypatch.undo()

    def exhausted(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    monkeypatch.setattr(training.Learner, "step", exhausted)
    with pytest.raises(InputError, match=r"out of memory with training.batch_size=2 and data.resolution=32: give"):
        run(recipe)


def test_a_diverged_loss_is_said(place):
    with pytest.raises(InputError, match=r"the loss is (nan|inf) at step \d+: training diverged"):
        run(tiny_diffusion.write_recipe(place, optimizer=DIVERGES), "method=lora")


def test_other_photos_are_not_continued_with(place):
    recipe = tiny_diffusion.write_recipe(place)
    run(recipe)
    (place / "photos" / "0.png").unlink()
    with pytest.raises(InputError, match="the photos are not those"):
        run(recipe, "resume=true")
    with pytest.raises(InputError, match="seed=1 differs from 0"):
        run(recipe, "resume=true", "seed=1")
    with pytest.raises(InputError, match="exists and is not overwritten"):
        run(recipe)
