"""Question files as others publish them, several at once, in a chat."""

import json

import numpy as np
import pytest
import questions as cases

from refrag_jax.data import tokenizers
from refrag_jax.data.questions import examples, forms, records
from refrag_jax.errors import UserError

TOKENIZER = tokenizers.load('bytes')
SQUAD = {
  'title': 'T', 'context': 'The sky is blue.',
  'qas': [
    {'id': 1, 'question': 'Colour?', 'answers': ['blue', 'blue', 'Blue']},
    {'id': 2, 'question': 'What?', 'answers': [{'text': 'sky', 'start': 4}]},
  ],
}  # fmt: skip
HOTPOT = {
  'question': 'Which is older?', 'answer': 'A',
  'supporting_facts': [['A', 0], ['B', 1]],
  'context': [
    ['C', ['One.', ' Two.']], ['A', ['Made in 1.', 'Then.']],
    ['B', ['Here.', 'In 2.']],
  ],
}  # fmt: skip
MUSIQUE = {
  'id': 'm1', 'question': 'Seat?', 'answer': 'S', 'answer_aliases': ['Ss'],
  'paragraphs': [
    {'title': 'x', 'paragraph_text': 'no', 'is_supporting': False},
    {'title': 'y', 'paragraph_text': 'yes', 'is_supporting': True},
    {'title': 'z', 'paragraph_text': 'too', 'is_supporting': True},
  ],
}  # fmt: skip
CHOICE = {
  'passage': 'Ann ran.', 'question': 'Why?',
  'options': 'A. for fun\nB. to win\nC. (late)', 'answer': 'B. to win',
}  # fmt: skip
BOOLQ = {'question': 'is it', 'title': 'E', 'passage': 'P.', 'answer': 'True'}
SUMMARY = {'text': 'a b c ' * 40, 'summary': 'abc', 'title': 'S'}
EXPECTED = [
  (SQUAD, [
    ('Colour?', ('blue', 'Blue'), [('T', 'The sky is blue.')], (0,)),
    ('What?', ('sky',), [('T', 'The sky is blue.')], (0,)),
  ]),
  (HOTPOT, [('Which is older?', ('A',), [
    ('C', 'One. Two.'), ('A', 'Made in 1. Then.'), ('B', 'Here. In 2.'),
  ], (1, 2))]),
  (MUSIQUE, [('Seat?', ('S', 'Ss'),
              [('x', 'no'), ('y', 'yes'), ('z', 'too')], (1, 2))]),
  (CHOICE, [('Why?\nA. for fun\nB. to win\nC. (late)', ('B',),
             [('', 'Ann ran.')], (0,))]),
  (BOOLQ, [('is it', ('True',), [('E', 'P.')], (0,))]),
  (SUMMARY, [(forms.SUMMARISE, ('abc',), [('S', 'a b c ' * 40)], (0,))]),
]  # fmt: skip


def read(path):
  skipped = records.Skipped()
  config = cases.make_config()
  return list(records.read(config, path, skipped)), skipped.lines()


def dpr(number, **fields):
  ctxs = [{'text': f'gold {number}', 'gold': True}, {'text': f'no {number}'}]
  own = {'question': f'Number {number}?', 'answers': [str(number)]}
  return own | {'ctxs': ctxs} | fields


def file_of(path, values):
  path.write_text('\n'.join(map(json.dumps, values)) + '\n')
  return str(path)


@pytest.mark.parametrize(('value', 'expected'), EXPECTED)
def test_each_form_is_read(tmp_path, value, expected):
  found, lines = read(file_of(tmp_path / 'q.jsonl', [value]))
  assert [
    (r.question, r.answers, list(r.passages), r.gold) for r in found
  ] == expected
  assert lines == []
  assert [r.whole for r in found] == [value is SUMMARY] * len(found)


@pytest.mark.parametrize('answer', ['B', 'B. to win', 'to win', 1])
@pytest.mark.parametrize(
  'options',
  ['A) for fun\nB) to win', ['for fun', 'to win'], ['A. for fun', 'B. to win']],
)
def test_an_answer_is_a_letter_a_text_or_a_number(tmp_path, answer, options):
  value = CHOICE | {'options': options, 'answer': answer}
  (found,), _ = read(file_of(tmp_path / 'q.jsonl', [value]))
  assert found.answers == ('B',) and found.choices == ('A', 'B')
  assert found.question == 'Why?\nA. for fun\nB. to win'


