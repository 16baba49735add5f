"""Importing brings in what is used, and no more. One process tells it all, for its imports take seconds."""

import json
import subprocess
import sys

CODE = """
import json, sys

import peft

before = set(sys.modules)
import peft_tsd

brought = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
early = "peft_tsd.explore" in sys.modules
peft_tsd.explore.explore
import peft_tsd.cli, peft_tsd.diffusion.recipe

wanted = ("matplotlib", "plotly", "pyarrow.parquet", "diffusers")
print(json.dumps([brought, early, [name for name in wanted if name in sys.modules]]))
"""


def test_what_importing_brings_in():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    brought, early, rest = json.loads(done.stdout.splitlines()[-1])
    assert "peft_tsd" in brought
    only_the_command_line = {"pydantic", "datasets", "reasoning_gym", "gguf", "trl", "matplotlib"}
    assert not only_the_command_line & set(brought)
    assert not early, "peft_tsd.explore is imported when it is first used"
    assert rest == []
