"""The hub offline, hypothesis without deadlines, and an adapter of every method."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings
from peft import get_peft_model

import tiny

torch.set_num_threads(1)  # for matrices of this size more threads only wait for each other

settings.register_profile("default", deadline=None, max_examples=40)
settings.load_profile("default")

METHODS = [
    pytest.param({"method": "lora-dash"}, id="dash"),
    pytest.param({"method": "lora-init", "init_reading": "svd"}, id="init-svd"),
    pytest.param({"method": "lora-init", "init_reading": "orthonormal"}, id="init-orthonormal"),
    pytest.param({"method": "lora-tsd", "init_reading": "svd"}, id="tsd-svd"),
    pytest.param({"method": "lora-tsd", "init_reading": "orthonormal"}, id="tsd-orthonormal"),
]


@pytest.fixture(params=METHODS)
def method(request) -> dict:
    return request.param


@pytest.fixture
def trained(method):
    """A tiny Llama with an adapter of each method, trained over its transition."""
    model = get_peft_model(tiny.llama(), tiny.config(**method))
    tiny.train(model, 6)
    return model.eval()
