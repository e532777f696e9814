"""The engine against the closed generation of the evals, request by request.

Dimension key: B rows, C chunks, K chunk size, E encoder width.
"""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import toy
import toy_run

from refrag_jax import generate, sharding
from refrag_jax.errors import UserError
from refrag_jax.models.refrag import Refrag
from refrag_jax.serve import engine as engine_lib
from refrag_jax.serve.engine import Engine, Options, Prompt

CFG, K = toy.MODEL, toy.K
PARAMS = toy.params()
EOS = 3
POOLS = ((3, 48), (2, 96))


def prompt(seed, most_chunks=6, expand=None):
  """A random request."""
  rng = np.random.default_rng(seed)
  C = int(rng.integers(most_chunks + 1))
  ids = lambda *shape: rng.integers(4, CFG.decoder.vocab_size, shape)
  expand_C = rng.random(C) < (0.3 if expand is None else expand)
  return Prompt(
    prefix=ids(int(rng.integers(1, 6))).astype(np.int32),
    chunks_CK=ids(C, K).astype(np.int32),
    chunk_len_C=rng.integers(1, K + 1, C).astype(np.int32),
    c_CE=rng.normal(size=(C, CFG.encoder.width)).astype(np.float32),
    expand_C=expand_C,
    given=ids(int(rng.integers(0, 4))).astype(np.int32),
  )


def make(pools=POOLS, params=PARAMS):
  return Engine(
    CFG,
    params,
    EOS,
    pools,
    max_chunks=8,
    max_encoder_tokens=6,
  )


def answers(engine, asked):
  """Submits all at once and runs to the end."""
  running = [engine.submit(*x) for x in asked]
  for _ in engine.run():
    pass
  return running


@functools.cache
def _reference(T):
  del T
  run = lambda params, batch, e_BCD, expand_BC, num_expanded, num_tokens: (
    generate.greedy(
      Refrag(CFG), params, batch, e_BCD, expand_BC, num_expanded, num_tokens,
      EOS,
    )
  )  # fmt: skip
  return jax.jit(run, static_argnums=(4, 5))


def reference(p, number):
  """Greedy tokens as the evals write them, up to EOS."""
  C = len(p.chunk_len_C)
  batch = {
    'prefix_BQ': p.prefix[None], 'prefix_len_B': np.array([len(p.prefix)]),
    'chunks_BCK': p.chunks_CK[None], 'chunk_len_BC': p.chunk_len_C[None],
    'output_BO': p.given[None], 'output_len_B': np.array([len(p.given)]),
  }  # fmt: skip
  e_BCD = None
  if C:
    e_BCD = Refrag(CFG).apply(
      {'params': PARAMS}, p.c_CE[None], method=Refrag.project
    )
  ids = _reference(0)(
    PARAMS, batch, e_BCD, p.expand_C[None], int(p.expand_C.sum()), number
  )
  ids = np.asarray(ids)[0].tolist()
  return ids[: ids.index(EOS) + 1] if EOS in ids else ids


@pytest.fixture(scope='module')
def engine():
  return make()


@pytest.mark.parametrize('seed', range(3))
def test_one_request_is_what_the_evals_write(engine, seed):
  p = prompt(seed)
  (running,) = answers(engine, [(p, Options(max_tokens=12))])
  assert running.tokens == reference(p, 12)
  assert running.finish == ('stop' if running.tokens[-1] == EOS else 'length')
  assert len(running.logprobs) == len(running.tokens)
  assert engine.idle


def test_torch_beside_it_writes_the_same(engine):
  """The bench's baseline has the engine's weights."""
  torch = pytest.importorskip('torch')
  from refrag_jax.serve import torch_baseline

  model = torch_baseline.load(SimpleNamespace(model=CFG), PARAMS)
  ids = np.random.default_rng(0).integers(4, CFG.decoder.vocab_size, 20)
  plain = dataclasses.replace(prompt(0, 0), prefix=ids, given=ids[:0])
  (running,) = answers(engine, [(plain, Options(max_tokens=8))])
  written = model.generate(
    torch.tensor(ids[None]), max_new_tokens=8, do_sample=False,
    eos_token_id=EOS, pad_token_id=EOS,
  )  # fmt: skip
  assert running.tokens == written[0, 20:].tolist()
  assert len(torch_baseline.generate(model, ids[None], 3)) == 3


