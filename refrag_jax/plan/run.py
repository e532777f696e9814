"""`--mode=plan`: what a layout costs on machines that are not there.

Every stage's largest step is compiled for the named topology, with no device,
by the compiler that would compile it there. From the program come the memory
of a device, and what is sent between devices; from the jaxpr come the FLOPs. A
step cannot take less time than the chip's arithmetic, its memory or its network
need for that: these are bounds and no predictions.
"""

import collections
import dataclasses
import itertools
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.interpreters import partial_eval

from refrag_jax import compilation, flops, sharding
from refrag_jax.config.schema import Config
from refrag_jax.errors import UserError
from refrag_jax.models.refrag import Refrag
from refrag_jax.plan import collectives, compiled, page, serving, topologies
from refrag_jax.resolve import changed
from refrag_jax.runtime import files
from refrag_jax.runtime.progress import say
from refrag_jax.session import (
  Session,
  abstract_params,
  check_batches,
  settle_attention,
)
from refrag_jax.stages import STAGES
from refrag_jax.state import TrainState

MOST_FIXES = 3
MOST_TRIED = 16  # programs compiled in search of them


@dataclasses.dataclass(frozen=True)
class StagePlan:
  """One stage's largest step; bytes and FLOPs are those of a device."""

  chunks: int
  variant: Any
  parameter_bytes: int
  optimizer_bytes: int
  gradient_bytes: int
  batch_bytes: int
  argument_bytes: int  # the three above, all that stays between steps
  temp_bytes: int
  peak_bytes: int
  fits: bool
  flops: float  # executed, recomputation included
  model_flops: float  # without it
  collectives: list[dict[str, Any]]
  trace_s: float
  compile_s: float
  compute_s: float
  hbm_s: float
  network_s: float
  bound_step_s: float
  bound_by: str
  tokens_per_s: float  # of text, all devices, at the bound
  mfu_ceiling: float
  bound_hours: float  # of all steps of the stage


def run(
  config: Config, workdir: str, topology: str, search: bool, answers: bool
) -> int:
  """Plans every stage, writes plan.json and plan.html.

  Args:
    topology: as in plan/topologies.py.
    search: also try other meshes and remat policies, and rank them.
    answers: also plan the engine, for the longest context of config.bench.

  Raises:
    UserError: the topology or the mesh cannot be, or a compiler is missing.
  """
  if not topology:
    raise UserError(
      '--mode=plan needs --topology=NAME, such as h100:8x8 (hosts x cards) or '
      'v5p:4x4x4'
    )
  there = topologies.load(topology)
  session = open_planned(config, there)
  say(f'{topology}: {len(there.devices)} devices, mesh '
      f'{dict(session.mesh.shape)}, '
      f'attention {session.config.model.attention}')  # fmt: skip
  stages = {}
  for name in config.stages:
    stages[name] = plan_stage(session, there, name)
    say(summary(name, stages[name], there))
  answering = None
  if answers:
    answering = serving.plan(session, there)
    for line in serving.summary(answering, page.gib):
      say(line)
  fixes = {}
  worst = worst_of(stages)
  if worst:
    fixes[worst] = list(fixes_of(config, there, worst))
    for fix in fixes[worst]:
      peak = page.gib(fix['peak_bytes'])
      say(f'  {worst} fits with {fix["change"]}: {peak}')
    if not fixes[worst]:
      say(f'  no small change was found with which {worst} fits')
  ranked = []
  if search:
    longest = max(stages, key=lambda name: np.nan_to_num(stages[name].flops))
    ranked = search_layouts(config, there, longest)
  out = {
    'topology': topology,
    'devices': len(there.devices),
    'hbm_bytes': there.chip.hbm,
    'mesh': dict(session.mesh.shape),
    'config': config.name,
    'stages': {n: dataclasses.asdict(s) for n, s in stages.items()},
    'serving': answering and dataclasses.asdict(answering),
    'fixes': fixes,
    'search': ranked,
    'arrays': largest_arrays(session),
    'budgets': budgets(config),
  }
  files.write_json(os.path.join(workdir, 'plan.json'), out)
  page.write(os.path.join(workdir, 'plan.html'), out)
  say(f'done: {workdir}/plan.json, {workdir}/plan.html')
  return 0


