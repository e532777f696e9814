"""`--mode=config`: every value, the schema, and what there is to run."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from refrag_jax import cli, describe, main
from refrag_jax.config import schema, typed
from refrag_jax.runtime.environment import ROOT

TINY = f'--config={ROOT}/configs/tiny.py'


def output(capsys, *argv):
  assert main.main(['--mode=config', *argv]) == 0
  return capsys.readouterr().out


def test_every_value_is_printed_with_its_source(capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  lines = output(capsys, TINY, '--config.seed=3').splitlines()
  shown = {line.split()[0]: line for line in lines}
  config = cli.load(cli.parse([TINY])).config
  used = {
    key
    for key, value in typed.flatten(dataclasses.asdict(config)).items()
    if not (key.startswith('stage.') and value in (0, '', ()))
  }
  assert shown.keys() == used
  assert 'command line' in shown['seed'] and shown['seed'].endswith('3')
  assert os.listdir(tmp_path) == []


def test_a_run_prints_what_differs_and_counts_the_rest(capsys, tmp_path):
  loaded = cli.load(cli.parse([TINY, '--config.seed=3']))
  cli.announce(loaded, str(tmp_path))
  *lines, last = capsys.readouterr().out.splitlines()
  assert not any(' default ' in line for line in lines)
  assert any(line.startswith('seed ') for line in lines)
  every = output(capsys, TINY, '--config.seed=3').splitlines()
  assert {line.split()[0] for line in lines} < {x.split()[0] for x in every}
  assert last == (
    f'{len(every) - len(lines)} more values are defaults; --mode=config prints '
    'them all'
  )
  saved = json.loads((tmp_path / 'config.json').read_text())['config']
  assert saved['mesh']['data'] == -1  # a default
  found = dataclasses.replace(
    loaded, command=dataclasses.replace(loaded.command, config_file='')
  )
  cli.announce(found, 'unused')  # a mode that read the config of a run
  assert capsys.readouterr().out.endswith(
    "the run's config.json has them all\n"
  )


def test_a_config_of_defaults_alone_is_printed(capsys, tmp_path):
  (tmp_path / 'bare.py').write_text(
    'from configs import common\ndef get_config():\n  return common.base()\n'
  )
  loaded = cli.load(cli.parse([f'--config={tmp_path}/bare.py']))
  cli.print_config(loaded, sys.stdout)
  assert capsys.readouterr().out == ''


def test_the_list_needs_neither_devices_nor_a_cluster_nor_a_workdir(tmp_path):
  done = subprocess.run(
    [sys.executable, '-m', 'refrag_jax.main', '--mode=config'],
    cwd=tmp_path, capture_output=True, text=True,
    env=os.environ | {
      'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'tpu',  # there is none
      'JAX_COORDINATOR_ADDRESS': '127.0.0.1:1', 'PYTHONDONTWRITEBYTECODE': '1',
    },
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert os.listdir(tmp_path) == []
  text = done.stdout
  for name in ('tiny', 'mine', 'pair', 'repro', 'llama2_7b'):
    assert f'configs/{name}.py' in text
  assert ':smoke' in text and 'common.py' not in text
  paper = next(line for line in text.splitlines() if ':k16' in line)
  assert 'decoder 6.74 B' in paper and 'encoder 354 M' in paper
  assert 'not measured' in paper


def check(value, rule):
  """The part of JSON Schema that describe.py writes."""
  if rule['type'] == 'object':
    of = rule.get('properties', {})
    for key, inner in value.items():
      other = rule['additionalProperties']
      assert key in of or other, key
      check(inner, of.get(key) or other)
    assert set(rule.get('required', ())) <= value.keys()
  elif rule['type'] == 'array':
    for inner in value:
      check(inner, rule['items'])
  else:
    kinds = {
      'boolean': bool,
      'integer': int,
      'number': (int, float),
      'string': str,
    }
    assert isinstance(value, kinds[rule['type']])


def test_the_schema_takes_configs_and_nothing_else(capsys):
  rule = json.loads(output(capsys, '--schema'))
  config = json.loads(
    json.dumps(dataclasses.asdict(cli.load(cli.parse([TINY])).config))
  )
  check(config, rule)
  with pytest.raises(AssertionError):
    check(config | {'sed': 1}, rule)
  stage = rule['properties']['stage']['additionalProperties']['properties']
  assert stage['batch_size']['description'] == (
    'sequences a step, over all devices'
  )
  fields = {field.name for field in dataclasses.fields(schema.Config)}
  assert rule['properties'].keys() == fields


@pytest.mark.parametrize('name', ['tiny', 'mine', 'pair', 'repro', 'llama2_7b'])
def test_durations_are_of_presets_that_there_are(name):
  names = cli.run_file(str(ROOT / 'configs' / f'{name}.py'))
  presets = {'', *names.get('PRESETS', {})}
  assert names.get('DURATIONS', {}).keys() <= presets


@pytest.mark.parametrize(
  ('text', 'line'),
  [
    ('"""Broken."""\ndef get_config():\n  return {}["x"]\n', 'KeyError'),
    ('def get_config(:\n', 'line 1: invalid syntax'),
    ('import no_such_thing\n', 'line 1: ModuleNotFoundError'),
  ],
)
def test_a_file_that_cannot_be_used_is_said(
  text, line, monkeypatch, tmp_path, capsys
):
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / 'broken.py').write_text(text)
  (tmp_path / 'configs' / 'other.py').write_text('get_config = 3\n')
  monkeypatch.setattr(describe, 'ROOT', tmp_path)
  said = output(capsys)
  assert 'configs/broken.py' in said and 'other.py' not in said
  assert [line in x for x in said.splitlines() if 'not usable' in x] == [True]


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (['--mode=train', TINY, '--schema'], 'takes no --schema'),
    (['--mode=config', f'{TINY}:smok'], "has no preset 'smok'"),
    (['--mode=config', f'{TINY}:smok', '--schema'], "has no preset 'smok'"),
    (['--mode=config', TINY, '--config.stages=lmm'], "there is no 'lmm'"),
    (['--mode=config', '--config.seed=3'], 'no config: add --config=FILE.py'),
    (['--mode=config', '--search'], 'takes no --search'),
  ],
)
def test_bad_input_is_one_line(argv, message, capsys):
  assert main.main(argv) == 2
  error = capsys.readouterr().err
  assert message in error and error.count('\n') == 1
