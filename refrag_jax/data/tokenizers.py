"""Tokenizers: bytes, built in, and Hugging Face tokenizers by directory.

Every tokenizer tells, beside its ids, where each token's span of the text
begins, so that a chunk of decoder tokens can be handed to the encoder as the
text it stands for and never has to be decoded and encoded again.

The spans partition the text: a character belongs to the first token that
covers it, and what no token covers (white space, mostly) belongs to the token
after it; behind the last token, to the last one. When one character is many
tokens, the spans of all but the first are empty:

  text    a     é           b            starts of byte tokens
  bytes   0x61  0xc3  0xa9  0x62         0  1  2  2
  span    [0,1) [1,2) [2,2) [2,3)
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence

import numpy as np

from refrag_jax.errors import UserError
from refrag_jax.hf import hub
from refrag_jax.runtime.paths import refuse_pointer

# What a tokenizer's directory may hold of it.
FILES = (
  'tokenizer.json', 'tokenizer.model', 'sentencepiece.bpe.model',
  'tokenizer_config.json', 'vocab.json', 'merges.txt', 'vocab.txt',
  'special_tokens_map.json', 'added_tokens.json',
)  # fmt: skip
# What lies beside it in the directory of a model, for chat and for sentences.
BESIDE = (
  'chat_template.jinja', 'chat_template.json', 'additional_chat_templates',
  'generation_config.json', 'sentence_bert_config.json',
  'config_sentence_transformers.json',
)  # fmt: skip
MARK = b'\xef\xbb\xbf'  # of UTF-8, which some editors put before a text
_SAID = 'WHATTHEUSERSAYS'  # a place in a chat template
# ids and starts, both int32[n].
Encoded = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """What the project needs of a tokenizer; equal fingerprint, equal ids.

  `encode_batch` adds no special tokens, and a special token's name inside a
  text is text like any other: a passage cannot end its own context.
  """

  name: str
  vocab_size: int
  bos_id: int
  eos_id: int
  pad_id: int
  cls_id: int
  sep_id: int
  mask_id: int  # what `mlm` hides a token behind
  fingerprint: str
  encode_batch: Callable[[Sequence[str]], list[Encoded]]
  ids_batch: Callable[[Sequence[str]], list[Sequence[int]]]  # those ids alone
  decode: Callable[[Sequence[int]], str]
  # What a user's words stand between in the model's own chat template, up to
  # where the assistant's begin: ids before and behind. Raises UserError where
  # there is no template.
  chat_frame: Callable[[], tuple[Sequence[int], Sequence[int]]]

  def encode(self, text: str) -> Encoded:
    """Returns the text's ids and the character where each span begins."""
    return self.encode_batch([text])[0]


@functools.lru_cache(maxsize=8)
def load(name: str) -> Tokenizer:
  """Returns the tokenizer in directory `name`, or the one called 'bytes'.

  Raises:
    UserError: there is no tokenizer of that name.
  """
  if name == 'bytes':
    return _bytes()
  if not os.path.exists(name) and not hub.is_name(name):
    raise UserError(
      f'tokenizer {name!r}: neither "bytes" nor a directory; give the '
      'directory of a Hugging Face tokenizer (with its tokenizer.json)'
    )
  path = hub.resolve(name, weights=False)
  read = (*FILES, 'config.json')  # the last by transformers, in passing
  there = [os.path.join(path, file) for file in read]
  there = [file for file in there if os.path.exists(file)]
  for file in there:
    refuse_pointer(file)
  if not any(_is_marked(file) for file in there):
    return _hugging_face(path, path)
  with tempfile.TemporaryDirectory() as unmarked:
    copy_files(path, unmarked, read)
    return _hugging_face(path, unmarked)


def _is_marked(path: str) -> bool:
  with open(path, 'rb') as f:
    return f.read(len(MARK)) == MARK


def copy_files(source: str, target: str, names: Sequence[str]) -> None:
  """Copies those of the files that are there, without a byte-order mark."""
  for name in names:
    path = os.path.join(source, name)
    if os.path.isdir(path):
      os.mkdir(os.path.join(target, name))
      copy_files(path, os.path.join(target, name), os.listdir(path))
    elif os.path.exists(path):
      with open(path, 'rb') as of, open(os.path.join(target, name), 'wb') as to:
        begin = of.read(len(MARK))
        to.write(b'' if begin == MARK else begin)
        shutil.copyfileobj(of, to)


def check_vocab(tokenizer: Tokenizer, vocab_size: int, which: str) -> None:
  """Refuses a vocabulary larger than the model's (`which`: its config)."""
  if tokenizer.vocab_size > vocab_size:
    raise UserError(
      f'tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} ids, but '
      f'{which}.vocab_size is {vocab_size}: raise it to '
      f'{tokenizer.vocab_size} or take another tokenizer'
    )


# What two tokenizers of one vocabulary agree on, whatever their files.
_PROBE = 'A report of 2024 says: naïve models, 3.14 times.'


