"""Entry point: python -m refrag_jax.main --config=FILE.py[:preset] ...

Kept short: it parses, dispatches and turns errors into exit codes. A mode's
module is imported when it is asked for, so that --help needs no JAX.
"""

import contextlib
import errno
import importlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator

from refrag_jax import cli
from refrag_jax.config import typed
from refrag_jax.errors import NonFinite, Stopped, UserError
from refrag_jax.runtime import environment, stopping, watchdog
from refrag_jax.runtime import workdir as workdir_lib

# mode: (module, function called with (config, workdir), what it does); those
# of OF_COMMAND are called with the command.
MODES = {
  'train': ('refrag_jax.run', 'run', 'run the stages, then the evals'),
  'eval': ('refrag_jax.evaluate', 'run', 'restore a checkpoint, run the evals'),
  'repro': (
    'refrag_jax.repro.run',
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
    'a checkpoint to Hugging Face directories: --from=CHECKPOINT --to=DIR; '
    'with --changes only what was trained, in bfloat16',
  ),
  'plan': (
    'refrag_jax.plan.run',
    'run',
    'memory and time of every stage on machines that are not there: '
    '--topology=h100:8x8 [--search] [--serving]',
  ),
  'ask': (
    'refrag_jax.serve.ask',
    'run',
    'answer a question: "QUESTION" [--passages=FILE] [--expand=0.1|3|64t] '
    '[--selector=NAME] [--from=CHECKPOINT]',
  ),
  'bench': (
    'refrag_jax.serve.bench',
    'run',
    'measure how soon answers come, against full context [--from=CHECKPOINT]',
  ),
  'config': (
    'refrag_jax.describe',
    'run',
    'print a config whole, its --schema, or the configs that there are',
  ),
  'doctor': ('refrag_jax.doctor', 'run', 'check this machine and its packages'),
}
LATER = {
  'index': 'store the chunk vectors of passages',
  'chat': 'converse over a store',
  'serve': 'answer over HTTP',
}
ALONE = ('data', 'plan', 'ask', 'bench')  # need no other process of a cluster
WRITERS = ('train', 'eval')  # one of them a workdir; of repro's, one an arm
# The plan's devices are not there; the doctor starts JAX as its last check.
NO_DEVICES = ('plan', 'doctor')
OF_COMMAND = ('config',)  # no devices, no cluster, and nothing is written
# Flags of one's own, handed over in this order.
FLAGS = {
  'import': ('from', 'to'),
  'export': ('from', 'to', 'changes'),
  'plan': ('topology', 'search', 'serving'),
  'ask': ('question', 'passages', 'expand', 'selector', 'from'),
  'bench': ('from',),
  'config': ('schema',),
}
# The machine's fault, not the program's: one line says more than a traceback.
# Each with what to do, where that is not plain.
_DISK = {
  getattr(errno, name): advice
  for name, advice in {
    'EACCES': '',
    'EBUSY': '',
    'EDQUOT': '',
    'EFBIG': "raise the limit of a file's size (ulimit -f)",
    'EHOSTDOWN': '',
    'EIO': 'the disk, or the way to it, fails: see dmesg',
    'EISDIR': '',
    'ELOOP': 'a symbolic link leads back to itself',
    'EMFILE': 'raise the limit of open files (ulimit -n)',
    'ENAMETOOLONG': 'choose a shorter path',
    'ENFILE': 'the whole machine has too many files open',
    'ENODEV': 'mount the disk again',
    'ENOLCK': 'the network disk gives no locks',
    'ENOSPC': '',
    'ENOTCONN': 'mount the network disk again',
    'ENOTDIR': '',
    'ENXIO': '',
    'EPERM': '',
    'EREMOTEIO': 'the network disk fails',
    'EROFS': '',
    'ESTALE': 'the network disk was changed under this run: mount it again',
    'ETIMEDOUT': 'the network disk does not answer',
  }.items()
  if hasattr(errno, name)  # not all systems have all
}


def main(argv: list[str]) -> int:
  """Runs one mode and returns the exit code: 0, 1, 2 or 75."""
  _take_any_text()
  stopping.heard.clear()
  try:
    code = _dispatch(argv) or 0
    sys.stdout.flush()
    return code
  except (UserError, Stopped, NonFinite) as e:
    _say(str(e))
    return e.exit_code
  except KeyboardInterrupt:
    _say('interrupted; the same command continues from the last checkpoint')
    return 1
  except BrokenPipeError:  # as of `... | head`: whoever read has enough
    stopping.detach(sys.stdout)
    return 1
  except Exception as e:
    line = _of_disk(e)
    if not line:
      raise
    _say(line)
    return 1
  finally:
    stopping.heard.clear()  # whoever called this may go on with other runs


