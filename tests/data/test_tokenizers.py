"""Ids, spans and special tokens of the byte and of Hugging Face tokenizers."""

import itertools
import json
import shutil

import numpy as np
import pytest
import tokenizers as hf_tokenizers
import transformers
from tokenizers import (
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

from refrag_jax.data import tokenizers
from refrag_jax.errors import UserError

TEXTS = [
  'plain words of text',
  '  white   space\n\n around\t ',
  'zwölf Boxkämpfer jagen Viktor',
  '🦜🦜 日本語 é',
  'ﬁne ligatures ① and ½',
  '',
  ' ',
  'x</s>y <s> [PAD] <pad>',
]
SPECIAL = ['<s>', '</s>', '<pad>']


def save(directory, core, **special):
  special = special or {
    'bos_token': '<s>',
    'eos_token': '</s>',
    'pad_token': '<pad>',
  }
  fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special)
  fast.save_pretrained(str(directory))
  return str(directory)


@pytest.fixture(scope='module')
def byte_level(tmp_path_factory):
  """GPT-2 or Llama-3-like: many tokens for a rare character."""
  core = hf_tokenizers.Tokenizer(models.BPE())
  core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = decoders.ByteLevel()
  core.post_processor = processors.ByteLevel(trim_offsets=True)
  core.train_from_iterator(
    ['words words words </ </ </', *TEXTS[:3]],
    trainers.BpeTrainer(
      vocab_size=300,
      special_tokens=SPECIAL,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ),
  )
  return save(tmp_path_factory.mktemp('byte_level'), core)


@pytest.fixture(scope='module')
def word_piece(tmp_path_factory):
  """BERT-like: normalised, white space covered by no token."""
  core = hf_tokenizers.Tokenizer(models.WordPiece(unk_token='[UNK]'))
  core.normalizer = normalizers.BertNormalizer(lowercase=True)
  core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  names = ['[UNK]', '[CLS]', '[SEP]', '[PAD]']
  core.train_from_iterator(
    TEXTS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=names)
  )
  return save(
    tmp_path_factory.mktemp('word_piece'),
    core,
    unk_token='[UNK]',
    cls_token='[CLS]',
    sep_token='[SEP]',
    pad_token='[PAD]',
  )


@pytest.fixture(scope='module')
def unigram(tmp_path_factory):
  """XLM-R-like: special tokens are pieces of the vocabulary itself."""
  pieces = [('<unk>', 0.0), *((name, 0.0) for name in SPECIAL), ('▁', -2.0)]
  letters = sorted(set(''.join(TEXTS)) - {' '})
  pieces += [(letter, -3.0) for letter in letters]
  core = hf_tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
  core.pre_tokenizer = pre_tokenizers.Metaspace()
  core.decoder = decoders.Metaspace()
  return save(
    tmp_path_factory.mktemp('unigram'),
    core,
    unk_token='<unk>',
    bos_token='<s>',
    eos_token='</s>',
    pad_token='<pad>',
  )


@pytest.fixture(params=['bytes', 'byte_level', 'word_piece', 'unigram'])
def tokenizer(request):
  if request.param == 'bytes':
    return tokenizers.load('bytes')
  return tokenizers.load(request.getfixturevalue(request.param))


@pytest.mark.parametrize('text', TEXTS)
def test_spans_partition_the_text(tokenizer, text):
  ids, starts = tokenizer.encode(text)
  assert ids.dtype == starts.dtype == np.int32
  assert ids.shape == starts.shape
  if text.strip():
    assert starts[0] == 0
  assert (np.diff(starts) >= 0).all()
  assert not len(starts) or starts[-1] <= len(text)
  bounds = [*starts, len(text)] if len(ids) else []
  spans = [text[a:b] for a, b in itertools.pairwise(bounds)]
  assert ''.join(spans) == (text if len(ids) else '')


@pytest.mark.parametrize('text', TEXTS)
def test_special_tokens_in_text_stay_text(tokenizer, text):
  ids, _ = tokenizer.encode(text)
  special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
  special |= {tokenizer.cls_id, tokenizer.sep_id}
  assert not special & set(ids.tolist())
  assert (ids < tokenizer.vocab_size).all()


def test_special_tokens_in_text_are_encoded_like_any_text(byte_level):
  ids, _ = tokenizers.load(byte_level).encode('x</s>y')
  core = hf_tokenizers.Tokenizer.from_file(f'{byte_level}/tokenizer.json')
  assert core.token_to_id('</') in ids  # learnt, and not cut for safety