def test_what_is_not_in_the_files_form_is_counted(tmp_path):
  values = [
    SQUAD,
    BOOLQ,
    SQUAD | {'qas': 7},
    SQUAD,
    {'context': 'x', 'qas': [{'question': 'y'}]},
  ]
  found, lines = read(file_of(tmp_path / 'q.jsonl', values))
  assert len(found) == 2
  assert lines == [
    '1 x a record of the form one passage among SQuAD (first in line 2)',
    '1 x not in the form SQuAD (first in line 3)',
    '2 x id that another record has (first in line 4)',
    "1 x no 'answers' (a list of texts); it has question, ctxs (first in line"
    ' 5)',
  ]
  wrong = [dpr(1), dpr(2, choices=['x', 'y'])]
  found, lines = read(file_of(tmp_path / 'd.jsonl', wrong))
  assert len(found) == 1 and "'choices'" in lines[0]


@pytest.mark.parametrize(
  ('options', 'answer', 'shown', 'right'),
  [
    # Letters are the options' own where not all have them in order.
    (['E. coli', 'C. elegans'], 'C. elegans', ['E. coli', 'C. elegans'], 'B'),
    (['B. x', 'A. y'], 'A. y', ['B. x', 'A. y'], 'B'),
    ('A. x\n\nB. y', 'B', ['x', 'y'], 'B'),
    ({'A': 'x', 'B': 'y'}, 'B', ['x', 'y'], 'B'),
    ({'text': ['x', 'y'], 'label': ['1', '2']}, '2', ['x', 'y'], 'B'),
    (['B', 'A'], 'A', ['B', 'A'], 'B'),
    (['x', 'y'], '(B)', ['x', 'y'], 'B'),
  ],
)
def test_options_as_they_come(tmp_path, options, answer, shown, right):
  value = CHOICE | {'options': options, 'answer': answer}
  (found,), _ = read(file_of(tmp_path / 'q.jsonl', [value]))
  listed = '\n'.join(f'{x}. {o}' for x, o in zip('AB', shown, strict=True))
  assert found.question == f'Why?\n{listed}'
  assert found.answers == (right,)


@pytest.mark.parametrize(
  ('change', 'reason'),
  [
    ({'answer': -1}, "an 'answer' that names none of the options"),
    ({'answer': True}, "an 'answer' that names none of the options"),
    ({'answer': 7}, "an 'answer' that names none of the options"),
    ({'answer': 'D'}, "an 'answer' that names none of the options"),
    ({'options': ['x']}, 'options that are fewer than 2 or more than 26'),
    ({'options': ['x'] * 30}, 'options that are fewer than 2 or more than 26'),
    ({'options': [1, 2], 'answer': 1}, 'an option that is no text'),
    ({'options': 7}, 'not in the form multiple choice'),
  ],
)
def test_options_that_cannot_be_used(tmp_path, change, reason):
  values = [CHOICE, CHOICE | change]
  found, lines = read(file_of(tmp_path / 'q.jsonl', values))
  assert len(found) == 1
  assert lines == [f'1 x {reason} (first in line 2)']


def test_files_as_they_are_downloaded(tmp_path):
  """Of SQuAD, MRQA, and as the Hugging Face hub has them."""
  whole = {'version': '1.1', 'data': [{'title': 'T', 'paragraphs': [SQUAD]}]}
  hub_squad = {
    'id': 'a', 'title': 'T', 'context': 'The sky is blue.', 'question': 'What?',
    'answers': {'text': ['sky'], 'answer_start': [4]},
  }  # fmt: skip
  hub_hotpot = HOTPOT | {
    'supporting_facts': {'title': ['A', 'B'], 'sent_id': [0, 1]},
    'context': {'title': [t for t, _ in HOTPOT['context']],
                'sentences': [s for _, s in HOTPOT['context']]},
  }  # fmt: skip
  hub_arc = {
    'question': 'Why?', 'answerKey': 'B', 'passage': 'Ann ran.',
    'choices': {'text': ['for fun', 'to win', '(late)'], 'label': list('ABC')},
  }  # fmt: skip
  for values, like in (
    ([whole], [SQUAD]),
    ([{'header': {'dataset': 'SQuAD'}}, SQUAD], [SQUAD]),
    ([hub_squad], [SQUAD | {'qas': SQUAD['qas'][1:]}]),
    ([hub_hotpot], [HOTPOT]),
    ([hub_arc], [CHOICE]),
    ([BOOLQ | {'answer': True}], [BOOLQ | {'answer': 'yes'}]),
  ):
    found, lines = read(file_of(tmp_path / 'a.jsonl', values))
    wanted, _ = read(file_of(tmp_path / 'b.jsonl', like))
    assert lines == []
    strip = lambda rs: [r._replace(line=0) for r in rs]
    assert strip(found) == strip(wanted)


