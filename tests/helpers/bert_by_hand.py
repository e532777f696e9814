"""The toy encoder in NumPy, chunk by chunk and head by head.

Dimension key: M encoder tokens of a chunk, E width, F MLP width, H head width.
"""

import math

import jax
import numpy as np
import toy

CFG = toy.MODEL.encoder


def states(params, ids):
  """One chunk's states: float64, its real tokens alone, a loop over heads."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

  def norm(x_ME, w):
    x_ME = x_ME - x_ME.mean(-1, keepdims=True)
    std_M1 = np.sqrt((x_ME**2).mean(-1, keepdims=True) + CFG.norm_eps)
    return x_ME / std_M1 * w['scale'] + w['bias']

  positions = CFG.position_offset + np.arange(len(ids))
  x_ME = p['word_embeddings'][ids] + p['position_embeddings'][positions]
  x_ME = norm(x_ME, p['embeddings_norm'])
  for y in range(CFG.num_layers):
    w = jax.tree.map(lambda x: x[y], p['layers'])
    out_ME = w['o_proj']['bias']
    for n in range(CFG.num_heads):
      q_MH, k_MH, v_MH = (
        x_ME @ w[name]['kernel'][:, n] + w[name]['bias'][n]
        for name in ('q_proj', 'k_proj', 'v_proj')
      )
      weight_MM = np.exp(q_MH @ k_MH.T / math.sqrt(CFG.width / CFG.num_heads))
      weight_MM /= weight_MM.sum(-1, keepdims=True)
      out_ME = out_ME + weight_MM @ v_MH @ w['o_proj']['kernel'][n]
    x_ME = norm(x_ME + out_ME, w['attention_norm'])
    h_MF = x_ME @ w['up_proj']['kernel'] + w['up_proj']['bias']
    h_MF = h_MF * (1 + np.vectorize(math.erf)(h_MF / math.sqrt(2))) / 2
    h_ME = h_MF @ w['down_proj']['kernel'] + w['down_proj']['bias']
    x_ME = norm(x_ME + h_ME, w['output_norm'])
  return x_ME