def check_own(tokenizer: Tokenizer, directory: str, which: str) -> None:
  """Refuses another tokenizer than the one that a model comes with.

  Args:
    directory: of the model; if it has no tokenizer, anything may be its own.
    which: the config's name for `tokenizer`.
  """
  if not any(os.path.exists(os.path.join(directory, name)) for name in FILES):
    return
  try:
    own = load(directory)
  except UserError:  # it may not be readable, which is why there is another
    return
  same = tokenizer.fingerprint == own.fingerprint or np.array_equal(
    tokenizer.encode(_PROBE)[0], own.encode(_PROBE)[0]
  )
  if not same:
    raise UserError(
      f'config.data.{which} is {tokenizer.name!r}, but the model in '
      f'{directory} was trained with other ids, those of the tokenizer beside '
      f'it: --config.data.{which}={directory}'
    )


def starts_of(offsets_N2: np.ndarray) -> np.ndarray:
  """Span starts, int32 (N,), from the characters that each token covers."""
  starts_N = np.zeros(len(offsets_N2), np.int32)
  starts_N[1:] = np.maximum.accumulate(offsets_N2[:-1, 1])
  return starts_N


def _without_surrogates(texts: Sequence[str]) -> list[str]:
  return [t.encode('utf-8', 'replace').decode('utf-8') for t in texts]


def _bytes() -> Tokenizer:
  # 260 ids are used; 264 so that the table divides over 8 devices.
  return Tokenizer(
    name='bytes',
    vocab_size=264,
    bos_id=256,
    eos_id=257,
    pad_id=258,
    cls_id=256,
    sep_id=257,
    mask_id=259,
    fingerprint=hashlib.sha256(b'refrag_jax bytes 1').hexdigest(),
    encode_batch=lambda texts: [_encode_bytes(text) for text in texts],
    ids_batch=lambda texts: [_encode_bytes(text)[0] for text in texts],
    decode=_decode_bytes,
    chat_frame=lambda: _no_chat('bytes'),
  )


def _no_chat(name: str):
  raise UserError(
    f'config.data.chat is on, but tokenizer {name!r} has no chat template: '
    'take that of a model trained to converse, or --config.data.chat=false'
  )


def _encode_bytes(text: str) -> Encoded:
  # A lone surrogate has no UTF-8; '?' keeps one character one byte.
  data_N = np.frombuffer(text.encode('utf-8', errors='replace'), np.uint8)
  continues_N = (data_N & 0xC0) == 0x80
  starts_N = np.cumsum(~continues_N, dtype=np.int32) - 1 + continues_N
  return data_N.astype(np.int32), starts_N.astype(np.int32)


def _decode_bytes(ids: Sequence[int]) -> str:
  data = bytes(int(i) for i in ids if 0 <= i < 256)
  return data.decode('utf-8', errors='replace')


