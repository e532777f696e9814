"""`--mode=config`: every value, the schema, and what there is to run."""

import dataclasses
import json
import os

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


def test_a_run_prints_what_differs(capsys):
  loaded = cli.load(cli.parse([TINY, '--config.seed=3']))
  cli.print_config(loaded, os.sys.stdout)
  lines = capsys.readouterr().out.splitlines()
  assert not any(' default ' in line for line in lines)
  assert any(line.startswith('seed ') for line in lines)


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


def test_the_list_has_every_config_and_preset(capsys):
  text = output(capsys)
  for name in ('tiny', 'mine', 'pair', 'repro', 'llama2_7b'):
    assert f'configs/{name}.py' in text
  assert ':smoke' in text and 'common.py' not in text
  paper = next(line for line in text.splitlines() if ':k16' in line)
  assert 'decoder 6.74G' in paper and 'not measured' in paper


def test_a_preset_that_cannot_be_read_is_said(monkeypatch, tmp_path):
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / 'broken.py').write_text(
    '"""Broken."""\ndef get_config():\n  return {}["x"]\n'
  )
  monkeypatch.setattr(describe, 'ROOT', tmp_path)
  assert any('not usable' in line for line in describe.listing())


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (['--mode=train', TINY, '--schema'], 'takes no --schema'),
    (['--mode=config', f'{TINY}:smok'], "has no preset 'smok'"),
    (['--mode=config', TINY, '--config.stages=lmm'], "there is no 'lmm'"),
  ],
)
def test_bad_input_is_one_line(argv, message, capsys):
  assert main.main(argv) == 2
  error = capsys.readouterr().err
  assert message in error and error.count('\n') == 1
