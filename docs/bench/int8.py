"""What a decoder's matrices in 8 bits cost: NLL of the same text, side by side.

  launch/models.sh
  PYTHONPATH=. .venv/bin/python docs/bench/int8.py --text=TEXT.jsonl.gz \
    [--documents=48] [--tokens=256]

The first tokens of each held-out document, behind BOS, by the engine's own
programs (`Engine.token_nll`), with matrices as they came and in 8 bits.
"""

import argparse
import os
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import numpy as np

from refrag_jax import cli, results
from refrag_jax import session as session_lib
from refrag_jax.config import load
from refrag_jax.serve.engine import Engine


def main() -> None:
  """Prints both means, and their difference by document."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--text', required=True)
  parser.add_argument('--documents', type=int, default=48)
  parser.add_argument('--tokens', type=int, default=256)
  args = parser.parse_args()
  found = cli.load(cli.parse(['--config=configs/smollm2.py:laptop']))
  config = load.changed(
    found.config, [f'data.text={args.text}', 'model.lora.rank=0']
  )
  opened = session_lib.open_model(config)
  with tempfile.TemporaryDirectory() as workdir, jax.set_mesh(opened.mesh):
    data = session_lib.open_data(opened.config, workdir)
    params, _ = session_lib.load_params(opened, config.init_from, 'int8.py')
    engines = [
      Engine(
        opened.config.model, params, 0, [(1, 8)],
        -(-args.tokens // config.model.chunk_size), 8, attend='blockwise',
        int8=int8,
      )
      for int8 in (False, True)
    ]  # fmt: skip
    nll_X2 = []
    for document in data.corpus.documents('heldout').tolist():
      ids = data.tokenizer.encode(data.corpus.document_text(document))[0]
      if len(ids) < args.tokens:
        continue
      ids = np.asarray(ids[: args.tokens], np.int32)
      nll_X2.append(
        [e.token_nll(ids, data.tokenizer.bos_id).mean() for e in engines]
      )
      if len(nll_X2) == args.documents:
        break
  nll_X2 = np.array(nll_X2, np.float64)
  for name, values in (
    ('as they came', nll_X2[:, 0]),
    ('8 bits', nll_X2[:, 1]),
    ('8 bits minus that', nll_X2[:, 1] - nll_X2[:, 0]),
  ):
    print(f'{name:20}{results.stat(values)}')


if __name__ == '__main__':
  main()
