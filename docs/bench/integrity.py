r"""Damages checkpoints in every way that a disk does, and counts what is found.

  PYTHONPATH=. .venv/bin/python docs/bench/integrity.py [--flips=240] \
    [--seed=0] > docs/bench/integrity.md

Trains a few steps of `lm`, damages a copy of the newest of its two steps, and
restores it as a resumed run does (parameters, optimizer state, meta) and as an
eval does (parameters). What comes back must be bit for bit what was saved, or
the step must be named as damaged and the sound one before it taken. Then it
times saves and restores with and without digests, in turns.
"""

import argparse
import collections
import contextlib
import io
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from configs import tiny
from refrag_jax import checkpoint, compilation, resolve, session
from refrag_jax.errors import UserError
from refrag_jax.state import TrainState

CHANGES = ('stages=lm', 'evals=()', 'checkpoint_every_steps=1')
TURNS = 41  # saves and restores of each kind
MEGABYTES = 256  # of the state whose saves are timed


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--flips', type=int, default=240)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    print('# Checkpoints that were damaged, and what was found of it\n')
    print(f'`python docs/bench/integrity.py --flips={args.flips} '
          f'--seed={args.seed}`, jax {jax.__version__}, '
          f'orbax-checkpoint {checkpoint.ocp.__version__}, '
          f'{os.cpu_count()} CPU cores.\n')  # fmt: skip
    damage_all(folder, args.flips, random.Random(args.seed))
    time_all(folder)


def damage_all(folder: str, flips: int, rng: random.Random) -> None:
  opened = train(folder)
  directory = opened.checkpoint_dir('lm')
  abstract = compilation.abstract_state(opened, 'lm')
  step, state, meta = checkpoint.restore(directory, abstract)
  newest = os.path.join(directory, str(step))
  files = sorted(
    os.path.relpath(os.path.join(at, name), newest)
    for at, _, names in os.walk(newest)
    for name in names
  )
  trials = [('one bit flipped', flip, file) for file in files for _ in range(4)]
  sizes = [os.path.getsize(os.path.join(newest, file)) for file in files]
  more = max(0, flips - len(trials))
  trials += [
    ('one bit flipped', flip, file)
    for file in rng.choices(files, sizes, k=more)
  ]
  trials += [('truncated', truncate, file) for file in files]
  trials += [('emptied', empty, file) for file in files]
  trials += [('deleted', delete, file) for file in files]
  trials += [('swapped with another', swap, file) for file in files]
  outcomes = collections.defaultdict(collections.Counter)
  for number, (kind, function, file) in enumerate(trials):
    copy = os.path.join(folder, f'copy{number}')
    shutil.copytree(directory, copy)
    broken = os.path.join(copy, str(step))
    function(os.path.join(broken, file), broken, files, rng)
    result = outcome(copy, abstract, step, state, meta)
    outcomes[kind][result] += 1
    if result in ('silent', 'crash'):
      print(f'{result}: {kind} {file}', file=sys.stderr)
    shutil.rmtree(copy)
  columns = ('found', 'harmless', 'silent', 'crash')
  print(f'A step of {len(files)} files: parameters, optimizer state, meta. '
        'Every file was damaged in every way, each in a fresh copy; the '
        'other flips went where the bytes are. Found: the step is named and '
        'the one before it taken, by a resumed run and by an eval. Harmless: '
        'what comes back is bit for bit what was saved.\n')  # fmt: skip
  print(f'| damage | times | {" | ".join(columns)} |')
  print('|---' * 6 + '|')
  for kind, counts in outcomes.items():
    cells = ' | '.join(str(counts[name]) for name in columns)
    print(f'| {kind} | {counts.total()} | {cells} |')
  print()


def train(folder: str) -> session.Session:
  """Two steps of `lm`, each saved; a better one, then the newest."""
  workdir = os.path.join(folder, 'run')
  flags = [f'--config.{change}' for change in CHANGES]
  subprocess.run(
    [sys.executable, '-m', 'refrag_jax.main', '--config=configs/tiny.py:smoke',
     f'--workdir={workdir}', *flags],
    check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
  )  # fmt: skip
  cfg = resolve.changed(resolve.build(tiny.get_config('smoke')), CHANGES)
  opened = session.open_session(cfg, workdir, with_text=False)
  directory = opened.checkpoint_dir('lm')
  abstract = compilation.abstract_state(opened, 'lm')
  # One more, worse: then two steps are there, whatever the loss was.
  step, state, meta = checkpoint.restore(directory, abstract)
  with checkpoint.open_manager(directory) as manager:
    checkpoint.save(manager, step + 1, state, meta, meta['loss'] + 1)
  assert len([name for name in os.listdir(directory) if name.isdigit()]) == 2
  return opened


