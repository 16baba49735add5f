"""Does all of it work on a GPU, and how fast? One command of nine minutes at most, where nothing can be installed.

    make gpu                                  # with the machine's own python3
    PEFT_WHEEL=FOLDER make gpu                # PEFT from a wheel, a file or in a folder, where it is not installed
    MODEL=FOLDER make gpu                     # the training with a model of transformers' in a folder
    OUT=FOLDER make gpu                       # gpu.json goes there, and what the parts printed
    python benchmarks/gpu.py --device cpu     # the same code, small, where there is no GPU

Needs torch, transformers, PEFT and what these need. Each part is a process with a time limit of its own; one that
fails stops no other. Exit code 0: all passed; 1: some did not; 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]

LIMITS = {"checks": 150, "step": 110, "identify": 100, "sketches": 60, "training": 110}
"""Seconds for each part: 530 in all."""

TARGETS = {"step": "time of LoRA-TSD over LoRA's: 0.95", "identify": "40 s, 1 GiB", "sketches": "10 s"}
"""What was aimed at, for the table; a part that misses it has not failed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", default=",".join(LIMITS), help="parts, separated by commas")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "gpu-results"), help="a folder")
    args = parser.parse_args()
    parts = args.only.split(",")
    if unknown := sorted(set(parts) - LIMITS.keys()):
        parser.error(f"--only {args.only!r}: there is no part {unknown[0]!r}; there are {', '.join(LIMITS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("make gpu: torch sees no GPU here; run it on a machine that has one, or give --device cpu")
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"device": name_of(args.device), "torch": torch.__version__, "parts": {}}
    print(f"{results['device']}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": paths(Path(folder)), "HF_HUB_OFFLINE": "1"}
        for part in parts:
            results["parts"][part] = found = run(part, args.device, args.out, environment)
            (args.out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(f"{part:10} {found['status']:8} {found['seconds']:6.0f} s   {found['summary']}", flush=True)
    print(f"figures: {args.out / 'gpu.json'}")
    return int(any(one["status"] != "passed" for one in results["parts"].values()))


def name_of(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def paths(folder: Path) -> str:
    """Where Python looks: this checkout, as if it were installed; and PEFT, where it comes in a wheel."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"$', text, re.MULTILINE)[1]
    info = folder / f"peft_tsd-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: peft-tsd\nVersion: {version}\n", encoding="utf-8")
    found = [ROOT / "src", ROOT / "tests", ROOT / "benchmarks", folder]
    if given := os.environ.get("PEFT_WHEEL"):
        wheels = [Path(given)] if given.endswith(".whl") else sorted(Path(given).glob("peft-*.whl"))
        if not wheels or not wheels[-1].is_file():
            raise SystemExit(f"PEFT_WHEEL={given!r} is no wheel, and no folder with a peft-*.whl")
        with zipfile.ZipFile(wheels[-1]) as wheel:
            wheel.extractall(folder)
    return os.pathsep.join([*map(str, found), *filter(None, [os.environ.get("PYTHONPATH")])])


def run(part: str, device: str, out: Path, environment: dict[str, str]) -> dict[str, Any]:
    """A part in a process of its own: what it came to."""
    figures, log = out / f"{part}.json", out / f"{part}.log"
    figures.unlink(missing_ok=True)
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as printed:
        try:
            done = subprocess.run(
                command(part, device, figures),
                env=environment,
                stdout=printed,
                stderr=subprocess.STDOUT,
                timeout=LIMITS[part],
            )
            status = "passed" if done.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "late"
    seconds = time.perf_counter() - started
    content = json.loads(figures.read_text(encoding="utf-8")) if figures.is_file() else {}
    if status == "late":
        summary = f"longer than {LIMITS[part]} s; {log} has how far it came"
    elif status == "failed":
        last = (log.read_text(encoding="utf-8").splitlines() or [""])[-1]
        summary = f"{last[:100]} ({log})"
    else:
        summary = summary_of(part, content)
    return {"status": status, "seconds": seconds, "summary": summary, "figures": content}


def command(part: str, device: str, figures: Path) -> list[str]:
    """What does a part, and writes its figures."""
    here = ROOT / "benchmarks"
    small = device == "cpu"
    if part == "step":
        program = [here / "step.py", "--steps", 2 if small else 20, "--only", "lora-tsd" if small else "lora-"]
    elif part == "identify":
        program = [here / "identify.py", *(["--growth"] if small else ["--weights", "llama-7b", "--only", "package"])]
    else:
        program = [here / "gpu_parts.py", part]
    return [sys.executable, *map(str, program), "--device", device, "--out", str(figures)]


def summary_of(part: str, content: dict[str, Any]) -> str:
    """A part's figures in a line, with what was aimed at."""
    found = content.get("results", content)
    if part == "step":
        text = f"of LoRA's time: {found['lora-tsd, dash']['time']:.3f}, memory {found['lora-tsd, dash']['memory']:.3f}"
    elif part == "identify" and isinstance(found, dict):
        one = found["this package"]
        text = f"{one['seconds']:.1f} s for {one['weights']} weights, peak {one['peak_mib']:.0f} MiB"
    else:
        text = ", ".join(f"{name} {value}" for name, value in content.items()) if part != "identify" else "sizes only"
    return f"{text}   (target: {TARGETS[part]})" if part in TARGETS else text


if __name__ == "__main__":
    sys.exit(main())
