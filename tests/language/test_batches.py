"""Batches of rows of similar length."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Trainer

from peft_tsd.language.batches import POOL, SimilarLengths
from peft_tsd.language.preparing import prepare
from peft_tsd.language.recipe import load_recipe
from peft_tsd.runs.folder import RunFolder
from peft_tsd.runs.stopping import Interrupted
from support import text_models
from support.runs import assert_same_result, interrupt_at, run


def batches(sampler):
    order = list(sampler)
    return [order[i : i + sampler.batch_size] for i in range(0, len(order), sampler.batch_size)]


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=300),
    st.integers(1, 9),
    st.integers(0, 2**32 - 1),
    st.integers(0, 9),
)
def test_every_row_once_in_batches_of_neighbours(lengths, size, seed, epoch):
    sampler = SimilarLengths(lengths, size, seed)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths)))
    assert len(sampler) == len(order)
    assert order == list(sampler)
    if len(lengths) <= POOL * size:
        # One pool: no two batches overlap in length by more than their ends.
        spans = sorted((min(of), max(of)) for of in ([lengths[row] for row in batch] for batch in batches(sampler)))
        assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_orders_differ_by_seed_and_epoch_and_batches_are_not_sorted():
    lengths = [i % 40 for i in range(800)]
    sampler = SimilarLengths(lengths, 8, 0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert first != list(sampler) != list(SimilarLengths(lengths, 8, 1))
    longest = [max(lengths[row] for row in batch) for batch in batches(sampler)]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


@pytest.fixture
def place(tmp_path):
    return text_models.place_in(tmp_path, 30)


def test_a_run_continues_in_the_second_epoch_to_the_same_bits(place, monkeypatch):
    recipe = text_models.write_recipe(place, training={"similar_lengths": True})
    rows = len(prepare(load_recipe(str(recipe), [])).rows)
    assert rows // load_recipe(str(recipe), []).training.batch_size < 9
    whole = run(recipe).folder
    stopped = f"output={place / 'stopped'}"
    with monkeypatch.context() as patch:
        interrupt_at(patch, "step 9:")
        with pytest.raises(Interrupted):
            run(recipe, stopped)
    run(recipe, stopped, "resume=true")
    assert_same_result(whole, RunFolder(place / "stopped"))


def test_less_padding_is_computed(place, monkeypatch):
    """Tokens a step, as the model is given them."""
    computed = {}
    for similar in (False, True):
        recipe = text_models.write_recipe(place, training={"similar_lengths": similar})
        seen = computed[similar] = []
        with monkeypatch.context() as patch:
            step = Trainer.training_step
            patch.setattr(
                Trainer,
                "training_step",
                lambda self, model, inputs, *rest, step=step, seen=seen: (
                    seen.append(inputs["input_ids"].numel()) or step(self, model, inputs, *rest)
                ),
            )
            run(recipe, f"output={place / str(similar)}")
    assert len(computed[True]) == len(computed[False])
    assert sum(computed[True]) < sum(computed[False])
