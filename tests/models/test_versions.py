"""The versions of transformers and PEFT that are installed go together in transformers' own way too."""

import peft
import pytest
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

from support import tiny


def test_add_adapter_works_where_transformers_takes_this_peft():
    model = tiny.llama()
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        with pytest.raises(ValueError, match="PEFT"):
            model.add_adapter(tiny.config())
    else:
        model.add_adapter(tiny.config())
        assert model(tiny.tokens()).logits.shape[-1] == 64
