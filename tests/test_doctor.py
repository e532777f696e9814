"""The doctor names what is wrong with machines that we do not have."""

import importlib.util
import sys

import pytest
import toy_config
import toy_run

from refrag_jax import doctor
from refrag_jax import run as training
from refrag_jax.errors import UserError
from refrag_jax.runtime import environment

GOOD = {
  'python': '3.11.7',
  'jax': '0.10.2',
  'jaxlib': '0.10.2',
  'flax': '0.12.8',
  'orbax-checkpoint': '0.12.8',
  'tensorflow-datasets': '4.9.10',
  'importlib_resources': '7.1.0',
  'transformers': '5.23.0',
}


def problems(findings):
  return [f for f in findings if f.level == 'problem']


def test_a_good_set_has_no_problem():
  assert not problems(doctor.check_pairs(GOOD))


@pytest.mark.parametrize(
  ('change', 'names', 'fix'),
  [
    (
      {'jax': '0.11.1', 'jaxlib': '0.11.1'},
      'flax 0.12.8 with jax 0.11.1',
      'flax==0.12.8',
    ),
    (
      {'jax': '0.11.2', 'jaxlib': '0.11.2', 'flax': '0.12.9'},
      'flax 0.12.9 with jax 0.11.2',
      'jax==0.10.2',
    ),
    ({'jaxlib': '0.10.1'}, 'jaxlib 0.10.1', 'jaxlib==0.10.2'),
    ({'importlib_resources': None}, 'importlib_resources', 'pip install'),
    ({'transformers': '4.57.1'}, 'transformers 4.57.1', '>=5.13'),
    ({'orbax-checkpoint': '0.11.0'}, 'orbax-checkpoint 0.11.0', '>=0.12.3'),
    ({'orbax-checkpoint': '0.13.0'}, 'orbax-checkpoint 0.13.0', '<0.13'),
    ({'jax-cuda12-plugin': '0.9.0'}, 'jax-cuda12-plugin', 'jax[cuda12]==0.10'),
    ({'python': '3.10.2'}, 'Python 3.10.2', '3.11'),
    ({'jax': '0.9.2', 'jaxlib': '0.9.2'}, 'jax 0.9.2', 'jax==0.10.2'),
  ],
)
def test_known_bad_pairs(change, names, fix):
  versions = {k: v for k, v in (GOOD | change).items() if v is not None}
  found = problems(doctor.check_pairs(versions))
  assert len(found) == 1
  assert names in found[0].what
  assert fix in found[0].fix


def test_versions_against_the_tested_set():
  tested = {'jax': '0.10.2', 'flax': '0.12.8', 'ml-collections': '1.1.0'}
  have = {'jax': '0.10.2', 'flax': '0.12.9'}
  found = {f.what: f for f in doctor.check_versions(have, tested)}
  assert found['ml-collections is not installed'].level == 'problem'
  other = found['flax 0.12.9 is installed, 0.12.8 was tested']
  assert other.level == 'warning'
  assert len(found) == 2
  have = {'jax': '0.10.2', 'flax': '0.12.8', 'ml_collections': '1.1.0'}
  assert [f.level for f in doctor.check_versions(have, tested)] == ['ok']


def test_the_pins_are_read():
  pins = doctor.tested_versions()
  assert pins['jax'] == '0.10.2'
  assert pins['importlib-resources']


@pytest.mark.parametrize(
  ('hardware', 'plugin', 'environ', 'level'),
  [
    ('nvidia', None, {}, 'problem'),
    ('nvidia', None, {'JAX_PLATFORMS': 'cpu'}, 'warning'),
    ('nvidia', 'jax-cuda12-plugin', {}, 'ok'),
    ('nvidia', 'jax-cuda13-plugin', {}, 'ok'),
    ('tpu', None, {}, 'problem'),
    ('tpu', 'libtpu', {}, 'ok'),
    ('cpu', None, {}, 'ok'),
  ],
)
def test_an_accelerator_needs_its_build(hardware, plugin, environ, level):
  versions = GOOD | ({plugin: '1'} if plugin else {})
  found = doctor.check_accelerator(hardware, versions, environ)
  assert [f.level for f in found] == [level]
  if level == 'problem':
    build = {'nvidia': 'jax[cuda12]==0.10.2', 'tpu': 'jax[tpu]==0.10.2'}
    assert build[hardware] in found[0].fix


def test_tpu_is_told_from_googles_network_card():
  assert environment.vendor_is_tpu('0x1ae0\n', '0x0063\n')
  assert not environment.vendor_is_tpu('0x1ae0\n', '0x0042\n')
  assert not environment.vendor_is_tpu('0x10de\n', '0x0063\n')


def test_a_cpu_backend_on_an_accelerator_machine():
  found = doctor.check_devices('nvidia', {})
  assert [f.level for f in found] == ['problem']
  assert 'nvidia' in found[0].what
  hidden = doctor.check_devices('nvidia', {'CUDA_VISIBLE_DEVICES': ''})
  assert 'unset CUDA_VISIBLE_DEVICES' in hidden[0].fix
  asked = doctor.check_devices('nvidia', {'JAX_PLATFORMS': 'cpu'})
  assert [f.level for f in asked] == ['warning']
  assert [f.level for f in doctor.check_devices('cpu', {})] == ['ok']


