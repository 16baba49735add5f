"""Several comparisons of one folder at once: each run is done by one of them, and a dead one's by another."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from peft_tsd.compare import compare, comparing, make_plan, running
from peft_tsd.compare.sharing import Claim, at_work
from peft_tsd.errors import InputError
from support import text_models
from support.comparisons import computed
from support.waiting import PATIENCE, until


@pytest.fixture
def place(tmp_path):
    return text_models.place_in(tmp_path, 30)


def beginnings(out):
    """How often each run was begun, and how often gone on with."""
    logs = {path.parent.relative_to(out).as_posix(): path.read_text() for path in out.rglob("train.log")}
    return {name: (text.count("beginning"), text.count("continuing")) for name, text in logs.items()}


@pytest.fixture
def at_once(monkeypatch):
    """What two comparisons that began together say; in threads, so that no further interpreter is started."""
    check, one_at_a_time = comparing._check, threading.Lock()

    def checked(*arguments):
        with one_at_a_time:  # models without weights are made by what PyTorch keeps for all threads
            check(*arguments)

    def begin(plan, out):
        with ThreadPoolExecutor() as pool:
            return [one.result() for one in [pool.submit(compare, plan, out) for _ in range(2)]]

    monkeypatch.setattr(comparing, "_check", checked)
    return begin


def test_two_at_once_do_each_run_once_and_say_the_same(place, at_once):
    recipe = text_models.write_recipe(place, training={"steps": 2}, directions={"prelaunch_steps": 1})
    plan = make_plan(str(recipe), methods=["base", "lora-dash"], seeds=[0, 1])
    one, other = at_once(plan, place / "out")
    assert one.rows == other.rows
    assert beginnings(place / "out") == {
        f"runs/{method}/seed-{seed}": (1, 0) for method in ("base", "lora-dash-r2") for seed in (0, 1)
    }
    assert not list((place / "out" / ".at-work").iterdir())


@pytest.mark.long
def test_two_at_once_come_to_what_one_comes_to(place, at_once):
    recipe = text_models.write_recipe(place, training={"steps": 6}, directions={"prelaunch_steps": 2})
    tune = ("lr", [1e-3, 0.03])
    plan = make_plan(str(recipe), methods=["lora", "lora-dash"], seeds=[0], tune=tune, validation_size=5)
    at_once(plan, place / "both")
    compare(plan, place / "one")
    assert computed(place / "both") == computed(place / "one")
    assert set(beginnings(place / "both").values()) == {(1, 0)}
    assert len(beginnings(place / "both")) == 6


def test_what_failed_elsewhere_meanwhile_is_not_tried_again(place, monkeypatch):
    plan = make_plan(str(text_models.write_recipe(place)), methods=["base"], seeds=[0, 1])
    first, second = (Claim(place / "out" / "runs" / "base" / f"seed-{seed}") for seed in (0, 1))
    with second.take():
        second.fail("before this comparison began, which tries again")
    look = running._look

    def looked(run, before):
        if run.name.endswith("seed-0"):
            first.fail("the other machine's disk is full")
        return look(run, before)

    monkeypatch.setattr(running, "_look", looked)
    with first.take():
        pass
    result = compare(plan, place / "out")
    assert [row["status"] for row in result.rows] == ["failed", "finished"]
    assert "the other machine's disk is full" in result.document
    assert second.failure() is None


def test_a_run_that_another_works_on_is_waited_for(place, monkeypatch):
    plan = make_plan(str(text_models.write_recipe(place)), methods=["base"], seeds=[0, 1])
    first, second = (place / "out" / "runs" / "base" / f"seed-{seed}" for seed in (0, 1))
    shown = []
    only_waits = threading.Event()

    def show(bar, text):
        shown.append(text)
        if text == "1 in other processes":
            only_waits.set()

    monkeypatch.setattr(running.tqdm, "set_postfix_str", show)
    with ThreadPoolExecutor() as pool:
        with Claim(first).take() as mine:
            assert mine
            going = pool.submit(compare, plan, place / "out")
            assert only_waits.wait(PATIENCE)
            assert (second / "metrics.json").is_file()
            assert not first.exists()
        # Nobody holds it now, as when its process was killed.
        assert [row["status"] for row in going.result().rows] == ["finished", "finished"]
    assert "base/seed-1, 1 in other processes" in shown


def test_other_settings_are_refused_while_they_are_at_work(tmp_path):
    mine = {"runs/lora": {"seed": 0, "optimizer": {"learning_rate": 0.5}, "output": "here"}}
    same = {"runs/lora": {"seed": 0, "optimizer": {"learning_rate": 0.5}, "output": "there"}, "runs/dora": {"seed": 0}}
    other = {"runs/lora": {"seed": 0, "optimizer": {"learning_rate": 0.1}, "output": "here"}}
    with at_work(tmp_path, mine) as joins:
        assert not joins
        with at_work(tmp_path, same) as joins:
            assert joins
        with pytest.raises(InputError, match=r"optimizer.learning_rate=0.1 differs from 0.5, with which another"):
            at_work(tmp_path, other).__enter__()
    with at_work(tmp_path, other) as joins:
        assert not joins


def test_one_that_was_killed_is_not_at_work(tmp_path):
    (tmp_path / ".at-work").mkdir()
    (tmp_path / ".at-work" / "killed.json").write_text('{"runs/lora": {"seed": 1}}')
    with at_work(tmp_path, {"runs/lora": {"seed": 0}}) as joins:
        assert not joins
        assert len(list((tmp_path / ".at-work").glob("*.json"))) == 1


@pytest.mark.long
def test_killed_while_it_holds_a_run_the_other_finishes_everything(place):
    recipe = text_models.write_recipe(place, training={"save_every": 3})
    command = [
        *(sys.executable, "-m", "peft_tsd.cli", "compare", str(recipe), "--methods", "lora,lora-tsd"),
        *("--seeds", "0,1", "--tune", "lr=0.01,0.003", "--validation-size", "5", "--out"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = place / "both"

    def begin():
        return subprocess.Popen(
            [*command, str(out)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def begun():
        return [path for path in out.rglob("metrics.json") if '"running"' in path.read_text()]

    killed = begin()
    until(begun, killed)
    other = begin()
    # Killed in the middle of a run of its own, while the other works too or is about to.
    until(lambda: list(out.rglob("checkpoint-*/complete.json")), killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert other.wait(PATIENCE) == 0
    subprocess.run([*command, str(place / "one")], check=True, capture_output=True, env=environment)
    assert computed(out) == computed(place / "one")
    found = beginnings(out)
    assert len(found) == 8
    # What was killed went on from its checkpoint, or had written nothing yet.
    assert all(began <= 1 + (went == 0) for began, went in found.values())
    assert sum(went for _, went in found.values()) <= 1
