"""A folder to train in."""

import pytest

from support import text_models


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder one is in, with a tiny Llama and 20 rows of data."""
    monkeypatch.chdir(tmp_path)
    return text_models.place_in(tmp_path, 20)
