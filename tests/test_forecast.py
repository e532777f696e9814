"""What is said before a run: sizes, passes over the text, time, warnings."""

import pytest
import toy_config
import toy_run

from refrag_jax import forecast
from refrag_jax.stages import STAGES


@pytest.fixture(scope='module')
def session(tmp_path_factory):
  folder = toy_config.write_data(tmp_path_factory.mktemp('data'))
  cfg = toy_run.config(folder)
  return toy_run.open_session(cfg, f'{folder}/run', toy_run.mesh())


def test_stages_are_listed_with_their_passes(session, capsys):
  forecast.tell(session)
  lines = capsys.readouterr().out.splitlines()
  shown = {line.split()[0]: line for line in lines}
  assert list(session.config.stages) == [line.split()[0] for line in lines]
  task = STAGES['cpt'].task
  documents = session.corpus.documents('train')
  windows = task.table(session.config, 'cpt', session.corpus, documents, '').num
  assert f'{4 * 8 / windows:.1f} passes' in shown['cpt']
  assert 'passes' not in shown['sft']


def test_many_passes_are_a_sentence(session, capsys):
  forecast.tell(toy_run.with_stage(session, 'cpt', num_train_steps=9000))
  assert 'cpt goes ' in capsys.readouterr().out


def test_few_documents_and_questions_of_others_are_said(session):
  class Few:
    def documents(self, side):
      return [1, 2]

  asks = toy_run.replaced(
    session.config,
    data=session.config.data.__class__(
      **vars(session.config.data) | {'questions': ('stdlib',)}
    ),
  )
  few, questions = forecast._about_data(asks, Few())
  assert 'only 2 documents' in few and 'standard library' in questions
  assert forecast._about_data(session.config, session.corpus) == []


def test_the_time_is_said_once_a_stage(session, capsys):
  heard = forecast._Clock(session.config)
  for _ in range(2):
    heard('lm', 8.0)
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith('lm  about 0:00:08 for its steps, and 0:')


def test_rough_flops_are_near_those_of_the_jaxpr(session):
  """Within a factor of three: they only compare stages."""
  from refrag_jax import compilation

  for name in ('lm', 'cpt', 'cpt_trained'):
    state = compilation.abstract_state(session, name)
    keys = compilation.step_keys(session, name)
    counted = sum(
      compilation.model_flops(session, name, state, key) for key in keys
    )
    rough = forecast.rough_flops(session.config, name)
    assert 1 / 3 < rough / counted < 3, name
