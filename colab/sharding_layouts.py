# %% [markdown]
# # Sharding layouts of REFRAG, before paying for machines
#
# A layout says which part of which array lies on which device. Here you pick a
# model, a mesh and a rule, see what each device would hold and what the compiled
# step sends, change one rule, and see what moved. On Colab's CPU eight devices
# are pretended; on a TPU they are real. Nothing is trained.
#
# The source of this notebook is `colab/sharding_layouts.py`
# (`jupytext --to ipynb colab/*.py`).

# %%
# Where refrag_jax comes from; a local checkout needs no installation.
REPOSITORY = 'https://github.com/YOUR_NAME/refrag_jax'  # @param {type:"string"}

import importlib.util
import subprocess
import sys

sys.path.append('..')  # a checkout: this notebook is in its colab/
if importlib.util.find_spec('refrag_jax') is None:
  subprocess.run(
    [sys.executable, '-m', 'pip', 'install', '-q', f'git+{REPOSITORY}'],
    check=True,
  )

# %%
# Before JAX looks for devices: eight, where there is only a CPU.
import jax

jax.config.update('jax_num_cpu_devices', 8)
devices = jax.devices() if jax.device_count() > 1 else jax.devices('cpu')
print(len(devices), 'x', devices[0].device_kind)

# %% [markdown]
# ## A model and a mesh
#
# `data` copies the model, `fsdp` shares out parameters and rows, `tensor` shares
# out heads, MLP and vocabulary, `sequence` the positions of a row. `-1` takes
# what the others leave. `llama2_7b` is the paper's: its layout can be drawn here,
# to compile its steps takes the compilers of `--mode=plan` (last cell).

# %%
import collections
import difflib
import importlib
import tempfile

from refrag_jax import checkpoint, compilation, sharding
from refrag_jax import resolve
from refrag_jax.plan import run as plan
from refrag_jax.plan import topologies

MODEL = 'tiny'  # @param ["tiny", "repro", "llama2_7b"]
DATA, FSDP, TENSOR, SEQUENCE = -1, 2, 2, 1
STAGE = 'cpt'  # @param ["lm", "reconstruct", "cpt", "mixed"]


def open_on(data, fsdp, tensor, sequence, model=MODEL):
  """The model's config on a mesh of these sizes, with no text."""
  values = importlib.import_module(f'configs.{model}').get_config()
  values.mesh.update(data=data, fsdp=fsdp, tensor=tensor, sequence=sequence)
  here = topologies.Topology(
    'here', topologies.CHIPS['cpu'], devices, len(devices), {}
  )
  return plan.open_planned(resolve.build(values), here), here


session, here = open_on(DATA, FSDP, TENSOR, SEQUENCE)
print(dict(session.mesh.shape))

# %% [markdown]
# ## What lies where
#
# One line an array: its path, its shape, and for each axis the mesh axes that
# divide it (`-`: whole). Moments of the optimizer lie where their parameter lies.

# %%
before = sharding.layout(compilation.abstract_state(session, STAGE).params)
print(before)

# %%
# The devices that hold each part of two of the matrices.
params = compilation.abstract_state(session, STAGE).params
for path in (('decoder', 'embed_tokens'), ('projection', 'up_proj', 'kernel')):
  array = params
  for name in path:
    array = array[name]
  print('/'.join(path), array.shape, sharding.describe(array.sharding.spec))
  jax.debug.visualize_sharding(array.shape, array.sharding)

# %% [markdown]
# ## What a device holds, and what the compiled step sends


# %%
def describe(session, stage=STAGE):
  """Compiles the stage's dearest step; returns its plan."""
  found = plan.plan_stage(session, here, stage)
  for what in ('parameter', 'optimizer', 'gradient', 'batch', 'temp', 'peak'):
    print(f'{what:>10} {getattr(found, f"{what}_bytes") / 2**20:10.2f} MiB')
  for sent in found.collectives[:12]:
    print(
      f'{sent["op"]:>20} over {sent["axis"]:<16} {sent["count"]:>4} x '
      f'{sent["bytes"] / 2**10:10.1f} KiB'
    )
  return found


if MODEL != 'llama2_7b':
  first = describe(session)

# %% [markdown]
# ## Change one rule
#
# `AXIS_RULES` says on which mesh axes a logical axis lies. Here `embed`, the axis
# along which FSDP shares out parameters, stays whole: no device then has to gather
# what another one holds, each holds more, and gradients are summed instead.

# %%
kept = sharding.AXIS_RULES['embed']
sharding.AXIS_RULES['embed'] = ()
try:
  changed, _ = open_on(DATA, FSDP, TENSOR, SEQUENCE)
  after = sharding.layout(compilation.abstract_state(changed, STAGE).params)
  moved = [
    line
    for line in difflib.ndiff(before.splitlines(), after.splitlines())
    if line[0] in '+-'
  ]
  print('\n'.join(moved[:16]), f'\n... {len(moved)} lines differ')
  if MODEL != 'llama2_7b':
    second = describe(changed)
finally:
  sharding.AXIS_RULES['embed'] = kept

# %%
if MODEL != 'llama2_7b':
  for when, found in (('before', first), ('after', second)):
    count = collections.Counter()
    for sent in found.collectives:
      count[sent['op']] += sent['count']
    print(f'collectives a step, {when}: {dict(count)}')
  grown = second.parameter_bytes / first.parameter_bytes
  print(f'parameters of a device: {grown:.2f} times as many bytes')

# %% [markdown]
# ## Saved on one mesh, restored on another
#
# A checkpoint knows no mesh: each array is read into whatever layout asks for it.

# %%
import numpy as np

from refrag_jax.session import abstract_params, fresh_params

if MODEL != 'llama2_7b':
  groups = tuple(abstract_params(session))
  params = fresh_params(session, groups)
  state = compilation.fresh_state(session, STAGE, params)
  other, _ = open_on(1, len(devices), 1, 1)
  with tempfile.TemporaryDirectory() as directory:
    with checkpoint.open_manager(directory) as manager:
      checkpoint.save(manager, 1, state, {}, 0.0)
      manager.wait_until_finished()
    restored = checkpoint.load_params(directory, abstract_params(other))
  same = jax.tree.map(
    lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), params, restored
  )
  assert all(jax.tree.leaves(same))
  for params_of in (params, restored):
    embed = params_of['decoder']['embed_tokens']
    print(
      sharding.describe(embed.sharding.spec),
      [shard.data.shape for shard in embed.addressable_shards[:2]],
    )
  print('bit for bit the same')

# %% [markdown]
# ## Machines that are not there
#
# The same for 64 H100s or a TPU slice, compiled by their own compilers without
# any of them (no more than a CPU is needed):
#
# ```bash
# pip install "refrag_jax[plan-gpu]"
# python -m refrag_jax.main --config=configs/llama2_7b.py --mode=plan --topology=h100:8x8
# ```
