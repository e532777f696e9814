"""The examples of docs/extending.md, run as they stand there."""

import re
import threading
import types

import jax
import numpy as np
import pytest
import toy_config
import toy_run

from refrag_jax import compilation, evals, lineage, stages
from refrag_jax.evals import common
from refrag_jax.hf import families
from refrag_jax.models.refrag import init_params
from refrag_jax.report import run as report
from refrag_jax.runtime.environment import ROOT
from refrag_jax.state import partition


def example(path):
  """The code block of that file, as a module; the page is text of ours."""
  page = (ROOT / 'docs' / 'extending.md').read_text()
  blocks = re.findall(r'```python\n# ([^\n]*)\n(.*?)```', page, re.DOTALL)
  module = types.ModuleType(path)
  exec(dict(blocks)[path], module.__dict__)
  return module


@pytest.fixture(scope='module')
def session(tmp_path_factory):
  folder = toy_config.write_data(tmp_path_factory.mktemp('data'))
  config = toy_run.config(folder)
  config.stage['cpt_half'] = config.stage['cpt']
  return toy_run.open_session(config, f'{folder}/run', toy_run.mesh())


@pytest.mark.slow
def test_a_stage(session, monkeypatch):
  stage = example('refrag_jax/stages/half.py').CPT_HALF
  monkeypatch.setitem(stages.STAGES, 'cpt_half', stage)
  config, corpus = session.config, session.corpus
  stage.check(config)
  chunks = [key[0] for key in compilation.step_keys(session, 'cpt_half')]
  assert set(chunks) == {1, 2}  # of the factors (2, 4)
  half = stage.sampler(config, corpus)(0, np.arange(3))
  full = stages.STAGES['cpt'].sampler(config, corpus)(0, np.arange(3))
  np.testing.assert_array_equal(half['output_BO'], full['output_BO'])
  np.testing.assert_array_equal(
    half['chunks_BCK'], full['chunks_BCK'][:, -chunks[0] :]
  )
  params = toy_run.fresh_params(session)
  frozen = partition(params, stage.trainable)[1]
  assert jax.tree.leaves(frozen) == jax.tree.leaves(params['policy'])
  # From nothing: what the loop does is the same for every stage.
  monkeypatch.setattr(lineage, 'init_from', lambda *_, **__: None)
  workdir = toy_run.train(session, 'cpt_half')
  assert lineage.finished(workdir, 'cpt_half')['steps'] == 4


def test_an_eval(session, monkeypatch, tmp_path):
  order = example('refrag_jax/evals/order.py').EVAL
  monkeypatch.setitem(evals.EVALS, 'order', order)
  params = init_params(session.config.model, jax.random.key(0))
  context = common.Context(
    session,
    {'cpt': params}.get,
    {'toy': session.corpus},
    threading.Event(),
    {},
    {},
    [],
  )
  with jax.set_mesh(session.mesh):
    found = order.run(context)
  rows = found['toy']
  assert rows.keys() == {'forward', 'backward'}
  assert rows['backward']['vs']['forward']['P3']['mean'] != 0
  shown = order.table(found)
  assert 'backward' in shown
  (tmp_path / 'results.json').write_text('{}')
  report.write(str(tmp_path), evals.EVALS)


def test_a_model_family(monkeypatch):
  page = (ROOT / 'docs' / 'extending.md').read_text()
  monkeypatch.setattr(families, 'FAMILIES', dict(families.FAMILIES))
  block = re.search(r'# in refrag_jax/hf/families.py\n(.*?)```', page, re.S)[1]
  exec(block, {'FAMILIES': families.FAMILIES})
  values = {
    'model_type': 'mylm',
    'vocab_size': 32,
    'num_hidden_layers': 1,
    'hidden_size': 8,
    'intermediate_size': 16,
    'num_attention_heads': 2,
    'max_position_embeddings': 64,
  }
  assert families.decoder_config(values, 'config.json').head_dim == 4
