"""The bench: its cells, the keys that others read, and what is refused."""

import json
import sys
from types import SimpleNamespace

import jax
import pytest
import toy_config
import toy_run

from refrag_jax import flops
from refrag_jax.errors import UserError
from refrag_jax.serve import bench

OTHERS = ('transformers', 'llama_cpp')
VLLM = [
  f'{of}_{name}_ms'
  for name in ('ttft', 'tpot', 'itl', 'e2el')
  for of in ('mean', 'p50', 'p95', 'p99')
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  toy_config.write_data(folder)
  return str(folder)


def config(folder, **changes):
  fields = dict(
    contexts=(32, 64), repeats=2, batches=(2,), question_tokens=4,
    output_tokens=3, fractions=(0.0, 0.25),
  )  # fmt: skip
  fields = {f'bench__{name}': of for name, of in (fields | changes).items()}
  return toy_run.config(folder, **fields)


def test_every_cell_is_measured_and_none_compiles(
  folder, tmp_path, monkeypatch
):
  monkeypatch.setattr(bench.session_lib.sharding, 'make_mesh', one_device)
  cfg = config(folder)
  assert bench.run(cfg, str(tmp_path), '') == 0
  out = json.loads((tmp_path / 'bench.json').read_text())
  compiled = [row for row in out['rows'] if row['compiles']]
  assert out['compiles_after_warmup'] == 0, compiled
  assert {'device', 'dtype', 'versions', 'compile_s'} <= out.keys()
  rows = {(r['arm'], r['context'], r['p'], r['cached']): r for r in out['rows']}
  assert len(rows) == len(out['rows']) == 2 * (2 + 2 * 2)
  k, model = cfg.model.chunk_size, cfg.model
  head = 2 * model.decoder.width * model.decoder.vocab_size
  full = lambda n: flops.decoder_flops(vars(model.decoder), n) + head
  for context in (32, 64):
    row = rows['refrag', context, 0.25, True]
    C = context // k
    assert row['decoder_positions'] == 4 + C + C // 4 * (k - 1)
    assert row['padded_positions'] >= row['decoder_positions']
    assert row['requests'] == 2 * 2
    assert {*VLLM, 'request_throughput', 'output_throughput'} <= row.keys()
    assert row['mean_ttft_ms'] < row['mean_e2el_ms']
    assert row['p50_ttft_ms'] <= row['p99_ttft_ms']
    assert row['split_ms'].keys() == {'tokenize', 'store', 'policy', 'project'}
    fresh = rows['refrag', context, 0.0, False]
    assert fresh['split_ms'].keys() == {
      'tokenize',
      'store',
      'encode',
      'project',
    }
    held = rows['refrag', context, 0.0, True]
    assert held['flop_limit'] > fresh['flop_limit'] > 0
    projected = flops.projection_flops(
      vars(model.encoder), vars(model.decoder), C
    )
    assert held['flop_limit'] == pytest.approx(
      full(context + 4) / (full(C + 4) + projected)
    )
    assert held['speedup'] == pytest.approx(
      rows['full_context', context, 0.0, True]['mean_ttft_ms']
      / held['mean_ttft_ms']
    )
    last = rows['last_k', context, 0.0, True]
    assert last['decoder_positions'] == held['decoder_positions']
  page = (tmp_path / 'bench.html').read_text()
  assert 'REFRAG, k = 4, p = 0.25, in hand' in page and '<svg' in page


def test_as_many_as_fit(folder, tmp_path, monkeypatch):
  """By the bytes of a slot; one request's time is the sum of its parts."""
  monkeypatch.setattr(bench.session_lib.sharding, 'make_mesh', one_device)
  monkeypatch.setattr(bench.jax, 'devices', lambda: jax.local_devices()[:1])
  monkeypatch.setattr(bench, 'free_bytes', lambda: 40_000)
  cfg = config(
    folder, batches=(0, 1), contexts=(64,), fractions=(0.0,), repeats=1
  )
  assert bench.run(cfg, str(tmp_path), '') == 0
  out = json.loads((tmp_path / 'bench.json').read_text())
  assert out['compiles_after_warmup'] == 0
  full, refrag = (row for row in out['rows'] if row['saturated'])
  c = cfg.model.decoder
  for row in (full, refrag):
    length = row['decoder_positions'] + 3
    a_slot = 2 * 4 * c.num_layers * length * c.num_kv_heads * c.head_dim
    a_slot += c.vocab_size + 8
    assert row['batch'] == 40_000 // a_slot and row['requests'] == (
      2 * row['batch']
    )
  assert refrag['batch'] > full['batch'] > 1
  assert refrag['throughput_ratio'] == pytest.approx(
    refrag['request_throughput'] / full['request_throughput']
  )
  (alone,) = (
    row for row in out['rows']
    if row['batch'] == 1 and row['arm'] == 'refrag' and not row['cached']
  )  # fmt: skip
  parts = sum(alone['split_ms'][x] for x in ('encode', 'project', 'prefill'))
  assert parts == pytest.approx(alone['mean_ttft_ms'])
  page = (tmp_path / 'bench.html').read_text()
  assert 'As many as fit' in page
  monkeypatch.setattr(bench, 'free_bytes', lambda: 100)
  with pytest.raises(UserError, match='no slot of 71 positions'):
    bench.run(cfg, str(tmp_path), '')