def budgets(config: Config) -> dict[str, dict[str, int]]:
  """Steps and sizes of each stage: batch, s and o in tokens, k."""
  out = {}
  for name in config.stages:
    task, cfg = STAGES[name].task, config.stage[name]
    chunks = task.num_chunks(config, name)
    shapes = task.row_shapes(config, name, chunks)
    output = shapes.get('output_BO') or shapes.get('tokens_BT') or ((0,),)
    out[name] = {
      'steps': cfg.num_train_steps,
      'batch_size': cfg.batch_size,
      'context_length': chunks * config.model.chunk_size,
      'output_length': output[0][0],
      'chunk_size': config.model.chunk_size,
    }
  return out


def open_planned(config: Config, there: topologies.Topology) -> Session:
  """A session on devices that are not there; no text, no tokenizer."""
  mesh = sharding.make_mesh(
    **dataclasses.asdict(config.mesh), devices=there.devices
  )
  session = Session(config, '', mesh, Refrag(config.model), None, None, {})
  check_batches(session)
  return settle_attention(session)


def plan_stage(
  session: Session, there: topologies.Topology, name: str
) -> StagePlan:
  """Compiles a stage's most expensive step and adds up what it costs."""
  state, clock = compilation.abstract_state(session, name), time.monotonic()
  counts = collections.Counter(compilation.step_keys(session, name))
  with jax.set_mesh(session.mesh):
    traced = {key: _trace(session, name, state, key) for key in counts}
    cost = {key: flops.count(t.jaxpr) for key, t in traced.items()}
    key = max(cost, key=cost.get)
    trace_s, clock = time.monotonic() - clock, time.monotonic()
    flags = topologies.flags(there, session.config.cluster)
    memory, text = compiled.compile_with(
      traced[key], there, there.options | flags
    )
    compile_s = time.monotonic() - clock
  devices = len(there.devices)
  batch = compilation.abstract_batch(session, name, key[0])
  trainable, frozen = STAGES[name].partition(
    state.params, session.config.stage[name].freeze
  )
  sent = collectives.read(
    text, session.mesh.axis_names, session.mesh.devices.shape
  )
  per_device = cost[key] / devices
  compute_s = per_device / there.chip.flops
  # What is trained is read and written once at least, with its moments; what is
  # frozen and multiplied with is read. Of an embedding a stage may read a part.
  changing = compiled.device_bytes((trainable, state.opt_state))
  read = compiled.device_bytes(
    _multiplied(traced[key].jaxpr.jaxpr, state, frozen)
  )
  hbm_s = (2 * changing + read) / there.chip.hbm_rate
  # Of a program that the compiler refused nobody knows what it sends.
  network_s = network_seconds(sent, session.mesh, there) if text else math.nan
  bounds = {'compute': compute_s, 'hbm': hbm_s, 'network': network_s}
  bound_by = max(bounds, key=lambda name: np.nan_to_num(bounds[name]))
  bound = bounds[bound_by]
  model = compilation.model_flops(session, name, state, key) / devices
  return StagePlan(
    chunks=key[0],
    variant=key[1],
    parameter_bytes=compiled.device_bytes(state.params),
    optimizer_bytes=compiled.device_bytes(state.opt_state),
    gradient_bytes=compiled.device_bytes(trainable),
    batch_bytes=compiled.device_bytes(batch),
    **memory,
    fits=memory['peak_bytes'] <= compiled.usable(there),
    flops=per_device,
    model_flops=model,
    collectives=[
      {
        'op': c.op,
        'axis': '+'.join(c.axes) or 'mixed',
        'bytes': c.bytes,
        'count': c.count,
      }
      for c in sorted(sent, key=lambda c: -c.bytes * c.count)
    ],
    trace_s=trace_s,
    compile_s=compile_s,
    compute_s=compute_s,
    hbm_s=hbm_s,
    network_s=network_s,
    bound_step_s=bound,
    bound_by=bound_by,
    tokens_per_s=compilation.text_tokens(batch) / bound,
    mfu_ceiling=model / there.chip.flops / bound,
    # Shorter steps by their arithmetic; what they send is not known.
    bound_hours=sum(
      count
      * (
        bound if k == key else max(cost[k] / devices / there.chip.flops, hbm_s)
      )
      for k, count in counts.items()
    )
    / 3600,
  )


