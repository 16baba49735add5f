"""The folder that exploring makes, and what it refuses before any work."""

import json

import numpy as np
import pyarrow.parquet
import pytest
import torch

from peft_tsd.explore import Exploration, ExploreError, measure, overlap, write
from peft_tsd.explore.output import write_rates


def exploration(tuned: str) -> Exploration:
    generator = torch.Generator().manual_seed(len(tuned))
    weights = []
    for name, shape in {"model.layers.0.q_proj": (12, 9), "model.layers.1.q_proj": (12, 9), "dense": (5, 20)}.items():
        weight, delta = (torch.randn(*shape, generator=generator) for _ in range(2))
        weights.append(measure(name, weight, delta, num_directions=3))
    return Exploration("base", tuned, "checkpoint", 3, 1e-6, tuple(weights), {"lm_head": "the output head"})


def test_the_folder(tmp_path):
    models = [exploration("one"), exploration("other")]
    write(tmp_path / "found", models, overlap(models))
    assert {path.name for path in (tmp_path / "found").iterdir()} == {
        "report.html",
        "figures",
        "rates.parquet",
        "summary.json",
    }
    assert list((tmp_path / "found" / "figures").iterdir())
    found = json.loads((tmp_path / "found" / "summary.json").read_text())
    assert [model["tuned"] for model in found["models"]] == ["one", "other"]
    assert found["overlap"]["weights"] == ["model.layers.0.q_proj", "model.layers.1.q_proj", "dense"]
    assert list(tmp_path.iterdir()) == [tmp_path / "found"]
    with pytest.raises(ExploreError, match="exists and is not overwritten"):
        write(tmp_path / "found", models)


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="at least one exploration"):
        write(tmp_path / "found", [])
    assert list(tmp_path.iterdir()) == []


def test_rates_have_a_row_for_every_direction(tmp_path):
    models = [exploration("one"), exploration("other")]
    write_rates(tmp_path / "rates.parquet", models)
    rows = pyarrow.parquet.read_table(tmp_path / "rates.parquet").to_pylist()
    assert len(rows) == 2 * (9 + 9 + 5)
    change = models[1]["dense"]
    of_dense = [row for row in rows if row["tuned"] == "other" and row["name"] == "dense"]
    assert [row["index"] for row in of_dense] == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal([row["sigma"] for row in of_dense], change.sigma)
    np.testing.assert_array_equal([row["coordinate"] for row in of_dense], change.coordinates)
    np.testing.assert_array_equal([row["rate"] for row in of_dense], change.rates)
    by_rank = sorted(of_dense, key=lambda row: row["rank_of_rate"])
    assert [row["index"] for row in by_rank][:3] == change.directions.tolist()
    assert [row["is_tsd"] for row in by_rank] == [True, True, True, False, False]
    assert {row["layer"] for row in rows} == {0, 1, None}
    assert {row["module"] for row in rows} == {"q_proj", "dense"}
