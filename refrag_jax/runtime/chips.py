"""What one accelerator can do, by its maker's data sheet."""

import math
from typing import NamedTuple


class Chip(NamedTuple):
  """One device, by its maker's data sheet; rates are upper limits."""

  platform: str  # of JAX: cuda, tpu, cpu
  flops: float  # dense bfloat16, per second
  hbm: int  # bytes
  hbm_rate: float  # bytes per second
  near_rate: float  # bytes per second out of one device, within a host or slice
  far_rate: float  # likewise to other hosts


GIB = 1 << 30
# NVIDIA's data sheets of the SXM cards: NVLink's figure is the sum of both
# directions, so half of it here; one network card of 400 Gbit/s (A100: 200) a
# GPU, as in a DGX. Google's pages docs.cloud.google.com/tpu/docs/v4 and the
# like: ICI in Gbit/s of all links of a chip, one direction; the data centre
# network per chip is that of a host (v6e: 4 cards of 200 Gbit/s, 8 chips).
CHIPS = {
  'a100': Chip('cuda', 312e12, 85_100_068_864, 2.039e12, 300e9, 25e9),
  'h100': Chip('cuda', 989e12, 84_978_434_048, 3.352e12, 450e9, 50e9),
  'h200': Chip('cuda', 989e12, 150_754_820_096, 4.8e12, 450e9, 50e9),
  'b200': Chip('cuda', 2250e12, 191_514_673_152, 7.672e12, 900e9, 50e9),
  'v4': Chip('tpu', 275e12, 32 * GIB, 1.2e12, 300e9, 6.25e9),
  'v5e': Chip('tpu', 197e12, 16 * GIB, 0.819e12, 200e9, 3.125e9),
  'v5p': Chip('tpu', 459e12, 95 * GIB, 2.765e12, 600e9, 6.25e9),
  'v6e': Chip('tpu', 918e12, 32 * GIB, 1.64e12, 400e9, 12.5e9),
  # A device is half a chip, one of its two cores.
  'tpu7x': Chip('tpu', 1153.5e12, 96 * GIB, 3.69e12, 300e9, 12.5e9),
  # Nothing is known of this machine; the fake devices share it.
  'cpu': Chip('cpu', math.nan, 0, math.nan, math.nan, math.nan),
}

# Devices by their JAX names. The first name that occurs in `device_kind`
# decides, so a longer name stands before its prefix: 'TPU v5 lite' is a v5e,
# 'TPU v5' a v5p. Of those that no plan knows only the arithmetic is.
_ALONE = dict(hbm=0, hbm_rate=math.nan, near_rate=math.nan, far_rate=math.nan)
DEVICES = (
  ('H200', CHIPS['h200']),
  ('H100 NVL', CHIPS['h100']._replace(flops=835e12, **_ALONE)),
  ('H100 PCIe', CHIPS['h100']._replace(flops=756e12, **_ALONE)),
  ('H100', CHIPS['h100']),
  ('A100', CHIPS['a100']),
  ('TPU v6', CHIPS['v6e']),
  ('TPU v5 lite', CHIPS['v5e']),
  ('TPU v5e', CHIPS['v5e']),
  ('TPU v5', CHIPS['v5p']),
  ('TPU v4 lite', CHIPS['v4']._replace(flops=138e12, **_ALONE)),
  ('TPU v4', CHIPS['v4']),
)


def of_device(kind: str) -> Chip | None:
  """The chip of a device's JAX name; None if it is not known."""
  for name, chip in DEVICES:
    if name.lower() in kind.lower():
      return chip
  return None
