"""README.md of an export: what is in the directory, for users of PyTorch.

The code in it is run by a test against the model here.
"""

from collections.abc import Mapping
from typing import Any

_FRONT = """\
---
library_name: transformers
tags: [refrag, retrieval-augmented-generation]
---

# REFRAG ({stage})

{what}, written by `refrag_jax --mode=export`. This directory is a starting
point for `refrag_jax` again (`--config.init_from=DIRECTORY`); each part can be
used by itself.

| file | what it is |
| --- | --- |
{table}

"""
_FILES = {
  'decoder': (
    '`decoder/`',
    'language model, as `transformers.AutoModelForCausalLM` loads it',
  ),
  'encoder': (
    '`encoder/`',
    'encoder of chunks, as `transformers.AutoModel` and '
    '`sentence_transformers` load it',
  ),
  'adapter': (
    '`adapter/`',
    'what was trained of the language model (LoRA), as PEFT loads it onto the '
    'one that it was trained for; it is merged into `decoder/` already',
  ),
  'projection': (
    '`projection.safetensors`',
    'from chunk vectors to input embeddings of the decoder, below',
  ),
  'policy': (
    '`policy.safetensors`',
    'which chunks to read token by token; run by `refrag_jax` alone',
  ),
  'cross': (
    '`cross.safetensors`',
    'cross-attention of the baseline CEPE; run by `refrag_jax` alone',
  ),
}
_CHANGES = """\
# REFRAG ({stage})

{what}, written by `refrag_jax --mode=export --changes`.

`changes.safetensors` has what was trained, in bfloat16, by the names that the
parameters have in `refrag_jax`: everything that is not as it was in the models
that training began with, `{start}`. It takes them to use this:
`refrag.json` has their digests, and another model in their place is refused.
With them in place it is a starting point (`--config.init_from=DIRECTORY`), and
evaluation reads it (`--mode=eval`, the same flag).
"""
_PROJECTION = """\
## The projection

A chunk is {k} consecutive tokens of the decoder. Its text is tokenized for the
encoder, cut to {m} tokens with the special tokens at both ends, and becomes the
vector `c` of {E} numbers ({pooling}). Its embedding is

    e = gelu(c W1 + b1) W2 + b2

with the exact GELU (by erf, not tanh), and W1 and W2 stored as (in, out): the
transpose of `torch.nn.Linear.weight`.

| in the formula | in `projection.safetensors` | shape |
| --- | --- | --- |
| W1, b1 | `up_proj/kernel`, `up_proj/bias` | ({E}, {D}), ({D}) |
| W2, b2 | `down_proj/kernel`, `down_proj/bias` | ({D}, {D}), ({D}) |

```python
import torch
from safetensors.torch import load_file

p = load_file(f'{{directory}}/projection.safetensors')


def project(c):  # (chunks, {E}) to (chunks, {D}), in float32
  h = torch.nn.functional.gelu(c @ p['up_proj/kernel'] + p['up_proj/bias'])
  return h @ p['down_proj/kernel'] + p['down_proj/bias']
```

The embeddings stand in `inputs_embeds` of the decoder, one position a chunk,
between the embedded tokens of the question, which come first, and those of the
answer.

"""
_POOLING = {
  'cls': "the encoder's last hidden state at the first position",
  'mean': 'the mean of its last hidden states, special tokens included',
}
_KEYS = """\
## refrag.json

| key | what it says |
| --- | --- |
| `format`, `groups` | of this export; the groups of weights in it |
| `stage` | which was trained last |
| `config` | of the run, without its text and questions |
| `base` | the models that training started from: {names} |
| `model` | all numbers of decoder, encoder and policy |
| `chunk_size` | tokens of the decoder in a chunk: {k} |
| `max_encoder_tokens` | the encoder's tokens of a chunk, at most: {m} |
| `piece_length` | tokens that CEPE's encoder reads at once; 0: no CEPE |
| `history_chunks` | of a conversation before its last turn; 0: none |
| `templates` | how a question, its passages and the answer are put together |
| `tokenizers` | fingerprints of the tokenizers that were trained with |
| `sha256` | of each file here |
| `versions`, `git` | of the program that wrote it |

## Numbers

{types}
"""


_WHAT = """\
A decoder that reads retrieved text as one vector per {k} tokens, in the manner
of REFRAG (arXiv 2509.01092)"""
_BEFORE = """\
Models to train with REFRAG (arXiv 2509.01092), as they are before a projection
joins them"""


def text(exported: Mapping[str, Any]) -> str:
  """The card.

  Args:
    exported: what refrag.json holds.
  """
  if 'changes' in exported:
    return _CHANGES.format(
      stage=exported['stage'],
      what=_WHAT.format(k=exported['chunk_size']),
      start=exported['changes']['from'],
    )
  groups, base = exported['groups'], exported['base']
  if any(file.startswith('adapter/') for file in exported['sha256']):
    groups = [*groups, 'adapter']
  model = exported['model']
  whole = 'projection' in groups
  values = dict(
    what=(_WHAT if whole else _BEFORE).format(k=exported['chunk_size']),
    stage=exported['stage'] or 'untrained',
    k=exported['chunk_size'],
    m=exported['max_encoder_tokens'],
    D=model['decoder']['width'],
    E=model['encoder']['width'],
    pooling=_POOLING[model['encoder']['pooling']],
    table='\n'.join(f'| {a} | {b} |' for a, b in _rows(groups)),
    names=', '.join(f'{g} {of["name"]}' for g, of in base.items()) or 'none',
    types=' '.join(_types(groups, base)),
  )
  parts = [_FRONT, *([_PROJECTION] if whole else []), _KEYS]
  return ''.join(part.format(**values) for part in parts)


def _rows(groups):
  yield from (row for group, row in _FILES.items() if group in groups)
  yield '`refrag.json`', 'all that the weights do not say, below'


def _types(groups, base):
  """A sentence for each model: how its weights were rounded."""
  for group in ('decoder', 'encoder'):
    if group not in groups:
      continue
    kinds = set(base.get(group, {}).get('dtypes', {}).values()) or {'float32'}
    if kinds == {'float32'}:
      yield f'The {group} is in float32.'
    else:
      yield (
        f'The {group} is in {" and ".join(sorted(kinds))}, as the model came '
        'that training started from; it was trained in float32, and what '
        'training has changed is rounded.'
      )
    left = [
      m['kind']
      for m in base.get(group, {}).get('modules', [])
      if m['kind'] not in ('Transformer', 'Pooling', 'Normalize')
    ]
    if left:
      yield (
        f"Modules behind the {group}'s pooling were left out: "
        f'{", ".join(left)}.'
      )
