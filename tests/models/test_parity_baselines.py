"""CEPE and REPLUG against references in torch, in double precision.

The references follow the definitions, one example at a time: no padding, no
mask, no folded axis, what is absent is simply not there. Torch's own layers do
the encoder and every attention.

Dimension key: B batch, P pieces, M encoder tokens of a piece, S states to read,
O output slots, T positions, N heads, H head dimension, D width, E encoder width.
"""

import functools

import forward
import jax
import numpy as np
import pytest
import toy

from refrag_jax.evals import replug
from refrag_jax.models import losses

torch = pytest.importorskip('torch')
nn, F = torch.nn, torch.nn.functional

DECODER, ENCODER = toy.MODEL.decoder, toy.MODEL.encoder
PARAMS = toy.params(toy.CEPE)


def tensor(x):
  return torch.tensor(np.asarray(x), dtype=torch.float64)


def linear(kernel, bias=None, num_in=1):
  """nn.Linear's weight (out, in) and bias from a kernel (in..., out...)."""
  kernel = tensor(kernel)
  inputs = int(np.prod(kernel.shape[:num_in]))
  layer = nn.Linear(
    inputs, kernel.numel() // inputs, bias is not None, dtype=torch.float64
  )
  with torch.no_grad():
    layer.weight.copy_(kernel.reshape(inputs, -1).T)
    if bias is not None:
      layer.bias.copy_(tensor(bias).reshape(-1))
  return layer


def torch_encoder():
  """ids of one text -> its states (M, E), by torch's own encoder layers."""
  p = jax.tree.map(tensor, PARAMS['encoder'])
  stack = []
  for y in range(ENCODER.num_layers):
    w = jax.tree.map(lambda x, y=y: x[y], p['layers'])
    layer = nn.TransformerEncoderLayer(
      ENCODER.width,
      ENCODER.num_heads,
      ENCODER.mlp_width,
      dropout=0.0,
      activation='gelu',
      layer_norm_eps=ENCODER.norm_eps,
      batch_first=True,
      dtype=torch.float64,
    ).eval()
    flat = lambda name, w=w: linear(w[name]['kernel'], w[name]['bias'])
    qkv = [flat(name) for name in ('q_proj', 'k_proj', 'v_proj')]
    out = linear(w['o_proj']['kernel'], w['o_proj']['bias'], num_in=2)
    up, down = flat('up_proj'), flat('down_proj')
    layer.load_state_dict(
      {
        'self_attn.in_proj_weight': torch.cat([part.weight for part in qkv]),
        'self_attn.in_proj_bias': torch.cat([part.bias for part in qkv]),
        'self_attn.out_proj.weight': out.weight,
        'self_attn.out_proj.bias': out.bias,
        'linear1.weight': up.weight,
        'linear1.bias': up.bias,
        'linear2.weight': down.weight,
        'linear2.bias': down.bias,
        'norm1.weight': w['attention_norm']['scale'],
        'norm1.bias': w['attention_norm']['bias'],
        'norm2.weight': w['output_norm']['scale'],
        'norm2.bias': w['output_norm']['bias'],
      }
    )
    stack.append(layer)

  def states(ids):
    positions = ENCODER.position_offset + torch.arange(len(ids))
    x_ME = p['word_embeddings'][ids] + p['position_embeddings'][positions]
    norm = p['embeddings_norm']
    x_ME = F.layer_norm(
      x_ME, (ENCODER.width,), norm['scale'], norm['bias'], ENCODER.norm_eps
    )
    for layer in stack:
      x_ME = layer(x_ME[None])[0]
    return x_ME

  return states


def heads(x, num):
  """(length, num * H) -> (1, num, length, H), as torch's attention wants it."""
  return x.unflatten(-1, (num, -1)).transpose(0, 1)[None]


