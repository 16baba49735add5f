"""What `hostile` changes, decided by hypothesis."""

from hypothesis import strategies as st


class Drawn:
    """`hostile.Choices` from hypothesis."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data

    def integer(self, low: int, high: int) -> int:
        return self._data.draw(st.integers(low, high))

    def data(self, most: int) -> bytes:
        return self._data.draw(st.binary(max_size=most))
