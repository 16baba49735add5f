"""GLUE's metrics, as scikit-learn and SciPy compute them."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ...errors import RecipeError


class Metric(NamedTuple):
    """A number that says how well `guesses` agree with what is right: 1 is best, 0 no better than a constant guess
    (accuracy apart)."""

    package: str
    """What it is computed by, as pip knows it."""
    module: str
    measure: Callable[[Sequence[float], Sequence[float]], float]

    def check_installed(self) -> None:
        """Refuse, before anything long, to go on without the package.

        Raises:
            RecipeError: It is not installed.
        """
        try:
            found = importlib.util.find_spec(self.module) is not None
        except ValueError:  # None stands in for it in sys.modules
            found = False
        if not found:
            raise RecipeError(f"task.family=glue needs the package {self.package}: pip install 'peft-tsd[train]'")


def _accuracy(right: Sequence[float], guesses: Sequence[float]) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(right, guesses))


def _f1(right: Sequence[float], guesses: Sequence[float]) -> float:
    """Of label 1: the harmonic mean of precision and recall; 0 where neither has any."""
    from sklearn.metrics import f1_score

    return float(f1_score(right, guesses, zero_division=0.0))


def _matthews(right: Sequence[float], guesses: Sequence[float]) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(right, guesses))


def _pearson(right: Sequence[float], guesses: Sequence[float]) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, right, guesses)


def _spearman(right: Sequence[float], guesses: Sequence[float]) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, right, guesses)


def _correlation(
    measure: Callable[..., tuple[float, float]], right: Sequence[float], guesses: Sequence[float]
) -> float:
    with warnings.catch_warnings():
        # Constant guesses have no correlation; that they say nothing is the 0 below.
        warnings.simplefilter("ignore")
        value = float(measure(right, guesses)[0]) if len(right) > 1 else math.nan
    return 0.0 if math.isnan(value) else value


METRICS = {
    "accuracy": Metric("scikit-learn", "sklearn", _accuracy),
    "f1": Metric("scikit-learn", "sklearn", _f1),
    "matthews": Metric("scikit-learn", "sklearn", _matthews),
    "pearson": Metric("scipy", "scipy", _pearson),
    "spearman": Metric("scipy", "scipy", _spearman),
}
