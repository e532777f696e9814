"""The whole of REFRAG against the same thing written with transformers.

RobertaModel, an MLP and LlamaForCausalLM(inputs_embeds=...), a row at a time,
without padding: each row's input is put together from embeddings by hand.

Dimension key: B batch, C chunks, K chunk size, O output slots, T positions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch')
hf_torch = pytest.importorskip('hf_torch')

import forward  # noqa: E402
import toy  # noqa: E402

from refrag_jax.hf import convert  # noqa: E402
from refrag_jax.models import losses  # noqa: E402
from refrag_jax.models.refrag import Refrag, init_params  # noqa: E402
from refrag_jax.sharding import path_str  # noqa: E402

B, C = 4, 4


def linear(kernel, bias):
  layer = torch.nn.Linear(*kernel.shape)
  with torch.no_grad():
    layer.weight.copy_(torch.tensor(np.asarray(kernel)).T)
    layer.bias.copy_(torch.tensor(np.asarray(bias)))
  return layer


class Torch:
  """The composition, and its parameters' gradients."""

  def __init__(self, encoder, decoder, projection):
    self.encoder, self.decoder = encoder, decoder
    self.layers = {name: linear(**of) for name, of in projection.items()}

  def project(self, ids_M):
    states = self.encoder(torch.tensor(ids_M)[None]).last_hidden_state
    hidden = torch.nn.functional.gelu(self.layers['up_proj'](states[:, 0]))
    return self.layers['down_proj'](hidden)

  def loss(self, batch, expand_BC):
    """The sum of the NLL of all outputs, over their number."""
    embed, total, count = self.decoder.get_input_embeddings(), 0.0, 0
    for b in range(len(expand_BC)):
      ids = lambda values: torch.tensor(np.asarray(values), dtype=torch.long)
      parts = [embed(ids(batch['prefix_BQ'][b, : batch['prefix_len_B'][b]]))]
      for c in range(expand_BC.shape[1]):
        length = batch['chunk_len_BC'][b, c]
        if not length:
          continue
        if expand_BC[b, c]:
          parts.append(embed(ids(batch['chunks_BCK'][b, c, :length])))
        else:
          size = batch['encoder_len_BC'][b, c]
          parts.append(self.project(batch['encoder_BCM'][b, c, :size]))
      output = batch['output_BO'][b, : batch['output_len_B'][b]]
      before = sum(len(part) for part in parts)
      parts.append(embed(ids(output[:-1])))
      logits = self.decoder(inputs_embeds=torch.cat(parts)[None]).logits[0]
      total = total + torch.nn.functional.cross_entropy(
        logits[before - 1 :], ids(output), reduction='sum'
      )
      count += len(output)
    return total / count


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
  """Directories of a Roberta and a Llama, and the config that fits both."""
  folder = tmp_path_factory.mktemp('pair')
  encoder = hf_torch.saved(hf_torch.encoder('roberta', 3), folder / 'encoder')
  decoder = hf_torch.saved(hf_torch.decoder('llama', 3), folder / 'decoder')
  config = hf_torch.model_config(hf_torch.config_of(encoder))
  config = toy.dataclasses.replace(config, decoder=hf_torch.config_of(decoder))
  return encoder, decoder, config


@functools.cache
def value_and_grad(config, num_expanded: int):
  model = Refrag(config)

  def loss(params, batch, expand_BC):
    c_BCE = forward.chunk_vectors(model, params, batch)
    nll_BO = forward.output_nll(
      model, params, batch, c_BCE, expand_BC, num_expanded
    )
    total, count = losses.masked_sum(nll_BO, batch['loss_mask_BO'])
    return total / count

  return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize('expanded', ['none', 'all', 'random'])
def test_loss_and_gradients(pair, expanded, tmp_path):
  encoder, decoder, config = pair
  params = init_params(config, jax.random.key(1))
  params['encoder'] = convert.read_params(
    encoder, hf_torch.abstract(config.encoder)
  )
  params['decoder'] = convert.read_params(
    decoder, hf_torch.abstract(config.decoder)
  )
  params['projection'] = jax.tree.map(
    lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape),
    params['projection'],
  )
  batch = toy.batch(B, C)
  # Nobody's text holds RoBERTa's <pad>, from which it counts positions.
  batch['encoder_BCM'] = np.maximum(batch['encoder_BCM'], 2)
  draw_BC = np.random.default_rng(0).random((B, C)) < 0.5
  expand_BC = {
    'none': np.zeros((B, C), bool), 'all': np.ones((B, C), bool),
    'random': draw_BC,
  }[expanded]  # fmt: skip
  most = int(expand_BC.sum(1).max())
  loss, grads = value_and_grad(config, most)(params, batch, expand_BC)

  classes = [hf_torch.ENCODERS['roberta'][0], hf_torch.DECODERS['llama'][0]]
  models = [
    cls.from_pretrained(path, attn_implementation='eager').eval()
    for cls, path in zip(classes, (encoder, decoder))
  ]
  theirs = Torch(*models, params['projection'])
  wanted = theirs.loss(batch, expand_BC)
  assert abs(float(loss) - wanted.item()) <= 1e-5
  wanted.backward()

  norm = lambda tree: float(jnp.sqrt(sum(
    (x.astype(float) ** 2).sum() for x in jax.tree.leaves(tree))))  # fmt: skip
  for group, model in zip(('encoder', 'decoder'), models):
    cfg = getattr(config, group)
    tree = hf_torch.gradients(model, tmp_path / group, cfg)
    apart = norm(jax.tree.map(jnp.subtract, grads[group], tree))
    assert apart <= 1e-4 * norm(tree), group
    if group == 'decoder' or expanded != 'all':
      assert norm(tree) > 0.01, group
  for path, ours in jax.tree_util.tree_leaves_with_path(grads['projection']):
    name, kind = path_str(path).split('/')
    layer = theirs.layers[name]
    value = (layer.weight if kind == 'kernel' else layer.bias).grad
    value = np.zeros_like(ours) if value is None else value.numpy().T
    scale = norm(grads['projection'])
    assert np.linalg.norm(ours - value) <= 1e-4 * scale + 1e-12, path
