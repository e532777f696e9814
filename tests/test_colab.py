"""The notebooks are made from their sources, and run to the end; minutes."""

import os
import subprocess
import sys

import jupytext
import pytest

from refrag_jax.runtime.environment import ROOT

SOURCES = sorted((ROOT / 'colab').glob('*.py'))
SAYS = {
  'sharding_layouts': 'bit for bit the same',
  'eval_checkpoint': 'refrag_k8_cpt',
}
# As Colab runs it: cell by cell, in one namespace.
RUN = """
import sys, jupytext
cells = jupytext.read(sys.argv[1]).cells
space = {'__name__': '__main__'}
for cell in cells:
  if cell.cell_type == 'code':
    exec(compile(cell.source, sys.argv[1], 'exec'), space)
"""


def cells(path):
  return [(c.cell_type, c.source) for c in jupytext.read(path).cells]


def test_each_notebook_is_that_of_its_source():
  assert {s.stem for s in SOURCES} == set(SAYS)
  for source in SOURCES:
    notebook = source.with_suffix('.ipynb')
    assert cells(notebook) == cells(source), (
      f'jupytext --to ipynb colab/{source.name}'
    )
    assert all(
      'outputs' not in c or not c.outputs for c in jupytext.read(notebook).cells
    )


@pytest.mark.slow
@pytest.mark.parametrize('name', SAYS)
def test_it_runs_to_the_end(name, tmp_path):
  flags = '--xla_backend_optimization_level=0'
  done = subprocess.run(
    [sys.executable, '-c', RUN, str(ROOT / 'colab' / f'{name}.ipynb')],
    cwd=tmp_path,
    env=os.environ
    | {
      'PYTHONPATH': str(ROOT),
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': flags,
      'TMPDIR': str(tmp_path),
    },
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert SAYS[name] in done.stdout
