"""Pages of the site that lie outside docs/, where GitHub shows them: README files, examples, the change log.

Links between them and docs/ are written as GitHub reads them, from the file they stand in. Here each file outside gets
a page of its own, and a link is followed in the repository and written anew as the site has it. One to a file of the
repository that is no page is left as plain text, for the site stands alone.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]

# A Markdown link or image whose target is in the repository: not an address, not an anchor of the same page.
LINK = re.compile(r"(?P<text>!?\[(?:[^\]\[]|\[[^\]]*\])*\])\((?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")


def outside() -> dict[str, str]:
    """Pages outside docs/: the path of the file in the repository, and of its page in the site."""
    pages = {"README.md": "index.md", **{name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}}
    for path in sorted([*ROOT.glob("benchmarks/README.md"), *ROOT.glob("examples/*")]):
        name = path.relative_to(ROOT).as_posix()
        if path.suffix in {".md", ".py", ".ipynb"}:
            pages[name] = name if path.suffix == ".md" else f"{name}.md"
    return pages


def content(path: Path) -> str:
    """A file outside docs/ as Markdown."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return f"# {path.name}\n\n```python\n{text}```\n"
    if path.suffix == ".ipynb":
        return f"# {path.name}\n\n" + "\n\n".join(cell for part in json.loads(text)["cells"] for cell in _cell(part))
    return text


def _cell(cell: dict[str, Any]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [re.sub(r"^#", "##", source, flags=re.MULTILINE)]
    shown = [f"```python\n{source}\n```"]
    for output in cell.get("outputs", []):
        text = "".join(output.get("text", "") or output.get("data", {}).get("text/plain", ""))
        if text:
            shown.append(f"```text\n{text.rstrip()}\n```")
    return shown


def relink(text: str, place: str, page: str, pages: dict[str, str]) -> str:
    """Markdown of the file `place` of the repository, with the links that its page `page` of the site needs."""

    def replaced(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), found["path"]))
        if target in pages:
            there = pages[target]
        elif target.startswith("docs/"):
            there = target.removeprefix("docs/")
        elif (ROOT / target).exists():
            return found["text"][1:-1]
        else:
            return found[0]  # MkDocs says that it leads nowhere
        link = posixpath.relpath(there, posixpath.dirname(page) or ".")
        return f"{found['text']}({link}{found['anchor'] or ''})"

    return LINK.sub(replaced, text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, page in outside().items():
        files.append(File.generated(config, page, content=content(ROOT / name)))
    return files


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    # A number and its interval stay on one line.
    return re.sub(r"<td(?=[^>]*>[^<]*±)", '<td class="number"', html)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    pages = outside()
    places = {there: name for name, there in pages.items()}
    here = page.file.src_uri
    return relink(markdown, places.get(here, f"docs/{here}"), here, pages)
