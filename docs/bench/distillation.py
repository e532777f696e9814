"""What distillation gives at equal FLOPs: steps, and both runs side by side.

  launch/models.sh
  PYTHONPATH=. .venv/bin/python docs/bench/distillation.py
  PYTHONPATH=. .venv/bin/python docs/bench/distillation.py WORKDIR DISTILLED

Without directories: the FLOPs of `cpt` in configs/smollm2.py:cpu, counted from
its programs with the teacher and without, and the steps of the distilled stage
that cost as much. With them: differences of the rows of documents.json, paired
on the same documents, distilled minus plain.
"""

import argparse
import collections
import json
import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import numpy as np

from refrag_jax import cli, compilation, results
from refrag_jax import session as session_lib
from refrag_jax.config import load

STAGE = 'cpt'


def main() -> None:
  """Prints either."""
  parser = argparse.ArgumentParser()
  parser.add_argument('workdirs', nargs='*')
  args = parser.parse_args()
  if args.workdirs:
    compare(*args.workdirs)
    return
  config = cli.load(cli.parse(['--config=configs/smollm2.py:cpu'])).config
  plain = total_flops(config)
  steps = full = config.stage[STAGE].num_train_steps
  print(f'{steps} steps: {plain / 1e12:.1f} TFLOP')
  for _ in range(8):  # the curriculum's share of long contexts moves a little
    found = total_flops(
      load.changed(
        config,
        [
          f'stage.{STAGE}.distill_weight=1.0',
          f'stage.{STAGE}.num_train_steps={steps}',
        ],
      )
    )
    print(f'{steps} distilled: {found / 1e12:.1f} TFLOP')
    if abs(found / plain - 1) < 1 / full:
      break
    steps = round(steps * plain / found)


def total_flops(config) -> float:
  """Model FLOPs of all steps of the stage."""
  session = session_lib.open_model(config)
  state = compilation.abstract_state(session, STAGE)
  keys = collections.Counter(compilation.step_keys(session, STAGE))
  return sum(
    float(times) * compilation.model_flops(session, STAGE, state, key)
    for key, times in keys.items()
  )


def compare(plain: str, distilled: str) -> None:
  """The rows that both runs have, each beside the other."""
  tables = []
  for workdir in (plain, distilled):
    with open(os.path.join(workdir, 'documents.json')) as f:
      tables.append(json.load(f))
  datasets = [of['datasets'] for of in tables]
  if datasets[0] != datasets[1]:
    raise SystemExit('the runs were not measured on the same text')
  for name in datasets[0]:
    a, b = (of['evals']['log_perplexity'][name] for of in tables)
    if a['doc'] != b['doc']:
      raise SystemExit(f'{name}: not the same documents')
    print(name)
    for row in a['rows']:
      for measure in a['rows'][row] if row in b['rows'] else ():
        of_a, of_b = (np.array(x['rows'][row][measure]) for x in (a, b))
        if not np.array_equal(of_a, of_b):
          print(f'  {row} {measure}: {text(of_a)}, distilled {text(of_b)}, '
                f'difference {text(of_b - of_a)}, n = {len(of_a)}')  # fmt: skip


def text(values: np.ndarray) -> str:
  stat = results.stat(values)
  return f'{stat["mean"]:.3f} ± {stat["se"]:.3f}'


if __name__ == '__main__':
  main()