def rotate(x):
  """Each pair (x_i, x_{i + H/2}) turned by position * theta^(-2i/H)."""
  T, H = x.shape[-2:]
  turn = DECODER.rope_theta ** (-torch.arange(0, H, 2, dtype=x.dtype) / H)
  angle = torch.outer(torch.arange(T, dtype=x.dtype), turn)
  pairs = torch.complex(x[..., : H // 2], x[..., H // 2 :])
  turned = pairs * torch.polar(torch.ones_like(angle), angle)
  return torch.cat([turned.real, turned.imag], -1)


class Attention(nn.Module):
  """Grouped-query attention; keys and values come from anywhere."""

  def __init__(self, w):
    super().__init__()
    self.q, self.k, self.v = (
      linear(w[name]['kernel']) for name in ('q_proj', 'k_proj', 'v_proj')
    )
    self.o = linear(w['o_proj']['kernel'], num_in=2)

  def forward(self, x, read, turn=lambda x: x, causal=False):
    N, J = DECODER.num_heads, DECODER.num_kv_heads
    out = F.scaled_dot_product_attention(
      turn(heads(self.q(x), N)),
      turn(heads(self.k(read), J)),
      heads(self.v(read), J),
      is_causal=causal,
      enable_gqa=True,
    )
    return self.o(out[0].transpose(0, 1).flatten(1))


def torch_log_probs(ids, states):
  """log p(. | ids up to here), (T, V): a Llama, with cross-attention to states.

  Args:
    states: (S, E); None where there is nothing to read.
  """
  p = jax.tree.map(tensor, {g: PARAMS[g] for g in ('decoder', 'cross')})
  rms = lambda x, scale: F.rms_norm(
    x, (DECODER.width,), scale, DECODER.norm_eps
  )
  decoder = p['decoder']
  x_TD = decoder['embed_tokens'][ids]
  for y in range(DECODER.num_layers):
    w = jax.tree.map(lambda x, y=y: x[y], decoder['layers'])
    h_TD = rms(x_TD, w['input_layernorm']['scale'])
    x_TD = x_TD + Attention(w)(h_TD, h_TD, rotate, causal=True)
    if states is not None:
      c = jax.tree.map(lambda x, y=y: x[y], p['cross'])
      x_TD = x_TD + Attention(c)(rms(x_TD, c['layernorm']['scale']), states)
    h_TD = rms(x_TD, w['post_attention_layernorm']['scale'])
    gate, up, down = (
      linear(w[name]['kernel'])
      for name in ('gate_proj', 'up_proj', 'down_proj')
    )
    x_TD = x_TD + down(F.silu(gate(h_TD)) * up(h_TD))
  logits_TV = rms(x_TD, decoder['norm']['scale']) @ decoder['lm_head']
  return F.log_softmax(logits_TV, -1)


def torch_nll(before, output, states=None):
  """-log p of each output token after `before` and the outputs before it."""
  ids = torch.tensor([*before, *output])
  logp_TV = torch_log_probs(ids, states)[len(before) - 1 : -1]
  return -logp_TV[torch.arange(len(output)), ids[len(before) :]]


def of_row(batch, b):
  prefix = batch['prefix_BQ'][b, : batch['prefix_len_B'][b]]
  return prefix.tolist(), batch['output_BO'][b, : batch['output_len_B'][b]]


def assert_rows_equal(found_BO, expected, batch):
  """`expected` ragged; then the loss, over the batch's targets."""
  for b, expected_O in enumerate(expected):
    expected_O = expected_O.detach().numpy()
    np.testing.assert_allclose(
      found_BO[b, : len(expected_O)], expected_O, rtol=0, atol=1e-5
    )
  total, weight = losses.masked_sum(found_BO, batch['loss_mask_BO'])
  expected = torch.cat(expected).mean().item()
  assert float(total / weight) == pytest.approx(expected, rel=0, abs=1e-5)


@pytest.mark.parametrize(
  ('B', 'P', 'M', 'O'),
  [(3, 3, 6, 5), (1, 1, 3, 2), (5, 7, 5, 11), (2, 0, 6, 3)],
)
def test_cepe(B, P, M, O):
  """Ragged and absent pieces, none in the last of several rows; odd shapes."""
  rng = np.random.default_rng(B)
  batch = toy.batch(B, C=2, Q=4, O=O, seed=B)
  batch['piece_BPM'] = rng.integers(1, ENCODER.vocab_size, (B, P, M))
  lengths_BP = rng.integers(1, M + 1, (B, P))
  lengths_BP[rng.random((B, P)) < 0.2] = 0
  if B > 1:
    lengths_BP[-1] = 0
  batch['piece_len_BP'] = lengths_BP.astype(np.int32)
  encode, expected = torch_encoder(), []
  for b in range(B):
    pieces = [
      encode(torch.tensor(ids_M[:size]))
      for ids_M, size in zip(batch['piece_BPM'][b], lengths_BP[b])
      if size
    ]
    states_SE = torch.cat(pieces) if pieces else None
    expected.append(torch_nll(*of_row(batch, b), states_SE))
  run = toy.jit(functools.partial(forward.cepe_nll, toy.model(toy.CEPE)))
  assert_rows_equal(run(PARAMS, batch), expected, batch)


@pytest.mark.parametrize(
  ('B', 'C', 'K', 'O'),
  [(3, 4, 3, 5), (1, 1, 1, 2), (2, 5, 7, 11), (2, 3, 1, 4)],
)
def test_replug(B, C, K, O):
  """Products of probabilities, averaged over the pieces at every prefix."""
  rng = np.random.default_rng(B)
  ids_BCK = rng.integers(1, DECODER.vocab_size, (B, C, K)).astype(np.int32)
  batch = toy.batch(B, C, O=O, seed=B) | {
    'chunks_BCK': ids_BCK,
    'chunk_len_BC': np.full((B, C), K, np.int32),
  }
  expected = []
  for b in range(B):
    prefix, output = of_row(batch, b)
    likelihood = [
      torch.cumprod(torch.exp(-torch_nll([*prefix, *piece], output)), 0)
      for piece in torch.tensor(ids_BCK[b].ravel()).split(C)
    ]
    mixture = torch.stack(likelihood).mean(0)
    before = torch.cat([torch.ones(1, dtype=mixture.dtype), mixture[:-1]])
    expected.append(-torch.log(mixture / before))
  run = toy.jit(functools.partial(replug.nll, toy.model()))
  assert_rows_equal(run(PARAMS, batch), expected, batch)
