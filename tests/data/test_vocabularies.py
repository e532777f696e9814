"""Bare vocabulary files, made here, and the real ones where they are.

Dimension key: N tokens.
"""

import base64
import io
import os

import numpy as np
import pytest
import sentencepiece as spm
import tokenizers as hf_tokenizers

from refrag_jax.data import tokenizers, vocabularies
from refrag_jax.errors import UserError
from refrag_jax.runtime.environment import ROOT

REAL = ROOT / 'data' / 'tokenizers'
if not REAL.is_dir():
  REAL = ROOT.parent / 'shared' / 'data' / 'tokenizers'
WORDS = [
  'plain words of text', 'the text of the words', 'zwölf Boxkämpfer jagen',
  'def f(x): return x + 1', 'words  and   spaces',
]  # fmt: skip
HARD = [
  '', ' ', '\n\n', 'a', ' a', '  two  spaces ', 'emoji 😀👩‍👩‍👧 ok', '日本語と한국어',
  'e\u0301 combining a\u0308', 'x' * 200, 'a\tb\r\nc', '\u200bzero\u00a0width',
  '<s> </s> <unk> [CLS] [SEP] <|endoftext|> <|begin_of_text|> <pad> <mask>',
  'naïve “quotes” — dash…', '\ufeffbom', 'ﬁ ½ ① İ ß', '\x00\x01',
]  # fmt: skip


@pytest.fixture(scope='module')
def sentencepiece_dir(tmp_path_factory):
  """A Llama-2-like model: byte fallback, a space put before every text."""
  folder = tmp_path_factory.mktemp('sp')
  model = io.BytesIO()
  spm.SentencePieceTrainer.train(
    sentence_iterator=iter(WORDS * 20), model_writer=model, vocab_size=330,
    model_type='bpe', byte_fallback=True, normalization_rule_name='identity',
    remove_extra_whitespaces=False, hard_vocab_limit=False,
    minloglevel=3,
  )  # fmt: skip
  (folder / 'tokenizer.model').write_bytes(model.getvalue())
  return str(folder)


@pytest.fixture(scope='module')
def bpe_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('bpe')
  core = hf_tokenizers.ByteLevelBPETokenizer()
  special = ['<s>', '<pad>', '</s>', '<unk>', '<mask>']
  core.train_from_iterator(WORDS, vocab_size=300, special_tokens=special)
  core.save_model(str(folder))
  return str(folder)


@pytest.fixture(scope='module')
def wordpiece_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('wp')
  core = hf_tokenizers.BertWordPieceTokenizer()
  core.train_from_iterator(WORDS, vocab_size=120)
  core.save_model(str(folder))
  return str(folder)


@pytest.fixture(scope='module')
def tiktoken_dir(tmp_path_factory):
  """Ranks: all bytes, then merges of them in order."""
  folder = tmp_path_factory.mktemp('tik')
  tokens = [bytes([b]) for b in range(256)]
  tokens += [b'wo', b'rd', b'word', b' word', b' t', b' te', b'xt', b' text']
  lines = (b'%s %d' % (base64.b64encode(t), i) for i, t in enumerate(tokens))
  (folder / 'tokenizer.model').write_bytes(b'\n'.join(lines) + b'\n')
  return str(folder)


ALL = ('sentencepiece_dir', 'bpe_dir', 'wordpiece_dir', 'tiktoken_dir')


def directory_of(name, request):
  if name in ALL:
    return request.getfixturevalue(name)
  path = REAL / name
  if not path.is_dir():
    pytest.skip(f'there is no {name} here')
  return str(path)


REAL_NAMES = ('llama2', 'llama3', 'roberta', 'gpt2', 'bert-base-uncased')


def random_texts(seed, num=60):
  """Texts of every plane of Unicode, code and special tokens between them."""
  rng = np.random.default_rng(seed)
  ranges = [
    (0x20, 0x7F), (0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x600, 0x700),
    (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A0), (0x1F300, 0x1FAFF),
    (0x2000, 0x206F), (0xE000, 0xE010), (0x1D400, 0x1D7FF),
  ]  # fmt: skip
  texts = []
  for _ in range(num):
    parts = []
    for _ in range(int(rng.integers(1, 8))):
      low, high = ranges[rng.integers(len(ranges))]
      codes = rng.integers(low, high, int(rng.integers(1, 12)))
      parts.append(''.join(map(chr, codes)))
      if rng.random() < 0.2:
        parts.append(str(rng.choice(HARD)))
    texts.append(''.join(parts))
  return texts


