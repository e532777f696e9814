"""Every test runs on 8 CPU devices, made before JAX first looks for any."""

import atexit
import gc
import os
import shutil
import signal
import tempfile

import xla

# Processes that tests start inherit what is set here; no accelerator is touched.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('XLA_FLAGS', xla.UNOPTIMISED)
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

import jax
from absl import flags

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_enable_x64', False)
# (B, T) + (T,) is a mistake more often than a wish.
jax.config.update('jax_numpy_rank_promotion', 'raise')
# The collector goes through all that JAX keeps of its programs each time that a
# quarter has come to it.
gc.set_threshold(20_000, 20, 20)
# Under nohup it is ignored, here and in what tests start, and means nothing.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# grain reads absl flags, which nobody parses here.
flags.FLAGS.mark_as_parsed()
