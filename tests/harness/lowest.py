"""The lowest versions of its dependencies that pyproject.toml admits, as constraints for pip.

python tests/harness/lowest.py > lowest.txt
"""

import re
from pathlib import Path


def lowest(pyproject: str) -> list[str]:
    """A line for each dependency in the text of a pyproject.toml; its first `>=` is taken for its lowest."""
    [block] = re.findall(r"^dependencies = \[(.*?)^\]", pyproject, re.S | re.M)
    return [f"{name}=={version}" for name, version in re.findall(r'^\s*"([\w.-]+)>=([\w.]+)', block, re.M)]


if __name__ == "__main__":
    print("\n".join(lowest((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))))