def test_baselines_stand_beside_it(folder, tmp_path, monkeypatch):
  """Both read full context; llama.cpp, one sequence at a time."""
  pytest.importorskip('torch')
  monkeypatch.setattr(bench.session_lib.sharding, 'make_mesh', one_device)
  asked = []

  class Llama:
    def __init__(self, path, n_ctx, **_):
      if path == 'broken.gguf':
        raise ValueError('Failed to load model from file')
      assert n_ctx == 32 + 4 + 3
      self.path = path

    def n_vocab(self):
      known = cfg.model.decoder.vocab_size
      return known + (self.path != 'file.gguf')

    def reset(self):
      asked.append([])

    def eval(self, tokens):
      asked[-1] += tokens

    def sample(self, temp):
      assert temp == 0.0
      return 7

  monkeypatch.setitem(sys.modules, 'llama_cpp', SimpleNamespace(Llama=Llama))
  changes = dict(contexts=(32,), batches=(1, 2), fractions=(0.0,))
  monkeypatch.setitem(bench.BELOW, 'llama_cpp', 'numpy')  # it is not installed
  cfg = config(folder, transformers=True, llama_cpp='file.gguf', **changes)
  assert bench.run(cfg, str(tmp_path), '') == 0
  rows = json.loads((tmp_path / 'bench.json').read_text())['rows']
  found = [(r['arm'], r['batch']) for r in rows if r['arm'] in OTHERS]
  assert found == [('transformers', 1), ('transformers', 2), ('llama_cpp', 1)]
  for row in rows:
    if row['arm'] in OTHERS:
      assert {*VLLM, 'request_throughput', 'output_throughput'} <= row.keys()
      assert row['decoder_positions'] == 36
      assert row['speedup'] > 0 and row['flop_limit'] == 1
  # Every turn has a prompt of its own, and each token is read once.
  assert len(asked) == 3 and {len(x) for x in asked} == {36 + 2}
  assert asked[0] != asked[1] and asked[0][-2:] == [7, 7]
  broken = config(folder, llama_cpp='broken.gguf', **changes)
  with pytest.raises(UserError, match='broken.gguf: Failed to load'):
    bench.run(broken, str(tmp_path), '')
  other = config(folder, llama_cpp='other.gguf', **changes)
  with pytest.raises(UserError, match='other.gguf has a vocabulary of'):
    bench.run(other, str(tmp_path), '')
  monkeypatch.setitem(sys.modules, 'llama_cpp', None)
  with pytest.raises(UserError, match='pip install llama-cpp-python'):
    bench.run(broken, str(tmp_path), '')


def one_device(**_):
  return toy_run.mesh()


def test_other_chunk_sizes_with_the_same_weights(folder):
  found = list(bench.cells(config(folder), 8, 2))
  assert {cell.k for cell in found} == {8}
  assert [c.read for c in found if c.arm == 'refrag'][:4] == [4, 4, 11, 11]


def test_longer_chunks_have_more_encoder_tokens(folder):
  cfg = config(folder)
  k, M = cfg.model.chunk_size, cfg.data.max_encoder_tokens
  assert bench.encoder_tokens(cfg, k) == M
  assert bench.encoder_tokens(cfg, 4 * k) == 2 + 4 * (M - 2)
  assert bench.encoder_tokens(cfg, 1) >= 3
  cost = lambda cached: bench.first_token_cost(
    dict(arm='refrag', context=64, k=4 * k, p=0.0, cached=cached,
         decoder_positions=20), cfg.model, cfg,
  )[0]  # fmt: skip
  encoder = vars(cfg.model.encoder)
  assert cost(False) - cost(True) == flops.encoder_flops(
    encoder, 64 // (4 * k), 2 + 4 * (M - 2)
  )


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(chunk_sizes=(4, 1024), contexts=(1024,)), 'the encoder has .* posi'),
    (dict(contexts=()), 'contexts is empty'),
    (dict(contexts=(30,)), '30 tokens are no whole chunks of 4'),
    (dict(chunk_sizes=(4, 5)), '32 tokens are no whole chunks of 5'),
    (dict(batches=(-1,)), 'or 0 for as many as fit'),
    (dict(fractions=(1.0,)), 'fractions .* use shares'),
    (dict(repeats=0), 'bench.repeats is 0'),
  ],
)
def test_what_is_refused(folder, changes, message):
  with pytest.raises(UserError, match=message):
    bench.check_bench(config(folder, **changes))


def test_more_positions_than_the_decoder_has_are_refused(folder):
  cfg = toy_run.config(folder, model__decoder__max_length=64)
  with pytest.raises(UserError, match='are 2096 positions, and the decoder'):
    bench.check_bench(cfg)
