"""The launch scripts, run with stand-ins for the schedulers that they talk to."""

import math
import os
import re
import shutil
import subprocess

import pytest
import yaml

from refrag_jax.runtime.environment import ROOT

LAUNCH = ROOT / 'launch'
SCRIPTS = sorted(path.name for path in LAUNCH.glob('*.sh'))


@pytest.mark.parametrize('name', SCRIPTS)
def test_the_shell_reads_it(name):
  subprocess.run(['bash', '-n', LAUNCH / name], check=True)
  assert os.access(LAUNCH / name, os.X_OK)


@pytest.fixture
def run(tmp_path):
  """Runs a script in a copy of launch/ whose run.sh and tools only log."""
  shutil.copytree(LAUNCH, tmp_path / 'launch')
  (tmp_path / 'bin').mkdir()
  log = tmp_path / 'log'

  def tool(path, code='exit 0'):
    path.write_text(
      f'#!/bin/bash\n{{ echo -n "$(basename "$0")"; printf " %q" "$@"; echo; }}'
      f' >>{log}\n{code}\n'
    )
    path.chmod(0o755)

  tool(tmp_path / 'launch' / 'run.sh')

  def script(name, *arguments, tools, **environment):
    for program, code in tools.items():
      tool(tmp_path / 'bin' / program, code)
    env = {'PATH': f'{tmp_path / "bin"}:{os.environ["PATH"]}'} | environment
    done = subprocess.run(
      [tmp_path / 'launch' / name, *arguments],
      env=env, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    lines = log.read_text().splitlines() if log.exists() else []
    return done.returncode, lines, done.stderr

  return script


ARGUMENTS = ('--config=a.py', '--config.data.text=two words.txt')
QUOTED = r'--config=a.py --config.data.text=two\ words.txt'


@pytest.mark.parametrize(('code', 'again'), [(0, 0), (75, 1), (1, 0), (2, 0)])
def test_slurm_requeues_what_was_stopped(run, tmp_path, code, again):
  returned, lines, _ = run(
    'slurm.sh', *ARGUMENTS, SLURM_JOB_ID='7', SLURM_SUBMIT_DIR=str(tmp_path),
    SLURM_CPUS_PER_TASK='12',
    tools={'srun': f'exit {code}', 'scontrol': 'exit 0'},
  )  # fmt: skip
  assert returned == code
  assert lines[0] == 'run.sh --help'  # .venv before the ranks
  assert lines[1] == (
    f'srun --cpus-per-task=12 --wait=600 launch/run.sh {QUOTED}'
  )
  assert lines[2:] == ['scontrol requeue 7'] * again


def test_slurm_says_how_it_is_started(run):
  returned, _, err = run('slurm.sh', tools={})
  assert returned != 0 and 'sbatch launch/slurm.sh' in err


def test_slurm_asks_for_a_signal_before_the_end():
  text = (LAUNCH / 'slurm.sh').read_text()
  assert re.search(r'^#SBATCH --signal=TERM@\d+$', text, re.M)
  assert re.search(r'^#SBATCH --requeue$', text, re.M)
  tasks, cards = re.findall(r'--(?:ntasks|gpus)-per-node=(\d+)', text)
  assert tasks == cards


def test_mpirun_starts_a_rank_a_card(run):
  returned, lines, _ = run(
    'mpi.sh', *ARGUMENTS, HOSTS='a:8,b:8', tools={'mpirun': 'exit 3'}
  )
  assert returned == 3
  assert lines[-1] == (
    rf'mpirun --host a:8\,b:8 --bind-to none launch/run.sh {QUOTED}'
  )
  returned, _, err = run('mpi.sh', *ARGUMENTS, tools={})
  assert returned != 0 and 'set HOSTS=' in err


def test_a_tpu_goes_on_until_it_is_done(run, tmp_path):
  stops = f'n=$(grep -c "worker=all" {tmp_path}/log); [ "$n" -gt 2 ] || exit 75'
  returned, lines, _ = run(
    'tpu_vm.sh', 'run', *ARGUMENTS, tools={'gcloud': stops}
  )
  assert returned == 0 and len(lines) == 3
  command = lines[-1].replace('\\', '')
  assert 'tpu-vm ssh refrag --worker=all' in command
  assert 'cd refrag_jax && launch/run.sh --config=a.py' in command
  returned, lines, _ = run(
    'tpu_vm.sh', 'run', *ARGUMENTS, tools={'gcloud': 'exit 2'}
  )
  assert returned == 2 and len(lines) == 4  # wrong input is not repeated


def test_a_tpu_is_asked_for_and_given_back(run):
  ready = 'case "$*" in *describe*) echo ACTIVE;; esac'
  returned, lines, _ = run(
    'tpu_vm.sh', 'create', REPOSITORY='https://x/y', tools={'gcloud': ready}
  )
  assert returned == 0
  assert 'queued-resources create refrag' in lines[0]
  assert 'git' in lines[-1] and 'clone' in lines[-1]
  assert 'python3.11-venv' in lines[-1]  # the image has 3.10
  failed = 'case "$*" in *describe*) echo FAILED;; esac'
  returned, _, err = run(
    'tpu_vm.sh', 'create', REPOSITORY='https://x/y', tools={'gcloud': failed}
  )
  assert returned == 1 and 'FAILED' in err  # and does not wait for ever
  returned, lines, _ = run('tpu_vm.sh', 'delete', tools={'gcloud': ''})
  assert returned == 0 and 'queued-resources delete refrag' in lines[-1]
  returned, _, err = run('tpu_vm.sh', 'create', tools={'gcloud': ''})
  assert returned != 0 and 'REPOSITORY' in err
  assert run('tpu_vm.sh', tools={})[0] == 2


def test_the_hosts_of_the_jobset_are_the_topology():
  jobset = yaml.safe_load((LAUNCH / 'gke_jobset.yaml').read_text())
  job = jobset['spec']['replicatedJobs'][0]['template']['spec']
  pod = job['template']['spec']
  chips = pod['containers'][0]['resources']['limits']['google.com/tpu']
  shape = pod['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x')
  assert job['parallelism'] == job['completions']
  assert job['parallelism'] * chips == math.prod(map(int, shape))
  # Wrong input must not be tried a hundred times.
  [rule] = job['podFailurePolicy']['rules']
  assert rule['onExitCodes']['values'] == [2]
  assert rule['onExitCodes']['containerName'] == pod['containers'][0]['name']
  [policy] = jobset['spec']['failurePolicy']['rules']
  assert policy['action'] == 'FailJobSet'


def test_skypilot_starts_one_process_a_host():
  task = yaml.safe_load((LAUNCH / 'skypilot.yaml').read_text())
  environment = {
    'SKYPILOT_NODE_IPS': '10.0.0.1\n10.0.0.2', 'SKYPILOT_NUM_NODES': '2',
    'SKYPILOT_NODE_RANK': '1', 'PATH': os.environ['PATH'], **task['envs'],
  }  # fmt: skip
  shown = task['run'].replace('launch/run.sh', 'env; echo')
  out = subprocess.run(
    ['bash', '-c', shown], env=environment, capture_output=True, text=True
  ).stdout
  recovery = task['resources']['job_recovery']
  assert recovery['recover_on_exit_codes'] == [75]
  for line in (
    'JAX_COORDINATOR_ADDRESS=10.0.0.1:8476',
    'REFRAG_NUM_PROCESSES=2',
    'REFRAG_PROCESS_ID=1',
    f'--config={task["envs"]["CONFIG"]} --workdir={task["envs"]["WORKDIR"]}',
  ):
    assert line in out
  assert (ROOT / task['envs']['CONFIG']).exists()


@pytest.mark.parametrize('name', ['Dockerfile.cuda', 'Dockerfile.tpu'])
def test_images_have_the_tested_jax(name):
  text = (LAUNCH / name).read_text()
  pin = re.search(r'^jax==(.*)$', (ROOT / 'requirements.txt').read_text(), re.M)
  assert f']=={pin[1]}' in text
  assert '"-m", "refrag_jax.main"' in text
  for source in re.findall(r'^COPY (\S+) ', text, re.M):
    assert (ROOT / source).exists()
