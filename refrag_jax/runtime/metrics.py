"""Where a run's numbers go: metrics.jsonl, samples.jsonl, and boards.

The only file that writes metrics. Values arrive here as numbers that the host
has already read (one step late), so nothing below makes the device wait.
"""

import datetime
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import rich
from rich.table import Table
from rich.text import Text

from refrag_jax.errors import UserError
from refrag_jax.runtime import files, wandb
from refrag_jax.runtime.progress import say


class Writer:
  """Appends to `metrics.jsonl` and `samples.jsonl`; process 0 only.

  Lines are flushed one by one: after a kill the file ends at a step that was
  really made. TensorBoard gets one directory a stage, so that a resumed stage
  can purge what it will write again.
  """

  def __init__(
    self,
    workdir: str,
    tensorboard: bool = False,
    project: str = '',
    config: Mapping[str, Any] | None = None,
  ):
    """Opens what is asked for.

    Args:
      project: of Weights & Biases; '': none.
      config: what the project shows of the run beside its numbers.
    """
    self.workdir = os.fspath(workdir)
    self.active = jax.process_index() == 0
    self._summary = import_tensorboard() if tensorboard else None
    self._boards = {}
    self._files = {}
    self._wandb = None
    if self.active:
      os.makedirs(self.workdir, exist_ok=True)
      if project:
        self._wandb = wandb.Board(project, self.workdir, config or {})
      for name in ('metrics.jsonl', 'samples.jsonl'):
        _mend(os.path.join(self.workdir, name))

  def scalars(
    self, stage: str, step: int, split: str, values: Mapping[str, Any]
  ) -> None:
    """Adds one line; `split` is 'train' or 'heldout'."""
    if not self.active:
      return
    values = files.plain(dict(values))
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
    head = {'stage': stage, 'step': int(step), 'split': split, 'time': now}
    self._append('metrics.jsonl', head | values)
    if self._wandb:
      self._wandb.scalars(stage, int(step), split, values)
    if self._summary:
      board = self._board(stage)
      for name, value in values.items():
        if isinstance(value, (int, float)):
          board.add_scalar(f'{split}/{name}', value, int(step))

  def samples(
    self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]
  ) -> None:
    """Adds a table of sample texts, one mapping of column to text a row."""
    if not self.active or not rows:
      return
    rows = files.plain([dict(row) for row in rows])
    head = {'stage': stage, 'step': int(step)}
    self._append('samples.jsonl', head | {'rows': rows})
    if self._wandb:
      self._wandb.samples(stage, int(step), rows)
    if self._summary:
      text = '\n\n'.join(_sample_lines(rows))
      self._board(stage).add_text('samples', text, int(step))
    title = f'{stage} {step}: samples'
    if rich.get_console().is_terminal:
      rich.get_console().print(_sample_table(title, rows))
    else:
      say('\n'.join([title, *('  ' + line for line in _sample_lines(rows))]))

  def truncate_from(self, stage: str, step: int) -> None:
    """Forgets what `stage` wrote at `step` and later: it will come again."""
    if not self.active:
      return
    for name in ('metrics.jsonl', 'samples.jsonl'):
      path = os.path.join(self.workdir, name)
      old = files.read_lines(path)
      kept = [
        r for r in old if r.get('stage') != stage or r.get('step', -1) < step
      ]
      if len(kept) < len(old):
        if name in self._files:
          self._files.pop(name).close()  # it points to the file replaced
        files.write_text(path, ''.join(map(files.json_line, kept)))
    if self._summary:
      if stage in self._boards:
        self._boards.pop(stage).close()
      self._board(stage, purge_step=step)

  def close(self) -> None:
    boards = [self._wandb] if self._wandb else []
    for file in (*self._files.values(), *self._boards.values(), *boards):
      file.close()
    self._files, self._boards, self._wandb = {}, {}, None

  def _append(self, name: str, record: dict[str, Any]) -> None:
    if name not in self._files:
      path = os.path.join(self.workdir, name)
      self._files[name] = open(  # noqa: SIM115
        path, 'a', encoding='utf-8', newline='\n'
      )
    self._files[name].write(files.json_line(record))
    self._files[name].flush()

  def _board(self, stage: str, purge_step: int | None = None) -> Any:
    if stage not in self._boards:
      path = os.path.join(self.workdir, 'tensorboard', stage)
      # Event files are named by the second; a quick restart would overwrite.
      suffix = f'.{os.getpid()}'
      self._boards[stage] = self._summary(
        path, purge_step=purge_step, filename_suffix=suffix
      )
    return self._boards[stage]


def visible(text: Any) -> str:
  """Text on one line: control characters as their pictures (newline: ␊).

  A model prints any byte, and an escape sequence in a sample must not reach
  the terminal.
  """

  def picture(c: str) -> str:
    if ord(c) < 0x20:
      return chr(0x2400 + ord(c))
    return '\u2421' if 0x7F <= ord(c) < 0xA0 else c

  return ''.join(map(picture, str(text)))


def _sample_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
  columns = list(dict.fromkeys(name for row in rows for name in row))
  table = Table(title=title, show_lines=True)
  for name in columns:
    table.add_column(name, overflow='fold')
  for row in rows:  # Text: brackets in a sample are no markup
    table.add_row(*(Text(visible(row.get(name, ''))) for name in columns))
  return table


def _sample_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
  for number, row in enumerate(rows):
    for name, value in row.items():
      yield f'{number} {name}: {visible(value)}'


def _mend(path: str) -> None:
  """Drops the torn line that a kill or a full disk left at the end."""
  if not os.path.exists(path):
    return
  with open(path, 'rb') as f:
    data = f.read()
  if data and not data.endswith(b'\n'):
    whole = data[: data.rfind(b'\n') + 1]
    files.write_text(path, whole.decode('utf-8', 'replace'))


def import_tensorboard() -> Any:
  """The writer's class.

  Raises:
    UserError: the package is missing.
  """
  try:
    import tensorboardX
  except ImportError as e:
    raise UserError(
      'tensorboard = True needs tensorboardX: pip install tensorboardX'
    ) from e
  return tensorboardX.SummaryWriter
