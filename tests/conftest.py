"""Every test runs on 8 CPU devices, made before JAX first looks for any."""

import atexit
import os
import shutil
import tempfile

# Also for the processes that tests start; an accelerator is not touched.
os.environ['JAX_PLATFORMS'] = 'cpu'
# Programs of toy sizes that run a few times: compiling them well costs twice
# what it costs without, and saves nothing, not even where a test trains for
# minutes. (Worker processes inherit what is set here.)
UNOPTIMISED = (
  '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
)
os.environ.setdefault('XLA_FLAGS', UNOPTIMISED)
# Many tests compile the same programs; one process keeps them for all.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  os.environ |= {
    'JAX_COMPILATION_CACHE_DIR': tempfile.mkdtemp(prefix='refrag_jax_xla_'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }
  atexit.register(
    shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True
  )

import jax  # noqa: E402
from absl import flags  # noqa: E402

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_enable_x64', False)
# (B, T) + (T,) is a mistake more often than a wish.
jax.config.update('jax_numpy_rank_promotion', 'raise')
# grain reads absl flags, which nobody parses here.
flags.FLAGS.mark_as_parsed()