def _take_any_text() -> None:
  """Lets a terminal, or a log, that knows no Unicode show '?' instead.

  Some schedulers close the streams; Python then has none.
  """
  for name in ('stdout', 'stderr'):
    stream = getattr(sys, name)
    if stream is None:
      setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115
    elif hasattr(stream, 'reconfigure'):  # a notebook's has not
      stream.reconfigure(errors='replace')


def _of_disk(error: BaseException | None) -> str:
  """The line that a disk's failure is told in; '' for any other error.

  Libraries pass it on as an error of theirs, caused by it or, from TensorStore,
  with its number and file in the text.
  """
  while error is not None:
    number, file, text = getattr(error, 'errno', None), '', str(error)
    if isinstance(error, OSError):
      file = os.fsdecode(error.filename or '')
    elif found := re.search(r"(?:OS error |os_error_code=')(\d+)", text):
      number = int(found[1])
      file = (re.findall(r'"(/[^"]+)"', text) or [''])[-1]
    if number in _DISK:
      advice = _DISK[number] and f'; {_DISK[number]}'
      return (
        f'cannot write or read {file or "a file"}: {os.strerror(number)}'
        f'{advice}'
      )
    error = error.__cause__ or error.__context__
  return ''


def _dispatch(argv: list[str]) -> int | None:
  for text in argv:
    shown = text.encode(errors='replace').decode()
    if shown != text:  # bytes that are no text: no library can name such a file
      raise UserError(
        f'{shown} is not in UTF-8: rename it, or set PYTHONUTF8=1 where the '
        'locale is another'
      )
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
  if command.mode in OF_COMMAND:
    with _stopping():
      return getattr(importlib.import_module(module), function)(command)
  config, workdir = None, command.workdir
  with _stopping():
    if command.config_file or command.mode != 'doctor':
      loaded = cli.load(command)
      config = loaded.config
      workdir = loaded.command.workdir or f'runs/{config.name}'
    if command.mode != 'doctor':  # which looks at all this as it is
      cluster, hardware = config.cluster, environment.accelerator()
      environment.set_platform(os.environ, hardware)
      environment.set_compilation_cache(os.environ)
      environment.set_flags(
        os.environ, hardware, cluster.xla_flags, cluster.libtpu_flags
      )
      if problem := environment.bad_flags(os.environ.get('XLA_FLAGS', '')):
        raise UserError(problem)
      from refrag_jax import resolve  # JAX, which reads the environment once

      resolve.check(config)
  first = False
  if command.mode != 'doctor':
    # Here JAX waits outside Python: a signal ends the process at once.
    first = command.mode in ALONE or environment.join_cluster(
      cluster.join_seconds, cluster.heartbeat_seconds
    )
  with _stopping():
    if command.mode not in NO_DEVICES:
      with watchdog.watch(config.cluster.hang_seconds):
        environment.start_jax()
    writes = first and command.mode in WRITERS
    with workdir_lib.held(workdir) if writes else contextlib.nullcontext():
      if first:
        cli.announce(loaded, workdir)
      run = getattr(importlib.import_module(module), function)
      return run(config, workdir, *(command.flags[flag] for flag in own))


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
  """A signal ends what has nothing to save, and asks to be run again.

  As soon as Python runs again: not within a compilation. Trainings and evals
  take the signal for themselves, to save first and to agree with the other
  processes (stopping.py); before those each process ends by itself, and a
  scheduler tells all of them. JAX takes SIGTERM as well, joining a cluster:
  this comes after.
  """

  def stop(signum, frame):
    del frame
    name = signal.Signals(signum).name
    stopping.heard.set()
    raise Stopped(f'{name}: stopped; the same command starts this again')

  with stopping.handling(stopping.SIGNALS, stop):
    yield


def _say(message: str) -> None:
  try:
    print(f'refrag_jax: {message}', file=sys.stderr, flush=True)
  except OSError:  # a closed terminal
    stopping.detach(sys.stderr)


if __name__ == '__main__':
  try:
    code = main(sys.argv[1:])
  except Exception:  # anything else is a bug, or the machine's: show it whole
    traceback.print_exc()
    code = 1
  if code == 1:
    # After a save that failed, Orbax's threads wait five minutes for a
    # directory that will never be there, and Python would wait for them.
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError):
        stream.flush()
    os._exit(code)
  sys.exit(code)
