"""Sample texts during training: what the model writes beside what it should.

Expanded chunks are marked: ⟦tokens⟧ stay as they are, ‹text› is one vector.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refrag_jax import forward, generate, sharding
from refrag_jax.models import policy
from refrag_jax.session import Session
from refrag_jax.stages import STAGES

NUM_ROWS = 3


def rows(
  session: Session, name: str, params, batch: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
  """A table of `NUM_ROWS` held-out examples; empty where a stage has none."""
  if 'chunks_BCK' not in batch:
    return []  # `lm` has no context to show
  if 'piece_BPM' in batch:
    return []  # CEPE is measured, not sampled from
  batch = {key: value[:NUM_ROWS] for key, value in batch.items()}
  cfg, C = session.config.stage[name], batch['chunks_BCK'].shape[1]
  variant = STAGES[name].variants(cfg, C)[-1]
  # Tokens that are given before the loss begins: an answer's prompt.
  prompt = int(np.argmax(batch['loss_mask_BO'][0]))
  if isinstance(variant, str):  # a control arm: its context stays tokens
    expand, kind = (C if variant == 'full' else 0), 'tokens'
    if variant == 'last_k':
      return []
  else:
    expand, kind = variant or 0, 'policy' if name == 'grpo' else 'first'
  ids_BT, expand_BC = _generate(
    session.model, kind, expand, prompt, session.tokenizer.eos_id
  )(params, batch)
  ids_BT, expand_BC = sharding.fetch(ids_BT), sharding.fetch(expand_BC)
  decode = session.tokenizer.decode
  out = []
  for b in range(len(batch['doc_B'])):
    length = int(batch['output_len_B'][b])
    row = {}
    question = batch['prefix_BQ'][b, 1 : batch['prefix_len_B'][b]]
    if len(question):
      row['question'] = decode(question.tolist()).strip()
    row['context'] = ''.join(
      ('⟦{}⟧' if on else '‹{}›').format(decode(ids[:n]))
      for ids, n, on in zip(
        batch['chunks_BCK'][b].tolist(),
        batch['chunk_len_BC'][b],
        expand_BC[b],
      )
      if n
    )
    row['written'] = decode(_until(ids_BT[b], session.tokenizer.eos_id))
    row['reference'] = decode(
      _until(batch['output_BO'][b, prompt:length], session.tokenizer.eos_id)
    )
    out.append(row)
  return out


def _until(ids, eos_id: int) -> list[int]:
  ids = np.asarray(ids).tolist()
  return ids[: ids.index(eos_id)] if eos_id in ids else ids


@functools.lru_cache(maxsize=16)
def _generate(model, kind: str, num_expanded: int, prompt: int, eos_id: int):
  """Compiled once for stages that sample alike."""

  @jax.jit
  def run(params, batch):
    B, C, _ = batch['chunks_BCK'].shape
    c_BCE = forward.chunk_vectors(model, params, batch)
    score_BC = jnp.where(batch['chunk_len_BC'] > 0, 0.0, policy.NEG)
    if kind == 'policy':
      score_BC = forward.policy_scores(model, params, batch, c_BCE)
    expand_BC = policy.to_mask(policy.greedy(score_BC, num_expanded), C)
    tokens = batch['output_BO'].shape[1] - prompt
    given = batch | {
      'output_BO': batch['output_BO'][:, :prompt],
      'output_len_B': jnp.full((B,), prompt, jnp.int32),
    }
    if kind == 'tokens' and not num_expanded:  # no context at all
      given |= {'chunk_len_BC': jnp.zeros_like(batch['chunk_len_BC'])}
    e_BCD = model.apply({'params': params}, c_BCE, method='project')
    ids_BT = generate.greedy(
      model, params, given, e_BCD, expand_BC, num_expanded, tokens, eos_id
    )
    return ids_BT, expand_BC & (given['chunk_len_BC'] > 0)

  return run
