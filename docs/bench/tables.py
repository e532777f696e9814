"""Markdown tables of a tiny run, for README.md and docs/results.md.

  .venv/bin/python docs/bench/tables.py docs/bench/tiny.json [--short] [WALL]

Prints them; nothing in them is written by hand. --short: README's table; WALL:
seconds of the whole command, which results.json does not have.
"""

import json
import sys

ROWS = (
  'no_context', 'last_k', 'full_context', 'no_context_trained',
  'last_k_trained', 'full_context_trained', 'refrag_k8', 'refrag_k8_shuffled',
  'refrag_k8_cpt', 'refrag_k8_rl_p0.125', 'refrag_k8_random_p0.125',
  'refrag_k8_ppl_desc_p0.125', 'refrag_k8_ppl_asc_p0.125',
  'refrag_k8_last_p0.125', 'refrag_k8_oracle_p0.125',
)  # fmt: skip
SHORT = {
  'no_context_trained': 'nothing (`no_context_trained`)',
  'refrag_k8_shuffled': "REFRAG with another document's chunks",
  'refrag_k8': '**REFRAG**: 64 bytes as 8 chunk embeddings',
  'refrag_k8_rl_p0.125': '**REFRAG**, one chunk of them as tokens',
  'last_k_trained': 'the last 8 bytes (`last_k_trained`)',
  'full_context_trained': 'all 64 bytes (`full_context_trained`)',
}


def measured(stat, sign=''):
  return f'{stat["mean"]:{sign}.3f} ± {stat["se"]:.3f}'


def main(path, short=False, wall=None):
  with open(path) as f:
    run = json.load(f)
  evals = {name: next(iter(of.values())) for name, of in run['evals'].items()}
  rows = evals['log_perplexity']
  if short:
    for name, words in SHORT.items():
      print(f'| {words} | {measured(rows[name]["P4"])} |')
    return
  print('| row | P4 | P8 | P16 |\n|---|---|---|---|')
  for name in ROWS:
    cells = ' | '.join(measured(rows[name][p]) for p in ('P4', 'P8', 'P16'))
    print(f'| `{name}` | {cells} |')
  print('\n| comparison | nats |\n|---|---|')
  refrag = rows['refrag_k8']['vs']
  for other in (
    'no_context_trained', 'refrag_k8_shuffled', 'last_k_trained',
    'full_context_trained',
  ):  # fmt: skip
    print(
      f'| `refrag_k8` − `{other}`, P4 | {measured(refrag[other]["P4"], "+")} |'
    )
  own = evals['reconstruction']['refrag_k8']['vs']['refrag_k8_shuffled']
  for p, what in (('P8', '1 chunk'), ('P64', '8 chunks')):
    print(
      f"| reconstruction of {what}, own − another's | {measured(own[p], '+')} |"
    )
  for row in evals['selection']:
    tail = ', tail expanded' if row.get('tail_expanded') else ''
    for other in ('random', 'last') if row['selector'] == 'rl' else ():
      stat = measured(row[f'vs_{other}'], '+')
      print(f'| `rl` − `{other}`, p = {row["p"]:g}{tail} | {stat} |')
  print('\n| questions | NLL of the gold answer | EM | F1 |\n|---|---|---|---|')
  for name, row in evals['qa'].items():
    if isinstance(row, dict):
      cells = ' | '.join(measured(row[m]) for m in ('gold_nll', 'em', 'f1'))
      print(f'| `{name}` | {cells} |')
  print('\n| part | wall s | of it compiling | steps | paired gain held out |')
  print('|---|---|---|---|---|')
  for name, of in run['stages'].items():
    print(
      f'| `{name}` | {of["wall_s"]:.0f} | {of["compile_s"]:.0f} | '
      f'{of["steps"]} | {measured(of["paired_gain"], "+")} |'
    )
  if wall:
    rest = wall - sum(of['wall_s'] for of in run['stages'].values())
    compiling = sum(of['compile_s'] for of in run['stages'].values())
    print(f'| evals, report, start | {rest:.0f} | | | |')
    print(f'| **total** | **{wall:.0f}** | {compiling:.0f} | | |')


if __name__ == '__main__':
  numbers = [float(text) for text in sys.argv[2:] if text != '--short']
  main(sys.argv[1], '--short' in sys.argv, *numbers[:1])
