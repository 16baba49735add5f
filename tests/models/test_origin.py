"""What an adapter was trained on, recorded and compared."""

import json

import pytest
import torch
from peft import get_peft_model

from peft_tsd.errors import AdapterError
from peft_tsd.files.adapters import ORIGIN
from peft_tsd.models.origin import check_base, fingerprint, write_origin
from peft_tsd.tuner.checking import check_adapter
from support import tiny


def test_a_fingerprint_tells_models_apart():
    base = tiny.llama()
    made_of = fingerprint(base)
    assert made_of == fingerprint(tiny.llama())
    assert made_of.dtype == "float32"
    # The head is new in every classifier, and what an adapter trains is not the base's.
    with torch.no_grad():
        base.lm_head.weight.add_(1)
    assert made_of == fingerprint(base)
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter.flatten()[-1] += 1e-3
            assert not fingerprint(base).agrees_with(made_of)
            parameter.flatten()[-1] -= 1e-3
    # Another dtype says nothing: the weights were rounded.
    assert fingerprint(tiny.llama().bfloat16()).agrees_with(made_of)
    assert not fingerprint(tiny.bert()).agrees_with(made_of)


def test_an_origin_is_checked(tmp_path):
    base = tiny.llama()
    made_of = fingerprint(base)
    model = get_peft_model(base, tiny.config())
    tiny.train(model, 4)
    model.save_pretrained(tmp_path)
    check_base(tmp_path, fingerprint(tiny.bert()), "bert")  # nothing was recorded, nothing is known
    write_origin(tmp_path, made_of)
    check_adapter(tmp_path)
    check_base(tmp_path, made_of, "base")
    with pytest.raises(AdapterError, match="was trained on other weights than those of 'bert'"):
        check_base(tmp_path, fingerprint(tiny.bert()), "bert")
    # One bit of a number: still finite, of the right shape, and found.
    weights = tmp_path / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(AdapterError, match="is not as it was written"):
        check_adapter(tmp_path)
    for damaged in ("", "[]", '{"base": 3}', '{"weights": 3, "base": {"dtype": 1}}'):
        (tmp_path / ORIGIN).write_text(damaged)
        with pytest.raises(AdapterError, match=r"origin.json|is not as it was written"):
            check_adapter(tmp_path)
    (tmp_path / ORIGIN).write_text(json.dumps({"weights": "", "base": {"x": 1}}))
    with pytest.raises(AdapterError, match="is damaged"):
        check_base(tmp_path, made_of, "base")
