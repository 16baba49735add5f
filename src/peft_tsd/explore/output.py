"""The folder that `peft-tsd explore` makes: the report, the figures, and everything in them as data.

    report.html      one self-contained page
    figures/         the same as files, for a paper
    rates.parquet    one row a model, weight and core direction
    summary.json     one entry a model and weight: `results.summary`

The columns are explained in `docs/explore.md`.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files.whole import write_folder
from .errors import ExploreError
from .figures import write_figures
from .report import render
from .results import Agreement, Exploration, Overlap, WeightChange, highest, summary


def check_out(out: str | os.PathLike[str]) -> None:
    """Refuse a folder that exists or cannot be made, and an installation that cannot fill it.

    Raises:
        ExploreError: `out` exists, its parent cannot be written to, or a package is missing.
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise ExploreError(f"{out} exists and is not overwritten; give a new folder, or remove it first")
    nearest = next(parent for parent in out.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ExploreError(f"{out} cannot be made: {nearest} is not a folder that can be written to")
    missing = [name for name in ("matplotlib", "plotly", "pyarrow") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExploreError(f"the report needs {', '.join(missing)}: pip install 'peft-tsd[explore]'")


def write(
    out: str | os.PathLike[str],
    explorations: Sequence[Exploration],
    overlap: Overlap | None = None,
    agreement: Agreement | None = None,
) -> None:
    """Make the folder `out`: all of it, or nothing.

    Args:
        out: The folder to make; it must not exist.
        explorations: One or several fine-tuned models of one base.
        overlap: What they share, for several.
        agreement: How early a recorded run found the directions.

    Raises:
        ExploreError: As `check_out`.
        OSError: It cannot be written. Nothing is left behind then.
    """
    check_out(out)

    def fill(folder: Path) -> None:

        (folder / "report.html").write_text(render(explorations, overlap, agreement), encoding="utf-8")
        (folder / "figures").mkdir()
        write_figures(folder / "figures", explorations, agreement)
        write_rates(folder / "rates.parquet", explorations)
        found = summary(explorations, overlap, agreement)
        (folder / "summary.json").write_text(json.dumps(found, indent=1, allow_nan=False), encoding="utf-8")

    write_folder(Path(out), fill)


def write_rates(path: Path, explorations: Sequence[Exploration]) -> None:
    """Write one row a model, weight and core direction, weight by weight."""
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    text = pa.dictionary(pa.int32(), pa.string())
    schema = pa.schema(
        [
            ("tuned", text),
            ("name", text),
            ("layer", pa.int32()),
            ("module", text),
            ("index", pa.int32()),
            ("sigma", pa.float64()),
            ("coordinate", pa.float64()),
            ("rate", pa.float64()),
            ("rank_of_rate", pa.int32()),
            ("is_tsd", pa.bool_()),
        ]
    )
    with parquet.ParquetWriter(path, schema) as writer:
        for one in explorations:
            for weight in one.weights:
                writer.write_table(pa.table(_columns(one, weight)).cast(schema))


def _columns(one: Exploration, weight: WeightChange) -> dict[str, Any]:
    order = highest(weight.rates, weight.k)
    rank = np.empty(weight.k, dtype=np.int32)
    rank[order] = np.arange(weight.k)
    is_tsd = np.zeros(weight.k, dtype=bool)
    is_tsd[weight.directions] = True
    return {
        "tuned": [one.tuned] * weight.k,
        "name": [weight.name] * weight.k,
        "layer": [weight.layer] * weight.k,
        "module": [weight.module] * weight.k,
        "index": np.arange(weight.k),
        "sigma": weight.sigma,
        "coordinate": weight.coordinates,
        "rate": weight.rates,
        "rank_of_rate": rank,
        "is_tsd": is_tsd,
    }
