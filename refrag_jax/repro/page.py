"""A report as blocks of text, tables and pictures; as Markdown and as HTML.

The same blocks make RESULTS.md and repro.html, so that the two cannot differ
in a number. Text may have `code`; whatever else it holds is shown as it is.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from refrag_jax.report import page
from refrag_jax.repro.estimate import Estimate

MISSING = 'missing'

# What a cell that says it looks like: better, worse.
GOOD = ('confirmed', 'holds', 'yes')
BAD = ('contrary', 'missing', 'failed', 'no')
CSS = """
td.prose, th.prose {
  text-align: left; white-space: normal; min-width: 10rem; max-width: 34rem;
}
"""


class Text(NamedTuple):
  text: str


class Heading(NamedTuple):
  text: str


class Items(NamedTuple):
  """A list."""

  texts: Sequence[str]


class Table(NamedTuple):
  head: Sequence[str]
  rows: Sequence[Sequence[str]]
  note: str = ''
  folded: str = ''  # the line that unfolds it; '' shows it
  prose: Sequence[int] = ()  # columns of words, which may break


class Picture(NamedTuple):
  """In HTML only: a table beside it has the numbers."""

  svgs: Sequence[str]
  caption: str = ''


class Section(NamedTuple):
  title: str
  blocks: Sequence


def markdown(title: str, sections: Sequence[Section]) -> str:
  parts = [f'# {title}']
  for section in sections:
    if section.blocks:
      parts.append(f'## {section.title}')
      parts += [_MARKDOWN[type(b)](b) for b in section.blocks]
  return '\n\n'.join(part for part in parts if part) + '\n'


def html(title: str, sections: Sequence[Section]) -> str:
  """A page that needs no network, light or dark as its reader's."""
  body = f'<h1>{page.text(title)}</h1>\n'
  body += page.sections([
    (s.title, '\n'.join(_HTML[type(b)](b) for b in s.blocks))
    for s in sections
    if s.blocks
  ])  # fmt: skip
  whole = page.page(title, body)
  return whole.replace('</style>', CSS + '</style>', 1)


# --- Markdown -----------------------------------------------------------------


def _markdown_table(table: Table) -> str:
  if not table.rows:
    return ''
  plain = lambda cell: str(cell).replace('|', '\\|').replace('\n', ' ')
  lines = [list(map(plain, table.head)), ['---'] * len(table.head)]
  lines += [[_strong(plain(cell)) for cell in row] for row in table.rows]
  text = '\n'.join(f'| {" | ".join(line)} |' for line in lines)
  if table.note:
    text = f'{table.note}\n\n{text}'
  if table.folded:
    text = (
      f'<details><summary>{page.text(table.folded)}</summary>\n\n{text}\n\n'
      '</details>'
    )
  return text


def _strong(cell: str) -> str:
  return f'**{cell}**' if cell in GOOD + BAD else cell


_MARKDOWN = {
  Text: lambda block: block.text,
  Heading: lambda block: f'### {block.text}',
  Items: lambda block: '\n'.join(f'- {text}' for text in block.texts),
  Table: _markdown_table,
  Picture: lambda block: '',
}


# --- HTML ---------------------------------------------------------------------


def inline(text: str) -> str:
  """Escaped text, with `code` as such."""
  return re.sub(r'`([^`]+)`', r'<span class="name">\1</span>', page.text(text))


def _html_table(table: Table) -> str:
  if not table.rows:
    return ''
  shown = page.table(
    [inline(cell) for cell in table.head],
    [[_coloured(str(cell)) for cell in row] for row in table.rows],
    inline(table.note),
  )
  for column in table.prose:  # report_page has classes for whole tables only
    shown = re.sub(
      rf'(<tr>(?:<(t[dh])[^>]*>(?:(?!</t[dh]>).)*</t[dh]>){{{column}}}<t[dh])'
      r'( scope="col")?>',
      r'\1\3 class="prose">',
      shown,
      flags=re.DOTALL,
    )
  return page.details(table.folded, shown) if table.folded else shown


def _coloured(cell: str) -> str:
  for words, style in ((GOOD, 'good'), (BAD, 'bad')):
    if cell in words:
      return f'<span class="{style}">{cell}</span>'
  return inline(cell)


def _html_picture(block: Picture) -> str:
  if not block.svgs:
    return ''
  figures = ''.join(f'<figure>{svg}</figure>' for svg in block.svgs)
  note = f'<p class="note">{inline(block.caption)}</p>' if block.caption else ''
  return f'<div class="grid wide">{figures}</div>{note}'


def _html_items(block: Items) -> str:
  items = ''.join(f'<li>{inline(text)}</li>' for text in block.texts)
  return f'<ul>{items}</ul>' if items else ''


_HTML = {
  Text: lambda block: f'<p>{inline(block.text)}</p>',
  Heading: lambda block: f'<h3>{inline(block.text)}</h3>',
  Items: _html_items,
  Table: _html_table,
  Picture: _html_picture,
}


# --- Cells --------------------------------------------------------------------


def shown_estimate(value: Estimate | None, digits: int) -> str:
  """Mean ± standard error over documents."""
  if value is None or value.mean is None:
    return page.MISSING
  se = '?' if value.se is None else page.number(value.se, digits)
  return f'{page.number(value.mean, digits, sign=True)} ± {se}'


def shown_interval(value: Estimate | None, digits: int) -> str:
  """The bootstrap interval."""
  if value is None or value.low is None or value.high is None:
    return page.MISSING
  low, high = (page.number(x, digits, sign=True) for x in
               (value.low, value.high))  # fmt: skip
  return f'{low} to {high}'


def shown_stat(value: Mapping[str, Any] | None, digits: int = 3) -> str:
  """Mean ± standard error; what has none is missing."""
  if not value or value.get('mean') is None:
    return page.NOT_FINITE if value and value.get('n') else MISSING
  se = value.get('se')
  shown = '?' if se is None else page.number(float(se), digits)
  return f'{page.number(float(value["mean"]), digits)} ± {shown}'


def shown_counts(stats: Sequence[Mapping[str, Any] | None]) -> str:
  """Documents on each data set: 26 / 49 / 512, or one number for all."""
  numbers = [page.number(s['n']) if s else page.MISSING for s in stats]
  if len(set(numbers)) == 1:
    return numbers[0]
  return ' / '.join(numbers)
