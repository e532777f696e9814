"""Questions to batches: templates, masks, chunks of passages, bad records."""

import gzip
import json

import numpy as np
import pytest
import zstandard
from questions import TOKENIZER, build, context_text

from refrag_jax.data import chunking
from refrag_jax.data.questions import examples as rag
from refrag_jax.data.text import corpus
from refrag_jax.data.text import sources as text_lib
from refrag_jax.errors import UserError


def record(number, **fields):
  ctxs = [
    {'title': f'T{number}', 'text': f'gold text {number}', 'gold': True},
    {'title': f'T{number}', 'text': f'other {number}'},
  ]
  question = {'question': f'What is {number}?', 'answers': [str(number)]}
  return question | {'ctxs': ctxs} | fields


def write(path, records):
  lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
  path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
  return str(path)


@pytest.fixture(scope='module')
def sources():
  return {split: build(split) for split in ('train', 'heldout')}


def test_rows_read_as_the_templates_say(sources):
  source = sources['heldout']
  batch = source.examples('gold', 5)
  for row, number in enumerate(batch['id_B']):
    question = source.questions[number]
    prefix = batch['prefix_BQ'][row, : batch['prefix_len_B'][row]]
    assert prefix[0] == TOKENIZER.bos_id
    assert TOKENIZER.decode(prefix[1:]) == f'Q: {question.question}\n'
    output = batch['output_BO'][row]
    length = batch['output_len_B'][row]
    assert output[length - 1] == TOKENIZER.eos_id
    assert TOKENIZER.decode(output[: length - 1]) == f'A: {question.answers[0]}'
    learned = output[batch['loss_mask_BO'][row]]
    assert TOKENIZER.decode(learned[:-1]) == question.answers[0]
    assert learned[-1] == TOKENIZER.eos_id
    title, text = source.passages[question.gold[0]]
    assert context_text(batch, row) == [f'{title}.{text}\n']


def test_shapes_are_static(sources):
  source = sources['train']
  shapes = [
    {key: (v.shape, v.dtype) for key, v in batch.items()}
    for batch in [
      source.batch(0, 0, range(4)),
      source.batch(0, 7, range(4)),
      *(sources['heldout'].examples(kind, 4) for kind in source.kinds),
    ]
  ]
  assert all(shape == shapes[0] for shape in shapes)
  assert shapes[0]['chunks_BCK'] == ((4, 96, 4), np.int32)
  assert shapes[0]['loss_mask_BO'] == ((4, 32), np.bool_)


def test_chunks_never_straddle_passages(sources):
  """A passage's chunks are those it has alone, wherever it stands."""
  source = sources['heldout']
  batch = source.examples('gold_distractors', 8)
  for row in range(8):
    for p, text in enumerate(context_text(batch, row)):
      alone = chunking.chunk_passage(text, TOKENIZER, TOKENIZER, 4, 8)
      n = len(alone.chunk_len_C)
      here = slice(p * 32, p * 32 + n)
      np.testing.assert_array_equal(
        batch['chunks_BCK'][row, here], alone.chunks_CK
      )
      np.testing.assert_array_equal(
        batch['encoder_BCM'][row, here], alone.encoder_CM
      )
      rest = slice(p * 32 + n, (p + 1) * 32)
      assert not batch['chunk_len_BC'][row, rest].any()
      assert not batch['encoder_len_BC'][row, rest].any()


def test_a_row_is_a_pure_function_of_seed_step_and_row(sources):
  source = sources['train']
  whole = source.batch(3, 11, range(8))
  part = build('train').batch(3, 11, [5, 2])  # another process
  for key, values in whole.items():
    np.testing.assert_array_equal(values[[5, 2]], part[key])
  for other in (source.batch(3, 12, range(8)), source.batch(4, 11, range(8))):
    assert (other['id_B'] != whole['id_B']).any()


def test_kinds_show_the_same_questions_and_the_passages_they_name(sources):
  source = sources['heldout']
  batches = {kind: source.examples(kind, 30) for kind in rag.KINDS}
  ids = batches['none']['id_B']
  for batch in batches.values():
    np.testing.assert_array_equal(batch['id_B'], ids)
    np.testing.assert_array_equal(
      batch['output_BO'], batches['none']['output_BO']
    )
  places = []
  for row, number in enumerate(ids):
    gold = source.passage(source.questions[number].gold[0])
    texts = {kind: context_text(batches[kind], row) for kind in rag.KINDS}
    assert texts['none'] == []
    assert texts['gold'] == [gold]
    assert texts['given'][0] == gold
    assert len(set(texts['gold_distractors'])) == 3
    assert gold not in texts['gold_missing'] and texts['gold_missing']
    places.append(texts['gold_distractors'].index(gold))
    assert len(texts['bm25']) == 3
    assert gold not in texts['shuffled']
    assert len(texts['shuffled']) == 3
  assert set(places) == {0, 1, 2}  # the gold passage's place is random
  found = [
    source.passage(source.questions[n].gold[0])
    in context_text(batches['bm25'], r)
    for r, n in enumerate(ids)
  ]
  assert np.mean(found) > 0.7


