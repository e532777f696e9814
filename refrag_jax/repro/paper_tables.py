"""The paper's numbers beside which ours stand: configs/paper_tables.toml."""

import tomllib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from refrag_jax.runtime.environment import ROOT


class PaperTable(NamedTuple):
  where: str  # page, or figure
  title: str
  columns: tuple[str, ...]
  rows: Mapping[str, tuple[float, ...]]

  def row(self, name: str, columns: Sequence[str]) -> list[float]:
    """The values of a row in some columns."""
    return [self.rows[name][self.columns.index(c)] for c in columns]

  @staticmethod
  def short(column: str) -> str:
    """The data set of a column, where it names one."""
    return column.split()[0]


def _read() -> dict[str, PaperTable]:
  with open(ROOT / 'configs' / 'paper_tables.toml', 'rb') as f:
    tables = tomllib.load(f)
  return {
    name: PaperTable(
      table['where'],
      table['title'],
      tuple(table['columns']),
      {row: tuple(values) for row, values in table['rows'].items()},
    )
    for name, table in tables.items()
  }


TABLES = _read()