def test_a_first_record_that_says_nothing_is_not_the_files_form(tmp_path):
  values = [BOOLQ | {'passage': None}, BOOLQ, BOOLQ | {'question': 'or not'}]
  found, lines = read(file_of(tmp_path / 'q.jsonl', values))
  assert len(found) == 2 and len(lines) == 1
  mixed = [CHOICE, {k: x for k, x in CHOICE.items() if k != 'options'}
           | {'choices': ['a', 'b'], 'answer': 0}]  # fmt: skip
  assert len(read(file_of(tmp_path / 'c.jsonl', mixed))[0]) == 2


def test_a_text_is_no_list_of_letters(tmp_path):
  bad = {'id': 3, 'question': 'Where?', 'answers': 'Paris'}
  found, lines = read(
    file_of(tmp_path / 'q.jsonl', [SQUAD | {'qas': [*SQUAD['qas'], bad]}])
  )
  assert len(found) == 2 and "no 'answers'" in lines[0]
  (one,), _ = read(
    file_of(tmp_path / 'm.jsonl', [MUSIQUE | {'answer_aliases': 'Sss'}])
  )
  assert one.answers == ('S', 'Sss')


def test_what_supports_an_answer_has_to_be_there(tmp_path):
  values = [HOTPOT, HOTPOT | {'supporting_facts': [['A', 0], ['Z', 0]]}]
  found, lines = read(file_of(tmp_path / 'q.jsonl', values))
  assert len(found) == 1
  assert lines == [
    '1 x a passage that supports the answer is not there (first in line 2)'
  ]
  path = file_of(tmp_path / 'one.jsonl', [HOTPOT])
  source = cases.build('all', questions=path, num_passages=1)
  assert source.skipped == (
    '1 x gold passages cut to data.num_passages (first in line 1)',
  )


def test_two_files_share_no_question_over_the_split(tmp_path):
  """Nor a gold passage; each file read by itself has the same sides."""
  values = [dpr(i) for i in range(60)]
  asked = [dpr(i, ctxs=[{'text': f'other {i}', 'gold': True}])
           for i in range(60)]  # fmt: skip
  told = [dpr(i, question=f'Other {i}?') for i in range(60)]
  paths = tuple(
    file_of(tmp_path / f'{name}.jsonl', of)
    for name, of in (('a', values), ('b', asked), ('c', told))
  )
  sides = {
    split: cases.build(split, questions=paths) for split in ('train', 'heldout')
  }
  for part in (
    lambda s: {q.question for q in s.questions},
    lambda s: {s.passages[q.gold[0]] for q in s.questions},
  ):
    train, held = map(part, (sides['train'], sides['heldout']))
    assert train and held and not train & held
  alone = cases.rag.build(
    cases.make_config(questions=paths), TOKENIZER, TOKENIZER, 'heldout',
    paths[1:2],
  )  # fmt: skip
  second = {q.question for q in sides['heldout'].questions if q.source == 1}
  assert {q.question for q in alone.questions} == second


def test_a_question_that_many_ask_joins_nobody(tmp_path):
  """With one of its own beside it, and with few answers to it."""
  values = [{'text': f'text {i}', 'summary': f'sum {i}'} for i in range(100)]
  values.append({'text': 'own', 'summary': 'own', 'question': 'TLDR?'})
  labels = [
    dpr(i, question='Good or bad?', answers=[('good', 'bad')[i % 2]])
    for i in range(100)
  ]
  for records_ in (values, labels):
    path = file_of(tmp_path / 'q.jsonl', records_)
    train, heldout = (
      cases.build(split, questions=path).questions
      for split in ('train', 'heldout')
    )
    assert 10 < len(heldout) < 35 and len(train) > 60
    if records_ is labels:
      assert {q.answers[0] for q in heldout} == {'good', 'bad'}


