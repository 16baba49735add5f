"""What rows lose to `task.max_length`."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Cut:
    """Counts what rows lose as they are encoded, and says it.

    Attributes:
        lost: Tokens, of every row that loses any.
        left_out: Rows whose answer does not fit, and that are therefore left out.
    """

    def __init__(self) -> None:
        self.lost: list[int] = []
        self.left_out = 0

    def row(self, tokens: int) -> None:
        """One more row, which loses `tokens`."""
        if tokens > 0:
            self.lost.append(tokens)

    def rows(self, kept: Sequence[Sequence[int]], most: int, whole: Callable[[list[int]], list[list[int]]]) -> None:
        """Rows of at most `most` tokens that a tokenizer has cut to that length.

        Args:
            kept: Their tokens.
            most: `task.max_length`.
            whole: The tokens of the rows at these places, uncut.
        """
        full = [i for i, ids in enumerate(kept) if len(ids) >= most]
        for i, ids in zip(full, whole(full) if full else [], strict=True):
            self.row(len(ids) - len(kept[i]))

    def notes(self, most: int, count: int, rows: str, part: str) -> list[str]:
        """In words; none where nothing is lost.

        Args:
            most: `task.max_length`.
            count: All rows.
            rows: What they are: "training rows".
            part: What loses tokens: "the beginning of their prompt".
        """
        said = []
        if self.lost:
            mean = sum(self.lost) / len(self.lost)
            said.append(
                f"{len(self.lost):,} of {count:,} {rows} are longer than task.max_length={most} and lose {part}: "
                f"{mean:,.0f} tokens in the mean, {max(self.lost):,} at most"
            )
        if self.left_out:
            said.append(
                f"{self.left_out:,} of {count:,} {rows} have an answer that task.max_length={most} does not hold, and "
                "are left out of the held-out loss"
            )
        return said
