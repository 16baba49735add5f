"""The exported file draws what the native adapter draws, in an interpreter that cannot import this package."""

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")

from diffusers import DiffusionPipeline

from peft_tsd import AdapterError
from peft_tsd.cli.main import main
from peft_tsd.diffusion import export_diffusers, load_adapters, load_recipe, train
from support import tiny_diffusion
from support.without_package import image, images_elsewhere


def trained(tmp_path, family, **sections):
    tiny_diffusion.save(family, tmp_path / family)
    tiny_diffusion.photos(tmp_path / "photos")
    targets = [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        *(["add_q_proj"] if family == "sd3" else ["conv1", "conv_shortcut"]),
    ]
    recipe = tiny_diffusion.write_recipe(
        tmp_path,
        family,
        adapter={"target_modules": targets, "rank_pattern": {"to_q": 2}},
        text_encoders={"train": True},
        optimizer={"learning_rate": 0.02},
        validation={"every": None},
        **sections,
    )
    return train(load_recipe(str(recipe))).folder


CASES = {"sdxl": "lora-tsd", "sd15": "lora", "sd3": "lora-dash"}


@pytest.mark.long
def test_the_same_images_without_this_package(tmp_path):
    jobs, expected = [], []
    for family, method in CASES.items():
        (tmp_path / family).mkdir()
        folder = trained(tmp_path / family, family, method=method, export={"kohya": family != "sd3"})
        model = tmp_path / family / family
        native = DiffusionPipeline.from_pretrained(model)
        load_adapters(native, folder.adapter)
        drawn = image(native)
        assert np.abs(drawn - image(DiffusionPipeline.from_pretrained(model))).max() > 0.01
        names = sorted(path.name for path in folder.adapter_lora.iterdir())
        assert names == ["kohya_lora_weights.safetensors"] * (family != "sd3") + ["pytorch_lora_weights.safetensors"]
        for name in names:
            jobs.append((model, folder.adapter_lora, name))
            expected.append(drawn)

        keys = set(load_file(folder.adapter_lora / "pytorch_lora_weights.safetensors"))
        assert {key.partition(".")[0] for key in keys} >= {
            "text_encoder",
            "transformer" if family == "sd3" else "unet",
        }
        if family != "sd3":
            keys = set(load_file(folder.adapter_lora / "kohya_lora_weights.safetensors"))
            encoders = {"sdxl": {"lora_te1", "lora_te2"}, "sd15": {"lora_te"}}[family]
            assert {"_".join(key.split("_")[:2]) for key in keys} == {"lora_unet"} | encoders
            assert {key.partition(".")[2] for key in keys} == {"lora_down.weight", "lora_up.weight", "alpha"}

    for job, drawn, found in zip(jobs, expected, images_elsewhere(jobs, tmp_path)):
        assert np.abs(found - drawn).max() < 1e-5, job


def _pickled(folder) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _outside(folder) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder.parent / "elsewhere")
    weights.symlink_to(folder.parent / "elsewhere")


def _not_finite(folder) -> None:
    state = load_file(folder / "adapter_model.safetensors")
    key = next(key for key in state if key.endswith("lora_B.weight"))
    save_file(state | {key: state[key] * float("nan")}, folder / "adapter_model.safetensors")


def _too_large(folder) -> None:
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 10**9, "rank_pattern": {}}))


DAMAGED = {"pickled": _pickled, "outside": _outside, "not finite": _not_finite, "too large": _too_large}
DAMAGE = {
    "pickled": "which is pickled and not read",
    "outside": "is a link out of its folder",
    "not finite": "holds NaN or Inf",
    "too large": "says r=1000000000",
}


def test_compressed_and_refused(tmp_path, capsys):
    folder = trained(tmp_path, "sd15")
    out = tmp_path / "small"
    assert main(["export", str(folder.path), str(out), "--rank", "2"]) == 0
    assert "relative error of the change" in capsys.readouterr().out
    weights = load_file(out / "pytorch_lora_weights.safetensors")
    assert {len(x) for key, x in weights.items() if key.endswith("lora_A.weight")} == {8}
    assert {int(x.flatten(1).any(1).sum()) for key, x in weights.items() if key.endswith("lora_A.weight")} == {2}
    exact = load_file(folder.adapter_lora / "pytorch_lora_weights.safetensors")
    report = export_diffusers(folder.adapter, tmp_path / "again", rank=2)
    for name, error in report.errors.items():
        big, small = (
            w[f"{name}.lora_B.weight"].double().flatten(1) @ w[f"{name}.lora_A.weight"].double().flatten(1)
            for w in (exact, weights)
        )
        assert float((big - small).norm() / big.norm()) == pytest.approx(error, abs=1e-5)

    assert main(["export", str(folder.path), str(out)]) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds no adapter of a pipeline"):
        export_diffusers(tmp_path, tmp_path / "x")
    with pytest.raises(ValueError, match="rank must be a positive integer"):
        export_diffusers(folder.adapter, tmp_path / "x", rank=0)
    (tmp_path / "flow" / "transformer").mkdir(parents=True)
    (tmp_path / "flow" / "transformer" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="leave kohya out"):
        export_diffusers(tmp_path / "flow", tmp_path / "x", kohya=True)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "sd15")
    modules = [name for part in (pipe.unet, pipe.text_encoder) for name, _ in part.named_modules()]
    for damage, said in DAMAGE.items():
        harm = tmp_path / damage
        shutil.copytree(folder.adapter, harm)
        DAMAGED[damage](harm / "unet")
        for read in (lambda: load_adapters(pipe, harm), lambda: export_diffusers(harm, tmp_path / "x")):  # noqa: B023
            with pytest.raises(AdapterError, match=said):
                read()
        assert [name for part in (pipe.unet, pipe.text_encoder) for name, _ in part.named_modules()] == modules
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match=r"adapts the transformer, which a StableDiffusionPipeline does not have"):
        load_adapters(pipe, tmp_path / "flow")
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        load_adapters(pipe, tmp_path)