def test_marked_passages_are_no_distractors(tmp_path):
  ctxs = [{'text': f'yes {i}', 'gold': True} for i in range(4)]
  ctxs += [{'text': f'no {i}'} for i in range(4)]
  path = file_of(tmp_path / 'q.jsonl', [dpr(1, ctxs=ctxs)])
  source = cases.build('all', questions=path)
  for kind, right in (('gold_distractors', 1), ('gold_missing', 0)):
    texts = cases.context_text(source.examples(kind, 1), 0)
    assert sum('yes' in t for t in texts) == right


def test_a_title_may_hold_the_answer(tmp_path):
  values = [
    {'title': f'{w}', 'context': f'the long river number {i}',
     'qas': [{'question': f'Which long river {i}?', 'answers': [w]}]}
    for i, w in enumerate(['Rhine', 'Rhine', 'Elbe', 'Oder', 'Main', 'Ems'])
  ]  # fmt: skip
  path = file_of(tmp_path / 'q.jsonl', values)
  source = cases.build('all', questions=path)
  batch = source.examples('gold_distractors', 6)
  for row, number in enumerate(batch['id_B']):
    question = source.questions[number]
    gold = source.passage(question.gold[0])
    for text in cases.context_text(batch, row):
      assert text == gold or question.answers[0] not in text


def test_what_is_asked_in_training_is_not_asked_of_another_file(tmp_path):
  path = file_of(tmp_path / 'a.jsonl', [dpr(i) for i in range(40)])
  trained = {q.question for q in cases.build('train', questions=path).questions}
  copied = [dpr(i, id=f'copy{i}') for i in range(40)] + [dpr(99)]
  other = file_of(tmp_path / 'b.jsonl', copied)
  source = examples.build(
    cases.make_config(questions=path), TOKENIZER, TOKENIZER, 'all', (other,)
  )
  left = {q.question for q in source.questions}
  assert 0 < len(trained) < 40 and len(left) == 41 - len(trained)
  assert not left & trained
  assert source.skipped[0].startswith(f'{len(trained)} x asked in training')


def test_options_that_do_not_fit_are_left_out(tmp_path):
  long = CHOICE | {'question': 'x' * 90}
  path = file_of(tmp_path / 'q.jsonl', [CHOICE, long])
  source = cases.build('all', questions=path)
  assert len(source.questions) == 1
  assert source.skipped == (
    '1 x options longer than data.question_length (first in line 2)',
  )
  path = file_of(
    tmp_path / 'd.jsonl',
    [dpr(1), dpr(2, answers=['yes'], choices=['yes', 'no, since ' * 9])],
  )
  source = cases.build('all', questions=path)
  assert len(source.questions) == 1
  assert 'answer longer than data.answer_length' in source.skipped[0]


def test_all_gold_passages_are_shown_in_their_order(tmp_path):
  values = [HOTPOT | {'question': f'{i}?', 'answer': str(i)} for i in range(9)]
  for i, value in enumerate(values):
    value['context'] = [[t, [f'{s} {i}' for s in x]]
                        for t, x in HOTPOT['context']]  # fmt: skip
  path = file_of(tmp_path / 'q.jsonl', values)
  source = cases.build('train', questions=path)
  places, batch = set(), source.examples('gold_distractors', 6)
  for row in range(len(batch['id_B'])):
    texts = cases.context_text(batch, row)
    own = [t for t in texts if t[0] in 'AB']
    assert [t[0] for t in own] == ['A', 'B']
    places.add(tuple(texts.index(t) for t in own))
  assert len(places) > 1
  alone = cases.build('train', questions=path, num_passages=1)
  assert [t[0] for t in cases.context_text(alone.examples('gold', 1), 0)] == [
    'A'
  ]


