"""What answering takes on machines that are not there: `--mode=plan --serving`.

Dimension key: B slots, S positions of a slot, T positions of a prefill.

The engine's own programs (serve/programs.py) are compiled for the topology: a
prefill of full context, one of the same context compressed, and a decode step
of every slot at its whole length. From them come memory and bounds, as for the
stages.
"""

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from refrag_jax import flops, sharding
from refrag_jax.plan import topologies
from refrag_jax.plan.compiled import compile_with, device_bytes, usable
from refrag_jax.serve import programs
from refrag_jax.serve.engine import Options, settings_of
from refrag_jax.session import Session, abstract_params


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
  """One program of the engine; bytes and FLOPs are those of a device."""

  name: str
  positions: int  # T of a prefill; of a decode step what it looks at
  temp_bytes: int
  flops: float
  compute_s: float
  hbm_s: float
  bound_s: float
  bound_by: str
  compile_s: float


@dataclasses.dataclass(frozen=True)
class ServingPlan:
  """What a layout holds, and how soon it can answer at the best."""

  slots: int
  positions: int  # of a slot
  weight_bytes: int  # of a device, encoder, projection and policy among them
  slot_bytes: int  # of a device, for one more sequence on each of its rows
  sequences_that_fit: int | None  # on all devices; None: not known
  programs: list[ProgramPlan]


def plan(session: Session, there: topologies.Topology) -> ServingPlan:
  """Compiles the engine's programs for the longest context of config.bench."""
  bench, model = session.config.bench, session.config.model
  context, k = max(bench.contexts), model.chunk_size
  ways = sharding.axis_size('batch', session.mesh)
  rows = -(-max(1, *bench.batches) // ways) * ways
  length = context + bench.question_tokens + bench.output_tokens
  compressed = context // k + bench.question_tokens
  with jax.set_mesh(session.mesh):
    weights = abstract_weights(session)
    slots = abstract_slots(session, rows, length)
    found = [
      _prefill(session, there, weights, slots, name, T)
      for name, T in (
        ('prefill, full context', context + bench.question_tokens),
        (f'prefill, k = {k}', compressed),
      )
    ]
    found += [
      _decode(session, there, weights, slots, name, live)
      for name, live in (
        ('decode, full context', length),
        (f'decode, k = {k}', compressed + bench.output_tokens),
      )
    ]
  params = abstract_params(session)
  small = {group: x for group, x in params.items() if group != 'decoder'}
  held = device_bytes((weights, small))
  a_slot = device_bytes(slots.caches) // (rows // ways)
  temp = max(p.temp_bytes for p in found)
  room = usable(there) - held - temp
  fit = None if math.isinf(room) else max(0, int(room // a_slot)) * ways
  return ServingPlan(rows, length, held, a_slot, fit, found)


def abstract_weights(session: Session) -> programs.Weights:
  """Shapes and shardings of the engine's weights, as `programs.unstack`."""
  model = session.config.model
  decoder = abstract_params(session)['decoder']
  dtype = jnp.dtype(model.compute_dtype)

  def of(x, spec, shape, dtype=dtype):
    placed = NamedSharding(session.mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

  def spec_of(x):
    return (*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec)))

  def of_layer(path, x):
    kind = jnp.float32 if 'scale' in str(path[-1]) else dtype
    return of(x, spec_of(x)[1:], x.shape[1:], kind)

  embed = decoder['embed_tokens']
  head = decoder.get('lm_head', embed)
  flip = slice(None, None, None if 'lm_head' in decoder else -1)
  layer = jax.tree_util.tree_map_with_path(of_layer, decoder['layers'])
  return programs.Weights(
    of(embed, spec_of(embed), embed.shape),
    of(head, spec_of(head)[flip], head.shape[flip]),
    decoder['norm'],
    [layer] * model.decoder.num_layers,
  )


def abstract_slots(session: Session, rows: int, length: int) -> programs.Slots:
  """Shapes and shardings of a pool."""
  shapes = jax.eval_shape(
    lambda: programs.new_slots(
      cfg=session.config.model, rows=rows, length=length
    )
  )

  def placed(x):
    spec = sharding.to_spec(programs.AXES[x.ndim], x.shape, session.mesh)
    place = NamedSharding(session.mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

  return jax.tree.map(placed, shapes)


def _everywhere(session: Session, shape: tuple[int, ...], dtype: Any):
  place = NamedSharding(session.mesh, PartitionSpec())
  return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def _prefill(session, there, weights, slots, name: str, T: int) -> ProgramPlan:
  model = session.config.model
  decoder = model.decoder
  place = lambda shape, dtype: _everywhere(session, shape, dtype)
  settings = jax.tree.map(
    lambda x: place(x.shape, x.dtype), settings_of([Options()])
  )
  traced = programs.prefill.trace(
    weights, slots, place((), jnp.int32),
    place((1, T, decoder.width), jnp.dtype(model.compute_dtype)),
    place((), jnp.int32), place((decoder.vocab_size,), jnp.bool_), settings,
    cfg=decoder, attend=model.attention,
  )  # fmt: skip
  return _planned(session, there, traced, name, T, device_bytes(weights))


def _decode(session, there, weights, slots, name: str, live: int):
  model, rows = session.config.model, slots.token_B.shape[0]
  place = lambda shape, dtype: _everywhere(session, shape, dtype)
  settings = jax.tree.map(
    lambda x: place(x.shape, x.dtype), settings_of([Options()] * rows)
  )
  traced = programs.decode.trace(
    weights, slots, place((rows,), jnp.bool_), settings, cfg=model.decoder,
    attend=model.attention, live=live,
  )  # fmt: skip
  length = slots.caches[0]['k'].shape[2]
  read = device_bytes(weights) + device_bytes(slots.caches) * live / length
  return _planned(session, there, traced, name, live, read)


def _planned(
  session, there, traced, name, positions, read: float
) -> ProgramPlan:
  """Args: read: bytes that a device cannot do without reading."""
  start = time.monotonic()
  flags = topologies.flags(there, session.config.cluster)
  memory, _ = compile_with(traced, there, there.options | flags)
  seconds = time.monotonic() - start
  count = flops.count(traced.jaxpr) / len(there.devices)
  compute_s, hbm_s = count / there.chip.flops, read / there.chip.hbm_rate
  bounds = {'compute': compute_s, 'hbm': hbm_s}
  by = max(bounds, key=lambda of: np.nan_to_num(bounds[of]))
  return ProgramPlan(
    name, positions, memory['temp_bytes'], count, compute_s, hbm_s, bounds[by],
    by, seconds,
  )  # fmt: skip


def summary(serving: ServingPlan, gib) -> list[str]:
  """Lines for people."""
  fit = serving.sequences_that_fit
  lines = [
    f'serving  weights {gib(serving.weight_bytes)} a device, '
    f'{gib(serving.slot_bytes)} for each sequence of {serving.positions:,} '
    f'positions: '
    + (
      f'{fit:,} sequences fit' if fit is not None else 'no bound is known here'
    )
  ]
  for p in serving.programs:
    text = f'  {p.name}  {p.positions:,} positions, {p.flops / 1e12:.2f} TFLOP'
    if p.bound_s == p.bound_s:  # known for this chip
      text += f'; at least {1e3 * p.bound_s:.2f} ms ({p.bound_by})'
    lines.append(f'{text} (compiled in {p.compile_s:.1f} s)')
  return lines
