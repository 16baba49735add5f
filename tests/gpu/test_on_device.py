"""What holds on a GPU holds on the CPU: the checks of `support.on_device`, which `make gpu` runs too."""

import importlib.util

import pytest
import torch

from support import on_device

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "check", [pytest.param(name, marks=[pytest.mark.long] * (name == "torch.compile")) for name in on_device.CHECKS]
)
@pytest.mark.parametrize("source", on_device.SOURCES)
@pytest.mark.parametrize("method", on_device.METHODS)
def test_on_a_device(method, source, check, device):
    package = on_device.NEEDS.get(check)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    on_device.CHECKS[check](device, method, source)
