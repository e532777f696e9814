"""Programs are compiled from shapes alone, which must be those of the batches."""

import jax
import numpy as np
import pytest
import toy_config
import toy_run

from refrag_jax import compilation
from refrag_jax.stages import STAGES


@pytest.fixture(scope='module')
def session(tmp_path_factory):
  folder = toy_config.write_data(tmp_path_factory.mktemp('data'))
  cfg = toy_run.config(folder, model__piece_length=4)
  return toy_run.open_session(cfg, f'{folder}/run', toy_run.mesh(2))


@pytest.mark.parametrize('name', STAGES)
def test_shapes_are_known_without_text(session, name):
  config = session.config
  sample = STAGES[name].sampler(config, session.corpus)
  keys = compilation.step_keys(session, name)
  for step in {chunks: step for step, (chunks, _) in enumerate(keys)}.values():
    row = sample(step, np.arange(3, 4))
    want = {key: (x.shape[1:], x.dtype) for key, x in row.items()}
    shapes = STAGES[name].task.row_shapes(config, name, keys[step][0])
    assert {k: (s, np.dtype(d)) for k, (s, d) in shapes.items()} == want
    batch = compilation.abstract_batch(session, name, keys[step][0])
    rows = config.stage[name].batch_size
    assert {x.shape[0] for x in jax.tree.leaves(batch)} == {rows}
