"""Preparing an index: by any number of workers, killed or not, the same bytes."""

import collections
import gzip
import hashlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from refrag_jax.data import tokenizers
from refrag_jax.data.text import corpus, index, pool, workers
from refrag_jax.data.text import sources as text_lib
from refrag_jax.errors import Stopped, UserError
from refrag_jax.runtime.environment import ROOT

BYTES = tokenizers.load('bytes')
SHARD = 9000
# Of the files of `sources` prepared by the code before there were shards.
GOLDEN = 'c7129af32a955809ef4c626862cb924c279b2d53e05e769e15a3fe67f6e54ebf'


@pytest.fixture
def sources(tmp_path, monkeypatch):
  """A file that is cut, one that cannot be, and a directory."""
  monkeypatch.setattr(index, 'SHARD_BYTES', SHARD)
  licence = 'Distributed under the terms that are printed at the end.\n'
  texts = [
    f'{licence if i % 3 else ""}{"Zwölf 🦜" if i % 2 else "Twelve"} of {i}\n'
    * (1 + i % 9)
    for i in range(300)
  ]
  lines = [json.dumps({'text': t}, ensure_ascii=len(t) > 99) for t in texts]
  lines[7:7] = ['{"body": 1}', '', '[1]', '{"text": "cut o', '{"text": " "}']
  folder = tmp_path / 'text'
  folder.mkdir()
  data = '\n'.join(lines).encode()
  (folder / 'a.jsonl').write_bytes(data)
  (folder / 'b.jsonl.gz').write_bytes(gzip.compress(data[: len(data) // 2]))
  for i in range(9):
    (folder / f'c{i}.txt').write_text(texts[i] * 50, encoding='utf-8')
  return [str(folder / 'a.jsonl'), str(folder)]


@pytest.fixture
def small(tmp_path):
  """One file of one shard."""
  path = tmp_path / 'a.jsonl'
  lines = [json.dumps({'text': f'text {i} '}) for i in range(60)]
  path.write_text('\n'.join(lines))
  return [str(path)]


def prepare(sources, cache, count=0, tokenizer=BYTES):
  weights = [1.0] * len(sources)
  return corpus.prepare(sources, weights, tokenizer, str(cache), 0.2, count)


def files(made):
  """A hash of all arrays of an index, and meta.json."""
  total = hashlib.sha256()
  for name in index.ARRAYS:
    path = pathlib.Path(made.directory, f'{name}.npy')
    total.update(path.read_bytes())
  return total.hexdigest(), made.meta


@pytest.fixture
def runs(monkeypatch):
  """Counts how often each unit of a stage is worked on, in this process."""
  counts = collections.Counter()

  def counted(stage):
    def run(job, unit, tokenizer):
      counts[stage.name, unit] += 1
      stage.run(job, unit, tokenizer)

    return stage._replace(run=run)

  monkeypatch.setattr(index, 'STAGES', tuple(map(counted, index.STAGES)))
  return counts


def test_the_bytes_are_those_that_they_were(sources, tmp_path):
  made = prepare(sources, tmp_path / 'cache')
  assert len(os.listdir(tmp_path / 'cache')) == 2  # and its pointer
  assert files(made)[0] == GOLDEN


@pytest.mark.parametrize('shard', [700, 1 << 30])
def test_shards_of_any_size_make_one_index(
  sources, tmp_path, monkeypatch, shard
):
  monkeypatch.setattr(index, 'SHARD_BYTES', shard)
  made = prepare(sources[:1], tmp_path / 'cache')
  monkeypatch.setattr(index, 'SHARD_BYTES', SHARD)
  assert files(made) == files(prepare(sources[:1], tmp_path / 'again'))


@pytest.mark.parametrize('count', [1, 2])
def test_workers_make_the_same_index(sources, tmp_path, count):
  want = files(prepare(sources, tmp_path / 'alone'))
  assert files(prepare(sources, tmp_path / 'cache', count)) == want
  assert sorted(os.listdir(tmp_path / 'cache')) == sorted(
    os.listdir(tmp_path / 'alone')
  )


def test_two_at_once_share_the_work(sources, tmp_path, runs):
  want = files(prepare(sources, tmp_path / 'alone'))
  units = dict(runs)
  assert set(units.values()) == {1} and len(units) > 20
  runs.clear()
  job = index.job(sources, BYTES, str(tmp_path / 'cache'), 0.2)
  index.open_directory(job)
  began, takers = threading.Barrier(2), collections.Counter()

  def work():
    with workers.Claims(job.path('claims')) as claims:
      take = claims.take

      def counted(name):
        taken = take(name)
        takers[threading.get_ident()] += taken
        return taken

      claims.take = counted
      began.wait()
      workers.work(job, claims, lambda: BYTES)

  both = [threading.Thread(target=work) for _ in range(2)]
  for thread in both:
    thread.start()
  for thread in both:
    thread.join()
  assert dict(runs) == units  # each once, by one of them
  assert min(takers.values()) > 3
  assert files(prepare(sources, tmp_path / 'cache')) == want


@pytest.mark.parametrize('at', [3, 12, 23])
def test_what_is_done_is_kept(sources, tmp_path, monkeypatch, runs, at):
  want = files(prepare(sources, tmp_path / 'alone'))
  units = set(runs)
  runs.clear()
  assert len(units) > at
  stages = index.STAGES

  def stops(stage):
    def run(job, unit, tokenizer):
      if runs.total() == at:
        raise Stopped('now')
      stage.run(job, unit, tokenizer)

    return stage._replace(run=run)

  monkeypatch.setattr(index, 'STAGES', tuple(map(stops, stages)))
  with pytest.raises(Stopped):
    prepare(sources, tmp_path / 'cache')
  assert all(n.startswith('.building-') for n in os.listdir(tmp_path / 'cache'))
  monkeypatch.setattr(index, 'STAGES', stages)
  assert files(prepare(sources, tmp_path / 'cache')) == want
  assert set(runs) == units and set(runs.values()) == {1}


KILLED = """
import sys
from refrag_jax.data import tokenizers
from refrag_jax.data.text import corpus
from refrag_jax.data.text import index
index.SHARD_BYTES = int(sys.argv[1])
corpus.prepare(
  sys.argv[3:], [1.0] * len(sys.argv[3:]), tokenizers.load('bytes'),
  sys.argv[2], 0.2, 2)
"""


def test_a_killed_run_leaves_shards_and_no_worker(sources, tmp_path, runs):
  want = files(prepare(sources, tmp_path / 'alone'))
  units = len(runs)
  runs.clear()
  cache = tmp_path / 'cache'
  job = index.job(sources, BYTES, str(cache), 0.2)
  index.open_directory(job)
  # The last unit is somebody else's, so that the run is not through before.
  with workers.Claims(job.path('claims')) as claims:
    (last,) = index.STAGES[-1].units(job)
    assert claims.take(f'{index.STAGES[-1].name}-{last}')
    run = subprocess.Popen(
      [sys.executable, '-c', KILLED, str(SHARD), str(cache), *sources], cwd=ROOT
    )
    deadline = time.monotonic() + 60
    while len(list(cache.glob('.building-*/*/*-*.npz'))) < 5:
      assert time.monotonic() < deadline and run.poll() is None
      time.sleep(0.001)
    started = [n for n in os.listdir('/proc') if stat(n)[1:2] == [str(run.pid)]]
    assert len(started) == 2
    run.kill()
    run.wait()
  while any(stat(n)[:1] not in ([], ['Z']) for n in started):
    assert time.monotonic() < deadline
    time.sleep(0.01)
  made = prepare(sources, cache)
  assert files(made) == want
  assert 0 < runs.total() < units  # not from the beginning
  assert len(os.listdir(cache)) == 2


def stat(process):
  """State and parent of a process, and more; [] if there is none."""
  try:
    text = pathlib.Path('/proc', process, 'stat').read_text()
  except OSError:
    return []
  return text.rpartition(')')[2].split()


DAMAGES = ('', '{}', '[]', 'null', '{"index": 3}', '{"index": "gone"}', '{"')


@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize('file', ['pointer', 'meta.json'])
def test_damaged_files_are_built_again(small, tmp_path, file, damage):
  made = prepare(small, tmp_path / 'cache')
  want = files(made)
  (pointer,) = (tmp_path / 'cache').glob('*.json')
  path = pathlib.Path(made.directory, file) if file != 'pointer' else pointer
  whole = path.read_bytes()
  path.write_text(damage)
  again = prepare(small, tmp_path / 'cache')
  assert files(again) == want
  assert path.read_bytes() == whole
  assert len(os.listdir(tmp_path / 'cache')) == 2


@pytest.mark.parametrize(
  'folder', ['read', 'split', 'compared', 'shared', 'tokens']
)
def test_a_damaged_shard_is_made_again(sources, tmp_path, monkeypatch, folder):
  """As a power cut leaves it: of the right size, and zero."""
  want = files(prepare(sources, tmp_path / 'alone'))
  closing = index.STAGES[-1]
  damaged = []

  def run(job, unit, tokenizer):
    if not damaged:
      damaged.extend(pathlib.Path(job.directory, folder).glob('*.npz'))
      for path in damaged:
        size = os.path.getsize(path)
        path.write_bytes(path.read_bytes()[: size // 3].ljust(size, bytes(1)))
        os.unlink(job.path('index', 'tokens.npy'))
        raise index.DamagedError('again')
    closing.run(job, unit, tokenizer)

  stages = (*index.STAGES[:-1], closing._replace(run=run))
  monkeypatch.setattr(index, 'STAGES', stages)
  assert files(prepare(sources, tmp_path / 'cache')) == want
  assert damaged


@pytest.mark.parametrize('name', index.ARRAYS)
def test_an_empty_array_is_built_again(small, tmp_path, name):
  made = prepare(small, tmp_path / 'cache')
  want = files(made)
  os.truncate(pathlib.Path(made.directory, f'{name}.npy'), 0)
  assert files(prepare(small, tmp_path / 'cache')) == want


@pytest.mark.parametrize('bom', [b'', b'\xef\xbb\xbf'])
def test_spans_are_the_whole_file(tmp_path, bom):
  lines = [json.dumps({'text': f'text {i} ' * (i % 5)}) for i in range(40)]
  lines[5] = '' if bom else lines[5]
  data = bom + '\r\n'.join(lines).encode()
  path = str(tmp_path / 'a.jsonl')
  pathlib.Path(path).write_bytes(data)
  assert text_lib.has_spans(path)

  def read(*spans):
    skipped = collections.Counter()
    texts = [
      d.text
      for span in spans
      for d in text_lib.read(path, 'a', True, skipped, span)
    ]
    return texts, skipped

  whole = read((0, None))
  assert len(whole[0]) == 32 - bool(bom and lines[5])
  for size in (1, 2, 17, 100, len(data) - 1, len(data)):
    begins = range(0, len(data), size)
    assert read(*((b, b + size) for b in begins)) == whole


@pytest.mark.parametrize(
  ('name', 'data'),
  [
    ('a.jsonl', b'[\n{"text": "one"},\n{"text": "two"}]'),
    ('a.jsonl', b'{\n"text": "one"}'),
    ('a.jsonl', b''),
    ('a.jsonl.gz', b'{"text": "one"}\n'),
    ('a.txt', b'{"text": "one"}\n'),
  ],
)
def test_other_files_are_not_cut(tmp_path, name, data):
  (tmp_path / name).write_bytes(data)
  assert not text_lib.has_spans(str(tmp_path / name))


@pytest.fixture
def claims(tmp_path):
  with workers.Claims(str(tmp_path / 'claims')) as claims:
    yield claims


def write_claim(tmp_path, machine, process):
  os.symlink(f'{machine} {process}', tmp_path / 'claims' / 'unit')


def test_a_claim_is_one_process_s(claims, tmp_path):
  with workers.Claims(str(tmp_path / 'claims')) as other:
    assert claims.take('unit') and not other.take('unit')
    claims.release('unit')
    assert other.take('unit') and not claims.take('unit')
  assert claims.take('unit')  # who leaves lets go


def test_a_claim_of_a_dead_process_is_free(claims, tmp_path):
  dead = subprocess.Popen(['true'])
  while stat(str(dead.pid))[0] != 'Z':  # of whom nobody took note yet
    time.sleep(0.01)
  for _ in range(2):
    write_claim(tmp_path, workers.machine(), dead.pid)
    assert claims.take('unit')
    claims.release('unit')
    dead.wait()


@pytest.mark.parametrize('here', [False, True])
def test_a_claim_lasts_as_long_as_it_beats(claims, tmp_path, monkeypatch, here):
  now = [1000.0]
  monkeypatch.setattr(workers.time, 'monotonic', lambda: now[0])
  machine = workers.machine() if here else 'another machine'
  write_claim(tmp_path, machine, os.getppid())
  path = tmp_path / 'claims' / 'unit'
  for beat in range(3):
    os.utime(path, (beat, beat), follow_symlinks=False)
    assert not claims.take('unit')
    now[0] += workers.LEASE * 0.9
  assert not claims.take('unit')
  now[0] += workers.LEASE
  assert claims.take('unit')


def test_claims_beat(tmp_path, monkeypatch):
  monkeypatch.setattr(workers, 'BEAT', 0.01)
  with workers.Claims(str(tmp_path)) as claims:
    claims.take('unit')
    os.utime(tmp_path / 'unit', (1, 1), follow_symlinks=False)
    deadline = time.monotonic() + 10
    while os.lstat(tmp_path / 'unit').st_mtime < 2:
      assert time.monotonic() < deadline
      time.sleep(0.01)


def test_runs_on_one_machine_share_its_cores(claims, tmp_path):
  names = pool._slots(None)
  assert len(names) == len(os.sched_getaffinity(0)) > 0
  with workers.Claims(str(tmp_path / 'claims')) as other:
    for _ in names:
      assert pool._free(other, names)
    assert pool._free(claims, names) is None
  assert pool._free(claims, names)  # when the other run is no more
  assert len(set(pool._slots(3) + pool._slots(3))) == 6


def test_errors_of_a_worker_are_those_of_the_run(tmp_path, sources):
  path = tmp_path / 'a.jsonl.gz'
  path.write_bytes(gzip.compress(b'{"text": "some text"}\n' * 99)[:-9])
  with pytest.raises(UserError, match=r'a.jsonl.gz: damaged after line'):
    prepare([str(path)], tmp_path / 'cache', 1)
  assert os.listdir(tmp_path / 'cache') == []
  full = pool._error('{"disk": [28, "No space", "/a/b"]}\n', 1)
  assert isinstance(full, OSError)
  assert (full.errno, full.filename) == (28, '/a/b')
  assert 'signal 9' in str(pool._error('', -9))


def test_a_stop_ends_the_workers(sources, tmp_path, monkeypatch):
  started = []
  start = subprocess.Popen

  def noted(*args, **kwargs):
    started.append(start(*args, **kwargs))
    return started[-1]

  def stop(seconds):
    raise Stopped('SIGTERM')

  monkeypatch.setattr(pool.subprocess, 'Popen', noted)
  monkeypatch.setattr(pool, 'time', type('T', (), {
    'monotonic': time.monotonic, 'sleep': stop
  }))  # fmt: skip
  with pytest.raises(Stopped):
    prepare(sources, tmp_path / 'cache', 2)
  assert [worker.returncode for worker in started] == [-9, -9]


def test_a_worker_starts_without_jax():
  """A second each, and a claim on every accelerator of the machine."""
  loaded = subprocess.run(
    [
      sys.executable,
      '-c',
      'import sys, refrag_jax.data.text.workers; print(*sys.modules)',
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stdout.split()
  assert not {'jax', 'rich', 'transformers'} & set(loaded)


def test_sides_of_bounds():
  hashes = np.asarray([0, 1, 2**63, 2**64 - 1], np.uint64)
  source = np.zeros(4, np.int32)
  for fraction in (0.0, 2.0**-64, 0.5, 1.0):
    want = [int(h) < fraction * 2**64 for h in hashes]
    assert index.sides(source, hashes, fraction).tolist() == want
  assert list(itertools.compress(hashes, want)) == list(hashes)
