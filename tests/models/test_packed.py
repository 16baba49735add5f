"""Weights that can only be read from what a layer answers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from peft_tsd.models.packed import from_outputs
from support.quantized_models import need


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_weight_is_read_from_outputs(out_size, in_size, bias, dtype):
    layer = nn.Linear(in_size, out_size, bias=bias, dtype=dtype)
    before = layer.bias
    assert torch.equal(from_outputs(layer, in_size), layer.weight)
    assert layer.bias is before


def test_a_weight_is_read_in_blocks():
    layer = nn.Linear(2500, 3)
    torch.testing.assert_close(from_outputs(layer, 2500), layer.weight, rtol=0, atol=0)


def test_an_unreadable_weight_is_refused():
    class Opaque(nn.Module):
        in_features = out_features = 4

    with pytest.raises(ValueError, match=r"quantized weight \(Opaque\) cannot be read"):
        from_outputs(Opaque(), 4)


@pytest.mark.parametrize("package", ["not_a_package", "not_a_package.at_all"])
def test_skips_say_why(package):
    with pytest.raises(pytest.skip.Exception, match=f"{package} is not installed"):
        need(package)
