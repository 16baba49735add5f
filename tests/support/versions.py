"""What the versions that are installed can do together."""

import peft
import pytest
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

ADD_ADAPTER = Version(peft.__version__) >= Version(MIN_PEFT_VERSION)
"""Whether this transformers takes this PEFT in its own `add_adapter`."""

needs_add_adapter = pytest.mark.skipif(not ADD_ADAPTER, reason=f"add_adapter wants PEFT {MIN_PEFT_VERSION}")
