"""Memory and speed of importing a model of Llama-2-7B's shape.

  launch/run.sh --help >/dev/null  # makes .venv
  .venv/bin/python docs/bench/import_7b.py DIRECTORY

Writes random bfloat16 weights to DIRECTORY (13.5 GB, once), reads them onto 8
fake CPU devices (fsdp = 8, bfloat16, in a process of its own) and prints what
the arrays weigh, the peak of the process's resident memory above what it had
before, and GB/s. Exit code 1 where the peak is more than the arrays and 2 GiB.
Linux only; 18 GB of free memory.
"""

import json
import os
import subprocess
import sys
import time

DEVICES = 8
LIMIT = 2 << 30
ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), '../..'))
SHAPE = {
  'architectures': ['LlamaForCausalLM'],
  'model_type': 'llama',
  'vocab_size': 32_000,
  'hidden_size': 4096,
  'intermediate_size': 11_008,
  'num_hidden_layers': 32,
  'num_attention_heads': 32,
  'num_key_value_heads': 32,
  'rms_norm_eps': 1e-5,
  'rope_theta': 10_000.0,
  'max_position_embeddings': 4096,
  'hidden_act': 'silu',
  'tie_word_embeddings': False,
}


def tensors(layer: int | None) -> dict[str, tuple[int, ...]]:
  D, F, V = (
    SHAPE[key] for key in ('hidden_size', 'intermediate_size', 'vocab_size')
  )
  if layer is None:
    return {
      'model.embed_tokens.weight': (V, D),
      'model.norm.weight': (D,),
      'lm_head.weight': (V, D),
    }
  attention = {f'self_attn.{x}_proj.weight': (D, D) for x in 'qkvo'}
  mlp = {f'mlp.{x}_proj.weight': (F, D) for x in ('gate', 'up')}
  names = {
    **attention,
    **mlp,
    'mlp.down_proj.weight': (D, F),
    'input_layernorm.weight': (D,),
    'post_attention_layernorm.weight': (D,),
  }
  return {f'model.layers.{layer}.{name}': s for name, s in names.items()}


def write(directory: str) -> None:
  """One file a layer; the index, written last, says that all are there."""
  import ml_dtypes
  import numpy as np
  from safetensors.numpy import save_file

  index = os.path.join(directory, 'model.safetensors.index.json')
  if os.path.exists(index):
    return
  os.makedirs(directory, exist_ok=True)
  weight_map = {}
  for layer in (None, *range(SHAPE['num_hidden_layers'])):
    rng = np.random.default_rng(0 if layer is None else layer + 1)
    file = f'model-{"ends" if layer is None else layer}.safetensors'
    values = {}
    for name, shape in tensors(layer).items():
      bits = np.frombuffer(rng.bytes(2 * int(np.prod(shape))), np.uint16)
      # Any sign and mantissa, exponents of 2^-30 to 2^1: finite numbers.
      bits = (bits & 0x8FFF) | 0x3000
      values[name] = bits.view(ml_dtypes.bfloat16).reshape(shape)
      weight_map[name] = file
    save_file(values, os.path.join(directory, file))
  with open(os.path.join(directory, 'config.json'), 'w') as f:
    json.dump(SHAPE, f)
  with open(index, 'w') as f:
    json.dump({'weight_map': weight_map}, f)


def status(key: str) -> int:
  """A line of /proc/self/status, in bytes."""
  with open('/proc/self/status') as f:
    lines = dict(line.split(':', 1) for line in f)
  return int(lines[key].split()[0]) << 10


def read(directory: str) -> int:
  """Reads the model as `--mode=import` does, in bfloat16; the exit code."""
  import jax
  import jax.numpy as jnp

  from refrag_jax import cli, sharding
  from refrag_jax.hf import convert
  from refrag_jax.models.refrag import init_params

  flags = cli.parse([f'--config={ROOT}/configs/llama2_7b.py'])
  model = cli.load(flags).config.model
  mesh = sharding.make_mesh(1, DEVICES, 1)
  shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=s),
    shapes,
    sharding.infer_shardings(shapes, mesh),
  )['decoder']
  before, clock = status('VmRSS'), time.monotonic()
  arrays = convert.read_params(directory, abstract)
  seconds = time.monotonic() - clock
  size = sum(x.nbytes for x in jax.tree.leaves(arrays))
  peak = status('VmHWM') - before
  print(
    json.dumps(
      {
        'params': size // 2,
        'arrays_gib': size / 2**30,
        'peak_gib': peak / 2**30,
        'above_arrays_gib': (peak - size) / 2**30,
        'seconds': seconds,
        'gb_per_s': size / 1e9 / seconds,
        'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
      }
    )
  )
  return int(peak > size + LIMIT)


if __name__ == '__main__':
  if sys.argv[2:] == ['read']:
    sys.exit(read(sys.argv[1]))
  write(sys.argv[1])
  flags = f'--xla_force_host_platform_device_count={DEVICES}'
  env = os.environ | {
    'XLA_FLAGS': flags,
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': ROOT,
  }
  sys.exit(
    subprocess.run([sys.executable, *sys.argv, 'read'], env=env).returncode
  )
