"""Imports point downward, and each outside library has one home."""

import ast

import pytest

from refrag_jax.environment import ROOT

# Level of each module; a package's files share it unless they are named. A
# module may import its own level and those below, never above.
LEVELS = {
  'main': 5,
  'cli': 4,
  'doctor': 4,
  'train': 4,
  'evaluate': 4,
  'serve': 4,
  'show': 4,
  'report': 4,
  'report_figures': 4,
  'report_page': 4,
  'report_tables': 4,
  'repro': 4,
  'repro_figures': 4,
  'repro_page': 4,
  'repro_report': 4,
  'repro_tables': 4,
  'plan': 4,
  'plan_page': 4,
  'programs': 4,
  'samples': 4,
  'model_card': 1,
  'exchange': 4,
  'session': 3,
  'pretrained': 3,
  'step': 3,
  'stages': 3,
  'evals': 3,
  'data.pipeline': 3,
  'forward': 2,
  'generate': 2,
  'models': 2,
  'losses': 2,
  'optimizer': 2,
  'checkpoint': 2,
  'collectives': 2,
  'convert_hf': 2,
  'metrics': 2,
  'flops': 2,
  'claims': 2,
  'claim_tests': 2,
  'records': 2,
  'sharding': 1,
  'watchdog': 1,
  'stopping': 1,
  'state': 1,
  'data': 1,
  'progress': 1,
  'results': 1,
  'estimate': 1,
  'latency': 1,
  'hf_families': 1,
  'hub': 1,
  'found': 1,
  'topologies': 1,
  'paper_tables': 1,
  'environment': 0,
  'config': 0,
  'validate': 0,
  'typed': 0,
  'paths': 0,
  'workdir': 0,
  'checksums': 0,
  'errors': 0,
}
# library: the only modules that may import it
HOMES = {
  'orbax': ('checkpoint',),
  'grain': ('data',),
  'tensorflow_datasets': ('data',),
  'array_record': ('data',),
  'pyarrow': ('data',),
  'bm25s': ('data',),
  'transformers': ('data.tokenizers',),
  'tokenizers': ('data.tokenizers', 'data.vocabularies'),
  'sentencepiece': ('data.vocabularies',),
  'safetensors': ('convert_hf',),
  'huggingface_hub': ('hub',),
  'tensorboardX': ('metrics',),
  'ml_collections': (),  # config files alone
  'absl': (),
  'tensorflow': (),
  'torch': (),
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


def level(name):
  """The level of 'data.text' is data's, unless it has one of its own."""
  while name:
    if name in LEVELS:
      return LEVELS[name]
    name = name.rpartition('.')[0]
  return None


def violations(name, source):
  """What a module imports although it must not."""
  found = []
  for imported in imports(source):
    library = imported.split('.')[0]
    if library == 'refrag_jax':
      other = imported.removeprefix('refrag_jax.')
      if level(other) is not None and level(other) > level(name):
        found.append(f'{name} imports {other}, which is above it')
      if other.split('.')[0] == 'cli' and name != 'main':
        found.append(f'{name} imports cli, which only main may')
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
  assert level(name) is not None, f'give {name} a level in LEVELS'
  assert violations(name, path.read_text()) == []


@pytest.mark.parametrize(
  ('name', 'source'),
  [
    ('losses', 'from refrag_jax import train'),
    ('losses', 'from refrag_jax.models import refrag\nimport orbax.checkpoint'),
    ('models.decoder', 'def f():\n  from refrag_jax.stages import cpt'),
    ('data.text', 'import jax.numpy as jnp'),
    ('data.text', 'from refrag_jax.data import pipeline'),
    ('train', 'from refrag_jax import cli'),
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
        allowed.append('refrag_jax.hf_families')
      assert imported in allowed, path.name
