"""Sample texts during training: what the model writes beside what it should.

Expanded chunks are marked: ⟦tokens⟧ stay as they are, ‹text› is one vector.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refrag_jax import generate, sharding
from refrag_jax.data import batch as batch_lib
from refrag_jax.models import policy
from refrag_jax.models.refrag import Refrag
from refrag_jax.session import Session
from refrag_jax.stages import STAGES

NUM_ROWS = 3


def rows(
  session: Session, name: str, params, batch: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
  """A table of `NUM_ROWS` held-out examples; empty where a stage has none."""
  stage, cfg = STAGES[name], session.config.stage[name]
  C = batch['chunks_BCK'].shape[1] if 'chunks_BCK' in batch else 0
  num_expanded = stage.context.sampled(cfg, C)
  if num_expanded is None:
    return []
  batch = batch_lib.take(batch, slice(NUM_ROWS))
  # Tokens that are given before the loss begins: an answer's prompt.
  prompt_B = batch['loss_mask_BO'].argmax(1)
  eos_id, decode = session.tokenizer.eos_id, session.tokenizer.decode
  reads = stage.context.reads(num_expanded)
  ids_BT, expand_BC = _write(
    params,
    batch,
    session.model,
    stage.score,
    reads,
    num_expanded,
    int(prompt_B.max()),
    eos_id,
  )
  ids_BT, expand_BC = sharding.fetch(ids_BT), sharding.fetch(expand_BC)
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
    row['written'] = decode(_until(ids_BT[b], eos_id))
    row['reference'] = decode(
      _until(batch['output_BO'][b, prompt_B[b] : length], eos_id)
    )
    out.append(row)
  return out


def _until(ids, eos_id: int) -> list[int]:
  ids = np.asarray(ids).tolist()
  return ids[: ids.index(eos_id)] if eos_id in ids else ids


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6, 7))
def _write(
  params,
  batch,
  model: Refrag,
  score: Callable | None,
  reads: bool,
  num_expanded: int,
  prompt: int,
  eos_id: int,
):
  """(ids, expanded chunks) of each row; one program for stages alike."""
  score_BC = jnp.where(batch['chunk_len_BC'] > 0, 0.0, policy.NEG)
  if score:
    c_BCE = model.apply(
      {'params': params}, batch, method=Refrag.chunk_embeddings
    )
    score_BC = score(model, params, batch, c_BCE)
  C = score_BC.shape[1]
  expand_BC = policy.to_mask(policy.greedy(score_BC, num_expanded), C)
  if not reads:
    batch |= {'chunk_len_BC': jnp.zeros_like(batch['chunk_len_BC'])}
  ids_BT = generate.continuation(
    model, params, batch, expand_BC, num_expanded, prompt, eos_id
  )
  return ids_BT, expand_BC & (batch['chunk_len_BC'] > 0)