def _hugging_face(path: str, files: str) -> Tokenizer:
  """The tokenizer of directory `path`, read from `files`, a copy or itself."""
  os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')  # no torch: silence
  import transformers  # a second of import that byte runs do not pay

  from refrag_jax.data import vocabularies

  try:
    there = lambda name: os.path.exists(os.path.join(files, name))
    fast = transformers.PreTrainedTokenizerFast
    if there('tokenizer.json'):
      # Not AutoTokenizer: the classes that a tokenizer_config.json names make
      # a tokenizer of their own from its words, with other spaces and digits
      # (transformers 5).
      hf = fast.from_pretrained(files, local_files_only=True)
    else:
      found = vocabularies.sentencepiece(files)
      if found is not None:
        return _sentencepiece(path, *found)
      bare = None
      if not there('tokenizer_config.json'):  # which may say more
        bare = vocabularies.fast(files)
      if bare is None:
        auto = transformers.AutoTokenizer
        hf = auto.from_pretrained(files, local_files_only=True)
      else:
        hf = fast(tokenizer_object=bare)
    if not (hf.bos_token or hf.cls_token or hf.eos_token):
      # No tokenizer_config.json says which they are: their names do.
      hf.add_special_tokens(vocabularies.special_tokens(hf.get_vocab()))
  except UserError:
    raise
  except Exception as e:  # whatever it trips over, the directory is at fault
    reason = str(e).strip().split('\n')[0][:200]
    raise UserError(f'no tokenizer could be read from {path}: {reason}') from e
  if not hf.is_fast:
    raise UserError(
      f'the tokenizer in {path} gives no character offsets; it needs a '
      'tokenizer.json (save it with transformers as a fast tokenizer)'
    )

  def first(*names: str) -> int:
    for name in names:
      if getattr(hf, f'{name}_token_id') is not None:
        return int(getattr(hf, f'{name}_token_id'))
    raise UserError(
      f'the tokenizer in {path} has none of the special tokens '
      f'{", ".join(names)}; the model needs one of them'
    )

  special = {
    'bos_id': first('bos', 'cls', 'eos'),
    'eos_id': first('eos', 'sep', 'bos'),
    'pad_id': first('pad', 'eos', 'sep', 'unk'),
    'cls_id': first('cls', 'bos', 'eos'),
    'sep_id': first('sep', 'eos', 'bos'),
  }
  backend = hf.backend_tokenizer
  backend.no_padding()
  backend.no_truncation()
  identity = json.dumps([backend.to_str(), special], sort_keys=True)
  backend.encode_special_tokens = True  # in text they stay text
  reserved = set(hf.all_special_ids) - {hf.unk_token_id}

  def unreserved(text: str, encoding) -> tuple[list[int], list]:
    """Ids and offsets without the special tokens that the text spells.

    A unigram vocabulary holds them as ordinary pieces and matches them in
    spite of `encode_special_tokens`, also where the text has other characters
    that its normaliser makes into these. Cut behind their first character
    they are others; one that is a single character is left out.
    """
    ids, offsets = encoding.ids, encoding.offsets  # each makes a new list
    if reserved.isdisjoint(ids):
      return ids, offsets
    tokens = list(zip(ids, offsets, strict=True))
    cuts = {a + 1 for i, (a, b) in tokens if i in reserved and b - a > 1}
    if not cuts:
      left = [token for token in tokens if token[0] not in reserved]
      return [i for i, _ in left], [of for _, of in left]
    ids, offsets, begin = [], [], 0
    for end in [*sorted(cuts), len(text)]:
      part = text[begin:end]
      of_part = unreserved(part, backend.encode(part, add_special_tokens=False))
      ids += of_part[0]
      offsets += [(a + begin, b + begin) for a, b in of_part[1]]
      begin = end
    return ids, offsets

  def encode_batch(texts: Sequence[str]) -> list[Encoded]:
    texts = _without_surrogates(texts)
    encodings = backend.encode_batch(texts, add_special_tokens=False)
    return [
      (
        np.asarray(ids, np.int32),
        starts_of(np.asarray(offsets, np.int32).reshape(-1, 2)),
      )
      for ids, offsets in map(unreserved, texts, encodings)
    ]

  def ids_batch(texts: Sequence[str]) -> list[Sequence[int]]:
    texts = _without_surrogates(texts)
    found = backend.encode_batch_fast(texts, add_special_tokens=False)
    found = [encoding.ids for encoding in found]
    spelt = [n for n, ids in enumerate(found) if not reserved.isdisjoint(ids)]
    for n, (ids, _) in zip(spelt, encode_batch([texts[n] for n in spelt])):
      found[n] = ids
    return found

  def decode(ids: Sequence[int]) -> str:
    return hf.decode([int(i) for i in ids], skip_special_tokens=True)

  def chat_frame() -> tuple[Sequence[int], Sequence[int]]:
    if not hf.chat_template:
      _no_chat(path)
    said = [{'role': 'user', 'content': _SAID}]
    try:
      text = hf.apply_chat_template(
        said, tokenize=False, add_generation_prompt=True
      )
    except Exception as e:  # a program of somebody else's
      reason = str(e).strip().split('\n')[0][:200]
      raise UserError(f'the chat template in {path} fails: {reason}') from e
    parts = text.split(_SAID)
    if len(parts) != 2:
      raise UserError(
        f'the chat template in {path} repeats what a user says, or leaves it '
        'out, so that passages cannot stand in it: --config.data.chat=false'
      )
    # A copy, in which the names of special tokens are meant: threads that read
    # texts may be using the other.
    named = type(backend).from_str(backend.to_str())
    named.encode_special_tokens = False
    before, behind = (
      named.encode(part, add_special_tokens=False).ids for part in parts
    )
    return before, behind

  return Tokenizer(
    name=path,
    vocab_size=1 + max(hf.get_vocab().values()),  # there may be gaps
    # Not in `identity`: it tells no text's ids, and not every one has a mask.
    mask_id=first('mask', 'unk', 'pad', 'eos', 'sep', 'cls', 'bos'),
    fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
    encode_batch=encode_batch,
    ids_batch=ids_batch,
    decode=decode,
    chat_frame=chat_frame,
    **special,
  )


def _sentencepiece(path, ids, encode, ids_of, decode, data) -> Tokenizer:
  """A bare sentencepiece model; control symbols in text are text to it."""
  first = lambda *names: next(
    (ids[name] for name in names if ids[name] >= 0), 0
  )

  def encode_batch(texts: Sequence[str]) -> list[Encoded]:
    texts = _without_surrogates(texts)
    return [(ids_N, starts_of(of_N2)) for ids_N, of_N2 in encode(texts)]

  return Tokenizer(
    name=path,
    vocab_size=ids['size'],
    bos_id=first('bos', 'eos'),
    eos_id=first('eos', 'bos'),
    pad_id=first('pad', 'eos'),
    cls_id=first('bos', 'eos'),
    sep_id=first('eos', 'bos'),
    mask_id=first('unk', 'pad', 'eos'),
    fingerprint=hashlib.sha256(data).hexdigest(),
    encode_batch=encode_batch,
    ids_batch=lambda texts: ids_of(_without_surrogates(texts)),
    decode=lambda ids: decode([int(i) for i in ids]),
    chat_frame=lambda: _no_chat(path),
  )
