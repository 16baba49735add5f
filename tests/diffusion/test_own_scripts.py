"""diffusers' own training scripts, with our configuration in LoRA's place: `add_adapter`, a loop, one call."""

import json
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open

pytest.importorskip("diffusers")

from diffusers import (
    DiffusionPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict

from peft_tsd import DashConfig, TsdConfig, advance, export_lora
from peft_tsd.diffusion import save_lora_weights
from peft_tsd.diffusion.families import FAMILIES
from support import tiny_diffusion
from support.without_package import image, images_elsewhere

CLASSES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline, "sd3": StableDiffusion3Pipeline}
DENOISER = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]


def settings(targets, **changes):
    fields = {"r": 3, "lora_alpha": 6, "prelaunch_steps": 2, "num_directions": 4, "dash_lr_ratio": 20.0}
    return TsdConfig(**{**fields, "target_modules": targets, **changes})


def taught(folder, family, steps=4, config=settings, with_text=True):
    """A pipeline and its adapted models, as a script has them at its end."""
    tiny_diffusion.save(family, folder / family)
    pipe = DiffusionPipeline.from_pretrained(folder / family)
    kind = next(known for known in FAMILIES if known.pipeline == type(pipe).__name__)
    models = {kind.denoiser: getattr(pipe, kind.denoiser)}
    models |= {name: getattr(pipe, name) for name in kind.text_encoders} if with_text else {}
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
    extra = {"rank_pattern": {"to_q": 2}} if config is settings else {}
    for name, model in models.items():
        model.add_adapter(config(TEXT) if name.startswith("text") else config(DENOISER, **extra))
    train(pipe, kind, models, steps)
    return pipe, models


def train(pipe, kind, models, steps):
    optimizer = torch.optim.AdamW([p for m in models.values() for p in m.parameters() if p.requires_grad], lr=0.02)
    generator = torch.Generator().manual_seed(0)
    channels = pipe.vae.config.latent_channels
    for _ in range(steps):
        embeddings = kind.encode(pipe, ["a photo of sks block"], torch.device("cpu"))
        latents = torch.randn(1, channels, 16, 16, generator=generator)
        times = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
        predicted = kind.denoise(models[kind.denoiser], latents, torch.tensor([500]), embeddings, times)
        (predicted - latents[:, : predicted.shape[1]]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for model in models.values():
            if any(isinstance(c, (TsdConfig, DashConfig)) for c in model.peft_config.values()):
                advance(model, optimizer)


@pytest.mark.long
def test_the_file_draws_the_same_where_this_package_is_not(tmp_path):
    jobs, expected = [], []
    for family in CLASSES:
        pipe, models = taught(tmp_path, family)
        report = save_lora_weights(tmp_path / family / "out", **models, kohya=family != "sd3")
        assert report.errors == {}
        assert {name.partition(".")[0] for name in report.ranks} == set(models)
        drawn = image(pipe)
        assert np.abs(drawn - image(DiffusionPipeline.from_pretrained(tmp_path / family))).max() > 0.01
        names = [None, *(["kohya_lora_weights.safetensors"] if family != "sd3" else [])]
        for name in names:
            jobs.append((tmp_path / family, tmp_path / family / "out", name))
            expected.append(drawn)
    for job, drawn, found in zip(jobs, expected, images_elsewhere(jobs, tmp_path)):
        assert np.abs(found - drawn).max() < 1e-5, job


@pytest.mark.long
def test_export_lora_of_a_denoiser_is_read_by_pipelines_and_by_peft(tmp_path):
    jobs, expected = [], []
    for family, name in (("sd15", "unet"), ("sd3", "transformer")):
        pipe, models = taught(tmp_path, family, with_text=False)
        export_lora(torch.nn.DataParallel(models[name]), tmp_path / family / "injected")
        fresh = DiffusionPipeline.from_pretrained(tmp_path / family)
        setattr(fresh, name, PeftModel.from_pretrained(getattr(fresh, name), tmp_path / family / "injected"))
        drawn = image(pipe)
        assert np.abs(image(fresh) - drawn).max() < 1e-5
        wrapped = DiffusionPipeline.from_pretrained(tmp_path / family)
        peft_model = get_peft_model(getattr(wrapped, name), settings(DENOISER, rank_pattern={"to_q": 2}))
        kind = next(known for known in FAMILIES if known.pipeline == type(pipe).__name__)
        train(wrapped, kind, {name: peft_model}, 4)
        export_lora(peft_model, tmp_path / family / "wrapped")
        jobs += [(tmp_path / family, tmp_path / family / kind, None) for kind in ("injected", "wrapped")]
        expected += [drawn, image(wrapped)]
    for job, drawn, found in zip(jobs, expected, images_elsewhere(jobs, tmp_path)):
        assert np.abs(found - drawn).max() < 1e-5, job


@pytest.mark.parametrize(
    "kind", ["lora", *(pytest.param(one, marks=pytest.mark.long) for one in ("loha", "pre-launch", "dora"))]
)
def test_other_adapters_of_a_script(kind, tmp_path):
    configs = {
        "lora": lambda targets: LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=targets),
        "dora": lambda targets: LoraConfig(r=3, use_dora=True, target_modules=targets),
        "loha": lambda targets: DashConfig(
            peft=LoHaConfig(r=2, target_modules=targets), prelaunch_steps=2, num_directions=3
        ),
        "pre-launch": lambda targets: settings(targets, prelaunch_steps=50),
    }
    pipe, models = taught(tmp_path, "sd15", config=configs[kind], with_text=False)
    if kind == "dora":
        with pytest.raises(ValueError, match="is no plain LoRA, which is what pipelines load"):
            save_lora_weights(tmp_path / "out", **models)
        assert not (tmp_path / "out").exists()
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_lora_weights(tmp_path / "out", **models, rank=4 if kind == "loha" else None)
    fresh = DiffusionPipeline.from_pretrained(tmp_path / "sd15")
    fresh.load_lora_weights(tmp_path / "out")
    assert np.abs(image(fresh) - image(pipe)).max() < 1e-5


