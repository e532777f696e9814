"""Markdown of a bench.json, for docs/bench/latency.md.

  PYTHONPATH=. .venv/bin/python docs/bench/latency.py runs/latency/bench.json

Prints the tables; nothing in them is written by hand.
"""

import json
import sys

from refrag_jax.serve.bench import label

HEADS = (
  'read as', 'positions', 'padded', 'TTFT, ms', 'speed-up', 'FLOPs allow',
  'of that', 'roofline, ms', 'encode', 'prefill', 'TPOT, ms', 'tokens/s',
)  # fmt: skip


def main(path: str) -> None:
  with open(path) as f:
    bench = json.load(f)
  print(
    f'{bench["devices"]} x {bench["device"]}, {bench["cpus"]} CPUs, '
    f'{bench["dtype"]}; '
    + ', '.join(
      f'{name} {bench["versions"][name]}'
      for name in ('python', 'jax', 'flax', 'torch', 'llama-cpp-python')
      if name in bench['versions']
    )
    + f'; {bench["compiles_after_warmup"]} programs compiled after warm-up'
  )
  for context in dict.fromkeys(row['context'] for row in bench['rows']):
    print(f'\n**{context:,} tokens of context**\n')
    print('| ' + ' | '.join(HEADS) + ' |')
    print('|---' * len(HEADS) + '|')
    for row in bench['rows']:
      if row['context'] == context:
        print('| ' + ' | '.join(cells(row)) + ' |')


def cells(row: dict) -> list[str]:
  se = row.get('se_ttft_ms')
  number = lambda value, digits: '' if value is None else f'{value:.{digits}f}'
  return [
    label(row),
    f'{row["decoder_positions"]:,}',
    f'{row["padded_positions"]:,}',
    number(row['mean_ttft_ms'], 1) + ('' if se is None else f' ± {se:.1f}'),
    number(row.get('speedup'), 2),
    number(row.get('flop_limit'), 2),
    number(row.get('fraction_of_limit'), 2),
    number(row.get('roofline_ms'), 1),
    number(row['split_ms'].get('encode'), 1),
    number(row['split_ms'].get('prefill'), 1),
    number(row.get('mean_tpot_ms'), 1),
    number(row.get('output_throughput'), 1),
  ]


if __name__ == '__main__':
  main(sys.argv[1])