def test_batch_mates_change_nothing(engine):
  """More requests than slots, sampled and greedy, joining mid-flight."""
  rng = np.random.default_rng(0)
  asked = [
    (
      prompt(seed),
      Options(
        max_tokens=int(rng.integers(1, 20)),
        temperature=float(rng.choice([0.0, 0.9])),
        top_k=int(rng.choice([0, 5])),
        seed=seed,
      ),
    )
    for seed in range(16)
  ]
  alone = [answers(engine, [x])[0] for x in asked]
  together, waiting = [], list(asked)
  while waiting or not engine.idle:
    for _ in range(int(rng.integers(0, 3))):
      if waiting:
        together.append(engine.submit(*waiting.pop(0)))
    engine.step()
  for a, b in zip(alone, together, strict=True):
    assert (a.tokens, a.finish) == (b.tokens, b.finish)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_streamed_tokens_are_the_answer(engine):
  p = prompt(3)
  running = engine.submit(p, Options(max_tokens=9))
  seen = []
  for news in engine.run():
    for r in news:
      assert r is running
      seen.append(r.tokens[-1])
  assert seen == running.tokens


def test_a_cancelled_request_frees_its_slot(engine):
  options = Options(max_tokens=30)
  first = [engine.submit(prompt(s), options) for s in range(20)]
  for _ in range(3):
    engine.step()
  engine.cancel(first[0])
  engine.cancel(first[19])  # which waits
  done = len(first[0].tokens)
  for _ in engine.run():
    pass
  assert [r.finish for r in (first[0], first[19])] == ['cancelled'] * 2
  assert len(first[0].tokens) == done and not first[19].tokens
  alone = answers(engine, [(prompt(1), options)])[0]
  assert first[1].tokens == alone.tokens


def test_nothing_compiles_after_the_warm_up():
  """Whatever the lengths, the settings and who is there."""
  engine = make(pools=((2, 40),))
  engine.warm_up()
  rng = np.random.default_rng(1)
  sizes = lambda: [
    f._cache_size()
    for f in (
      engine_lib.programs.prefill, engine_lib.programs.decode,
      engine_lib.programs.spliced,
    )
  ]  # fmt: skip
  before = sizes()
  asked = [
    (prompt(s, 8), Options(max_tokens=int(rng.integers(1, 9)), seed=s,
                           temperature=float(rng.choice([0.0, 1.0]))))
    for s in range(30)
  ]  # fmt: skip
  with toy_run.watch_compiles() as seen:
    done = answers(engine, asked)
  assert sizes() == before and seen == []
  assert all(r.finish in ('stop', 'length') for r in done)
  for (p, options), running in zip(asked, done, strict=True):
    if not options.temperature:  # nor is anything left of the warm-up
      assert running.tokens == reference(p, options.max_tokens)


def test_a_request_that_fits_nowhere_is_refused(engine):
  with pytest.raises(UserError, match='together .* and a slot has 96'):
    engine.submit(prompt(0), Options(max_tokens=96))
  p = prompt(1)
  many = dataclasses.replace(
    p, chunks_CK=np.ones((9, K), np.int32), chunk_len_C=np.full(9, 1),
    c_CE=np.zeros((9, CFG.encoder.width)), expand_C=np.zeros(9, bool),
  )  # fmt: skip
  with pytest.raises(
    UserError, match='9 chunks, and the engine was made for 8'
  ):
    engine.submit(many, Options())
  assert engine.idle


def test_all_expanded_is_the_plain_decoder(engine):
  p = prompt(5, expand=1.1)
  tokens = np.concatenate(
    [p.prefix, *(p.chunks_CK[c, :n] for c, n in enumerate(p.chunk_len_C))]
  )
  none = dataclasses.replace(
    p, prefix=tokens, chunks_CK=p.chunks_CK[:0], chunk_len_C=p.chunk_len_C[:0],
    c_CE=p.c_CE[:0], expand_C=p.expand_C[:0],
  )  # fmt: skip
  a, b = answers(engine, [(p, Options()), (none, Options())])
  assert a.tokens == b.tokens


