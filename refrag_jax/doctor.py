"""`--mode=doctor`: versions, known-bad pairs, devices, disk, what to fix.

Every check of the machine is a function of plain facts (versions, environment
variables), so that a test can hand it the facts of a broken one. With a config,
what a run of it would refuse at its start is found by the run's own checks.
"""

import dataclasses
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping

from refrag_jax.config.schema import Config
from refrag_jax.errors import UserError
from refrag_jax.runtime import environment

# Runs need room for two checkpoints at least; less is worth a warning.
_LOW_DISK_BYTES = 5 * 2**30
_REQUIREMENTS = environment.ROOT / 'requirements.txt'


@dataclasses.dataclass(frozen=True)
class Finding:
  level: str  # 'ok', 'warning' or 'problem'
  what: str
  fix: str = ''


def run(config: Config | None = None, workdir: str = '') -> int:
  """Prints each finding as it comes; returns 1 if one is a problem, else 0.

  Args:
    config: also look at what a training by it needs.
    workdir: of that training.
  """
  installed = environment.versions()
  hardware = environment.accelerator()
  print(*(f'{name} {version}' for name, version in installed.items()), sep='\n')
  print(flush=True)
  problems, told = 0, set()
  for finding in findings(config, workdir, hardware, installed):
    if finding in told:  # such as a mesh that several checks need
      continue
    told.add(finding)
    problems += finding.level == 'problem'
    print(f'{finding.level:8} {finding.what}')
    if finding.fix:
      print(f'{"":8} -> {finding.fix}')
    # What comes next may never come back.
    print(end='', flush=True)
  print(f'\n{problems} problems' if problems else '\nready to run')
  return 1 if problems else 0


def findings(
  config: Config | None,
  workdir: str,
  hardware: str,
  installed: Mapping[str, str],
) -> Iterator[Finding]:
  """All findings; JAX starts late, and a config is looked at where it does."""
  yield from check_versions(installed, tested_versions())
  yield from check_pairs(installed)
  yield from check_accelerator(hardware, installed, os.environ)
  yield from check_environment(os.environ)
  yield from check_workdir(workdir or '.')
  environment.set_platform(os.environ, hardware)
  if config is not None:
    flags = config.cluster.xla_flags, config.cluster.libtpu_flags
    environment.set_flags(os.environ, hardware, *flags)
  found = check_devices(hardware, os.environ)
  yield from found
  started = all(finding.level != 'problem' for finding in found)
  if config is not None and started:
    yield from check_config(config, workdir)


def tested_versions() -> dict[str, str]:
  """The pins of requirements.txt; empty where there is no checkout."""
  if not _REQUIREMENTS.exists():
    return {}
  pins = re.findall(
    r'^([\w.-]+)==([\w.]+)', _REQUIREMENTS.read_text(), flags=re.MULTILINE
  )
  return {_normal(name): version for name, version in pins}


def _normal(name: str) -> str:
  return re.sub(r'[-_.]+', '-', name).lower()


def _number(version: str) -> tuple[int, ...]:
  """'0.11.1rc2' as (0, 11, 1), to compare by."""
  return tuple(int(n) for n in re.findall(r'\d+', version)[:3])


def check_versions(
  installed: Mapping[str, str], tested: Mapping[str, str]
) -> list[Finding]:
  """Installed packages against those that the tests ran with."""
  have = {_normal(name): version for name, version in installed.items()}
  findings = []
  watched = {_normal(name) for name in environment.PACKAGES}
  for name in sorted(watched & set(tested)):
    pip = f'pip install {name}=={tested[name]}'
    if name not in have:
      findings.append(Finding('problem', f'{name} is not installed', pip))
    elif have[name] != tested[name]:
      what = f'{name} {have[name]} is installed, {tested[name]} was tested'
      findings.append(Finding('warning', what, f'if something fails: {pip}'))
  if not findings and tested:
    findings.append(Finding('ok', 'the tested versions are installed'))
  return findings


