"""A plain LoRA as GGUF, by llama.cpp's own converter, which knows the names and layouts of its models."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from ..errors import InputError, one_line
from ..files.adapters import CONFIG
from ..files.whole import write_file

CONVERTER = "convert_lora_to_gguf.py"


def find_converter(given: str | None, lora: Path, outfile: Path) -> Path:
    """llama.cpp's converter: the file `given`, one in that folder, or the one on PATH.

    Args:
        given: What the user named, if anything.
        lora: What is to be converted, and
        outfile: into what; for the command in the error message.

    Raises:
        InputError: It is not there; the message has the command that does it by hand.
    """
    if given is not None:
        path = Path(given).expanduser()
        path = path / CONVERTER if path.is_dir() else path
        if path.is_file():
            return path
        raise InputError(f"--converter {given!r}: there is no such file; give llama.cpp's folder, or its {CONVERTER}")
    found = shutil.which(CONVERTER)
    if found is not None:
        return Path(found)
    command = shlex.join(["python", f"llama.cpp/{CONVERTER}", "--base", "BASE", "--outfile", str(outfile), str(lora)])
    raise InputError(
        f"--gguf needs llama.cpp's {CONVERTER}, which is not on PATH: git clone "
        "https://github.com/ggml-org/llama.cpp, and give --converter llama.cpp; or export without --gguf, and then: "
        f"{command}"
    )


def write_gguf(lora: Path, outfile: Path, converter: Path, base: str | None = None) -> None:
    """Convert the plain LoRA in the folder `lora` to the file `outfile`.

    Args:
        lora: The folder that `export_lora` made.
        outfile: To make; whole or not at all.
        converter: llama.cpp's.
        base: The folder of the base model (its `config.json` and tokenizer will do); by default what the adapter
            names.

    Raises:
        InputError: The base is no folder with a configuration, or the converter refuses.
    """
    named = base or json.loads((lora / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    folder = Path(str(named)).expanduser()
    if (folder / "config.json").is_file():
        which = ["--base", str(folder)]
    elif base is None and str(named).count("/") == 1 and not str(named).endswith(".gguf"):
        which = ["--base-model-id", str(named)]  # of the hub
    else:
        raise InputError(
            f"--gguf: the converter reads the base model's config.json, and {str(named)!r} is no folder that has one; "
            "give it with --base FOLDER (weights need not be there)"
        )

    def convert(to: Path) -> None:
        command = [sys.executable, str(converter), *which, "--outfile", str(to), str(lora)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0 or not to.is_file():
            said = [line for line in done.stderr.splitlines() if line.strip()]
            reason = one_line(ValueError(said[-1] if said else f"exit code {done.returncode}"))
            raise InputError(f"{str(converter)!r} cannot convert {str(lora)!r}: {reason}")

    write_file(outfile, convert)
