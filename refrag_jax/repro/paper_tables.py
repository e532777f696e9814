"""The paper's numbers that ours stand beside: REFRAG, arXiv 2509.01092v2.

Log-perplexity (mean NLL in nats per token of LLaMA's tokenizer; lower is
better). Rows and columns are named as the paper names them, with s and the data
set where a table has several. Figures are read off their vector paths.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

DATASETS = ('Arxiv', 'Book', 'PG19', 'ProofPile')
FIGURE_3_RATES = ('4.01', '4.62', '5.35', '6.65', '8.02', '10.89')


class PaperTable(NamedTuple):
  where: str  # page, or figure
  title: str
  columns: tuple[str, ...]
  rows: Mapping[str, tuple[float, ...]]

  def row(self, name: str, columns: Sequence[str]) -> list[float]:
    """The values of a row in some columns."""
    return [self.rows[name][self.columns.index(c)] for c in columns]

  @staticmethod
  def short(column: str) -> str:
    """The data set of a column, where it names one."""
    return column.split()[0]


def _columns(lengths: Sequence[str]) -> tuple[str, ...]:
  return tuple(f'{name} {length}' for name in DATASETS for length in lengths)


# fmt: off
TABLES = {
  'Table 1': PaperTable(
    'p. 6',
    's = 2048',
    _columns(('P512', 'P1024', 'P2048')),
    {
      'LLaMA-Full Context': (
        1.075, 1.074, 1.069, 1.830, 1.827, 1.826,
        1.947, 1.941, 1.935, 0.952, 0.940, 0.931,
      ),
      'LLaMA-32K': (
        1.086, 1.084, 1.076, 1.887, 1.883, 1.880,
        1.988, 1.982, 1.975, 0.961, 0.948, 0.937,
      ),
      'LLaMA-No Context': (
        1.526, 1.371, 1.254, 2.101, 1.995, 1.927,
        2.211, 2.102, 2.030, 1.437, 1.256, 1.127,
      ),
      'LLaMA_256': (
        1.267, 1.221, 1.171, 1.924, 1.897, 1.874,
        2.031, 2.003, 1.978, 1.156, 1.094, 1.038,
      ),
      'REPLUG': (
        1.526, 1.371, 1.254, 2.101, 1.995, 1.927,
        2.211, 2.102, 2.030, 1.437, 1.256, 1.127,
      ),
      'CEPE': (
        1.196, 1.148, 1.107, 1.946, 1.896, 1.864,
        2.057, 2.002, 1.964, 1.075, 1.014, 0.968,
      ),
      'REFRAG_8': (
        1.124, 1.091, 1.062, 1.905, 1.868, 1.844,
        1.996, 1.956, 1.927, 0.997, 0.952, 0.916,
      ),
      'REFRAG_16': (
        1.157, 1.114, 1.076, 1.925, 1.882, 1.853,
        2.016, 1.971, 1.938, 1.034, 0.976, 0.931,
      ),
      'REFRAG_32': (
        1.215, 1.154, 1.103, 1.946, 1.896, 1.862,
        2.039, 1.987, 1.949, 1.097, 1.020, 0.961,
      ),
    },
  ),
  'Table 2': PaperTable(
    'p. 6',
    'o = 2048',
    DATASETS,
    {
      'LLaMA-Full Context s=4096': (6.751, 6.956, 6.829, 6.701),
      'LLaMA-32K s=4096': (1.037, 1.862, 1.960, 0.898),
      'LLaMA-No Context s=4096': (1.253, 1.925, 2.030, 1.126),
      'REPLUG s=4096': (1.253, 1.925, 2.030, 1.126),
      'CEPE s=4096': (1.085, 1.856, 1.959, 0.945),
      'REFRAG_8 s=4096': (1.042, 1.837, 1.922, 0.894),
      'REFRAG_16 s=4096': (1.058, 1.847, 1.934, 0.910),
      'REFRAG_32 s=4096': (1.088, 1.857, 1.946, 0.944),
      'LLaMA-Full Context s=8192': (9.675, 9.069, 8.963, 9.401),
      'LLaMA-32K s=8192': (0.965, 1.867, 1.947, 0.834),
      'LLaMA-No Context s=8192': (1.226, 1.949, 2.032, 1.110),
      'REPLUG s=8192': (1.226, 1.949, 2.032, 1.110),
      'CEPE s=8192': (1.032, 1.878, 1.958, 0.904),
      'REFRAG_8 s=8192': (0.983, 1.839, 1.922, 0.858),
      'REFRAG_16 s=8192': (0.994, 1.845, 1.932, 0.871),
      'REFRAG_32 s=8192': (1.032, 1.860, 1.945, 0.912),
      'LLaMA-Full Context s=16384': (9.043, 8.913, 8.848, 8.989),
      'LLaMA-32K s=16384': (0.865, 1.840, 1.943, 0.770),
      'LLaMA-No Context s=16384': (1.174, 1.939, 2.041, 1.081),
      'REPLUG s=16384': (1.174, 1.939, 2.041, 1.081),
      'CEPE s=16384': (0.960, 1.864, 1.966, 0.863),
      'REFRAG_8 s=16384': (0.977, 1.840, 1.939, 0.891),
      'REFRAG_16 s=16384': (0.942, 1.840, 1.945, 0.850),
      'REFRAG_32 s=16384': (0.969, 1.852, 1.955, 0.880),
    },
  ),
  'Figure 3': PaperTable(
    'read off its vector path',
    'k = 16, s = 4096, o = 2048, by effective rate; p = 0 is rate 16',
    tuple(
      f'{name} {rate}' for rate in FIGURE_3_RATES for name in DATASETS
    ),
    {
      'RL': (
        1.0196, 1.8169, 1.9098, 0.8698,
        1.0218, 1.8184, 1.9110, 0.8720,
        1.0245, 1.8203, 1.9126, 0.8749,
        1.0282, 1.8232, 1.9146, 0.8785,
        1.0328, 1.8278, 1.9184, 0.8830,
        1.0438, 1.8362, 1.9273, 0.8942,
      ),
      'Ppl-desc': (
        1.0247, 1.8224, 1.9170, 0.8763,
        1.0276, 1.8244, 1.9187, 0.8790,
        1.0302, 1.8267, 1.9204, 0.8815,
        1.0348, 1.8302, 1.9231, 0.8859,
        1.0389, 1.8336, 1.9267, 0.8901,
        1.0454, 1.8394, 1.9311, 0.8967,
      ),
      'Random': (
        1.0279, 1.8258, 1.9179, 0.8779,
        1.0306, 1.8276, 1.9196, 0.8806,
        1.0330, 1.8295, 1.9212, 0.8831,
        1.0370, 1.8327, 1.9235, 0.8871,
        1.0414, 1.8364, 1.9267, 0.8911,
        1.0466, 1.8412, 1.9306, 0.8969,
      ),
      'Ppl-asc': (
        1.0371, 1.8363, 1.9246, 0.8864,
        1.0391, 1.8384, 1.9264, 0.8885,
        1.0409, 1.8404, 1.9282, 0.8905,
        1.0435, 1.8422, 1.9317, 0.8933,
        1.0464, 1.8431, 1.9349, 0.8963,
        1.0499, 1.8451, 1.9374, 0.9001,
      ),
      'p = 0': (1.0688, 1.8637, 1.9567, 0.9193) * len(FIGURE_3_RATES),
    },
  ),
  'Table 11': PaperTable(
    'p. 26',
    'reconstruction, mean of Arxiv and Book',
    ('P16', 'P32', 'P128', 'P2048'),
    {
      'LLaMA-Full Context': (1.397, 0.734, 0.203, 0.021),
      'LLaMA-No Context': (3.483, 2.981, 2.249, 1.590),
      'REFRAG w/o curriculum': (3.719, 3.098, 2.272, 1.599),
      'REFRAG with curriculum': (0.669, 0.451, 0.230, 0.135),
    },
  ),
  'Table 12': PaperTable(
    'p. 26',
    'continued pre-training, mean of Arxiv and Book',
    ('P16', 'P32', 'P128', 'P2048'),
    {
      'LLaMA-Full Context': (1.448, 1.458, 1.464, 1.449),
      'LLaMA-No Context': (3.483, 2.981, 2.249, 1.590),
      'REFRAG w/o reconstruction': (3.272, 2.789, 2.119, 1.544),
      'REFRAG with reconstruction': (2.017, 1.837, 1.632, 1.453),
    },
  ),
  'Table 13': PaperTable(
    'p. 26',
    'rates 8 and 8.258 (s = 2048) or 8.0157 (s = 4096)',
    _columns(('P512', 'P1024', 'P2048')),
    {
      'REFRAG_8 s=2048': (
        1.124, 1.091, 1.062, 1.905, 1.868, 1.844,
        1.996, 1.956, 1.927, 0.997, 0.952, 0.916,
      ),
      'REFRAG_16+RL s=2048': (
        1.118, 1.090, 1.062, 1.878, 1.856, 1.840,
        1.978, 1.952, 1.930, 0.992, 0.951, 0.916,
      ),
      'REFRAG_8 s=4096': (
        1.098, 1.065, 1.042, 1.895, 1.860, 1.837,
        1.989, 1.950, 1.922, 0.965, 0.923, 0.894,
      ),
      'REFRAG_16+RL s=4096': (
        1.065, 1.048, 1.033, 1.851, 1.837, 1.828,
        1.952, 1.934, 1.918, 0.932, 0.905, 0.883,
      ),
    },
  ),
  'Table 14': PaperTable(
    'p. 26',
    'Arxiv, s = 2048 where not said; k is not stated',
    ('P512', 'P1024', 'P2048'),
    {
      '3.1-8B Full Context': (1.000, 0.989, 0.972),
      '3.1-8B No Context': (1.445, 1.286, 1.162),
      '3.1-8B RoBERTa-Base': (1.109, 1.067, 1.026),
      '3.1-8B RoBERTa-Large': (1.107, 1.065, 1.025),
      '3.1-8B RoBERTa-Base s=4096': (1.067, 1.032, 0.999),
      '3.1-8B RoBERTa-Large s=4096': (1.065, 1.031, 0.998),
      '3.2-3B Full Context': (1.092, 1.080, 1.062),
      '3.2-3B No Context': (1.559, 1.392, 1.262),
      '3.2-3B RoBERTa-Base': (1.175, 1.133, 1.093),
      '3.2-3B RoBERTa-Large': (1.170, 1.130, 1.091),
      '3.2-3B RoBERTa-Base s=4096': (1.142, 1.105, 1.070),
      '3.2-3B RoBERTa-Large s=4096': (1.130, 1.096, 1.064),
    },
  ),
  'Figures 10 to 12': PaperTable(
    'read off their vector paths',
    'loss of continued pre-training; last: at 68k steps for the k, else at 58k',
    ('5k', '10k', '20k', '30k', '40k', '50k', 'last'),
    {
      '7B + R-Large k=8': (
        1.5046, 1.4821, 1.4678, 1.4622,
        1.4595, 1.4572, 1.4561,
      ),
      'k=16': (1.5041, 1.4882, 1.4772, 1.4724, 1.4705, 1.4688, 1.4677),
      'k=32': (1.5162, 1.5003, 1.4900, 1.4852, 1.4834, 1.4817, 1.4810),
      'k=64': (1.5250, 1.5112, 1.5013, 1.4975, 1.4954, 1.4937, 1.4928),
      '7B + R-Base (k=8)': (
        1.5086, 1.4851, 1.4709, 1.4647,
        1.4622, 1.4602, 1.4575,
      ),
      '13B + R-Base': (1.4974, 1.4722, 1.4538, 1.4448, 1.4423, 1.4387, 1.4364),
      '13B + R-Large': (1.4956, 1.4735, 1.4575, 1.4499, 1.4470, 1.4442, 1.4408),
    },
  ),
}
# fmt: on
