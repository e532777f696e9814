"""Paths: `~` and schemes, in every place where a path may stand."""

import dataclasses
import os

import pytest
import toy_run

from refrag_jax import checkpoint, cli, main
from refrag_jax.errors import UserError
from refrag_jax.runtime import paths

# (key, as written, as it must be with HOME=/home/me)
FIELDS = [
  ('data.text', ('~/a.jsonl', 'tfds:~/b:train', 'stdlib'),
   ('/home/me/a.jsonl', 'tfds:/home/me/b:train', 'stdlib')),
  ('data.tokenizer', '~/tok', '/home/me/tok'),
  ('data.tokenizer', 'owner/name@v1', 'owner/name@v1'),
  ('data.cache_dir', '~/cache', '/home/me/cache'),
  ('data.questions', ('~/q.jsonl',), ('/home/me/q.jsonl',)),
  ('eval.questions', ('heldout', '~/q'), ('heldout', '/home/me/q')),
  ('eval.data', ('heldout', '~/c.txt'), ('heldout', '/home/me/c.txt')),
  ('init_from', '~/a,~/b', '/home/me/a,/home/me/b'),
  ('init_from', '@main/lm', '@main/lm'),
  ('stage.cpt.init_from', '~/lm', '/home/me/lm'),
  ('repro.claims', '~/claims.toml', '/home/me/claims.toml'),
]  # fmt: skip


def field(config, key):
  for name in key.split('.'):
    config = config[name] if isinstance(config, dict) else getattr(config, name)
  return config


@pytest.mark.parametrize(('key', 'written', 'wanted'), FIELDS)
def test_home_is_put_in(tmp_path, monkeypatch, key, written, wanted):
  monkeypatch.setenv('HOME', '/home/me')
  cfg = toy_run.config(str(tmp_path), **{key.replace('.', '__'): written})
  assert field(cfg, key) == wanted


@pytest.mark.parametrize('key', sorted({key for key, *_ in FIELDS}))
def test_another_machine_is_no_path(tmp_path, key):
  value = 's3://bucket/x'
  old = field(toy_run.config(str(tmp_path)), key)
  value = (value,) if isinstance(old, tuple) else value
  # Control arms share what they are made from.
  key_or_twin = key.replace('stage.cpt', 'stage.c[a-z_]*')
  with pytest.raises(UserError, match=f'config.{key_or_twin} must be a local'):
    toy_run.config(str(tmp_path), **{key.replace('.', '__'): value})


@pytest.mark.parametrize('flag', ['workdir', 'from', 'to', 'config'])
def test_flags_are_paths_too(monkeypatch, flag):
  monkeypatch.setenv('HOME', '/home/me')
  command = cli.parse([f'--{flag}=~/x.py'])
  value = command.flags.get(flag) or (
    command.workdir if flag == 'workdir' else command.config_file
  )
  assert value == '/home/me/x.py'
  with pytest.raises(UserError, match=f'--{flag} must be a local path'):
    cli.parse([f'--{flag}=gs://bucket/run'])


def test_without_a_home_it_is_said(monkeypatch):
  with pytest.raises(UserError, match='no home directory to put for ~nobody-'):
    paths.local('~nobody-at-all/x', '--workdir')


def test_colons_in_a_preset_and_in_a_tfds_directory(tmp_path):
  command = cli.parse(['--config=configs/pair.py:/a:b/dec,/c:d/enc'])
  assert command.config_file == 'configs/pair.py'
  assert command.preset == '/a:b/dec,/c:d/enc'


@pytest.mark.parametrize('pair', ['ONE', 'a,b,c', ',b', 'a,'])
def test_a_pair_is_two_models(pair, capsys):
  code = main.main([f'--config=configs/pair.py:{pair}', '--mode=data'])
  assert code == 2
  assert 'name two models, DECODER,ENCODER' in capsys.readouterr().err


def test_a_forgotten_comma_is_told(tmp_path, capsys):
  path = tmp_path / 'mine.py'
  with open('configs/mine.py') as f:
    path.write_text(f.read().replace("('stdlib',)", "('/my/texts')"))
  assert main.main([f'--config={path}', '--mode=data']) == 2
  said = capsys.readouterr().err
  assert 'written with a comma, (x,)' in said and said.count('\n') == 1


def test_a_workdir_that_cannot_be_made_is_one_line(capsys):
  code = main.main(
    ['--config=configs/tiny.py:smoke', '--mode=data', '--workdir=/proc/nope']
  )
  assert code == 2
  assert '--workdir=/proc/nope cannot be made' in capsys.readouterr().err
  assert not os.path.exists('/proc/nope')


def test_a_step_is_no_stage(tmp_path):
  (tmp_path / 'lm' / '250').mkdir(parents=True)
  with pytest.raises(UserError, match=f'is one step: .* {tmp_path}/lm, of'):
    checkpoint.require(f'{tmp_path}/lm/250', {}, 'stage cpt starts from it')


def test_every_path_of_the_config_is_here():
  """A field that is called like a path is in the table above."""
  cfg = toy_run.config('unused')
  names = {
    f'{prefix}{f.name}'
    for prefix, section in (('', cfg), ('data.', cfg.data), ('eval.', cfg.eval))
    for f in dataclasses.fields(section)
    if f.name.endswith(('_dir', '_from', 'tokenizer')) or f.name in (
      'text', 'questions', 'claims',
    )
  }  # fmt: skip
  known = {key for key, *_ in FIELDS} | {'data.encoder_tokenizer'}
  assert names <= known