def test_examples_are_a_prefix_of_more_examples(sources):
  few = sources['heldout'].examples('gold_distractors', 6)
  many = sources['heldout'].examples('gold_distractors', 20)
  for key, values in few.items():
    np.testing.assert_array_equal(values, many[key][:6])
  asked = [sources['heldout'].questions[n].kind for n in few['id_B']]
  assert (
    sorted(asked) == ['default'] * 2 + ['describes'] * 2 + ['parameter'] * 2
  )


def test_training_mixes_contexts_and_kinds_of_questions(sources):
  source = sources['train']
  batch = source.batch(0, 0, range(600))
  lengths = batch['chunk_len_BC'].reshape(600, 3, 32)
  single = (lengths.any(axis=2).sum(axis=1) == 1).mean()
  assert 0.05 < single < 0.15  # 'gold'
  asked = [source.questions[n].kind for n in batch['id_B']]
  for kind in ('default', 'parameter', 'describes'):
    assert 0.25 < asked.count(kind) / 600 < 0.42


def test_held_out_passages_are_in_no_training_text(sources, tmp_path):
  train, heldout = sources['train'], sources['heldout']
  assert not set(train.passages) & set(heldout.passages)
  index = corpus.prepare(('stdlib',), (1.0,), TOKENIZER, str(tmp_path), 0.2)
  trained = set()
  for document in index.documents('train'):
    trained.update(index.document_text(document).split('\n'))

  def heads(source):
    return {f'{t}.{text}'.partition('\n')[0] for t, text in source.passages}

  assert not heads(heldout) & trained
  assert len(heads(train) & trained) > 0.9 * len(heads(train))


def test_shuffled_passages_are_of_another_document(sources):
  source = sources['heldout']
  batch = source.examples('shuffled', 400)
  for row, number in enumerate(batch['id_B']):
    own = {source.passage(p) for p in source.questions[number].given}
    assert not own & set(context_text(batch, row))


def test_embedded_passages_are_never_cut(sources):
  for source in sources.values():
    for number in range(len(source.passages)):
      assert len(source.passage(number).encode()) <= 32 * 4


def test_a_small_file_has_both_sides(tmp_path):
  path = write(tmp_path / 'q.jsonl', [record(i) for i in range(3)])
  for fraction in (0.001, 0.999):
    train = build('train', questions=path, heldout_fraction=fraction)
    heldout = build('heldout', questions=path, heldout_fraction=fraction)
    assert len(train.questions) + len(heldout.questions) == 3
  # Questions about one passage are on one side.
  same = [record(1), record(1, question='And what is this?', answers=['x'])]
  path = write(tmp_path / 'same.jsonl', [*same, record(2)])
  sizes = {
    len(build(s, questions=path).questions) for s in ('train', 'heldout')
  }
  assert sizes == {1, 2}


def test_bad_records_are_skipped_and_counted(tmp_path):
  good = [record(i) for i in range(20)]
  empty = {'title': 'x', 'text': ' \n'}
  bad = [
    '{"question": ',
    '[1]',
    record(5, question=' '),
    record(6, answers=[]),
    record(7, answers='7'),
    record(8, ctxs=None),
    record(9, ctxs=[empty]),
    '"\\ud800"',
    record(10, answers=['long ' * 20]),
  ]
  good[0]['ctxs'].append(empty)
  path = write(tmp_path / 'q.jsonl', [*good, *bad])
  skipped, number = set(), 0
  for split in ('train', 'heldout'):
    source = build(split, questions=path)
    number += len(source.questions)
    skipped |= set(source.skipped)
  assert number == 20
  assert skipped == {
    '2 x empty passage (first in line 1)',
    '2 x not JSON in UTF-8 (first in line 21)',
    '1 x not an object (first in line 22)',
    "1 x no 'question' (first in line 23)",
    "2 x no 'answers' (a list of texts) (first in line 24)",
    "1 x no 'ctxs' (a list of passages); it has question, answers (first in"
    ' line 26)',
    '1 x no passage with text (first in line 27)',
    '1 x answer longer than data.answer_length (first in line 29)',
  }


def outcome(path) -> dict:
  """Questions, passages and gold of both sides."""
  return {
    split: (source.kinds, source.passages, [
      (q.question, q.answers, q.gold, q.kind) for q in source.questions
    ])
    for split in ('train', 'heldout')
    for source in [build(split, questions=path)]
  }  # fmt: skip


