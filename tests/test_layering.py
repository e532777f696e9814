"""Imports point downward, and each outside library has one home."""

import ast

import pytest

from refrag_jax.runtime.environment import ROOT

# What is imported stands on a line above: a package of refrag_jax, or a module at
# its top. Only files of one package may import each other.
LAYERS = """
errors checksums
results sharding
runtime
config
hf
data state
models checkpoint flops optimizer
generate
stages
step
session
compilation
report
evals
resolve samples heldout forecast
show
evaluate lineage
serve
train
run exchange
plan repro doctor cli
describe
main
"""
# library: the only modules that may import it
HOMES = {
  'orbax': ('checkpoint',),
  'grain': ('data',),
  'tensorflow_datasets': ('data',),
  'array_record': ('data',),
  'pyarrow': ('data',),
  'bm25s': ('data',),
  'rouge_score': ('evals.text_metrics',),
  'transformers': ('data.tokenizers', 'serve.torch_baseline'),
  'tokenizers': ('data.tokenizers', 'data.vocabularies'),
  'sentencepiece': ('data.vocabularies',),
  'safetensors': ('hf.convert',),
  'huggingface_hub': ('hf.hub',),
  'gguf': ('hf.gguf',),
  'tensorboardX': ('runtime.metrics',),
  'wandb': ('runtime.wandb',),
  'ml_collections': (),  # config files alone
  'absl': (),
  'tensorflow': (),
  'torch': ('serve.torch_baseline',),
  'llama_cpp': ('serve.llama_cpp_baseline',),
}


def _modules():
  for path in sorted((ROOT / 'refrag_jax').rglob('*.py')):
    parts = path.relative_to(ROOT / 'refrag_jax').with_suffix('').parts
    name = '.'.join(p for p in parts if p != '__init__')
    if name:
      yield name, path


def imports(source):
  """All imported names, wherever they stand in the file."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        yield f'{node.module}.{alias.name}'


def layer(name):
  """The line of LAYERS that has the package, or None."""
  lines = [line.split() for line in LAYERS.split('\n')]
  return next((i for i, x in enumerate(lines) if name.split('.')[0] in x), None)


def violations(name, source):
  """What a module imports although it must not."""
  found = []
  for imported in imports(source):
    library = imported.split('.')[0]
    if library in ('refrag_jax', 'None'):  # None: relative
      other = imported.removeprefix('refrag_jax.')
      same = name.split('.')[0] == other.split('.')[0]
      if not same and (layer(other) is None or layer(other) >= layer(name)):
        found.append(f'{name} imports {other}, which is not below it')
    elif library in HOMES:
      homes = HOMES[library]
      if not any(name == home or name.startswith(home + '.') for home in homes):
        found.append(f'{name} imports {library}, whose home is {homes}')
    elif library in ('jax', 'flax', 'optax') and name.split('.')[0] == 'data':
      found.append(f'{name} imports {library}: data is NumPy alone')
  return found


@pytest.mark.parametrize(
  ('name', 'path'), list(_modules()), ids=[name for name, _ in _modules()]
)
def test_imports_point_downward(name, path):
  assert layer(name) is not None, f'LAYERS has no line for {name}'
  assert violations(name, path.read_text()) == []


@pytest.mark.parametrize(
  ('name', 'source'),
  [
    ('models.losses', 'from refrag_jax import train'),
    (
      'models.losses',
      'from refrag_jax.models import refrag\nimport orbax.checkpoint',
    ),
    ('models.decoder', 'def f():\n  from refrag_jax.stages import cpt'),
    ('data.text', 'import jax.numpy as jnp'),
    ('data.text', 'from refrag_jax.models import refrag'),
    ('evals.qa', 'from refrag_jax import samples'),
    ('train', 'from refrag_jax.plan import run'),
    ('doctor', 'from refrag_jax import cli'),
    ('train', 'from . import cli'),
    ('train', 'import ml_collections'),
    ('data.text', 'from transformers import AutoTokenizer'),
  ],
)
def test_violations_are_found(name, source):
  assert len(violations(name, source)) == 1


def test_configs_import_ml_collections_and_common_alone():
  for path in (ROOT / 'configs').glob('*.py'):
    for imported in imports(path.read_text()):
      allowed = ['ml_collections', 'configs.common', 'configs.xla_flags']
      if path.name == 'common.py':  # for models by their config.json
        allowed.append('refrag_jax.hf.families')
      assert imported in allowed, path.name
