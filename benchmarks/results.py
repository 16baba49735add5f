"""Every table and figure of docs/results.md, from the rows in benchmarks/results.

    python benchmarks/results.py                          write the page's generated part and its figures
    python benchmarks/results.py collect FOLDER NAME      add what `peft-tsd compare ... --out FOLDER` has come to

A file of rows, benchmarks/results/NAME.json, has one row a run: its task, variant, rate and seed, its final loss on
held-out and validation rows, its evaluations, metric, times, and on which setup it ran. Beside them what the runs have
in common, what each variant is, and the page's sections, which are written by hand and kept: of each a name (of its
figures), a title, a text, and, where it does not show all, which "variants", "tasks", "ranks", "rates" and "seeds" it
shows; and "targets", where it begins with what was asked of a variant, its name. Rows of a run that was collected
before are replaced; rows of other settings are refused.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from peft_tsd.compare.plan import LEARNING_RATE
from peft_tsd.recipes.methods import METHODS
from results_figures import draw
from results_tables import section

ROOT = Path(__file__).parent.parent

ROWS, PAGE, FIGURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md", ROOT / "docs" / "figures"

BEGIN, END = "<!-- written by benchmarks/results.py -->", "<!-- end of what is written -->"

KEPT = (
    *("task", "method", "variant", "rank", "variation", "seed", "status", "error", "metric", "score", "held_out_loss"),
    *("validation_loss", "evaluations", "steps", "trainable_parameters", "seconds_per_step", "start_seconds"),
    *("transition_seconds", "seconds", "peak_memory_bytes", "learning_rate", "setup"),
)
"""The fields of a row, in this order."""

Row = dict[str, Any]


def collect(folder: Path, name: str) -> Path:
    """Add the rows of a comparison's folder to those of a name.

    Raises:
        ValueError: They are of other settings than those that are there.
    """
    path = ROWS / f"{name}.json"
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    whole = {"name": name, "title": name, "about": ""}
    kept = {"sections": [whole], "recipe": None, "common": None, "variants": {}, "setups": [], "rows": []}
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
    rows = {_key(row): row for row in kept["rows"]}
    for row in content["runs"]:
        common, own = _settings(row["recipe"])
        for known, now, what in (
            (kept["common"], common, "all runs"),
            (_at_any_rank(kept["variants"].setdefault(_name(row), own)), _at_any_rank(own), _name(row)),
        ):
            if known is not None and known != now:
                raise ValueError(f"{folder} and {path.name} have other settings of {what}: {now} and {known}")
        kept["common"] = common
        rows[_key(row)] = _compact(row, kept["setups"])
    kept["recipe"] = kept["recipe"] or _recipe_of(content["command"])
    order = list(kept["variants"])
    kept["rows"] = sorted(
        rows.values(),
        key=lambda row: (
            str(row["task"]),
            order.index(_name(row)),
            row["rank"] or 0,
            str(row["variation"]),
            row["seed"],
        ),
    )
    path.parent.mkdir(exist_ok=True)
    path.write_text(_text(kept), encoding="utf-8")
    return path


def _recipe_of(command: str | None) -> str | None:
    """What `peft-tsd compare` was given, but for what says where files lie; None where it did not compare."""
    given = shlex.split(command or "")
    if "compare" not in given:
        return None
    recipe = Path(given[given.index("compare") + 1])
    if recipe.is_file():
        whole = recipe.resolve()
        recipe = whole.relative_to(ROOT) if whole.is_relative_to(ROOT) else Path(whole.name)
    return " ".join([str(recipe), *(word for word in given if re.fullmatch(r"[\w.]+=[^/]*", word))])


def _name(row: Row) -> str:
    return str(row.get("variant") or row["method"])


def _key(row: Row) -> tuple[Any, ...]:
    return row["task"], _name(row), row["rank"], tuple(sorted(row["variation"].items())), row["seed"]


def _settings(recipe: Row) -> tuple[Row, Row]:
    """What all runs have in common but the task, and what a variant is."""
    method = METHODS[recipe["method"]]
    own = {"method": recipe["method"], **({"adapter": recipe["adapter"]} if method.has_rank else {})}
    if method.directions != "none":
        own["directions"] = recipe["directions"]
    # How many batches a method starts from is its own.
    own["start"] = {"batches": recipe["training"].get("start_batches")}
    common = {key: dict(recipe[key]) for key in ("model", "optimizer", "training", "evaluation")}
    # It says where the weights lie, which differs between machines.
    common["model"]["name"] = Path(common["model"]["name"]).name
    del common["optimizer"]["learning_rate"], common["evaluation"]["batch_size"]
    # The first is a variant's, the others say how a run is watched, and on how many devices it is done.
    for key in ("start_batches", "report_to", "sharding", "deepspeed"):
        common["training"].pop(key, None)
    return common, own


def _at_any_rank(own: Row) -> Row:
    """What a variant is, with α over the rank in place of both: of every rank it is the same one."""
    adapter = own.get("adapter", {"r": 1, "lora_alpha": 1})
    return {**own, "adapter": {**adapter, "r": 1, "lora_alpha": adapter["lora_alpha"] / adapter["r"]}}


def _compact(row: Row, setups: list[Row]) -> Row:
    setup = None
    if row["status"] == "finished":
        setup = {"versions": row["versions"], "machine": row["machine"]}
        if setup not in setups:
            setups.append(setup)
        change = row.get("phase_change") or {}
        row = {**row, "transition_seconds": change.get("seconds"), "setup": setups.index(setup)}
    return {key: _rounded(row[key]) for key in KEPT if row.get(key) is not None}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return {key: _rounded(one) for key, one in value.items()} if isinstance(value, dict) else value


def _text(kept: Row) -> str:
    """JSON with a line a row, so that a difference shows which rows are new."""
    head = json.dumps({key: value for key, value in kept.items() if key != "rows"}, indent=1, ensure_ascii=False)
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in kept["rows"])
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def shown(content: Row, section: Row) -> Row:
    """What a section shows of a file of rows, with its title and text."""
    names = section.get("variants", list(content["variants"]))
    order = {name: i for i, name in enumerate(names)}
    parts = {
        "tasks": lambda row: row["task"],
        "ranks": lambda row: row["rank"],
        "rates": lambda row: row["variation"][LEARNING_RATE],
        "seeds": lambda row: row["seed"],
    }
    rows = [
        row
        for row in content["rows"]
        if _name(row) in order and all(of(row) in section[part] for part, of in parts.items() if part in section)
    ]
    return {
        **content,
        **{key: section.get(key) for key in ("title", "about", "targets")},
        "variants": {name: content["variants"][name] for name in names},
        "rows": sorted(rows, key=lambda row: (str(row["task"]), order[_name(row)])),
    }


def write(rows: Path = ROWS, page: Path = PAGE, figures: Path = FIGURES) -> None:
    """Write the page's generated part, and its figures: of the file with the most rows first.

    Raises:
        ValueError: The page does not say where that part is.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} lacks {BEGIN!r} or {END!r}, between which the generated part stands")
    sections = []
    figures.mkdir(exist_ok=True)
    contents = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(rows.glob("*.json"))}
    for name, content in sorted(contents.items(), key=lambda named: -len(named[1]["rows"])):
        for one in content["sections"]:
            part = shown(content, one)
            drawn = draw(part["rows"], figures, one["name"])
            sections.append(section(part, name, [f"{figures.name}/{figure}" for figure in drawn]))
    made = "\n\n".join(sections) or "No rows have been collected yet."
    page.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb")
    collecting = verbs.add_parser("collect", help="add the rows of a comparison's folder")
    collecting.add_argument("folder", type=Path, help="of a comparison, its --out")
    collecting.add_argument("name", help="of the file of rows, without .json")
    given = parser.parse_args()
    if given.verb == "collect":
        if not (given.folder / "results.json").is_file():
            parser.error(f"{given.folder / 'results.json'} is not there; make it with: peft-tsd compare ... --out DIR")
        try:
            print(collect(given.folder, given.name))
        except ValueError as error:
            sys.exit(str(error))
    else:
        write()


if __name__ == "__main__":
    main()