def test_lengths_are_powers_of_two_and_their_middles():
  assert engine_lib.lengths(100) == [16, 24, 32, 48, 64, 96, 100]
  assert engine_lib.lengths(96) == [16, 24, 32, 48, 64, 96]
  assert engine_lib.lengths(10) == [10]
  assert engine_lib.bucket(49, engine_lib.lengths(100)) == 64


@pytest.mark.slow
def test_two_thousand_requests_are_answered_as_if_alone(engine):
  """At random times, of all kinds; and nothing compiles after the start."""
  rng = np.random.default_rng(7)
  asked = [
    (
      prompt(seed, 8),
      Options(
        max_tokens=int(rng.integers(1, 13)),
        temperature=float(rng.choice([0.0, 0.0, 0.8, 1.5])),
        top_k=int(rng.choice([0, 3])),
        top_p=float(rng.choice([1.0, 0.8])),
        min_p=float(rng.choice([0.0, 0.1])),
        repetition_penalty=float(rng.choice([1.0, 1.2])),
        seed=int(rng.integers(1 << 32)),
      ),
    )
    for seed in range(2000)
  ]
  engine.warm_up()
  with toy_run.watch_compiles() as seen:
    together, waiting = [], list(reversed(asked))
    while waiting or not engine.idle:
      for _ in range(rng.poisson(0.7)):
        if waiting:
          together.append(engine.submit(*waiting.pop()))
      engine.step()
    for one, other in zip(asked, together, strict=True):
      (alone,) = answers(engine, [one])
      assert (alone.tokens, alone.finish) == (other.tokens, other.finish)
  assert seen == []
  assert len({r.finish for r in together}) == 2


@pytest.mark.parametrize(
  'shape', [(2, 2, 2), pytest.param((1, 1, 2), marks=pytest.mark.slow)]
)
def test_every_mesh_writes_the_same(shape):
  """With parameters, slots and heads shared out over the devices."""
  mesh = toy_run.mesh(*shape)
  placed = jax.device_put(PARAMS, sharding.infer_shardings(PARAMS, mesh))
  asked = [
    (prompt(seed), Options(max_tokens=8, seed=seed, temperature=seed % 2))
    for seed in range(10)
  ]
  expected = answers(make(), asked)
  with jax.set_mesh(mesh):
    engine = make(params=placed, pools=((4, 48),))
    engine.warm_up()
    with toy_run.watch_compiles() as seen:
      found = answers(engine, asked)
  for a, b in zip(expected, found, strict=True):
    assert a.tokens == b.tokens
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
  assert seen == []
  axes = sharding.to_spec(('batch', 'heads', None, None), (4, 2, 48, 4), mesh)
  wanted = jax.sharding.NamedSharding(mesh, axes)
  for leaf in jax.tree.leaves(engine.pools[0].slots.caches):
    assert leaf.sharding.is_equivalent_to(wanted, 4)
    assert leaf.addressable_shards[0].data.size * mesh.size == leaf.size


@pytest.mark.parametrize('live', [48, 96])
@pytest.mark.parametrize('rows', [1, 2, 4])
def test_a_step_copies_no_cache(rows, live):
  """Slots are donated: what was is written over, one position a row."""
  engine = make(((rows, 96),))
  (pool,) = engine.pools
  compiled = engine_lib.programs.decode.lower(
    engine.weights, pool.slots, np.ones(rows, bool), pool.settings(),
    cfg=CFG.decoder, attend='dense', live=live,
  ).compile()  # fmt: skip
  caches = jax.tree.leaves(pool.slots.caches)
  whole = sum(x.nbytes for x in caches)
  assert compiled.memory_analysis().alias_size_in_bytes >= whole
  B, M, S, H = caches[0].shape
  text = compiled.as_text()
  assert f'f32[{B * M},{S},{H}]' in text
  for shape in (f'{B},{M},{S},{H}', f'{B * M},{S},{H}'):
    assert not re.findall(rf'f32\[{shape}\]\S* copy\(', text)


def test_matrices_of_8_bits_are_the_nearest_of_their_channel():
  x = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)
  x[..., 2] = 0  # nothing to scale
  found = engine_lib.programs.quantized(x, 2)
  assert found.scale.shape == (1, 1, 7) and found.values.dtype == np.int8
  half_a_step = np.abs(x).max((0, 1)) / 127 / 2
  error = np.abs(np.array(found.values * found.scale) - x)
  assert (error <= half_a_step * 1.001).all() and error.max() > 0
