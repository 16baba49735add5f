"""Images drawn in an interpreter that cannot import this package."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

PROMPT = "sks block in the snow"

_CODE = """
import sys
sys.modules["peft_tsd"] = None
import numpy, torch
from diffusers import DiffusionPipeline
for job in sys.argv[1:]:
    model, folder, name, out = job.split("|")
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(folder, **({"weight_name": name} if name else {}))
    numpy.save(out, pipe("PROMPT", height=32, width=32, num_inference_steps=2, output_type="np",
                         generator=torch.Generator().manual_seed(3)).images)
""".replace("PROMPT", PROMPT)


def image(pipe) -> np.ndarray:
    """What a pipeline in this interpreter draws."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return pipe(PROMPT, height=32, width=32, num_inference_steps=2, output_type="np", generator=generator).images


def images_elsewhere(jobs: list[tuple[Path, Path, str | None]], out: Path) -> list[np.ndarray]:
    """What pipelines draw there. A job: the pipeline's folder, that of its LoRA file, and the file's name, or None
    where `load_lora_weights` is to find it."""
    paths = [out / f"elsewhere-{i}.npy" for i in range(len(jobs))]
    arguments = [
        "|".join((str(model), str(folder), name or "", str(path))) for (model, folder, name), path in zip(jobs, paths)
    ]
    subprocess.run([sys.executable, "-c", _CODE, *arguments], check=True, capture_output=True)
    return [np.load(path) for path in paths]
