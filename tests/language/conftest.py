"""A folder to train in."""

import pytest

from support import text_models


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder one is in, with a tiny Llama and 20 rows of data."""
    monkeypatch.chdir(tmp_path)
    text_models.llama_folder(tmp_path / "model")
    text_models.jsonl(tmp_path / "data.jsonl", text_models.rows(20))
    return tmp_path