def check_pairs(installed: Mapping[str, str]) -> list[Finding]:
  """Combinations that are known not to work together."""
  have = {_normal(name): version for name, version in installed.items()}
  number = {name: _number(version) for name, version in have.items()}
  problems = []

  def bad(what: str, fix: str) -> None:
    problems.append(Finding('problem', what, fix))

  pair = 'pip install jax==0.10.2 jaxlib==0.10.2 flax==0.12.8'
  jax, flax = number.get('jax', ()), number.get('flax', ())
  both = f'flax {have.get("flax")} with jax {have.get("jax")}'
  # flax issue 5596 and others: `import flax.nnx`, and so `import flax`, fails.
  if flax == (0, 12, 8) and jax >= (0, 11, 1):
    bad(f'{both} cannot be imported', pair)
  if flax == (0, 12, 9) and jax >= (0, 11, 2):
    bad(f'{both} cannot be imported', pair)
  if jax and jax < (0, 10):
    bad(f'jax {have["jax"]} lacks jax.set_mesh and others', pair)
  if number.get('python', (3, 11)) < (3, 11):
    bad(f'Python {have["python"]} is too old', 'use Python 3.11 or later')
  if have.get('jax') and have.get('jaxlib') and jax != number['jaxlib']:
    bad(
      f'jax {have["jax"]} with jaxlib {have["jaxlib"]}: they must be equal',
      f'pip install jaxlib=={have["jax"]}',
    )
  for plugin in ('jax-cuda12-plugin', 'jax-cuda13-plugin'):
    if plugin in have and jax and number[plugin] != jax:
      bad(
        f'{plugin} {have[plugin]} with jax {have["jax"]}: they must be equal',
        f'pip install "jax[{plugin[4:10]}]=={have["jax"]}"',
      )
  if 'tensorflow-datasets' in have and 'importlib-resources' not in have:
    # It imports the package, but asks for it on Python 3.8 only (tensorflow/
    # datasets issue 11212).
    bad(
      'tensorflow-datasets lacks importlib_resources',
      'pip install importlib_resources',
    )
  if 'transformers' in have and number['transformers'] < (5,):
    bad(
      f'transformers {have["transformers"]} keeps rope_theta elsewhere',
      'pip install "transformers>=5.13,<6"',
    )
  if 'orbax-checkpoint' in have and not (
    (0, 12, 3) <= number['orbax-checkpoint'] < (0, 13)
  ):
    bad(
      f'orbax-checkpoint {have["orbax-checkpoint"]} has another interface',
      'pip install "orbax-checkpoint>=0.12.3,<0.13"',
    )
  return problems or [Finding('ok', 'no known-bad pair of packages')]


def check_accelerator(
  hardware: str, installed: Mapping[str, str], environ: Mapping[str, str]
) -> list[Finding]:
  """An accelerator is there, and JAX was installed with it."""
  lacks = environment.jax_build(hardware, installed)
  if not lacks:
    return [Finding('ok', f'accelerator of this machine: {hardware}')]
  level = 'warning' if environ.get('JAX_PLATFORMS') == 'cpu' else 'problem'
  return [
    Finding(
      level,
      f'this machine has an accelerator ({hardware}), JAX was installed '
      'without it: everything would run on the CPU',
      f'pip install "{lacks}", or let launch/run.sh do it',
    )
  ]


def check_environment(environ: Mapping[str, str]) -> list[Finding]:
  """Variables that change what a run does, often unnoticed."""
  findings = []
  proxies = [
    name
    for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY')
    if environ.get(name)
  ]
  if proxies:
    findings.append(
      Finding(
        'warning',
        f'{", ".join(proxies)} set: processes on several machines may not '
        'find each other through a proxy',
        'name the machines in no_proxy, or unset it for the run',
      )
    )
  for name, why in (
    ('XLA_FLAGS', 'changes what is compiled'),
    ('JAX_PLATFORMS', 'chooses the device'),
    ('JAX_ENABLE_X64', 'makes numbers 64 bits wide'),
    ('XLA_PYTHON_CLIENT_MEM_FRACTION', "limits the device's memory"),
  ):
    if environ.get(name):
      findings.append(Finding('ok', f'{name}={environ[name]} {why}'))
  try:
    arguments = environment.cluster(environ, 'cpu')
    if arguments is not None:
      findings.append(Finding('ok', 'this is one process of several'))
  except UserError as e:
    findings.append(Finding('problem', 'half a cluster is described', str(e)))
  return findings


def check_workdir(workdir: str) -> list[Finding]:
  """There is room in the workdir (or where it will be) and it is writable."""
  there = os.path.abspath(workdir)
  while not os.path.isdir(there):
    there = os.path.dirname(there)
  try:
    with tempfile.NamedTemporaryFile(dir=there):
      pass
  except OSError as e:
    return [
      Finding(
        'problem',
        f'cannot write to {there}: {e.strerror}',
        'choose another --workdir',
      )
    ]
  free = shutil.disk_usage(there).free
  text = f'{free / 2**30:.1f} GiB free in {there}'
  if free < _LOW_DISK_BYTES:
    return [Finding('warning', text, 'checkpoints may not fit; make room')]
  return [Finding('ok', text)]


