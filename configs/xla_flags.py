"""What to tell XLA on clusters, so that it sends while it computes.

Set `c.cluster.xla_flags` (NVIDIA) and `c.cluster.libtpu_flags` (TPU); what the
environment variables XLA_FLAGS and LIBTPU_INIT_ARGS hold comes after it, and so
wins. Taken over from those who measured them on such machines; not measured
here. XLA ends a program that names a flag it does not know, and `--mode=plan`,
which compiles with them, says which. jaxlib 0.10.2 and 0.11.2 know H100's, and
libtpu 0.0.42 TPU's; xla_gpu_enable_pipelined_* of the list went with 0.11.
"""

# NVIDIA/JAX-Toolbox, rosetta/projects/maxtext: LLaMA2-7B on DGX H100. Of its
# list what orders and overlaps communication; the thresholds at which it joins
# collectives are for one model and one cluster.
H100 = (
  '--xla_gpu_enable_latency_hiding_scheduler=true',
  '--xla_gpu_enable_while_loop_double_buffering=true',
)
# AI-Hypercomputer/maxtext, end_to_end/tpu/test_host_offload.sh, and the same in
# gclouduniverse/reproducibility, Training/TPU-Trillium/Llama3-70B-PyTorch.
TPU = (
  '--xla_tpu_enable_async_collective_fusion=true',
  '--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true',
  '--xla_tpu_enable_async_collective_fusion_multiple_steps=true',
  '--xla_tpu_overlap_compute_collective_tc=true',
  '--xla_enable_async_all_gather=true',
)
