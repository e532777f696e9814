"""SmolLM2 of a GGUF file against transformers' own reading of that file.

Runs where `launch/models.sh` was and torch is installed.

Dimension key: B batch, T positions.
"""

import os
import pathlib
import re

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('accelerate')  # which transformers reads GGUF with
hf_torch = pytest.importorskip('hf_torch')

import gguf_files  # noqa: E402
import real_models  # noqa: E402
import transformers  # noqa: E402

from refrag_jax.data import tokenizers  # noqa: E402
from refrag_jax.hf import hub, sources  # noqa: E402
from refrag_jax.models.refrag import Refrag  # noqa: E402

PATH = real_models.smollm2()
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(PATH is None, reason='launch/models.sh was not run'),
]
PROMPT = 'The Eiffel Tower is 330 meters tall and stands in'


def theirs(kind):
  directory, name = os.path.split(PATH)
  return kind.from_pretrained(directory, gguf_file=name, dtype=torch.float32)


def test_logits_and_greedy_text_are_those_of_transformers():
  model = theirs(transformers.AutoModelForCausalLM).eval()
  cfg, params = hf_torch.read(hub.resolve(PATH))
  logits, _, continued = hf_torch.decoder_functions(
    Refrag(hf_torch.model_config(cfg))
  )
  ids_BT = tokenizers.load(PATH).encode(PROMPT)[0][None]
  given = torch.tensor(ids_BT, dtype=torch.long)
  model.generation_config.eos_token_id = None  # on beyond the end of a turn
  with torch.no_grad():
    expected = model(given).logits.numpy()
    text = model.generate(given, max_new_tokens=hf_torch.W, do_sample=False)[
      :, ids_BT.shape[1] :
    ]
  found = np.asarray(logits(params, ids_BT))
  apart = np.abs(found - expected).max() / np.abs(expected).max()
  print(f'logits apart by {apart:.1e} of the largest')
  assert apart <= 1e-4
  np.testing.assert_array_equal(continued(params, ids_BT), text.numpy())


def test_ids_of_ten_thousand_lines():
  """transformers' own, asked of what lies between digits and of each digit.

  Its reading of the file lets white space go on into a number, which the
  model's own tokenizer.json does not: `  1` is two tokens there, not three.
  """
  lines = real_models.lines(10_000)
  if lines is None:
    pytest.skip('needs the real texts')
  ours = tokenizers.load(PATH)
  directory, name = os.path.split(PATH)
  other = transformers.PreTrainedTokenizerFast.from_pretrained(
    directory, gguf_file=name
  )
  other.backend_tokenizer.encode_special_tokens = True
  asked = [re.split(r'(\d)', line) for line in lines]
  flat = other([part for parts in asked for part in parts],
               add_special_tokens=False)['input_ids']  # fmt: skip
  expected, begin = [], 0
  for parts in asked:
    end = begin + len(parts)
    expected.append([i for ids in flat[begin:end] for i in ids])
    begin = end
  found = [list(ids) for ids in ours.ids_batch(lines)]
  different = [n for n in range(len(lines)) if found[n] != expected[n]]
  assert not different, (lines[different[0]], len(different))
  whole = other(lines, add_special_tokens=False)['input_ids']
  spaced = [n for n in range(len(lines)) if whole[n] != found[n]]
  print(f'{len(spaced)} of {len(lines)} lines differ as a whole')
  assert all(re.search(r'\s\s\d|^\s+\d', lines[n]) for n in spaced)


def test_the_real_encoder_is_the_same_from_either(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  source = real_models.minilm()
  path = str(tmp_path / 'minilm.gguf')
  words = pathlib.Path(source, 'vocab.txt').read_text().split('\n')[:-1]
  gguf_files.write_bert(path, source, words)
  ours, theirs = sources.locate(path), sources.locate(source)
  assert ours.numbers == theirs.numbers
  ids = [tokenizers.load(of) for of in (path, source)]
  text = [
    "Ünïcode, 日本 don't [MASK] 3.14 x\u0300",
    *(real_models.lines(300) or []),
  ]
  for one, other in zip(*(of.encode_batch(text) for of in ids), strict=True):
    np.testing.assert_array_equal(one, other)
  special = [(t.cls_id, t.sep_id, t.pad_id, t.mask_id) for t in ids]
  assert special[0] == special[1]
