"""Arguments, typed overrides, suggestions, the source of each value."""

import io
import json
import os

import pytest

from refrag_jax import cli
from refrag_jax.config import typed
from refrag_jax.errors import UserError
from refrag_jax.runtime.environment import ROOT

TINY = f'--config={ROOT}/configs/tiny.py'


def load(*argv):
  return cli.load(cli.parse(list(argv)))


def message(*argv):
  with pytest.raises(UserError) as e:
    load(*argv)
  assert '\n' not in str(e.value)
  return str(e.value)


@pytest.mark.parametrize(
  ('text', 'kind', 'value'),
  [
    ('3', int, 3),
    ('1e3', int, 1000),
    ('-1', int, -1),
    ('12345678901234567890', int, 12345678901234567890),
    ('3', float, 3.0),
    ('1e-3', float, 1e-3),
    ('true', bool, True),
    ('False', bool, False),
    ('0', bool, False),
    ('a=b,c', str, 'a=b,c'),
    ('', str, ''),
    ('4,2', tuple[int, ...], (4, 2)),
    ('(4, 2)', tuple[int, ...], (4, 2)),
    ('[4,2]', tuple[int, ...], (4, 2)),
    ('(4,)', tuple[int, ...], (4,)),
    ('4', tuple[int, ...], (4,)),
    ('.5,1', tuple[float, ...], (0.5, 1.0)),
    ('a,b', tuple[str, ...], ('a', 'b')),
    ('(\'a\', "b")', tuple[str, ...], ('a', 'b')),
    ('()', tuple[str, ...], ()),
    ('', tuple[int, ...], ()),
  ],
)
def test_overrides_are_typed(text, kind, value):
  parsed = typed.parse(text, kind, 'x')
  assert parsed == value
  assert type(parsed) is type(value)


@pytest.mark.parametrize(
  ('text', 'kind'),
  [
    ('1.5', int),
    ('a', int),
    ('', int),
    ('inf', int),
    ('nan', float),
    ('1,2', float),
    ('maybe', bool),
    ('4,x', tuple[int, ...]),
    ('4,,2', tuple[int, ...]),
    ('(4', tuple[int, ...]),
  ],
)
def test_wrong_overrides_are_refused(text, kind):
  with pytest.raises(UserError, match='expected'):
    typed.parse(text, kind, 'x')


def test_both_forms_of_flags():
  one = cli.parse(['--config=a.py:p', '--workdir=w', '--config.seed=3'])
  two = cli.parse(
    ['--config', 'a.py:p', '--workdir', 'w', '--config.seed', '3']
  )
  assert (one.config_file, one.preset, one.workdir) == ('a.py', 'p', 'w')
  assert one.overrides == two.overrides == {'seed': '3'}
  assert (two.config_file, two.preset, two.workdir) == ('a.py', 'p', 'w')
  assert one.mode == 'train'
  negative = cli.parse(['--config.mesh.data', '-1'])
  assert negative.overrides == {'mesh.data': '-1'}


def test_bare_and_negated_booleans():
  assert load(TINY, '--config.tensorboard').config.tensorboard is True
  assert load(TINY, '--noconfig.tensorboard').config.tensorboard is False
  assert 'needs a value' in message(TINY, '--config.seed')
  assert 'expected true or false' in message(TINY, '--config.tensorboard=2')


@pytest.mark.parametrize(
  ('argv', 'hint'),
  [
    (['--config.model.decoder.widht=3'], "'model.decoder.width'"),
    (['--config.modle.decoder.width=3'], "'model.decoder.width'"),
    (['--config.stage.cpt.learning_rate=3'], "'stage.cpt.peak_learning_rate'"),
    (['--config.stage.mixed.lr=3'], 'unknown config key'),
    (['--config.width=3'], '.width'),
    (['--config.stage.ctp.batch_size=3'], "'stage.cpt.batch_size'"),
    (['--config.stage.cpt=3'], 'several values'),
    (['--config.seed.x=3'], 'unknown config key'),
    (['--seed=3'], "'--config.seed'"),
    (['--workdri=x'], "'--workdir'"),
    (['--stage.cpt.batch_size=3'], "'--config.stage.cpt.batch_size'"),
    (['config.seed=3'], 'unexpected argument'),
    (['--workdir'], 'needs a value'),
    (['--noconfig.tensorboard=false'], 'takes no value'),
  ],
)
def test_typos_are_answered_with_a_suggestion(argv, hint):
  assert hint in message(TINY, *argv)


def write(tmp_path, text, name='mine.py'):
  file = tmp_path / name
  file.write_text(text)
  return f'--config={file}'


MINIMAL = """
from configs import tiny
PRESETS = {'big': 'wide'}
def get_config(preset=''):
  c = tiny.get_config()
  if preset == 'big':
    c.model.decoder.width = 256
  return c
"""


