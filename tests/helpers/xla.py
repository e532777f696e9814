"""XLA's flags for programs of toy sizes, which run a few times each.

Compiling them well costs twice what it costs without, and saves nothing, not
even where a test trains for minutes.
"""

from refrag_jax.runtime import environment

UNOPTIMISED = ' '.join(
  [
    '--xla_backend_optimization_level=0',
    '--xla_llvm_disable_expensive_passes=true',
    '--xla_cpu_parallel_codegen_split_count=1',
    *environment.cpu_flags(environment.versions()['jaxlib']),
  ]
)