def test_flags_that_would_end_the_program_are_found_before():
  found = doctor.check_devices('cpu', {'XLA_FLAGS': '--xla_bogus=1'})
  assert [f.level for f in found] == ['problem']
  assert found[0].what == 'XLA_FLAGS: this jaxlib does not know --xla_bogus'


def test_what_is_found_is_printed_at_once(monkeypatch, capsys):
  """Whatever ends the program in the last check, the others are told."""

  def ends(hardware, environ):
    raise SystemExit(134)

  monkeypatch.setattr(doctor, 'check_devices', ends)
  with pytest.raises(SystemExit):
    doctor.run()
  out = capsys.readouterr().out
  assert 'accelerator of this machine' in out and ' free in ' in out


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp('texts'))
  toy_config.write_data(folder)
  return folder


def test_a_config_that_can_run_has_no_problem(texts, tmp_path):
  cfg = toy_run.config(texts, mesh__data=-1)
  found = list(doctor.check_config(cfg, str(tmp_path)))
  assert problems(found) == []
  assert f'text {texts}/text.jsonl is there' in [f.what for f in found]


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'data__text': ('/nope/a.txt',)}, '/nope/a.txt'),
    (
      {'evals': ('log_perplexity',), 'eval__data': ('heldout', '/nope/b.txt')},
      '/nope/b.txt',
    ),
    (
      {'stages': ('lm', 'sft'), 'data__questions': ('/nope/c.jsonl',)},
      '/nope/c.jsonl',
    ),
    ({'data__tokenizer': '/nope/d'}, '/nope/d'),
    ({'data__encoder_tokenizer': '/nope/e'}, '/nope/e'),
    ({'init_from': '/nope/f'}, '/nope/f'),
    ({'mesh__data': 3}, 'mesh data=3'),
    ({'stage__lm__batch_size': 3}, 'batch_size=8 would'),
    ({'model__attention': 'splash'}, 'attention is splash'),
    ({'stages': ('cpt',)}, 'starts from a finished reconstruct'),
  ],
)
def test_what_a_run_would_refuse_is_found(changes, said, texts, tmp_path):
  cfg = toy_run.config(texts, **{'mesh__data': -1} | changes)
  found = problems(doctor.check_config(cfg, str(tmp_path / 'w')))
  assert [f.what for f in found if said in f.what]
  assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize(
  ('package', 'changes'),
  [
    ('tensorboardX', {'tensorboard': True}),
    ('bm25s', {'stages': ('lm', 'sft')}),
  ],
)
def test_a_package_that_is_missing_is_found(
  package, changes, texts, tmp_path, monkeypatch
):
  """By the doctor, and by a run before it reads any text."""
  cfg = toy_run.config(texts, mesh__data=-1, **changes)
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, 'find_spec', lambda n: None if n == package else find(n)
  )
  monkeypatch.setitem(sys.modules, package, None)
  found = problems(doctor.check_config(cfg, str(tmp_path)))
  assert [f.what for f in found if package in f.what]
  monkeypatch.setattr(training, 'check_order', lambda *_: None)
  with pytest.raises(UserError, match=package):
    training.run_stages(cfg, str(tmp_path), None)


def test_one_mistake_is_told_once(texts, tmp_path, monkeypatch, capsys):
  """Several checks need the mesh."""
  monkeypatch.setattr(doctor, 'check_workdir', lambda workdir: [])
  assert doctor.run(toy_run.config(texts, mesh__data=3), str(tmp_path)) == 1
  assert capsys.readouterr().out.count('mesh data=3') == 1


def test_proxies_and_half_clusters():
  found = doctor.check_environment({'https_proxy': 'http://p:1'})
  assert [f.level for f in found] == ['warning']
  found = doctor.check_environment({'REFRAG_PROCESS_ID': '0'})
  assert [f.level for f in found] == ['problem']
  assert doctor.check_environment({}) == []


def test_disk(tmp_path, monkeypatch):
  there = doctor.check_workdir(str(tmp_path / 'not' / 'yet'))
  assert [f.level for f in there] in (['ok'], ['warning'])
  assert list(tmp_path.iterdir()) == []
  usage = type('usage', (), {'free': 2**20})
  monkeypatch.setattr(doctor.shutil, 'disk_usage', lambda path: usage)
  assert doctor.check_workdir(str(tmp_path))[0].level == 'warning'

  def read_only(**kwargs):
    raise OSError(30, 'Read-only file system')

  monkeypatch.setattr(doctor.tempfile, 'NamedTemporaryFile', read_only)
  found = doctor.check_workdir(str(tmp_path))
  assert [f.level for f in found] == ['problem']


def test_the_exit_code_says_whether_there_is_a_problem(monkeypatch, capsys):
  monkeypatch.setattr(environment, 'accelerator', lambda: 'cpu')
  monkeypatch.setattr(environment, 'versions', lambda: dict(GOOD))
  monkeypatch.setattr(doctor, 'tested_versions', dict)
  monkeypatch.setattr(doctor, 'check_workdir', lambda workdir: [])
  assert doctor.run() == 0
  assert 'ready to run' in capsys.readouterr().out
  bad = GOOD | {'jax': '0.11.1', 'jaxlib': '0.11.1'}
  monkeypatch.setattr(environment, 'versions', lambda: bad)
  assert doctor.run() == 1
  assert 'flax 0.12.8 with jax 0.11.1' in capsys.readouterr().out
