"""`Table`: named columns of equal length."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from stepcredit.forest.types import FINISHES

FINISH_CODE = {name: code for code, name in enumerate(FINISHES)}
SOURCE_COLUMNS = {"source", "part_source"}  # row numbers of the forest that was selected from; not joined
TERM = "term/"  # token columns that begin so are what each term of a sum of credits adds to the advantage
ZERO_WHERE_ABSENT = {"token_rewards"}  # token columns that may be missing from some segments; absent means 0


class Table(Mapping[str, Tensor]):
    """Named columns of equal length: a read-only mapping of tensors."""

    def __init__(self, num_rows: int, columns: Mapping[str, Tensor]) -> None:
        for name, column in columns.items():
            if column.shape[:1] != (num_rows,):
                raise ValueError(f"column '{name}' has shape {tuple(column.shape)}, the table has {num_rows} rows")
        self.num_rows = num_rows
        self._columns = dict(columns)

    def __getitem__(self, name: str) -> Tensor:
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def with_columns(self, columns: Mapping[str, Tensor]) -> "Table":
        return Table(self.num_rows, {**self._columns, **columns})

    def rows(self, index: Tensor) -> "Table":
        return Table(len(index), {name: column[index] for name, column in self._columns.items()})