def test_batches_encode_as_one_at_a_time(tokenizer):
  for text, (ids, starts), same in zip(
    TEXTS,
    tokenizer.encode_batch(TEXTS),
    tokenizer.ids_batch(TEXTS),
    strict=True,
  ):
    alone = tokenizer.encode(text)
    np.testing.assert_array_equal(ids, alone[0])
    np.testing.assert_array_equal(ids, same)
    np.testing.assert_array_equal(starts, alone[1])


def test_bytes():
  tokenizer = tokenizers.load('bytes')
  ids, starts = tokenizer.encode('aéb🦜')
  assert ids.tolist() == [97, 0xC3, 0xA9, 98, 0xF0, 0x9F, 0xA6, 0x9C]
  assert starts.tolist() == [0, 1, 2, 2, 3, 4, 4, 4]
  for text in TEXTS:
    assert tokenizer.decode(tokenizer.encode(text)[0]) == text
  assert tokenizer.decode([256, 97, 258, 0xC3, 263]) == 'a\ufffd'
  assert tokenizer.encode('a\ud800b')[0].tolist() == [97, 63, 98]


def test_byte_level_gives_a_character_to_its_first_token(byte_level):
  tokenizer = tokenizers.load(byte_level)
  ids, starts = tokenizer.encode('🦜 words')
  assert len(ids) == 5  # four bytes that nobody has merged, then ' words'
  assert starts.tolist() == [0, 1, 1, 1, 1]
  for text in TEXTS:
    assert tokenizer.decode(tokenizer.encode(text)[0]) == text


def test_white_space_between_tokens_goes_to_the_token_after(word_piece):
  tokenizer = tokenizers.load(word_piece)
  _, starts = tokenizer.encode('  white   space\n')
  assert starts[0] == 0
  assert 7 in starts  # the token that covers 's' at 10 begins there
  assert not {1, 2, 8, 9, 10, 15} & set(starts.tolist())


def test_unigram_pieces_of_special_tokens_are_cut(unigram):
  text = 'x</s>y'
  core = hf_tokenizers.Tokenizer.from_file(f'{unigram}/tokenizer.json')
  core.encode_special_tokens = True
  # What this guards against: the library matches the piece all the same.
  assert core.token_to_id('</s>') in core.encode(text).ids
  ids, starts = tokenizers.load(unigram).encode(text)
  assert core.token_to_id('</s>') not in ids
  assert starts[-1] == len(text) - 1


def test_other_characters_do_not_make_special_tokens(unigram, tmp_path):
  """XLM-R's normaliser writes '</s>' for the fullwidth '＜/s＞'."""
  core = hf_tokenizers.Tokenizer.from_file(f'{unigram}/tokenizer.json')
  core.normalizer = normalizers.NFKC()
  text = 'x＜/s＞y<s> ＜s＞'
  core.encode_special_tokens = True
  eos = core.token_to_id('</s>')
  assert core.encode(text).ids.count(eos) == 1
  tokenizer = tokenizers.load(
    save(tmp_path, core, unk_token='<unk>', bos_token='<s>', eos_token='</s>')
  )
  ids, starts = tokenizer.encode(text)
  assert not {eos, tokenizer.bos_id} & set(ids.tolist())
  assert starts[0] == 0 and (np.diff(starts) >= 0).all()
  assert {1, 2, 3, 4, 5} <= set(starts.tolist())  # letter by letter


@pytest.mark.parametrize('kind', ['GPT2Tokenizer', 'LlamaTokenizer'])
def test_a_class_name_changes_no_id(kind, tmp_path):
  """tokenizer.json says all; what such a class makes of it is another one."""
  core = hf_tokenizers.Tokenizer(
    models.BPE(
      {c: i for i, c in enumerate([*'abĠ0123456789', '20', '24', '</s>'])},
      [('2', '0'), ('2', '4')],
    )
  )
  core.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  core.decoder = decoders.ByteLevel()
  save(tmp_path, core, eos_token='</s>', unk_token='</s>')
  path = tmp_path / 'tokenizer_config.json'
  path.write_text(
    json.dumps(json.loads(path.read_text()) | {'tokenizer_class': kind})
  )
  ids, _ = tokenizers.load(str(tmp_path)).encode('ab 2024')
  assert ids.tolist() == core.encode('ab 2024').ids
  assert len(ids) == 7


def test_a_vocabulary_with_gaps(tmp_path):
  """What counts is the largest id: the table has to have its row."""
  core = hf_tokenizers.Tokenizer(
    models.WordLevel({'<unk>': 0, '</s>': 1, 'far': 900}, unk_token='<unk>')
  )
  save(tmp_path, core, eos_token='</s>', unk_token='<unk>')
  assert tokenizers.load(str(tmp_path)).vocab_size == 901