def check_devices(hardware: str, environ: Mapping[str, str]) -> list[Finding]:
  """Starts JAX and looks at what it found."""
  if problem := environment.bad_flags(environ.get('XLA_FLAGS', '')):
    fix = 'take it out of XLA_FLAGS, or of config.cluster.xla_flags'
    return [Finding('problem', problem, fix)]
  try:
    environment.start_jax()
    import jax  # last and here: a broken pair must not hide the other findings

    devices, backend = jax.devices(), jax.default_backend()
  except UserError as e:
    return [Finding('problem', str(e))]
  except Exception as e:
    return [
      Finding(
        'problem',
        f'JAX does not start: {_of_exception(e)}',
        'see the findings above; else: pip install -r requirements.txt',
      )
    ]
  text = f'JAX sees {len(devices)} x {devices[0].device_kind} ({backend})'
  if backend == 'cpu' and hardware != 'cpu':
    asked = environ.get('JAX_PLATFORMS') == 'cpu'
    fix = 'look at the driver (nvidia-smi) and at who else uses the device'
    if asked:
      fix = 'unset JAX_PLATFORMS'
    elif environ.get('CUDA_VISIBLE_DEVICES') in ('', '-1'):
      fix = 'unset CUDA_VISIBLE_DEVICES, which hides all cards'
    return [
      Finding(
        'warning' if asked else 'problem',
        f'{text}, but the machine has {hardware}',
        fix,
      )
    ]
  return [Finding('ok', text)]


def check_config(config: Config, workdir: str) -> Iterator[Finding]:
  """What a training by this config would refuse, each check by itself."""
  # Here: it imports JAX, which a broken machine cannot.
  from refrag_jax import resolve

  try:
    resolve.check(config)
  except UserError as e:  # nothing else can be asked of such stages
    yield Finding('problem', str(e))
    return
  for what, check in run_checks(config, workdir):
    try:
      check()
    except UserError as e:
      yield Finding('problem', str(e))
    except Exception as e:
      yield Finding('problem', f'{what}: {_of_exception(e)}')
    else:
      yield Finding('ok', what)


def run_checks(
  config: Config, workdir: str
) -> Iterator[tuple[str, Callable[[], object]]]:
  """(what holds if it raises nothing, check); none reads a text to its end.

  Raises:
    UserError: by a check, what does not hold.
  """
  from refrag_jax import evaluate, lineage, sharding
  from refrag_jax.data import tokenizers
  from refrag_jax.data.questions import records as questions
  from refrag_jax.data.text import sources as text
  from refrag_jax.evals import question_files
  from refrag_jax.hf import hub
  from refrag_jax.run import check_extras
  from refrag_jax.session import (
    check_batches,
    open_model,
    settle_attention,
    trained_groups,
  )

  data, session = config.data, functools.cache(lambda: open_model(config))

  def question(path: str):
    if not questions.read(config, path, questions.Skipped()):
      raise UserError(f'data.questions: {path} has no usable record')

  def start(name: str):
    opened = session()._replace(workdir=workdir)
    source = lineage.init_from(opened, name, check=False)
    parts = source.split(',')
    if any(map(hub.is_name, parts)):  # not the weights, only to look
      return [hub.resolve(part, weights=False) for part in parts]
    why = f'stage {name} starts from {source}'
    return trained_groups(opened, source, why)

  yield (
    'each stage has what it starts from',
    lambda: lineage.check_order(config, workdir),
  )
  yield (
    'the packages for these stages and evals are installed',
    lambda: check_extras(config),
  )
  measured = [name for name in config.eval.data if name != evaluate.HELDOUT]
  for source in (*data.text, *(measured if config.evals else ())):
    yield f'text {source} is there', functools.partial(text.stat, source)
  for path in question_files(config):
    yield f'questions {path} can be read', functools.partial(question, path)
  for name in dict.fromkeys((data.tokenizer, data.encoder_tokenizer)):
    yield f'tokenizer {name} is there', functools.partial(tokenizers.load, name)
  yield (
    'the devices make the mesh',
    lambda: sharding.make_mesh(**dataclasses.asdict(config.mesh)),
  )
  yield (
    'vocabularies, batches and attention fit',
    lambda: (
      check_batches(session()),
      settle_attention(session()),
    ),
  )
  for name in config.stages:
    if lineage.init_from_config(config, name):
      yield f'stage {name} can start', functools.partial(start, name)


def _of_exception(error: Exception) -> str:
  return f'{type(error).__name__}: {" ".join(str(error).split())}'
