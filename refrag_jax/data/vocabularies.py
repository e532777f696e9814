"""Tokenizers whose directory has no tokenizer.json: bare vocabulary files.

  tokenizer.model   sentencepiece (Llama 2, Mistral), or tiktoken's text of
                    base64 tokens and ranks (Llama 3)
  vocab.json        with merges.txt: byte-level BPE (GPT-2, RoBERTa)
  vocab.txt         WordPiece (BERT)

All but sentencepiece become fast tokenizers of the `tokenizers` library, whose
offsets the caller reads. Sentencepiece itself is asked, because what converts
its models loses the space that Llama 2 puts before a text.
"""

import base64
import os
from collections.abc import Callable, Sequence

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from refrag_jax.errors import UserError

# Special tokens by the names that the vocabularies of these families give them.
SPECIAL = {
  'bos_token': ('<s>', '<|begin_of_text|>', '<|endoftext|>'),
  'eos_token': ('</s>', '<|end_of_text|>', '<|endoftext|>'),
  'pad_token': ('<pad>', '[PAD]', '<|finetune_right_pad_id|>'),
  'unk_token': ('<unk>', '[UNK]'),
  'cls_token': ('[CLS]', '<s>'),
  'sep_token': ('[SEP]', '</s>'),
  'mask_token': ('<mask>', '[MASK]'),
}
# Llama 3: how text is cut before BPE, and what stands behind its ranks.
_LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_LLAMA3_SPECIAL = (
  '<|begin_of_text|>', '<|end_of_text|>', '<|reserved_special_token_0|>',
  '<|reserved_special_token_1|>', '<|finetune_right_pad_id|>',
  '<|reserved_special_token_2|>', '<|start_header_id|>', '<|end_header_id|>',
  '<|eom_id|>', '<|eot_id|>', '<|python_tag|>',
)  # fmt: skip
_LLAMA3_SPECIALS = 256  # the rest are reserved


def fast(directory: str) -> tokenizers.Tokenizer | None:
  """The fast tokenizer of bare files; None where there are none of them."""
  path = lambda name: os.path.join(directory, name)
  if os.path.exists(path('vocab.json')) and os.path.exists(path('merges.txt')):
    core = tokenizers.Tokenizer(
      models.BPE.from_file(path('vocab.json'), path('merges.txt'))
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return core
  if os.path.exists(path('vocab.txt')):
    with open(path('vocab.txt'), encoding='utf-8') as f:
      words = [line for line in f if not line.startswith('[')]
    uncased = all(word == word.lower() for word in words)
    return tokenizers.BertWordPieceTokenizer(
      path('vocab.txt'), lowercase=uncased, strip_accents=uncased
    )._tokenizer
  if is_tiktoken(path('tokenizer.model')):
    return _tiktoken(path('tokenizer.model'))
  return None


def special_tokens(vocabulary: dict[str, int]) -> dict[str, str]:
  """The special tokens that a vocabulary has, by their roles."""
  return {
    role: next(name for name in names if name in vocabulary)
    for role, names in SPECIAL.items()
    if any(name in vocabulary for name in names)
  }


def is_tiktoken(path: str) -> bool:
  """Whether the first line is a base64 token and its rank."""
  if not os.path.exists(path):
    return False
  with open(path, 'rb') as f:
    parts = f.readline(200).split()
  try:
    return len(parts) == 2 and bool(base64.b64decode(parts[0], validate=True))
  except ValueError:
    return False


def _tiktoken(path: str) -> tokenizers.Tokenizer:
  """Byte-level BPE of tiktoken's ranks, as Llama 3 uses them."""
  rank_of = {}
  with open(path, 'rb') as f:
    for number, line in enumerate(f):
      try:
        token, rank = line.split()
        rank_of[base64.b64decode(token, validate=True)] = int(rank)
      except ValueError:
        raise UserError(
          f'{path}, line {number + 1}: no token and rank'
        ) from None
  letter = _byte_letters()
  text = lambda token: ''.join(letter[byte] for byte in token)
  merges = []
  for token in rank_of:  # by rank: the order in which merges apply
    pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
    pairs = [p for p in pairs if p[0] in rank_of and p[1] in rank_of]
    pairs.sort(key=lambda p: (rank_of[p[0]], rank_of[p[1]]))
    merges += [(text(a), text(b)) for a, b in pairs]
  vocabulary = {text(token): rank for token, rank in rank_of.items()}
  core = tokenizers.Tokenizer(
    models.BPE(vocabulary, merges, ignore_merges=True)
  )
  core.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(Regex(_LLAMA3), 'isolated'),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  ])  # fmt: skip
  core.decoder = decoders.ByteLevel()
  more = _LLAMA3_SPECIALS - len(_LLAMA3_SPECIAL)
  names = [*_LLAMA3_SPECIAL]
  names += [f'<|reserved_special_token_{i + 3}|>' for i in range(more)]
  core.add_special_tokens(
    [tokenizers.AddedToken(name, special=True) for name in names]
  )
  return core


def _byte_letters() -> list[str]:
  """The letter that stands for each byte in byte-level vocabularies (GPT-2)."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in set(plain)]
  letters = {byte: chr(byte) for byte in plain}
  letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
  return [letters[byte] for byte in range(256)]


def sentencepiece(
  directory: str,
) -> tuple[dict[str, int], Callable, Callable, Callable, bytes] | None:
  """A bare sentencepiece model; None where there is none.

  Returns:
    Its special ids by role, what encodes a batch of texts to (ids, offsets),
    offsets being int32 (n, 2) characters, what gives the ids alone, what
    decodes ids, and the file.

  Raises:
    UserError: the file is no sentencepiece model.
  """
  path = os.path.join(directory, 'tokenizer.model')
  if not os.path.exists(path) or is_tiktoken(path):
    return None
  import sentencepiece as spm  # its start costs; most have a tokenizer.json

  with open(path, 'rb') as f:
    data = f.read()
  model = spm.SentencePieceProcessor()
  try:
    model.LoadFromSerializedProto(data)
  except (RuntimeError, TypeError) as e:
    raise UserError(f'{path} is no sentencepiece model ({e})') from None
  is_byte_V = np.array([model.is_byte(i) for i in range(len(model))])
  ids = {
    'bos': model.bos_id(), 'eos': model.eos_id(), 'pad': model.pad_id(),
    'unk': model.unk_id(), 'size': len(model),
  }  # fmt: skip

  def encode(texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    found = model.encode(list(texts), return_type='offset_mapping')
    return [_one_offset(of, is_byte_V) for of in found]

  decode = lambda ids: model.decode([i for i in ids if not model.is_control(i)])
  ids_of = lambda texts: model.encode(list(texts), return_type=int)
  return ids, encode, ids_of, decode, data


def _one_offset(of, is_byte_V) -> tuple[np.ndarray, np.ndarray]:
  """Gives all the byte tokens of a character its offset, not the last alone."""
  ids_N = np.asarray(of['ids'], np.int32)
  offsets_N2 = np.asarray(of['offsets'], np.int32).reshape(-1, 2)
  empty_N = is_byte_V[ids_N] & (offsets_N2[:, 0] == offsets_N2[:, 1])
  for i in np.flatnonzero(empty_N)[::-1]:  # rare
    if i + 1 < len(ids_N):
      offsets_N2[i, 1] = offsets_N2[i + 1, 1]
  return ids_N, offsets_N2
