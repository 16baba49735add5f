"""What is written can be read by those who can read what is written around it: its mode is the umask's."""

import os
import stat

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file

from peft_tsd import export_lora
from peft_tsd.files.whole import write_file, write_folder
from support import tiny


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def assert_usual(path, umask) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, (path, oct(mode))


def test_files_and_folders(tmp_path, umask):
    tensors = {"a": torch.ones(2)}
    write_file(tmp_path / "one.safetensors", lambda path: save_file(tensors, path))

    def fill(folder):
        (folder / "inner").mkdir()
        save_file(tensors, folder / "inner" / "two.safetensors")
        (folder / "text").write_text("three")

    write_folder(tmp_path / "folder", fill)
    for path in [tmp_path / "one.safetensors", tmp_path / "folder", *(tmp_path / "folder").rglob("*")]:
        assert_usual(path, umask)


def test_an_export(tmp_path, umask):
    model = get_peft_model(tiny.llama(), tiny.config())
    tiny.train(model, 4)
    export_lora(model, tmp_path / "lora")
    for path in [tmp_path / "lora", *(tmp_path / "lora").rglob("*")]:
        assert_usual(path, umask)


def test_a_file_for_pipelines(tmp_path, umask):
    pytest.importorskip("diffusers")
    from peft_tsd.diffusion import save_lora_weights
    from support import tiny_diffusion

    unet = tiny_diffusion.unet()
    unet.add_adapter(tiny.config(target_modules=["to_q"], prelaunch_steps=1))
    save_lora_weights(tmp_path / "out", unet=unet)
    for path in (tmp_path / "out").iterdir():
        assert_usual(path, umask)
