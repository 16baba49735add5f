"""The file that a page is: what its policy allows, and that nothing of the user's leaves its place."""

import base64
import hashlib
import json
import re

from peft_tsd.pages.embedding import one_script
from peft_tsd.pages.shell import assemble

HOSTILE = "</title></script><img src=x>"


def policy(text: str) -> str:
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert found is not None
    return found[1]


def test_a_page_without_scripts_allows_none():
    text = assemble(title="t", style="p { color: red; }\n", body="<p>b</p>\n")
    assert policy(text) == (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    assert "<script" not in text
    assert text.index("--paper:") < text.index("p { color: red; }") < text.index("<p>b</p>")


def test_scripts_are_allowed_by_their_digests_and_read_the_data():
    scripts = ("var a = 1;", one_script(["a += 1;"]))
    text = assemble(title="t", style="", body="", data={"name": HOSTILE}, scripts=scripts)
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy(text)
        assert f"<script>{script}</script>" in text
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    assert json.loads(found[1]) == {"name": HOSTILE}


def test_a_title_is_never_markup():
    assert "<img" not in assemble(title=HOSTILE, style="", body="")


def test_the_body_is_taken_as_it_is():
    assert "costs $5 and ${style}" in assemble(title="t", style="", body="costs $5 and ${style}")
