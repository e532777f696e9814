r"""A real step beside what the planner says of it: memory, time, MFU.

  PYTHONPATH=. .venv/bin/python docs/bench/step.py [VARIANT ...] \
    [--topology=h100:1x1 | --planned=FILE] [--out=FILE] [--config=repro:gpu] \
    [--config.model.loss_block=128]

On the devices that there are, with random parameters and ids: a `cpt` step of a
decoder of the size of Llama-3.2-1B with RoBERTa-Large, s = 2048, o = 2048, k =
16, or any stage of a config. A variant is attention,remat,rows[,stage], rows of
a device; 0 takes the config's. For each, in a process of its own: the loss of
the first step, the bytes that the planner predicts and those that the device
has had at most, the time of a step after two others, and the MFU: with all
pairs of the decoder's attention counted, as in the planner's ceiling, and with
those alone that a causal decoder sees. Exit code 1 where a peak is off by more
than 15 % or a variant failed.

--topology predicts instead, with no device, and --out keeps that; --planned
reads it where the devices are. Without it the prediction is that of the program
compiled there. --config=small is a model of toys, to see that the script runs;
a CPU keeps no count of its memory.
"""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from configs import common, llama2_7b
from refrag_jax import compilation, resolve
from refrag_jax.config.schema import Config
from refrag_jax.errors import UserError
from refrag_jax.plan import run as plan
from refrag_jax.plan import topologies
from refrag_jax.session import Session, abstract_params, fresh_params, to_device
from refrag_jax.stages import STAGES
from refrag_jax.state import TrainState

STEPS, WARM_UP, NEAR = 10, 2, 0.15
VARIANTS = (
  'cudnn,full,16',
  'cudnn,dots,12',
  'blockwise,full,16',
  'blockwise,dots,8',
  'dense,full,8',
)


def one_billion():
  c = llama2_7b.get_config()
  c.cluster.xla_flags = ()  # of several cards
  c.model.decoder.update(
    num_layers=16, width=2048, mlp_width=8192, num_heads=32, num_kv_heads=8,
    head_dim=64,
  )  # fmt: skip
  window = dict(context_length=2048, output_length=2048, factors=())
  c.stage.cpt.update(num_train_steps=100, **window)
  return c


def toys():
  c = one_billion()
  c.model.decoder.update(
    num_layers=2, width=64, mlp_width=128, num_heads=4, num_kv_heads=2,
    head_dim=16, vocab_size=512,
  )  # fmt: skip
  c.model.encoder = common.encoder('tiny', vocab_size=512)
  c.model.policy.update(num_heads=4, mlp_width=64)
  c.stage.cpt.update(context_length=256, output_length=256)
  c.model.compute_dtype = 'float32'
  return c


def config_of(variant: str, devices: int, given: dict) -> tuple[str, Config]:
  """The stage of a variant, and its config."""
  name = given.get('config', '')
  attention, remat, rows, *stage = variant.split(',')
  stage = stage[0] if stage else 'cpt'
  own = {'': one_billion, 'small': toys}
  if name in own:
    c = own[name]()
  else:
    file, _, preset = name.partition(':')
    c = importlib.import_module(f'configs.{file}').get_config(preset)
  c.mesh.update(data=1, fsdp=-1, tensor=1, sequence=1)
  c.model.update(attention=attention, remat=remat)
  if int(rows):
    c.stage[stage].batch_size = int(rows) * devices
  changes = [
    f'{key.removeprefix("config.")}={value}'
    for key, value in given.items()
    if key.startswith('config.')
  ]
  return stage, resolve.changed(resolve.build(c), changes)


def random_batch(session: Session, stage: str, chunks: int) -> dict:
  """Full rows of any ids; the same for every way of attending."""
  rng = np.random.default_rng(0)
  model = session.config.model
  abstract = compilation.abstract_batch(session, stage, chunks)
  ids = min(model.decoder.vocab_size, model.encoder.vocab_size)
  full = {'segment_ids_BT': 1, 'chunk_len_BC': model.chunk_size}
  for of, name in (
    ('prefix_len_B', 'prefix_BQ'),
    ('encoder_len_BC', 'encoder_BCM'),
    ('output_len_B', 'output_BO'),
  ):
    if name in abstract:
      full[of] = abstract[name].shape[-1]

  def draw(name, like):
    if name in full:
      return np.full(like.shape, full[name], like.dtype)
    if name == 'positions_BT':
      return np.broadcast_to(np.arange(like.shape[1]), like.shape).astype(
        like.dtype
      )
    if like.dtype == bool:
      return np.ones(like.shape, bool)
    return rng.integers(1, ids, like.shape).astype(like.dtype)

  return {name: draw(name, like) for name, like in abstract.items()}


def chip_of(device) -> topologies.Chip:
  """By a name such as 'NVIDIA H200'; what a TPU is called differs more."""
  names = [n for n in topologies.CHIPS if n in device.device_kind.lower()]
  return topologies.CHIPS[names[0] if names else 'cpu']


def planned(
  variant: str, there: topologies.Topology, given: dict
) -> tuple[Session, str, plan.StagePlan]:
  stage, cfg = config_of(variant, len(there.devices), given)
  session = plan.open_planned(cfg, there)
  return session, stage, plan.plan_stage(session, there, stage)


