"""What stands around the package: one version number, and files that other programs read."""

import re

import pytest
import yaml

import peft_tsd
from harness.lowest import lowest
from support.places import ROOT

VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
READ_BY_OTHERS = [ROOT / "CITATION.cff", ROOT / ".pre-commit-config.yaml", *(ROOT / ".github").rglob("*.yml")]


def test_the_version_is_that_of_pyproject():
    assert peft_tsd.__version__ == VERSION, "install the package again: its metadata are older than pyproject.toml"


def test_the_change_log_has_the_version():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert headings[0] == "Unreleased"
    assert headings[1].split(" – ")[0] == VERSION
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ – \d{4}-\d\d-\d\d", heading) for heading in headings[1:])


def test_every_dependency_has_a_lowest_version():
    """What `make test-versions` installs."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = lowest(text)
    [block] = re.findall(r"^dependencies = \[(.*?)^\]", text, re.S | re.M)
    assert len(found) == len(re.findall(r'^ *"', block, re.M)) > 5
    assert all(re.fullmatch(r"[a-z]+==[\d.]+", line) for line in found)


@pytest.mark.parametrize("path", READ_BY_OTHERS, ids=lambda path: path.name)
def test_what_other_programs_read_can_be_read(path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    assert "version" not in content  # of ours; pyproject.toml has the only one
