"""Decoders and encoders against transformers, in float32, through the importer.

Dimension key: B batch, T positions, W new tokens, M encoder tokens, E width.
"""

import functools

import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch')
hf_torch = pytest.importorskip('hf_torch')

import toy  # noqa: E402

from refrag_jax.hf import convert, families  # noqa: E402
from refrag_jax.models.refrag import Refrag  # noqa: E402

# Random ones a family; the whole six in CI.
CONFIGS = [
  0,
  1,
  *(pytest.param(i, marks=pytest.mark.slow) for i in range(2, 6)),
]
W = hf_torch.W


def drawn_ids(seed):
  rng = np.random.default_rng(100 + seed)
  return rng.integers(
    2, 40, (int(rng.integers(1, 4)), int(rng.integers(5, 41)))
  )


def tree_norm(tree):
  return float(np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum()
                           for x in jax.tree.leaves(tree))))  # fmt: skip


def assert_gradients(ours, theirs):
  scale = tree_norm(theirs)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs)
  ):
    apart = np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b))
    assert apart <= 1e-4 * scale, (path, apart / scale)


@pytest.mark.parametrize('seed', CONFIGS)
@pytest.mark.parametrize('name', hf_torch.DECODERS)
def test_decoder(name, seed, tmp_path):
  ids_BT = drawn_ids(seed)
  model = hf_torch.decoder(name, seed)
  directory = hf_torch.saved(model, tmp_path / 'in')
  cfg, params = hf_torch.read(directory)
  logits, value_and_grad, continued = hf_torch.decoder_functions(
    Refrag(hf_torch.model_config(cfg))
  )
  given = torch.tensor(ids_BT)
  out = model(given, labels=given)
  theirs = out.logits.detach().numpy()
  ours = np.asarray(logits(params, ids_BT))
  assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
  loss, grads = value_and_grad(params, ids_BT)
  assert abs(float(loss) - out.loss.item()) <= 1e-5

  with torch.no_grad():
    longer = model.generate(
      given, max_new_tokens=W, min_new_tokens=W, do_sample=False,
      attention_mask=torch.ones_like(given), pad_token_id=0,
    )[:, ids_BT.shape[1] :]  # fmt: skip
  np.testing.assert_array_equal(continued(params, ids_BT), longer.numpy())

  # Out and in again: the same numbers, bit for bit, and the same logits there.
  exported = tmp_path / 'out'
  exported.mkdir()
  convert.write_params(
    str(exported), 'decoder', params, families.decoder_json(cfg), np.float32
  )
  cfg_again, again = hf_torch.read(str(exported))
  assert cfg_again == cfg
  jax.tree.map(np.testing.assert_array_equal, params, again)
  loaded = type(model).from_pretrained(exported, attn_implementation='eager')
  with torch.no_grad():
    np.testing.assert_array_equal(loaded.eval()(given).logits.numpy(), theirs)

  out.loss.backward()
  assert_gradients(grads, hf_torch.gradients(model, tmp_path / 'grads', cfg))


@functools.cache
def encoder_functions(model: Refrag):
  def states(params, ids_XM, len_X):
    return model.apply(
      {'params': {'encoder': params}}, ids_XM, len_X, method='encoder_states'
    )

  def loss(params, ids_XM, len_X, weight_XME):
    return (states(params, ids_XM, len_X) * weight_XME).sum()

  return jax.jit(states), jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize('seed', CONFIGS)
@pytest.mark.parametrize('name', hf_torch.ENCODERS)
def test_encoder(name, seed, tmp_path):
  ids_BT = drawn_ids(seed)
  model = hf_torch.encoder(name, seed)
  directory = hf_torch.saved(model, tmp_path / 'in')
  cfg, params = hf_torch.read(directory)
  states, value_and_grad = encoder_functions(Refrag(hf_torch.model_config(cfg)))
  rng = np.random.default_rng(seed)
  X, M = ids_BT.shape
  len_X = rng.integers(3, M + 1, X)
  real_XM = np.arange(M)[None] < len_X[:, None]
  ids_XM = np.where(real_XM, ids_BT, model.config.pad_token_id)
  weight_XME = rng.standard_normal((X, M, cfg.width)).astype(np.float32)
  weight_XME *= real_XM[..., None]
  out = model(
    torch.tensor(ids_XM), attention_mask=torch.tensor(real_XM.astype(int))
  ).last_hidden_state
  theirs = out.detach().numpy()
  ours = np.asarray(states(params, ids_XM, len_X))
  apart = np.abs(ours - theirs)[real_XM].max()
  assert apart <= 1e-4 * np.abs(theirs[real_XM]).max()
  total = (out * torch.tensor(weight_XME)).sum()
  loss, grads = value_and_grad(params, ids_XM, len_X, weight_XME)
  size = np.abs(theirs * weight_XME).sum()
  assert abs(float(loss) - total.item()) <= 1e-5 * size

  exported = tmp_path / 'out'
  exported.mkdir()
  convert.write_params(
    str(exported), 'encoder', params, families.encoder_json(cfg), np.float32
  )
  cfg_again, again = hf_torch.read(str(exported))
  assert cfg_again == cfg
  jax.tree.map(np.testing.assert_array_equal, params, again)
  loaded = type(model).from_pretrained(exported, attn_implementation='eager')
  with torch.no_grad():
    back = loaded.eval()(
      torch.tensor(ids_XM), attention_mask=torch.tensor(real_XM.astype(int))
    ).last_hidden_state.numpy()
  np.testing.assert_allclose(back[real_XM], theirs[real_XM], atol=1e-5)

  total.backward()
  wanted = hf_torch.gradients(model, tmp_path / 'grads', cfg)
  if name == 'modernbert':  # its first layer has no such norm
    scale_YE = wanted['layers']['attention_norm']['scale']
    wanted['layers']['attention_norm']['scale'] = scale_YE.at[0].set(0)
  assert_gradients(grads, wanted)


@pytest.mark.parametrize(
  'change', ['rope_theta', 'norm_eps', 'sliding_window', 'rope_factor']
)
def test_a_number_that_is_not_read_would_be_seen(change, tmp_path):
  """The comparison above can fail, for each of these."""
  name = 'llama3' if change == 'rope_factor' else 'mistral'
  model = hf_torch.decoder(name, 1)
  directory = hf_torch.saved(model, tmp_path / 'in')
  cfg, params = hf_torch.read(directory)
  other = {'rope_theta': 70.0, 'norm_eps': 0.1, 'sliding_window': 3,
           'rope_factor': 2.0}  # fmt: skip
  ids_BT = np.random.default_rng(0).integers(2, 40, (2, 30))
  with torch.no_grad():
    theirs = model(torch.tensor(ids_BT)).logits.numpy()
  for values, same in (({}, True), ({change: other[change]}, False)):
    changed = toy.dataclasses.replace(cfg, **values)
    logits, _, _ = hf_torch.decoder_functions(
      Refrag(hf_torch.model_config(changed))
    )
    apart = np.abs(np.asarray(logits(params, ids_BT)) - theirs).max()
    assert (apart <= 1e-4 * np.abs(theirs).max()) == same