@pytest.mark.long
def test_it_goes_into_the_folder_of_a_script_and_replaces_its_file(tmp_path):
    _, models = taught(tmp_path, "sd15", steps=3)
    out = tmp_path / "output"
    (out / "checkpoint-2").mkdir(parents=True)
    (out / "pytorch_lora_weights.safetensors").write_text("old")
    report = save_lora_weights(out, unet=models["unet"], text_encoder=None, rank=2)
    assert report.path == out
    assert set(report.ranks.values()) == {2}
    assert max(report.errors.values()) > 0
    with safe_open(out / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert all(key.startswith("unet.") for key in file.keys())  # noqa: SIM118
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-2", "pytorch_lora_weights.safetensors"]
    with pytest.raises(ValueError, match=r"no adapter to save \(vae\); give the adapted models by their names"):
        save_lora_weights(tmp_path / "x", vae=tiny_diffusion.vae())
    with pytest.raises(ValueError, match="leave kohya out"):
        save_lora_weights(tmp_path / "x", transformer=models["unet"], kohya=True)
    with pytest.raises(ValueError, match="rank must be a positive integer"):
        save_lora_weights(tmp_path / "x", unet=models["unet"], rank=0)
    assert not (tmp_path / "x").exists()


@pytest.mark.long
def test_the_scripts_own_way_is_warned_of_and_resumes(tmp_path):
    """Their checkpoints hold the state that `get_peft_model_state_dict` gives: from it one goes on, natively."""
    pipe, models = taught(tmp_path, "sd15", with_text=False)
    unet = models["unet"]
    with pytest.warns(UserWarning, match=r"save_lora_weights\(FOLDER, unet=unet\), or export_lora\(unet, FOLDER\)"):
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    with warnings.catch_warnings():  # once is enough; and those who know are not warned
        warnings.simplefilter("error")
        get_peft_model_state_dict(unet)
    fresh = taught(tmp_path, "sd15", steps=0, with_text=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        save_lora_weights(tmp_path / "quiet", **models)
    metadata = _collate_lora_metadata({"unet": unet})
    StableDiffusionPipeline.save_lora_weights(tmp_path / "checkpoint", unet_lora_layers=layers, **metadata)
    loaded, _ = StableDiffusionPipeline.lora_state_dict(tmp_path / "checkpoint")
    state = {key.removeprefix("unet."): x for key, x in loaded.items() if key.startswith("unet.")}
    again = fresh[1]["unet"]
    result = set_peft_model_state_dict(again, convert_unet_state_dict_to_peft(state), adapter_name="default")
    assert not result.unexpected_keys
    assert np.abs(image(fresh[0]) - image(pipe)).max() < 1e-6
    with safe_open(tmp_path / "checkpoint" / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.peft_type"] == "TSD"
