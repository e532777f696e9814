"""The HTML of a report: one page, inline styles, nothing from the network.

Colours are CSS variables, so that tables and figures follow the reader's light
or dark setting. Series colours are those of Okabe and Ito, darkened on white
and lightened on black to keep a contrast of 3:1; markers and words repeat what
they say.
"""

import html
import re
from collections.abc import Sequence
from typing import Any

CSS = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --panel: #f6f7f9; --ink: #1b1f24; --muted: #596068;
  --line: #d5dade; --good: #00704f; --bad: #b03a00; --score: 0 114 178;
  --series0: #0072b2; --series1: #c65102; --series2: #00815e;
  --series3: #a64e87; --series4: #8f6400; --series5: #596068;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --panel: #1c2024; --ink: #e6e9ec; --muted: #9aa3ac;
    --line: #363d44; --good: #3fcf9f; --bad: #ff935c; --score: 86 180 233;
    --series0: #56b4e9; --series1: #ff935c; --series2: #3fcf9f;
    --series3: #e39ac6; --series4: #f0c04a; --series5: #9aa3ac;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 82rem;
  background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans',
    sans-serif;
}
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 {
  font-size: 1.3rem; margin: 3rem 0 .5rem; padding-top: 1rem;
  border-top: 1px solid var(--line);
}
h3 { font-size: 1rem; margin: 1.75rem 0 .4rem; }
p { max-width: 46rem; margin: .5rem 0; }
nav { margin: 1.25rem 0 0; font-size: .9rem; }
nav a { margin-right: 1.1rem; }
a { color: var(--series0); }
.muted, figcaption, .note { color: var(--muted); font-size: .9rem; }
/* Shadows at the edges say that there is more to scroll to. */
.scroll {
  overflow-x: auto; margin: .75rem 0;
  background:
    linear-gradient(to right, var(--page) .6rem, transparent)
      left / 1.2rem 100%,
    linear-gradient(to left, var(--page) .6rem, transparent)
      right / 1.2rem 100%,
    linear-gradient(to right, var(--muted), transparent) left / .6rem 100%,
    linear-gradient(to left, var(--muted), transparent) right / .6rem 100%;
  background-repeat: no-repeat;
  background-attachment: local, local, scroll, scroll;
}
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dd { margin: 0; }
table {
  border-collapse: collapse; font-size: .86rem; line-height: 1.35;
  font-variant-numeric: tabular-nums;
}
th, td {
  padding: .3rem .6rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line); white-space: nowrap;
}
thead th {
  font-weight: 600; border-bottom: 2px solid var(--line);
  vertical-align: bottom;
}
tr.groups th { border-bottom: 0; padding-bottom: 0; text-align: center; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
table.text th, table.text td { text-align: left; }
table.text td {
  white-space: pre-wrap; overflow-wrap: anywhere; min-width: 11rem;
  font-family: ui-monospace, 'DejaVu Sans Mono', monospace; font-size: .8rem;
}
table.text td.short { min-width: 0; white-space: nowrap; }
code, .name { font-family: ui-monospace, 'DejaVu Sans Mono', monospace; }
.name { font-size: .82rem; }
.se { color: var(--muted); }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.mark { display: inline-block; width: 1.1em; text-align: center; }
.banner {
  border-left: 4px solid var(--bad); background: var(--panel);
  padding: .5rem .9rem; margin: .75rem 0; max-width: 46rem;
}
.grid {
  display: grid; gap: .5rem 1.25rem;
  grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr));
}
.wide {
  grid-template-columns: repeat(auto-fill, minmax(min(28rem, 100%), 1fr));
}
figure { margin: .75rem 0; }
figure svg { width: 100%; height: auto; display: block; }
figure svg text { font-family: inherit !important; }
figure img { max-width: 100%; background: #fff; padding: .5rem; }
figcaption { margin-top: .25rem; }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--muted); font-size: .9rem; }
.context {
  font: .82rem/2.1 ui-monospace, 'DejaVu Sans Mono', monospace;
  background: var(--panel); padding: .75rem 1rem; border-radius: 6px;
  overflow-wrap: anywhere; white-space: pre-wrap;
}
.chunk {
  padding: .2rem .1rem; margin-right: 2px; border-radius: 3px;
  box-decoration-break: clone; -webkit-box-decoration-break: clone;
}
.expanded {
  outline: 2px solid var(--series1); font-weight: 700; margin-right: 4px;
}
.ramp {
  display: inline-block; width: 8rem; height: .8rem; vertical-align: middle;
  margin: 0 .4rem; border: 1px solid var(--line);
  background: linear-gradient(to right, rgb(var(--score) / .04),
    rgb(var(--score) / .6));
}
@media print { body { max-width: none; } h2 { break-after: avoid; } }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
{body}
</body>
</html>
"""

MISSING = '–'
NOT_FINITE = 'not finite'
GOOD = '<span class="mark good" title="better by more than 3 se">✓</span>'
BAD = '<span class="mark bad" title="worse by more than 3 se">✗</span>'
UNDECIDED = '<span class="mark"></span>'


def page(title: str, body: str) -> str:
  return PAGE.format(title=html.escape(title), css=CSS, body=body)


def text(value: Any) -> str:
  """Escapes a value; characters that HTML forbids become a question mark."""
  shown = ''.join(
    c if c in '\n\t' or c.isprintable() else '\ufffd' for c in str(value)
  )
  return html.escape(shown)


def name(value: Any) -> str:
  return f'<span class="name">{text(value)}</span>'


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
  """A number with a true minus sign; a dash where there is none."""
  if value is None or value != value:
    return MISSING
  if isinstance(value, int) and not sign:
    return f'{value:,}'
  return f'{value:{"+" if sign else ""}.{digits}f}'.replace('-', '\u2212')


def measured(
  value: dict[str, Any] | None, digits: int = 3, sign: bool = False
) -> str:
  """A STAT as mean ± standard error."""
  if not value:
    return MISSING
  if value.get('mean') is None:  # JSON has no NaN
    return NOT_FINITE if value.get('n') else MISSING
  mean = number(float(value['mean']), digits, sign)
  if value.get('se') is None:
    return f'{mean} <span class="se">± ?</span>'
  se = number(float(value['se']), digits)
  return f'{mean} <span class="se">± {se}</span>'


def table(
  head: Sequence[str],
  rows: Sequence[Sequence[str]],
  note: str = '',
  groups: Sequence[tuple[str, int]] = (),
  css_class: str = '',
) -> str:
  """A table of cells that are HTML already; the first column names the row.

  Args:
    head: the column heads.
    rows: the cells.
    note: stands above, at reading width.
    groups: a row above the heads, as (text, columns that it spans).
    css_class: 'text' where the cells are texts rather than numbers.
  """
  if not rows:
    return ''
  above = ''.join(
    f'<th scope="colgroup" colspan="{span}">{cell}</th>'
    for cell, span in groups
  )
  above = f'<tr class="groups">{above}</tr>' if above else ''
  header = ''.join(f'<th scope="col">{cell}</th>' for cell in head)
  body = '\n'.join(
    '<tr>' + ''.join(f'<td>{cell}</td>' for cell in row) + '</tr>'
    for row in rows
  )
  note = f'<p class="note">{note}</p>' if note else ''
  return (
    f'{note}<div class="scroll"><table class="{css_class}"><thead>{above}'
    f'<tr>{header}</tr></thead>\n<tbody>{body}</tbody></table></div>'
  )


def figure(content: str, caption: str) -> str:
  return f'<figure>{content}<figcaption>{caption}</figcaption></figure>'


def details(summary: str, body: str) -> str:
  if not body:
    return ''
  return f'<details><summary>{text(summary)}</summary>{body}</details>'


def sections(parts: Sequence[tuple[str, str]]) -> str:
  """Headed parts and links to them."""
  links, bodies = [], []
  for title, content in parts:
    anchor = re.sub(r'\W+', '-', title.lower())
    links.append(f'<a href="#{anchor}">{text(title)}</a>')
    bodies.append(
      f'<section id="{anchor}"><h2>{text(title)}</h2>\n{content}</section>'
    )
  return f'<nav>{" ".join(links)}</nav>\n' + '\n'.join(bodies)