@pytest.mark.parametrize(
  ('text', 'hint'),
  [
    ('x = (\n', 'line 1'),
    ('x = 1\n', 'get_config'),
    ('def get_config():\n  return 3\n', 'ConfigDict'),
    ('def get_config():\n  return undefined\n', 'line 2: NameError'),
    ('import no_such_thing\n', 'line 1: ModuleNotFoundError'),
    (
      'from configs import tiny\ndef get_config():\n  c = tiny.get_config()\n'
      '  c.lock()\n  c.model.chunksize = 3\n  return c\n',
      'line 5: AttributeError',
    ),
    (
      'from configs import tiny\ndef get_config():\n  c = tiny.get_config()\n'
      '  c.model.chunksize = 3\n  return c\n',
      "unknown config key 'model.chunksize'; did you mean 'model.chunk_size'?",
    ),
  ],
)
def test_errors_in_a_config_file_are_one_line(tmp_path, text, hint):
  assert hint in message(write(tmp_path, text))


def test_missing_files_and_presets(tmp_path):
  config = write(tmp_path, MINIMAL)
  assert 'does not exist' in message(config.replace('mine', 'yours'))
  assert "did you mean 'configs/" not in message('--config=nothing_like_it.py')
  near = message(TINY.replace('tiny', 'tinny'))
  assert 'did you mean' in near
  assert 'tiny.py' in near
  assert "did you mean 'big'" in message(config + ':bgi')
  assert 'no config' in message()
  bare = tmp_path / 'bare.py'
  bare.write_text('def get_config():\n  return {}\n')  # takes none
  assert 'no presets' in message(f'--config={bare}:x')


def test_a_config_file_runs_once(tmp_path):
  count = tmp_path / 'count'
  config = write(tmp_path, f'open({str(count)!r}, "a").write("x")\n' + MINIMAL)
  load(config)
  assert count.read_text() == 'x'


def test_sources(tmp_path):
  loaded = load(
    write(tmp_path, MINIMAL) + ':big',
    '--config.stage.cpt.num_train_steps=7',
    '--config.seed=0',
  )
  sources = loaded.sources
  assert loaded.config.model.decoder.width == 256
  assert sources['model.decoder.width'] == 'preset big'
  assert sources['stage.cpt.num_train_steps'] == 'command line'
  assert sources['seed'] == 'command line'  # said, even if it changes nothing
  assert sources['stage.cpt.batch_size'] == 'mine.py'
  assert set(sources) == set(typed.flatten(_plain(loaded)))
  assert load(TINY).sources['mesh.data'] == 'default'


def test_control_arms_follow_what_they_repeat():
  loaded = load(TINY, '--config.stage.cpt.num_train_steps=7')
  arm = loaded.config.stage['cpt_trained']
  assert arm.num_train_steps == 7
  key = 'stage.cpt_trained.num_train_steps'
  assert loaded.sources[key] == 'follows command line'
  for order in (1, -1):  # whatever stands first
    both = [f'--config.{key}=9', '--config.stage.cpt.num_train_steps=7']
    stages = load(TINY, *both[::order]).config.stage
    assert stages['cpt_trained'].num_train_steps == 9
    assert stages['cpt'].num_train_steps == 7


def test_an_integer_default_takes_a_decimal_number(tmp_path):
  text = MINIMAL.replace('  return c', '  c.stage.cpt.clip_eps = 1\n  return c')
  loaded = load(write(tmp_path, text), '--config.stage.cpt.clip_eps=0.5')
  assert loaded.config.stage['cpt'].clip_eps == 0.5


def _plain(loaded):
  import dataclasses

  return dataclasses.asdict(loaded.config)


class _Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.mark.parametrize('kind', [io.StringIO, _Terminal])
def test_the_config_is_printed_with_sources(kind, monkeypatch):
  monkeypatch.setenv('COLUMNS', '200')
  out = kind()
  cli.print_config(load(TINY, '--config.stage.cpt.factors=2,4'), out)
  lines = [
    line for line in out.getvalue().splitlines() if 'cpt.factors' in line
  ]
  assert len(lines) == 1
  assert 'command line' in lines[0]
  assert '(2,4)' in lines[0]


def test_the_config_is_saved_whole(tmp_path):
  argv = [TINY, '--config.seed=3']
  loaded = load(*argv)
  path = cli.save_config(loaded, str(tmp_path / 'run'))
  assert os.listdir(tmp_path / 'run') == ['config.json']
  saved = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert path.endswith('config.json')
  assert saved['config']['seed'] == 3
  assert saved['sources']['seed'] == 'command line'
  assert saved['command_line'][-2:] == argv
  assert saved['versions']['jax']
  assert 'git' in saved
  evaluated = cli.save_config(load('--mode=eval', TINY), str(tmp_path / 'run'))
  assert evaluated.endswith('config_eval.json')  # the training's stays
  again = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert again == saved


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
  def full(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(OSError, match='No space'):
    cli.save_config(load(TINY), str(tmp_path))
  assert os.listdir(tmp_path) == []
