"""Entry point: python -m refrag_jax.main --config=FILE.py[:preset] ...

Kept short: it parses, dispatches and turns errors into exit codes. A mode's
module is imported when it is asked for, so that --help needs no JAX.
"""

import contextlib
import errno
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator

from refrag_jax import cli, environment, typed
from refrag_jax.errors import NonFinite, Stopped, UserError

# mode: (module, function called with (config, workdir), what it does)
MODES = {
  'train': ('refrag_jax.train', 'run', 'run the stages, then the evals'),
  'eval': ('refrag_jax.evaluate', 'run', 'restore a checkpoint, run the evals'),
  'repro': (
    'refrag_jax.repro',
    'run',
    'run the ablation arms of a config, write verdicts',
  ),
  'data': ('refrag_jax.show', 'run', 'show examples as the model sees them'),
  'import': (
    'refrag_jax.exchange',
    'run_import',
    'Hugging Face models to a checkpoint: --from=DECODER[,ENCODER] [--to=DIR]',
  ),
  'export': (
    'refrag_jax.exchange',
    'run_export',
    'a checkpoint to Hugging Face directories: --from=CHECKPOINT --to=DIR',
  ),
  'plan': (
    'refrag_jax.plan',
    'run',
    'memory and time of every stage on machines that are not there: '
    '--topology=h100:8x8 [--search]',
  ),
  'doctor': ('refrag_jax.doctor', 'run', 'check this machine and its packages'),
}
LATER = {
  'index': 'store the chunk vectors of passages',
  'ask': 'answer one question over a store',
  'chat': 'converse over a store',
  'serve': 'answer over HTTP',
  'bench': 'measure latency',
}
ALONE = ('data', 'plan')  # need no other process of a cluster
# Flags of one's own, handed over in this order.
FLAGS = {
  'import': ('from', 'to'),
  'export': ('from', 'to'),
  'plan': ('topology', 'search'),
}
# The disk's fault, not the program's: one line says more than a traceback.
_DISK = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT)


def main(argv: list[str]) -> int:
  """Runs one mode and returns the exit code: 0, 1, 2 or 75."""
  try:
    return _dispatch(argv) or 0
  except (UserError, Stopped, NonFinite) as e:
    _say(str(e))
    return e.exit_code
  except KeyboardInterrupt:
    _say('interrupted; the same command continues from the last checkpoint')
    return 1
  except BrokenPipeError:  # as of `... | head`: whoever read has enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except OSError as e:
    if e.errno not in _DISK:
      raise
    _say(f'cannot write or read {e.filename or "a file"}: {e.strerror}')
    return 1


def _dispatch(argv: list[str]) -> int | None:
  command = cli.parse(argv)
  if command.help:
    print(cli.usage(MODES, LATER))
    return 0
  if command.mode in LATER:
    raise UserError(f'--mode={command.mode} is not there yet; see --help')
  if command.mode not in MODES:
    hint = typed.did_you_mean(command.mode, [*MODES, *LATER])
    hint = hint or f'; there are {", ".join(MODES)}'
    raise UserError(f'there is no --mode={command.mode}{hint}')
  module, function, _ = MODES[command.mode]
  own = FLAGS.get(command.mode, ())
  for flag, value in command.flags.items():
    if value and flag not in own:
      raise UserError(f'--mode={command.mode} takes no --{flag}')
  config, workdir = None, command.workdir
  if command.config_file or command.mode != 'doctor':
    loaded = cli.load(command)
    config = loaded.config
    workdir = loaded.command.workdir or f'runs/{config.name}'
  if command.mode != 'doctor':
    environment.set_compilation_cache(os.environ)
    cluster = config.cluster
    environment.set_flags(
      os.environ,
      environment.accelerator(),
      cluster.xla_flags,
      cluster.libtpu_flags,
    )
    if command.mode in ALONE or environment.join_cluster(
      cluster.join_seconds, cluster.heartbeat_seconds
    ):
      cli.announce(loaded, workdir)
  with _stopping():
    run = getattr(importlib.import_module(module), function)
    return run(config, workdir, *(command.flags[flag] for flag in own))


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
  """SIGTERM ends what has nothing to save, and asks to be run again.

  As soon as Python runs again: not within a compilation. Trainings and evals
  take the signal for themselves, to save first and to agree with the other
  processes (stopping.py); before those each process ends by itself, and a
  scheduler tells all of them. JAX takes it as well, joining a cluster: this
  comes after.
  """

  def stop(signum, frame):
    del signum, frame
    raise Stopped('SIGTERM: stopped; the same command starts this again')

  old = signal.signal(signal.SIGTERM, stop)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, old)


def _say(message: str) -> None:
  print(f'refrag_jax: {message}', file=sys.stderr, flush=True)


if __name__ == '__main__':
  try:
    code = main(sys.argv[1:])
  except Exception:  # anything else is a bug, or the machine's: show it whole
    traceback.print_exc()
    code = 1
  if code == 1:
    # After a save that failed, Orbax's threads wait five minutes for a
    # directory that will never be there, and Python would wait for them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  sys.exit(code)