def outcome(directory, abstract, step, state, meta) -> str:
  said = io.StringIO()
  try:
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
      params = checkpoint.load_params(directory, abstract.params)
      got_step, got, got_meta = checkpoint.restore(directory, abstract)
      with checkpoint.open_manager(directory) as manager:  # and a run goes on
        checkpoint.save(manager, step + 1, got, got_meta, 9.0)
      assert checkpoint.restore(directory, abstract)[0] == step + 1
  except UserError as e:
    return 'found' if f'{directory}/{step}' in str(e) else 'silent'
  except Exception as e:
    print(repr(e), file=sys.stderr)
    return 'crash'
  named = f'{directory}/{step} is damaged' in said.getvalue()
  if got_step != step:  # the step before has the same arrays, one step earlier
    sound = same(params, got.params) and got_step == step - 1
    return 'found' if named and sound else 'silent'
  whole = same((params, got), (state.params, state)) and got_meta == meta
  # Of what an eval reads nothing was damaged, or nothing at all.
  return 'harmless' if whole else 'silent'


def same(got, want) -> bool:
  return all(
    np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
  )


def flip(path, step, files, rng):
  del step, files
  with open(path, 'r+b') as f:
    data = bytearray(f.read())
    if data:
      data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    f.seek(0)
    f.write(data)


def truncate(path, step, files, rng):
  del step, files
  size = os.path.getsize(path)
  os.truncate(path, rng.randrange(size) if size else 0)


def empty(path, step, files, rng):
  del step, files, rng
  os.truncate(path, 0)


def delete(path, step, files, rng):
  del step, files, rng
  os.unlink(path)


def swap(path, step, files, rng):
  others = [os.path.join(step, file) for file in files]
  other = rng.choice([file for file in others if file != path])
  os.rename(path, path + '.aside')
  os.rename(other, path)
  os.rename(path + '.aside', other)


def time_all(folder: str) -> None:
  side = 1024
  arrays = {
    f'w{i}': jax.random.normal(jax.random.key(i), (side, side))
    for i in range(MEGABYTES * 2**20 // (4 * side * side))
  }
  state = TrainState(jax.numpy.int32(1), {'decoder': arrays}, {})
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    arrays,
  )
  seconds = collections.defaultdict(list)
  digests = checkpoint._digests
  for turn in range(TURNS):
    for kind in ('with', 'without') if turn % 2 else ('without', 'with'):
      directory = os.path.join(folder, f'{kind}{turn}')
      checkpoint._digests = digests if kind == 'with' else lambda tree: {}
      with checkpoint.open_manager(directory) as manager:
        clock = time.perf_counter()
        checkpoint.save(manager, 1, state, {}, 1.0)
        blocked = time.perf_counter() - clock
        manager.wait_until_finished()
        saved = time.perf_counter() - clock
      clock = time.perf_counter()
      checkpoint.load_params(directory, {'decoder': abstract})
      restored = time.perf_counter() - clock
      shutil.rmtree(directory)
      clock = time.perf_counter()
      digests({'decoder': arrays})
      alone = time.perf_counter() - clock
      if turn:  # the first compiles
        for what, value in (
          ('save', saved), ('of it the run waits', blocked),
          ('restore', restored), ('digests', alone),
        ):  # fmt: skip
          seconds[what, kind].append(value)
  checkpoint._digests = digests
  print(f'Times of {MEGABYTES} MiB of float32, median of {TURNS - 1} in turns, '
        'this machine:\n')  # fmt: skip
  print('| | with digests, s | without, s | more |')
  print('|---|---|---|---|')
  for what in ('save', 'of it the run waits', 'restore'):
    a, b = (statistics.median(seconds[what, k]) for k in ('with', 'without'))
    print(f'| {what} | {a:.3f} | {b:.3f} | {a - b:+.3f} s ({a / b - 1:+.1%}) |')
  alone, plain = (
    statistics.median(seconds[what, kind])
    for what, kind in (('digests', 'with'), ('save', 'without'))
  )
  print('\nA save goes on in the background; the run waits for what stands in '
        'the second line.')  # fmt: skip
  print(f'The digests alone take {alone:.4f} s, '
        f'{alone / plain:.1%} of a save without.')  # fmt: skip


if __name__ == '__main__':
  main()