def test_who_brings_no_distractors_gets_near_ones(tmp_path):
  """From the file's other passages, none that holds the answer."""
  values = [
    {'title': 'T', 'context': f'The river {name} is {n} miles long.',
     'qas': [{'question': f'How long is the river {name}?',
              'answers': [str(n)]}]}
    for n, name in enumerate('abcdefghijklmnop', 11)
  ]  # fmt: skip
  path = file_of(tmp_path / 'q.jsonl', values)
  source = cases.build('train', questions=path)
  batch = source.examples('gold_distractors', 5)
  for row, number in enumerate(batch['id_B']):
    question = source.questions[number]
    texts = cases.context_text(batch, row)
    gold = source.passage(question.gold[0])
    assert len(set(texts)) == 3 and gold in texts
    assert all(question.answers[0] not in t for t in texts if t != gold)


def test_a_text_to_summarise_is_read_in_order(tmp_path):
  text = ' '.join(f'word{i}' for i in range(60))
  values = [{'text': text + f' end {i}', 'summary': f'sum {i}'}
            for i in range(4)]  # fmt: skip
  path = file_of(tmp_path / 'q.jsonl', values)
  for kind in ('gold', 'gold_distractors', 'bm25'):
    source = cases.build('train', questions=path, num_passages=4)
    batch = source.examples(kind, 1)
    ids = batch['chunks_BCK'][0][
      np.arange(4) < batch['chunk_len_BC'][0][:, None]
    ]
    written = TOKENIZER.decode(ids).replace('\n', '')
    assert written.replace('.', '') == text + written[-6:]
  short = cases.build('train', questions=path, num_passages=2)
  assert any('text cut to data.num_passages' in s for s in short.skipped)


def test_a_conversation_is_compressed_but_for_its_last_turn(tmp_path):
  turns = [
    {'speaker': 'user', 'text': 'First I said much. ' * 9},
    {'speaker': 'agent', 'text': 'And I replied.'},
    {'speaker': 'user', 'text': 'And now?'},
  ]
  values = [dpr(i, turns=turns) for i in range(3)]
  for value in values:
    del value['question']
  path = file_of(tmp_path / 'q.jsonl', values)
  plain = cases.build('train', questions=path).examples('gold', 1)
  assert plain['chunk_len_BC'].shape[1] == 96
  source = cases.build('train', questions=path, history_chunks=8)
  batch = source.examples('gold', 1)
  assert batch['chunk_len_BC'].shape[1] == 8 + 96
  prefix = batch['prefix_BQ'][0, 1 : batch['prefix_len_B'][0]]
  assert TOKENIZER.decode(prefix) == 'Q: user: And now?\n'
  ids = batch['chunks_BCK'][0, :8].reshape(-1)
  whole = f'user: {turns[0]["text"]}\nagent: And I replied.'
  tail = TOKENIZER.decode(ids[: batch['chunk_len_BC'][0, :8].sum()])
  assert len(tail) > 28 and whole.endswith(tail)
  np.testing.assert_array_equal(batch['chunks_BCK'][:, 8:], plain['chunks_BCK'])


def test_files_are_drawn_by_their_weights(tmp_path):
  paths = (
    file_of(tmp_path / 'a.jsonl', [dpr(i) for i in range(20)]),
    file_of(tmp_path / 'b.jsonl', [dpr(i) for i in range(20, 400)]),
  )
  source = cases.build('train', questions=paths, question_weights=(3.0, 1.0))
  batch = source.batch(0, 0, range(400))
  first = [source.questions[n].source == 0 for n in batch['id_B']]
  assert 0.68 < np.mean(first) < 0.82
  equal = cases.build('train', questions=paths).batch(0, 0, range(400))
  first = [source.questions[n].source == 0 for n in equal['id_B']]
  assert 0.42 < np.mean(first) < 0.58
  empty = file_of(tmp_path / 'c.jsonl', [{}])
  with pytest.raises(UserError, match=r'c\.jsonl: no usable'):
    cases.build('train', questions=(*paths, empty))


