# %% [markdown]
# # Evaluate an Orbax checkpoint of REFRAG
#
# Restores what a run has written, on whatever devices are here, however many it
# was trained on, and runs the evals. Without a run of yours it first makes one:
# two steps a stage of a toy model, so that there is something to restore; its
# numbers mean nothing.
#
# The source of this notebook is `colab/eval_checkpoint.py`
# (`jupytext --to ipynb colab/*.py`).

# %%
# Where refrag_jax comes from; a local checkout needs no installation.
REPOSITORY = 'https://github.com/YOUR_NAME/refrag_jax'  # @param {type:"string"}

import importlib.util
import os
import subprocess
import sys

sys.path.append('..')  # a checkout: this notebook is in its colab/
if importlib.util.find_spec('refrag_jax') is None:
  subprocess.run(
    [sys.executable, '-m', 'pip', 'install', '-q', f'git+{REPOSITORY}'],
    check=True,
  )

# %%
# A run's directory, on a mounted drive for example, and the config it had.
WORKDIR = ''  # @param {type:"string"}
# Other text to measure: paths to text, JSON lines or parquet, by commas; without
# any, what the run has held out.
TEXT = ''  # @param {type:"string"}
CONFIG = 'tiny'  # @param {type:"string"}
PRESET = 'smoke'  # @param {type:"string"}

import importlib
import json
import tempfile

import jax

from refrag_jax import run
from refrag_jax import evaluate
from refrag_jax import resolve

values = importlib.import_module(f'configs.{CONFIG}').get_config(PRESET)
values.mesh.update(data=-1, fsdp=1, tensor=1, sequence=1)
made_here = not WORKDIR
if made_here:
  WORKDIR = os.path.join(tempfile.mkdtemp(), 'run')
  values.stages = ('lm', 'reconstruct', 'cpt')
  values.evals = ()
print(jax.device_count(), 'x', jax.devices()[0].device_kind)

# %%
if made_here:
  run.run(resolve.build(values), WORKDIR)

# %% [markdown]
# ## Restore and evaluate
#
# `--mode=eval` on the command line does the same, with TEXT as
# `--config.eval.data`.

# %%
values.evals = ('log_perplexity',)  # with a policy also 'selection'
values.eval.data = tuple(TEXT.split(',')) if TEXT else ()
evaluate.run(resolve.build(values), WORKDIR)

# %%
with open(os.path.join(WORKDIR, 'results.json')) as f:
  results = json.load(f)


def shown(stat):
  # Of one document there is no standard error, of what overflowed no mean.
  mean, se = ('?' if x is None else f'{x:.3f}' for x in
              (stat['mean'], stat['se']))  # fmt: skip
  return f'{mean} ± {se} (n = {stat["n"]})'


for dataset, rows in results['evals']['log_perplexity'].items():
  print(dataset)
  for row, cells in rows.items():
    line = '  '.join(
      f'{cell}: {shown(stat)}' for cell, stat in cells.items() if 'mean' in stat
    )
    print(f'  {row:<28} {line}')

# %% [markdown]
# A row without its `_trained` control says little: continued training alone
# lowers every loss. And a model that reads its chunks is worse with another
# document's (`_shuffled`).
#
# The run's page, with its curves and samples:

# %%
page = os.path.join(WORKDIR, 'report.html')
print(page, os.path.getsize(page), 'bytes')
if 'google.colab' in sys.modules:
  from IPython.display import HTML, display

  with open(page) as f:
    display(HTML(f.read()))
