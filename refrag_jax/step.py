"""The one jitted training step, whatever the stage.

Dimension key: B batch, A accumulation pieces.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from refrag_jax import optimizer
from refrag_jax.config.schema import OptimizerConfig, StageConfig
from refrag_jax.models import lora
from refrag_jax.models.refrag import Refrag
from refrag_jax.stages.stage import Stage
from refrag_jax.state import TrainState, merge


def init_opt_state(
  params: dict,
  stage: Stage,
  freeze: str = '',
  optim: OptimizerConfig = optimizer.DEFAULT,
) -> Any:
  """The optimizer's state of what a stage trains."""
  trainable, _ = stage.partition(params, freeze)
  return optimizer.make_tx(optim).init(trainable)


def train_step(
  state: TrainState,
  batch: dict,
  key: jax.Array,
  learning_rate: jax.Array,
  *,
  model: Refrag,
  stage: Stage,
  cfg: StageConfig,
  variant: Any,
  optim: OptimizerConfig = optimizer.DEFAULT,
) -> tuple[TrainState, dict]:
  """Prepares the batch, then makes the stage's optimizer update(s) on it.

  A non-finite loss or gradient leaves parameters, moments and step count as
  they were; `metrics['finite']` tells the host, which stops the run.

  Args:
    state: donated by the caller.
    batch: leaves (B, ...); with accumulation split into A pieces whose
      gradients are added before the one division by the number of targets, so
      that A changes memory and not the result (but for what dropout draws).
    key: a pure function of (seed, stage, step).
    learning_rate: of this step; an argument, so that schedules compile nothing.
    variant: static; see stages/context.py.
    optim: static.
  """
  tx = optimizer.make_tx(optim)
  trainable, frozen = stage.partition(state.params, cfg.freeze)
  opt_state = state.opt_state
  A, B = cfg.accumulation_steps, jax.tree.leaves(batch)[0].shape[0]
  pieces = jax.tree.map(lambda x: x.reshape(A, -1, *x.shape[1:]), batch)
  prepared = jax.lax.stop_gradient(
    map_pieces(
      lambda args: stage.prepare(
        model, state.params, args[0], args[1], variant, cfg
      ),
      (pieces, row_keys(key, B).reshape(A, -1)),
    )
  )

  dropout_keys = None
  if model.cfg.lora.rank and model.cfg.lora.dropout:
    # Behind those of the rows.
    dropout_keys = jax.random.split(jax.random.fold_in(key, B), A)

  def piece_grad(trainable, piece):
    piece, dropout_key = piece
    dropping = model
    if dropout_key is not None:
      dropping = lora.Dropping(model, dropout_key)

    def total(trainable):
      total, weight, metrics = stage.loss(
        dropping, merge(trainable, frozen), piece, variant, cfg
      )
      return total, (weight, metrics)

    (total, (weight, metrics)), grads = jax.value_and_grad(total, has_aux=True)(
      trainable
    )
    return total, weight, metrics, grads

  finite = jnp.bool_(True)
  for _ in range(max(1, cfg.updates_per_rollout)):
    total, weight, metrics, grads = _accumulate(
      piece_grad, trainable, (prepared, dropout_keys)
    )
    loss = total / weight
    grads = jax.tree.map(lambda g, w=weight: g / w, grads)
    grad_norm = optax.tree.norm(grads)
    finite &= jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = tx.update(grads, opt_state, trainable)
    trainable = jax.tree.map(
      lambda p, u: p - learning_rate * u, trainable, updates
    )
  new_state = TrainState(state.step + 1, merge(trainable, frozen), opt_state)
  new_state = jax.tree.map(
    lambda new, old: jnp.where(finite, new, old), new_state, state
  )
  metrics |= {
    'loss': loss,
    'grad_norm': grad_norm,
    'targets': weight,
    'finite': finite,
  }
  return new_state, metrics


def row_keys(key: jax.Array, rows: int) -> jax.Array:
  """A key for each row of a batch, whatever pieces it is computed in."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def map_pieces(f, xs):
  """lax.map over pieces of a batch; a plain call for one, without a loop."""
  if jax.tree.leaves(xs)[0].shape[0] == 1:
    y = f(jax.tree.map(lambda x: x[0], xs))
    return jax.tree.map(lambda y: y[None], y)
  return jax.lax.map(f, xs)


def _accumulate(piece_grad, trainable, prepared):
  """Sums of loss, weight and gradients over the pieces; means of metrics."""
  first = jax.tree.map(lambda x: x[0], prepared)
  pieces = jax.tree.leaves(prepared)[0].shape[0]
  if pieces == 1:
    return piece_grad(trainable, first)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(piece_grad, trainable, first),
  )

  def body(sums, piece):
    return jax.tree.map(jnp.add, sums, piece_grad(trainable, piece)), None

  (total, weight, metrics, grads), _ = jax.lax.scan(body, zeros, prepared)
  return total, weight, jax.tree.map(lambda m: m / pieces, metrics), grads