def test_the_question_may_stand_behind_the_passages(tmp_path):
  path = file_of(tmp_path / 'q.jsonl', [dpr(i) for i in (5, 12345)])
  source = cases.build(
    'all',
    questions=path,
    question_template='Read.\n',
    answer_template='Q: {question}\nA: ',
  )
  batch = source.examples('gold', 2)
  assert batch['output_BO'].shape[1] == 88 + 32
  for row, number in enumerate(batch['id_B']):
    question = source.questions[number]
    prefix = batch['prefix_BQ'][row, 1 : batch['prefix_len_B'][row]]
    assert TOKENIZER.decode(prefix) == 'Read.\n'
    length = batch['output_len_B'][row]
    given = batch['loss_mask_BO'][row].argmax()
    output = batch['output_BO'][row]
    assert TOKENIZER.decode(output[:given]) == f'Q: {question.question}\nA: '
    assert TOKENIZER.decode(output[given : length - 1]) == question.answers[0]
    assert batch['loss_mask_BO'][row].sum() == length - given
  assert source.prompt_slots == 88


def test_options_are_outputs_of_their_own(tmp_path):
  values = [CHOICE | {'question': f'{i}?'} for i in range(3)]
  source = cases.build('all', questions=file_of(tmp_path / 'q', values))
  batch = source.examples('gold', 3)
  row_X, options = source.options(batch)
  assert row_X.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
  learned = [
    TOKENIZER.decode(options['output_BO'][x][options['loss_mask_BO'][x]][:-1])
    for x in range(9)
  ]
  assert learned == ['A', 'B', 'C'] * 3
  np.testing.assert_array_equal(
    options['output_BO'][[1, 4, 7]], batch['output_BO']
  )


TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
  '{% endfor %}{% if add_generation_prompt %}</s>[assistant]{% endif %}'
)


@pytest.fixture
def chatty(tmp_path):
  """A tokenizer of bytes with special tokens, and a chat template."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers

  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {c: i for i, c in enumerate(['<s>', '</s>', *letters])}
  tokenizer = Tokenizer(models.BPE(vocab, []))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(['<s>', '</s>'])
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  names = {'bos_token': '<s>', 'eos_token': '</s>'}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(names))
  (tmp_path / 'chat_template.jinja').write_text(TEMPLATE)
  return tmp_path


def test_a_chat_template_stands_around(chatty, tmp_path):
  tokenizer = tokenizers.load(str(chatty))
  begin, end = tokenizer.chat_frame()
  assert begin[0] == tokenizer.bos_id and end[0] == tokenizer.eos_id
  path = file_of(tmp_path / 'q.jsonl', [dpr(1, question='</s>[assistant]?')])
  source = cases.build(
    'all', tokenizer, questions=path, chat=True, answer_length=60
  )
  batch = source.examples('gold', 1)
  prefix = batch['prefix_BQ'][0, : batch['prefix_len_B'][0]].tolist()
  # What a user writes is text, whatever it spells.
  assert prefix.count(tokenizer.bos_id) == 1
  assert tokenizer.eos_id not in prefix
  assert tokenizer.decode(prefix) == '[user]Q: </s>[assistant]?\n'
  given = batch['loss_mask_BO'][0].argmax()
  prompt = batch['output_BO'][0, :given].tolist()
  assert prompt.count(tokenizer.eos_id) == 1
  assert tokenizer.decode(prompt) == 'A: [assistant]'


def test_no_chat_template_or_one_that_will_not_do(chatty, tmp_path):
  path = file_of(tmp_path / 'q.jsonl', [dpr(1)])
  with pytest.raises(UserError, match='has no chat template'):
    cases.build('all', questions=path, chat=True)
  for template, message in (
    ("{{ messages[0]['content'] }}" * 2, 'repeats'),
    ('{{ raise_exception("no users") }}', 'no users'),
  ):
    (chatty / 'chat_template.jinja').write_text(template)
    tokenizers.load.cache_clear()
    with pytest.raises(UserError, match=message):
      tokenizers.load(str(chatty)).chat_frame()


def test_passages_that_are_cut_are_counted(tmp_path):
  ctxs = [{'text': 'x' * 300, 'gold': True}, {'text': 'short'}]
  path = file_of(tmp_path / 'q.jsonl', [dpr(1, ctxs=ctxs)])
  source = cases.build('all', questions=path)
  assert source.skipped == ('1 of 2 passages cut to data.passage_chunks',)


@pytest.mark.parametrize('field', ['question_length', 'answer_length'])
def test_templates_that_leave_no_room(tmp_path, field):
  path = file_of(tmp_path / 'q.jsonl', [dpr(1)])
  with pytest.raises(UserError, match=f'{field} is 4, which is filled'):
    cases.build('all', questions=path, **{field: 4})