def measure(variant: str, given: dict) -> dict:
  devices = jax.devices()
  here = topologies.Topology(
    'here', chip_of(devices[0]), devices, len(devices), {}
  )
  session, stage, predicted = planned(variant, here, given)
  with jax.set_mesh(session.mesh):
    abstract = compilation.abstract_state(session, stage)
    params = fresh_params(session, tuple(abstract_params(session)))
    init = jax.jit(
      lambda p: compilation.fresh_state(session, stage, p).opt_state,
      out_shardings=jax.tree.map(lambda x: x.sharding, abstract.opt_state),
    )
    opt_state = init(params)
    state = TrainState(jax.numpy.int32(0), params, opt_state)
    del params, opt_state
    batch = random_batch(session, stage, predicted.chunks)
    batch = to_device(batch, session.mesh)
    traced = compilation.trace_step(
      session, stage, abstract, batch, predicted.variant
    )
    compiled, metrics, start = traced.lower().compile(), [], 0.0
    for step in range(WARM_UP + STEPS):
      if step == WARM_UP:
        jax.block_until_ready(state)
        start = time.perf_counter()
      key = compilation.step_key(session, stage, step)
      state, found = compiled(state, batch, key, np.float32(1e-5))
      metrics.append(found)
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - start) / STEPS
  measures = STAGES[stage].measures
  stats = devices[0].memory_stats() or {}
  rate = here.chip.flops
  unseen = unseen_flops(session, stage, predicted.chunks) / len(devices)
  return {
    'variant': variant,
    'device': f'{len(devices)} x {devices[0].device_kind}',
    'jax': jax.__version__,
    'first': float(metrics[0][measures]),
    'last': float(metrics[-1][measures]),
    'compiled_bytes': predicted.peak_bytes,
    'measured_bytes': stats.get('peak_bytes_in_use'),
    'step_s': seconds,
    'compile_s': predicted.trace_s + predicted.compile_s,
    'model_flops': predicted.model_flops,
    'mfu': predicted.model_flops / rate / seconds,
    'mfu_causal': (predicted.model_flops - unseen) / rate / seconds,
    'ceiling': predicted.mfu_ceiling,
  }


def unseen_flops(session: Session, stage: str, chunks: int) -> float:
  """FLOPs on pairs that a causal decoder does not see; known of `cpt`."""
  cfg, c = session.config.stage[stage], session.config.model.decoder
  if stage != 'cpt':
    return np.nan
  places = chunks + cfg.output_length
  pairs = cfg.batch_size * places**2 / 2
  # Two products, forward and, by each operand, backward.
  return 12 * pairs * c.num_heads * c.head_dim * c.num_layers


def predict(variants: list[str], given: dict) -> dict:
  there = topologies.load(given['topology'])
  out = {}
  for variant in variants:
    try:
      _, _, found = planned(variant, there, given)
    except UserError as e:
      print(f'{variant}: {e}')
      continue
    out[variant] = {
      key: value
      for key, value in dataclasses.asdict(found).items()
      if isinstance(value, (int, float, str))
    }
    print(f'{variant}: {gib(found.peak_bytes)} GiB')
  return {'topology': there.name, 'jax': jax.__version__, 'variants': out}


def gib(size: int | None) -> str:
  return f'{size / 2**30:.2f}' if size else '-'


def share(x: float, form: str) -> str:
  return '-' if np.isnan(x) else format(x, form)


def table_of(rows: list[dict], known: dict) -> tuple[Table, bool]:
  """The rows beside the predictions, and whether one is far off."""
  table = Table(title=f'{rows[0]["device"]}, jax {rows[0]["jax"]}')
  for name in ('variant', 'first', 'planned GiB', 'compiled', 'measured', 'off',
               'step s', 'compile s', 'MFU', 'causal', 'ceiling'):  # fmt: skip
    table.add_column(name, justify='right')
  far = False
  for row in rows:
    foreseen = known.get(row['variant'], {}).get('peak_bytes')
    expected = foreseen or row['compiled_bytes']
    off = row['measured_bytes'] or np.nan
    off = off / expected - 1
    far |= abs(off) > NEAR
    table.add_row(
      row['variant'], f'{row["first"]:.5f}', gib(foreseen),
      gib(row['compiled_bytes']), gib(row['measured_bytes']),
      share(off, '+.1%'), f'{row["step_s"]:.4f}', f'{row["compile_s"]:.1f}',
      *(share(row[x], '.1%') for x in ('mfu', 'mfu_causal', 'ceiling')),
    )  # fmt: skip
  return table, far


def main(argv: list[str]) -> int:
  variants = [a for a in argv if not a.startswith('--')] or list(VARIANTS)
  given = dict(a[2:].split('=', 1) for a in argv if '=' in a)
  if '--one' in argv:  # of a process of its own
    print(json.dumps(measure(variants[0], given)))
    return 0
  if 'topology' in given:
    out, failed = predict(variants, given), False
  else:
    # A device counts its peak from the start of a process on; it may use as
    # much as launch/run.sh lets it.
    rows, failed = [], False
    env = {'XLA_PYTHON_CLIENT_MEM_FRACTION': str(plan.USABLE)} | os.environ
    own = [a for a in argv if a.startswith('--config')]
    for variant in variants:
      run = subprocess.run(
        [sys.executable, __file__, variant, '--one', *own],
        stdout=subprocess.PIPE,
        text=True,
        env=env,
      )
      failed |= run.returncode != 0
      if not run.returncode:
        rows.append(json.loads(run.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    known = {}
    if 'planned' in given:
      with open(given['planned'], encoding='utf-8') as f:
        known = json.load(f)['variants']
    if rows:
      table, far = table_of(rows, known)
      Console(width=120).print(table)
      failed |= far
    out = {'rows': rows}
  if 'out' in given:
    with open(given['out'], 'w', encoding='utf-8') as f:
      json.dump(out, f, indent=1)
      f.write('\n')
  return int(failed)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