@pytest.mark.parametrize(
  'change',
  [
    lambda r: {'document': None},
    lambda r: {'kind': None, 'id': None},
    lambda r: {'question': None,
               'turns': [{'speaker': 'Q', 'text': r['question']}]},
    lambda r: {'ctxs': [ctx | {'gold': None, 'title': None, 'has_answer': i < 1}
                        for i, ctx in enumerate(r['ctxs'])]},
    lambda r: {'ctxs': [{'title': None, 'text': ctx['text'], 'hasanswer': i < 1}
                        for i, ctx in enumerate(r['ctxs'])]},
    lambda r: {'ctxs': [ctx | {'gold': int(i < 1), 'title': None}
                        for i, ctx in enumerate(r['ctxs'])]},
  ],
)  # fmt: skip
def test_a_null_field_is_one_that_is_not_there(tmp_path, change):
  """And flags may be called as others call them, or 0 and 1."""
  records = [record(i) for i in range(20)]
  changed = [r | change(r) for r in records]
  titled = all(ctx.get('title') for r in changed for ctx in r['ctxs'])
  for r in [] if titled else records:
    for ctx in r['ctxs']:
      del ctx['title']
  if 'turns' in changed[0]:
    for r in records:
      r['question'] = f'Q: {r["question"]}'
  old = write(tmp_path / 'old.jsonl', records)
  new = write(tmp_path / 'new.jsonl', changed)
  assert outcome(old) == outcome(new)


@pytest.mark.parametrize('value', ['False', 'true', 2, 0.5, [], {}])
def test_a_flag_is_a_boolean(tmp_path, value):
  """The text "False" is true to Python."""
  broken = record(3)
  broken['ctxs'][0]['gold'] = value
  path = write(tmp_path / 'q.jsonl', [record(1), broken])
  with pytest.raises(
    UserError, match='record 2: gold is .*: write true or fal'
  ):
    build(questions=path)


def test_what_looks_like_a_flag_is_named(tmp_path):
  records = [record(i) for i in range(9)]
  for r in records:
    for ctx in r['ctxs']:
      ctx['is_relevant'] = ctx.pop('gold', False)
  source = build(questions=write(tmp_path / 'q.jsonl', records))
  assert 'gold' not in source.kinds
  assert source.skipped[0] == (
    'no passage is marked gold; is_relevant is not read: call it gold'
  )


def test_the_same_question_or_gold_text_is_on_one_side(tmp_path):
  """Also through a third record, and spelt otherwise."""
  rng = np.random.default_rng(0)
  records = []
  for i in range(60):
    q, g = rng.integers(25, size=2)
    gold = {'title': f'{i}', 'text': f'The text {g}.', 'gold': True}
    ask = f'What is {q}?' if i % 2 else f'what is  {q}'
    records.append(record(i, question=ask, ctxs=[gold], document=f'd{i}'))
  # Most come together; these are alone.
  records += [record(i) for i in range(100, 120)]
  path = write(tmp_path / 'q.jsonl', records)
  sides = {
    split: build(split, questions=path) for split in ('train', 'heldout')
  }
  seen = {
    split: {(' '.join(q.question.lower().split()).strip('?'),
             source.passages[q.gold[0]][1]) for q in source.questions}
    for split, source in sides.items()
  }  # fmt: skip
  assert all(seen.values())
  for part in (0, 1):
    train, held = ({pair[part] for pair in seen[s]} for s in seen)
    assert not train & held


def test_files_without_duplicates_keep_their_sides(tmp_path):
  path = write(tmp_path / 'q.jsonl', [record(i) for i in range(40)])
  held = {q.question for q in build('heldout', questions=path).questions}
  expected = {
    f'What is {i}?'
    for i in range(40)
    if corpus.is_heldout(f'gold text {i}', 0.2)
  }
  assert held == expected


@pytest.mark.parametrize('form', ['array', 'indented', 'gz', 'zst', 'bom'])
def test_other_forms_of_the_same_file(tmp_path, form):
  """As retrievers write them."""
  records = [record(i) | {'n': 3} for i in range(12)]
  plain = write(tmp_path / 'q.jsonl', records)
  data = (tmp_path / 'q.jsonl').read_bytes()
  path = tmp_path / {'gz': 'q.jsonl.gz', 'zst': 'q.jsonl.zst'}.get(
    form, 'q.json'
  )
  path.write_bytes({
    'array': lambda: json.dumps(records).encode(),
    'indented': lambda: json.dumps(records, indent=2).encode(),
    'gz': lambda: gzip.compress(data),
    'zst': lambda: zstandard.compress(data),
    'bom': lambda: b'\xef\xbb\xbf' + data.replace(b'3}', b'7' * 5000 + b'}'),
  }[form]())  # fmt: skip
  assert outcome(str(path)) == outcome(plain)


