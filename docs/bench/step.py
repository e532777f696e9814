r"""A real `cpt` step beside what the planner says of it: memory, time, MFU.

  PYTHONPATH=. .venv/bin/python docs/bench/step.py \
    [--attention=cudnn,blockwise,dense] [--small]

On the devices that there are, with random parameters and ids: a decoder of the
size of Llama-3.2-1B and RoBERTa-Large, s = 2048, o = 2048, k = 16. For each way
of attending: the loss of the first step (which should agree), the bytes that
the planner predicts and those that the device has had at most, the step's time
(compilation apart, after two steps), its MFU and the planner's ceiling. Exit
code 1 where a peak is off by more than 15 %. --small is a model of toys, to see
that the script runs; a CPU keeps no count of its memory.
"""

import sys
import time

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from configs import common, llama2_7b
from refrag_jax import config, plan, programs, topologies
from refrag_jax.session import abstract_params, fresh_params, to_device
from refrag_jax.stages import STAGES
from refrag_jax.state import TrainState
from refrag_jax.step import init_opt_state

STAGE, STEPS, WARM_UP, NEAR = 'cpt', 10, 2, 0.15


def one_billion(attention: str, small: bool) -> config.Config:
  c = llama2_7b.get_config()
  c.stages = (STAGE,)
  c.mesh.update(data=1, fsdp=-1, tensor=1, sequence=1)
  c.model.attention = attention
  c.model.decoder.update(
    num_layers=16, width=2048, mlp_width=8192, num_heads=32, num_kv_heads=8,
    head_dim=64,
  )  # fmt: skip
  cfg = c.stage[STAGE]
  cfg.update(batch_size=16 * jax.device_count(), num_train_steps=100)
  cfg.update(context_length=2048, output_length=2048, factors=())
  if small:
    c.model.decoder.update(
      num_layers=2, width=64, mlp_width=128, num_heads=4, num_kv_heads=2,
      head_dim=16, vocab_size=512,
    )  # fmt: skip
    c.model.encoder = common.encoder('tiny', vocab_size=512)
    c.model.policy.update(num_heads=4, mlp_width=64)
    cfg.update(context_length=256, output_length=256)
    c.model.compute_dtype = 'float32'
  return config.build(c)


def random_batch(session, chunks: int) -> dict:
  """Full rows of any ids; the same for every way of attending."""
  rng = np.random.default_rng(0)
  abstract = programs.abstract_batch(session, STAGE, chunks)
  full = {
    'prefix_len_B': abstract['prefix_BQ'].shape[1],
    'chunk_len_BC': session.config.model.chunk_size,
    'encoder_len_BC': abstract['encoder_BCM'].shape[2],
    'output_len_B': abstract['output_BO'].shape[1],
  }

  def draw(name, like):
    if name in full:
      return np.full(like.shape, full[name], like.dtype)
    if like.dtype == bool:
      return np.ones(like.shape, bool)
    return rng.integers(1, 500, like.shape).astype(like.dtype)

  return {name: draw(name, like) for name, like in abstract.items()}


def chip_of(device) -> topologies.Chip:
  """By a name such as 'NVIDIA H200'; what a TPU is called differs more."""
  names = [n for n in topologies.CHIPS if n in device.device_kind.lower()]
  return topologies.CHIPS[names[0] if names else 'cpu']


def measure(attention: str, small: bool) -> dict:
  devices = jax.devices()
  here = topologies.Topology(
    'here', chip_of(devices[0]), devices, len(devices), {}
  )
  cfg = one_billion(attention, small)
  session = plan.open_planned(cfg, here)
  predicted = plan.plan_stage(session, here, STAGE)
  with jax.set_mesh(session.mesh):
    params = fresh_params(session, tuple(abstract_params(session)))
    laid = jax.tree.map(
      lambda x: x.sharding, programs.abstract_state(session, STAGE).opt_state
    )
    init = jax.jit(
      lambda p: init_opt_state(p, STAGES[STAGE]), out_shardings=laid
    )
    opt_state = init(params)
    state = TrainState(jax.numpy.int32(0), params, opt_state)
    del params, opt_state
    compiled = programs.compile_stage(session, STAGE, state, 0)
    batch = to_device(random_batch(session, predicted.chunks), session.mesh)
    losses, start = [], 0.0
    for step in range(WARM_UP + STEPS):
      if step == WARM_UP:
        jax.block_until_ready(state)
        start = time.perf_counter()
      key = programs.step_key(session, STAGE, step)
      state, metrics = compiled.of_step(0)(state, batch, key, np.float32(1e-5))
      losses.append(metrics['loss'])
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - start) / STEPS
  stats = devices[0].memory_stats() or {}
  return {
    'loss': float(losses[0]),
    'predicted': predicted.peak_bytes,
    'measured': stats.get('peak_bytes_in_use'),
    'seconds': seconds,
    'compile': compiled.compile_s,
    'mfu': predicted.model_flops / here.chip.flops / seconds,
    'ceiling': predicted.mfu_ceiling,
  }


def main(argv: list[str]) -> int:
  small = '--small' in argv
  kinds = [a.partition('=')[2] for a in argv if a.startswith('--attention=')]
  kinds = kinds[0].split(',') if kinds else ['blockwise', 'dense']
  table = Table(title=f'{STAGE} on {jax.devices()[0].device_kind}')
  for name in ('attention', 'loss', 'predicted GiB', 'measured GiB', 'off',
               'step s', 'compile s', 'MFU', 'ceiling'):  # fmt: skip
    table.add_column(name, justify='right')
  far = False
  # The device counts its peak from the start of the process on, so the way
  # that needs least memory has to come first for both to be right.
  for kind in kinds:
    found = measure(kind, small)
    known = found['measured']
    off = known / found['predicted'] - 1 if known else np.nan
    far |= abs(off) > NEAR
    share = lambda x, form: '-' if np.isnan(x) else format(x, form)
    gib = lambda size: f'{size / 2**30:.2f}' if size else 'not counted'
    table.add_row(
      kind, f'{found["loss"]:.5f}', gib(found['predicted']), gib(known),
      share(off, '+.1%'), f'{found["seconds"]:.4f}', f'{found["compile"]:.1f}',
      share(found['mfu'], '.1%'), share(found['ceiling'], '.1%'),
    )  # fmt: skip
  Console(width=110).print(table)
  return int(far)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
