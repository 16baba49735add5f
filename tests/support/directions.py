"""What two trainings found, where their sums were taken in another order: nearly tied directions may change places."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Found(NamedTuple):
    """The directions of a layer, highest change rate first."""

    indices: Sequence[int]
    rates: Sequence[float]


def of(model) -> dict[str, Found]:
    """By the name of the layer."""
    return {name: Found(one.indices.tolist(), one.rates.tolist()) for name, one in model.directions().items()}


def assert_same(found: dict[str, Found], other: dict[str, Found], rtol: float = 1e-3) -> None:
    """The same layers have as many directions each, with the same rates; only those at the end may be others."""
    found, other = ({name: Found(*one) for name, one in each.items()} for each in (found, other))
    assert found.keys() == other.keys()
    for name, (indices, rates) in found.items():
        assert len(indices) == len(other[name].indices), name
        np.testing.assert_allclose(rates, other[name].rates, rtol=rtol, err_msg=name)
        mine, theirs = dict(zip(indices, rates)), dict(zip(*other[name]))
        for i in mine.keys() & theirs.keys():
            np.testing.assert_allclose(mine[i], theirs[i], rtol=rtol, err_msg=f"{name}, direction {i}")
        for i in mine.keys() ^ theirs.keys():
            # Chosen by one alone: then its rate is that of the last.
            rate, last = (mine | theirs)[i], min(*rates, *other[name].rates)
            np.testing.assert_allclose(rate, last, rtol=rtol, err_msg=f"{name}, direction {i}")


def assert_highest(found: Found, rates: np.ndarray, num: int, rtol: float = 1e-5) -> None:
    """`found` are `num` of the highest of `rates` (all of a layer's, from a reference), highest first."""
    assert len(found.indices) == len(set(found.indices)) == num
    np.testing.assert_allclose(found.rates, rates[list(found.indices)], rtol=rtol)
    np.testing.assert_allclose(found.rates, np.sort(rates)[::-1][:num], rtol=rtol)