def test_fields_of_another_form_are_named(tmp_path):
  path = write(tmp_path / 'q.jsonl', [{'query': 'x', 'docs': []}])
  with pytest.raises(UserError, match="no 'question'; it has query, docs"):
    build(questions=path)


def test_some_without_gold_is_said(tmp_path):
  records = [record(i) for i in range(20)]
  for r in records[:10]:
    del r['ctxs'][0]['gold']
  source = build(questions=write(tmp_path / 'q.jsonl', records))
  assert any('not measured' in line for line in source.skipped)


def test_nothing_usable_is_the_users_mistake(tmp_path):
  path = write(tmp_path / 'q.jsonl', [record(1, answers=None)] * 2)
  with pytest.raises(UserError, match=r"2 x no 'answers'.*first in line 1"):
    build(questions=path)
  with pytest.raises(UserError, match='cannot be read'):
    build(questions=str(tmp_path / 'nowhere.jsonl'))


def test_without_gold_marks_the_retrievers_order_is_kept(tmp_path):
  ctxs = [{'title': '', 'text': f'passage {i}'} for i in range(5)]
  records = [record(i, ctxs=ctxs) for i in range(9)]
  path = write(tmp_path / 'q.jsonl', records)
  source = build(questions=path)
  assert source.kinds == ('none', 'given', 'bm25', 'shuffled')
  batch = source.batch(0, 0, range(4))
  for row in range(4):
    assert context_text(batch, row) == [f'.passage {i}\n' for i in range(3)]
  with pytest.raises(UserError, match='gold'):
    source.examples('gold', 2)


def test_long_questions_keep_their_end_and_long_passages_their_start(tmp_path):
  turns = [
    {'speaker': 'user', 'text': 'x' * 200},
    {'speaker': 'system', 'text': 'I see.'},
    {'speaker': 'user', 'text': 'And {title}?'},
  ]
  gold = {'title': 'T', 'text': 'y' * 500, 'has_answer': True}
  records = [record(i, turns=turns, ctxs=[gold]) for i in range(2)]
  for r in records:
    del r['question']
  records[1]['document'] = 'another'
  path = write(tmp_path / 'q.jsonl', records)
  source = build(questions=path, question_length=40)
  batch = source.examples('gold', 1)
  assert batch['prefix_len_B'][0] == 40
  text = TOKENIZER.decode(batch['prefix_BQ'][0, 1:])
  assert text == 'Q: x\nsystem: I see.\nuser: And {title}?\n'
  assert context_text(batch, 0) == ['T.' + 'y' * 126]
  assert any('question cut' in line for line in source.skipped)


def test_what_all_are_asked_leaves_them_apart(tmp_path):
  """An instruction is no question of its own; with its answer it is."""
  records = [record(i, question='Summarise this.') for i in range(20)]
  records.append(record(20, question='summarise this', answers=['3.']))
  path = write(tmp_path / 'q.jsonl', records)
  train, heldout = (
    {q.answers[0].strip('.') for q in build(split, questions=path).questions}
    for split in ('train', 'heldout')
  )
  assert not train & heldout and len(train | heldout) == 20


@pytest.mark.parametrize('name', ['isGold', 'Has Answer'])
def test_names_like_a_flag_in_any_spelling(tmp_path, name):
  records = [record(i, ctxs=[{'text': str(i), name: True}]) for i in range(9)]
  source = build(questions=write(tmp_path / 'q.jsonl', records))
  assert any(name in line for line in source.skipped)


def test_every_flag_of_a_passage_is_one_and_the_message_is_short(tmp_path):
  ctx = {'text': 'x', 'gold': True, 'has_answer': 'no' * 5000}
  path = write(tmp_path / 'q.jsonl', [record(1), record(2, ctxs=[ctx])])
  with pytest.raises(UserError, match="record 2: has_answer is 'nono") as e:
    build(questions=path)
  assert len(str(e.value)) < 200


@pytest.mark.parametrize('pack', [bytes, zstandard.compress])
def test_blank_lines_before_records_count_for_their_numbers(tmp_path, pack):
  path = tmp_path / ('q.jsonl' if pack is bytes else 'q.jsonl.zst')
  path.write_bytes(pack(b'\n\n[\n{"a": 1}\n]\n'))
  assert list(text_lib.json_values(str(path))) == [(1, {'a': 1})]
  path.write_bytes(pack(b'\n\n{"a": 1}\n'))
  assert list(text_lib.json_values(str(path))) == [(3, {'a': 1})]
  path.write_bytes(pack(b'[1]\n{"a": 1}\n'))
  assert list(text_lib.json_values(str(path))) == [(1, [1]), (2, {'a': 1})]