def _trace(session: Session, name: str, state: TrainState, key):
  batch = compilation.abstract_batch(session, name, key[0])
  try:
    return compilation.trace_step(session, name, state, batch, key[1])
  except RuntimeError as e:
    if 'cuDNN' not in str(e):
      raise
    raise UserError(
      'config.model.attention=cudnn cannot be planned where cuDNN is not '
      'installed: plan with fused, which is blockwise there and holds as little'
    ) from None


def _multiplied(jaxpr: Any, state: TrainState, frozen: dict) -> list[Any]:
  """The frozen parameters that a step reads to come by the others, no tables.

  Args:
    jaxpr: of the step, (state, ...) to (state, ...).
  """
  names = [
    jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(state)
  ]
  leaves = {
    f'.params{jax.tree_util.keystr(path)}': leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(frozen)
  }
  # That they come out again is no use of them.
  wanted = [name not in leaves for name in names]
  wanted += [True] * (len(jaxpr.outvars) - len(names))
  _, used = partial_eval.dce_jaxpr(jaxpr, wanted)
  return [
    leaves[name]
    for name, read in zip(names, used)
    if read and name in leaves and 'embed' not in name
  ]


def network_seconds(sent, mesh, there: topologies.Topology) -> float:
  """The least time in which all collectives can pass the wires.

  Within a host, or a TPU slice, a device sends at the chip's near rate; what
  leaves a host leaves through the network cards of the devices that take part.
  Both kinds of wire work at once.
  """
  near = far = 0.0
  for c in sent:
    if c.op == 'send':  # to other slices, all of it
      far += c.sent / there.chip.far_rate
      continue
    hosts, members = spread(c, mesh, there.near)
    if members > 1:
      near += c.sent / there.chip.near_rate
    if hosts > 1:
      outside = (hosts - 1) / hosts
      if c.op in ('all-to-all', 'ragged-all-to-all'):
        cards = 1  # each device has other bytes for the other hosts
      elif c.op == 'collective-permute':
        outside = cards = 1  # somebody's partner is on another one
      else:
        cards = members
      far += c.passed * outside / cards / there.chip.far_rate
  return max(near, far)


