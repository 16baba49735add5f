"""The versions of transformers and PEFT that are installed go together in transformers' own way too."""

import pytest

from support import tiny
from support.versions import ADD_ADAPTER


def test_add_adapter_works_where_transformers_takes_this_peft():
    model = tiny.llama()
    if not ADD_ADAPTER:
        with pytest.raises(ValueError, match="PEFT"):
            model.add_adapter(tiny.config())
    else:
        model.add_adapter(tiny.config())
        assert model(tiny.tokens()).logits.shape[-1] == 64