def test_a_model_has_its_own_tokenizer(byte_level, word_piece, tmp_path):
  one = tokenizers.load(byte_level)
  tokenizers.check_own(one, str(tmp_path), 'tokenizer')  # it has none
  tokenizers.check_own(one, byte_level, 'tokenizer')
  core = hf_tokenizers.Tokenizer.from_file(f'{byte_level}/tokenizer.json')
  copy = save(tmp_path, core, bos_token='</s>', eos_token='</s>')
  assert tokenizers.load(copy).fingerprint != one.fingerprint
  tokenizers.check_own(one, copy, 'tokenizer')  # of the same ids
  (tmp_path / 'broken').mkdir()
  (tmp_path / 'broken' / 'vocab.txt').write_text('')
  tokenizers.check_own(one, str(tmp_path / 'broken'), 'tokenizer')
  with pytest.raises(UserError, match='was trained with other ids') as e:
    tokenizers.check_own(one, word_piece, 'encoder_tokenizer')
  assert f'--config.data.encoder_tokenizer={word_piece}' in str(e.value)


def test_special_ids_and_fingerprint(byte_level, word_piece, tmp_path):
  decoder, encoder = tokenizers.load(byte_level), tokenizers.load(word_piece)
  assert (decoder.bos_id, decoder.eos_id, decoder.pad_id) == (0, 1, 2)
  assert (decoder.cls_id, decoder.sep_id) == (0, 1)  # it has none of its own
  assert (encoder.cls_id, encoder.sep_id, encoder.pad_id) == (1, 2, 3)
  assert (encoder.bos_id, encoder.eos_id) == (1, 2)
  assert decoder.vocab_size == 300
  core = hf_tokenizers.Tokenizer.from_file(f'{byte_level}/tokenizer.json')
  copy = tokenizers.load(save(tmp_path / 'copy', core))
  core.enable_truncation(5)  # a setting of the caller, not of the tokenizer
  cut = tokenizers.load(save(tmp_path / 'cut', core))
  other = tokenizers.load(
    save(
      tmp_path / 'other',
      core,
      bos_token='</s>',
      eos_token='<s>',
      pad_token='<pad>',
    )
  )
  assert decoder.fingerprint == copy.fingerprint == cut.fingerprint
  assert len(cut.encode(TEXTS[0])[0]) > 5
  names = {decoder, encoder, other, tokenizers.load('bytes')}
  assert len({t.fingerprint for t in names}) == 4


def test_vocabulary_beyond_the_model():
  tokenizer = tokenizers.load('bytes')
  tokenizers.check_vocab(tokenizer, 264, 'model.decoder')
  with pytest.raises(UserError, match=r'264 ids, but model.decoder.vocab_size'):
    tokenizers.check_vocab(tokenizer, 263, 'model.decoder')


def test_not_a_tokenizer(tmp_path):
  with pytest.raises(UserError, match='neither "bytes" nor a directory'):
    tokenizers.load('byte')
  with pytest.raises(UserError, match='no tokenizer could be read'):
    tokenizers.load(str(tmp_path))
  (tmp_path / 'tokenizer.json').write_text(json.dumps({'model': 1}))
  with pytest.raises(UserError, match='no tokenizer could be read'):
    tokenizers.load(str(tmp_path))


# --- Files that are not what they seem ----------------------------------------

MARK = b'\xef\xbb\xbf'


@pytest.mark.parametrize(
  'file', ['tokenizer.json', 'tokenizer_config.json', 'config.json']
)
def test_a_mark_before_the_json_is_no_part_of_it(file, byte_level, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(byte_level, copy)
  (copy / 'config.json').write_text('{"model_type": "llama"}')
  (copy / file).write_bytes(MARK + (copy / file).read_bytes())
  marked, plain = tokenizers.load(str(copy)), tokenizers.load(byte_level)
  assert marked.fingerprint == plain.fingerprint
  assert marked.name == str(copy)  # not that of a copy


def test_a_mark_before_a_vocabulary_is_no_part_of_its_first_word(tmp_path):
  words = '[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nwords\n##y\n'
  ids = []
  for name, mark in (('plain', b''), ('marked', MARK)):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'vocab.txt').write_bytes(mark + words.encode())
    ids.append(tokenizers.load(str(tmp_path / name)))
  assert ids[0].pad_id == ids[1].pad_id == 0
  assert ids[0].fingerprint == ids[1].fingerprint


@pytest.mark.parametrize(
  'file', ['tokenizer.json', 'tokenizer_config.json', 'vocab.txt']
)
def test_a_pointer_of_git_lfs_is_named(file, byte_level, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(byte_level, copy)
  (copy / file).write_text(
    'version https://git-lfs.github.com/spec/v1\noid sha256:cd\nsize 9\n'
  )
  message = f'/copy/{file} is a Git LFS pointer: run git lfs pull'
  with pytest.raises(UserError, match=message):
    tokenizers.load(str(copy))