def spread(sent: collectives.Collective, mesh, near: int) -> tuple[int, int]:
  """Hosts over which a collective's group lies, and its devices on each.

  A group that is no axes of the mesh may lie anywhere: then as near together
  as can be.
  """
  if not sent.axes:
    hosts = -(-sent.group // near)
    return hosts, sent.group // hosts
  axes, shape = sent.axes, mesh.devices.shape
  index = np.arange(math.prod(shape)).reshape(shape)
  picked = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
  hosts = np.unique(np.asarray(index[picked]).ravel() // near)
  return len(hosts), max(1, np.asarray(index[picked]).size // len(hosts))


def largest_arrays(session: Session, number: int = 16) -> list[dict[str, Any]]:
  """The largest parameters, with how they lie on the mesh."""
  leaves = jax.tree_util.tree_leaves_with_path(abstract_params(session))
  leaves = sorted(leaves, key=lambda leaf: -leaf[1].size)[:number]
  out = []
  for path, x in leaves:
    shard = x.sharding.shard_shape(x.shape)
    parts = x.size // math.prod(shard)
    out.append(
      {
        'path': sharding.path_str(path),
        'shape': x.shape,
        'spec': sharding.describe(x.sharding.spec),
        'shard': shard,
        'bytes': math.prod(shard) * x.dtype.itemsize,
        'copies': session.mesh.devices.size // parts,
      }
    )
  return out


# --- What would fit, and what would be quicker --------------------------------


def worst_of(stages: dict[str, StagePlan]) -> str:
  """The stage that is furthest from fitting; '' if all fit."""
  unfit = {n: s.peak_bytes for n, s in stages.items() if not s.fits}
  return max(unfit, key=unfit.get) if unfit else ''


def fixes_of(
  config: Config, there: topologies.Topology, name: str
) -> Iterator[dict[str, Any]]:
  """Small changes with which a stage fits, each compiled; three at most."""
  found = tried = 0
  for change in candidates(config, len(there.devices), name):
    try:
      session = open_planned(changed(config, change), there)
    except UserError:
      continue  # not a batch, or not a mesh, that there can be
    if compiled.device_bytes(
      compilation.abstract_state(session, name)
    ) > compiled.usable(there):
      continue  # needs no compiler to be too large
    stage, tried = plan_stage(session, there, name), tried + 1
    if stage.fits:
      found += 1
      yield {
        'change': ' '.join(f'--config.{c}' for c in change),
        'peak_bytes': stage.peak_bytes,
        'bound_step_s': stage.bound_step_s,
      }
    if found == MOST_FIXES or tried == MOST_TRIED:
      return


def candidates(
  config: Config, devices: int, name: str
) -> Iterator[tuple[str, ...]]:
  """Changes to try: one, then two, then three at once, the cheap ones first."""
  cfg, model = config.stage[name], config.model
  mesh = sharding.fill_up(dataclasses.astuple(config.mesh), devices)
  _, fsdp, tensor, sequence = mesh
  everywhere = devices // (tensor * sequence)
  changes = [
    (model.attention == 'dense', ('model.attention=blockwise',)),
    (not model.loss_block, ('model.loss_block=512',)),
    (model.remat != 'full', ('model.remat=full',)),
    (fsdp != everywhere, ('mesh.data=1', f'mesh.fsdp={everywhere}')),
  ]
  changes = [change for of_use, change in changes if of_use]
  pieces = [
    (f'stage.{name}.accumulation_steps={cfg.accumulation_steps * more}',)
    for more in (2, 4, 8, 16)
    if cfg.batch_size % (cfg.accumulation_steps * more) == 0
  ]
  yield from changes + pieces
  # Together with others, only the most pieces: they cost little.
  changes += pieces[-1:]
  for number in (2, 3):
    for some in itertools.combinations(changes, number):
      yield tuple(itertools.chain(*some))


def search_layouts(
  config: Config, there: topologies.Topology, name: str
) -> list[dict[str, Any]]:
  """Meshes and remat policies by what stage `name` needs at least, best first.

  One stage, the most expensive: a layout costs a compilation each.
  """
  tried = []
  for change in layouts(config, there):
    try:
      session = open_planned(changed(config, change), there)
    except UserError:
      continue  # a batch that these axes do not share out
    stage = plan_stage(session, there, name)
    row = {
      'change': ' '.join(f'--config.{c}' for c in change),
      'stage': name,
      'fits': stage.fits,
      'peak_bytes': stage.peak_bytes,
      'bound_step_s': stage.bound_step_s,
      'bound_by': stage.bound_by,
      'mfu_ceiling': stage.mfu_ceiling,
    }
    peak = page.gib(row['peak_bytes'])
    say(f'  {row["change"]}  {peak}{"" if row["fits"] else ", does not fit"}')
    tried.append(row)
  return sorted(
    tried,
    key=lambda r: (
      not r['fits'],
      np.nan_to_num(r['bound_step_s']),
      r['peak_bytes'],
    ),
  )


def layouts(
  config: Config, there: topologies.Topology
) -> Iterator[tuple[str, ...]]:
  """Meshes whose inner axes stay within a host, and the remat policies."""
  devices, heads = len(there.devices), config.model.decoder.num_heads
  inner = [(n, 1) for n in (1, 2, 4, 8) if not heads % n]
  for tensor, sequence in (*inner, (1, 2), (1, 4)):
    near = there.near // (tensor * sequence)
    if devices % (tensor * sequence) or not near:
      continue
    rest = devices // (tensor * sequence)
    for fsdp in sorted(n for n in {1, near, rest} if not rest % n):
      for remat in ('dots', 'full'):
        yield (
          f'mesh.data={rest // fsdp}',
          f'mesh.fsdp={fsdp}',
          f'mesh.tensor={tensor}',
          f'mesh.sequence={sequence}',
          f'model.remat={remat}',
        )


# --- What is said -------------------------------------------------------------


def summary(name: str, stage: StagePlan, there: topologies.Topology) -> str:
  fits = 'fits' if stage.fits else 'DOES NOT FIT'
  of = f' of {page.gib(there.chip.hbm)}' if there.chip.hbm else ''
  text = (
    f'{name}  {page.gib(stage.peak_bytes)}{of}, {fits}; '
    f'{stage.flops / 1e12:.1f} TFLOP a device'
  )
  if stage.bound_step_s == stage.bound_step_s:  # known for this chip
    text += (
      f'; a step takes at least {stage.bound_step_s:.2f} s ({stage.bound_by}), '
      f'the stage {stage.bound_hours:.1f} h; MFU at most '
      f'{stage.mfu_ceiling:.0%}'
    )
  return f'{text} (compiled in {stage.compile_s:.1f} s)'