@pytest.mark.parametrize('name', [*ALL, *REAL_NAMES])
def test_spans_partition_any_text_and_no_reserved_id_comes_out(name, request):
  """Chunks cut text between tokens and lose none, over generated Unicode."""
  tokenizer = tokenizers.load(directory_of(name, request))
  reserved = {
    tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.cls_id,
    tokenizer.sep_id,
  }  # fmt: skip
  texts = [*HARD, *random_texts(0), *WORDS]
  for text, (ids_N, starts_N), same_N in zip(
    texts, tokenizer.encode_batch(texts), tokenizer.ids_batch(texts)
  ):
    np.testing.assert_array_equal(ids_N, same_N)
    assert ids_N.dtype == starts_N.dtype == np.int32
    assert len(ids_N) == len(starts_N)
    if not len(ids_N):
      continue
    assert starts_N[0] == 0 and (np.diff(starts_N) >= 0).all()
    assert starts_N[-1] <= len(text)
    assert ids_N.min() >= 0 and ids_N.max() < tokenizer.vocab_size
    assert not reserved & set(ids_N.tolist()), repr(text)
    single = tokenizer.encode(text)
    np.testing.assert_array_equal(single[0], ids_N)


@pytest.mark.parametrize('name', ['sentencepiece_dir', 'llama2'])
def test_sentencepiece_is_asked_itself(name, request):
  """With the space before a text, which its converted twin loses."""
  directory = directory_of(name, request)
  model = spm.SentencePieceProcessor(
    model_file=os.path.join(directory, 'tokenizer.model')
  )
  tokenizer = tokenizers.load(directory)
  for text in [*HARD, *random_texts(1), *WORDS]:
    assert tokenizer.encode(text)[0].tolist() == model.encode(text)
  assert tokenizer.vocab_size == len(model)
  assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


@pytest.mark.parametrize('name', ['sentencepiece_dir', 'llama2'])
def test_a_character_of_many_bytes_belongs_to_the_first(name, request):
  tokenizer = tokenizers.load(directory_of(name, request))
  ids_N, starts_N = tokenizer.encode('ab😀cd')
  inside = np.flatnonzero(starts_N == 3)
  first = np.flatnonzero(starts_N == 2)
  assert len(first) == 1 and len(inside) >= 3  # 😀 is [2, 3): four tokens
  assert ids_N[first[0]] != ids_N[inside[0]]


@pytest.mark.parametrize(
  ('name', 'text', 'ids'),
  [
    ('gpt2', 'Hello world', [15496, 995]),
    ('roberta', 'Hello world', [31414, 232]),
    ('bert-base-uncased', 'hello world', [7592, 2088]),
    ('llama2', 'Hello world', [15043, 3186]),
    ('llama3', 'Hello world', [9906, 1917]),
  ],
)
def test_known_ids(name, text, ids, request):
  tokenizer = tokenizers.load(directory_of(name, request))
  assert tokenizer.encode(text)[0].tolist() == ids
  assert tokenizer.decode(ids).strip() == text


def test_merges_follow_the_ranks(tiktoken_dir):
  tokenizer = tokenizers.load(tiktoken_dir)
  ids_N, starts_N = tokenizer.encode('word text wo')
  # 'word', ' text' (a word that is a token is one), ' ' + 'wo'.
  assert ids_N.tolist() == [258, 263, 32, 256]
  assert starts_N.tolist() == [0, 4, 9, 10]
  assert tokenizer.decode(ids_N) == 'word text wo'
  assert tokenizer.vocab_size == 264 + 256


def test_a_cased_vocabulary_keeps_its_case(tmp_path):
  words = ['[UNK]', '[CLS]', '[SEP]', '[PAD]', '[MASK]', 'hello', 'Hello', 'caf',
           '##é', '##e']  # fmt: skip
  for name, kept in (('cased', words), ('uncased', words[:6] + words[7:])):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'vocab.txt').write_text('\n'.join(kept) + '\n')
  cased = tokenizers.load(str(tmp_path / 'cased'))
  assert cased.encode('Hello café')[0].tolist() == [6, 7, 8]
  uncased = tokenizers.load(str(tmp_path / 'uncased'))
  assert uncased.encode('Hello café')[0].tolist() == [5, 6, 8]


def test_a_tokenizer_config_has_the_word(tmp_path, wordpiece_dir):
  """What it says of case is not in the vocabulary file."""
  (tmp_path / 'vocab.txt').write_text(
    '\n'.join(['[UNK]', '[CLS]', '[SEP]', '[PAD]', '[MASK]', 'word']) + '\n'
  )
  (tmp_path / 'tokenizer_config.json').write_text(
    '{"tokenizer_class": "BertTokenizer", "do_lower_case": false}'
  )
  tokenizer = tokenizers.load(str(tmp_path))
  assert tokenizer.encode('Word word')[0].tolist() == [0, 5]


def test_a_damaged_file_is_named(tmp_path):
  path = tmp_path / 'tokenizer.model'
  path.write_bytes(b'\x00\x01 nothing like a model')
  with pytest.raises(UserError, match='is no sentencepiece model'):
    tokenizers.load(str(tmp_path))
  path.write_bytes(base64.b64encode(b'a') + b' 0\nnothing\n')
  assert vocabularies.is_tiktoken(str(path))
  with pytest.raises(UserError, match='line 2: no token and rank'):
    vocabularies.fast(str(tmp_path))
