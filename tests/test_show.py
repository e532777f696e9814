"""`--mode=data` prints what the batches hold, readable without colours."""

import dataclasses
import io
import os

import numpy as np
import pytest
from rich.console import Console

from refrag_jax import show
from refrag_jax.config import schema as config_lib
from refrag_jax.data import tokenizers
from refrag_jax.main import main

TOKENIZER = tokenizers.load('bytes')
TINY = os.path.join(os.path.dirname(__file__), '..', 'configs', 'tiny.py')


def ids(text, length):
  padded = np.full(length, TOKENIZER.pad_id, np.int32)
  padded[: len(text)] = TOKENIZER.encode(text)[0]
  return padded


def row(context, output, given=0, prefix=''):
  """A row with k = 4, in six chunks."""
  chunks = [context[i : i + 4] for i in range(0, len(context), 4)]
  chunks += [''] * (6 - len(chunks))
  output_O = ids(output + '?', 12)
  output_O[len(output)] = TOKENIZER.eos_id
  place = np.arange(12)
  return {
    'prefix_BQ': np.concatenate([[TOKENIZER.bos_id], ids(prefix, 9)]),
    'prefix_len_B': 1 + len(prefix),
    'chunks_BCK': np.stack([ids(chunk, 4) for chunk in chunks]),
    'chunk_len_BC': np.array([len(chunk) for chunk in chunks]),
    'output_BO': output_O,
    'output_len_B': len(output) + 1,
    'loss_mask_BO': (place >= given) & (place <= len(output)),
  }


def test_an_example_in_plain_text():
  expand_C = np.array([False, True, False, False, False, False])
  text = show.example(row('one two\nsix', 'A: 7', 3, 'Q?'), expand_C, TOKENIZER)
  assert text.plain == 'BOS Q?|one |+two\N{PILCROW SIGN}|six| A: [7 EOS]'


def test_passages_begin_lines_and_escape_sequences_are_not_obeyed():
  example = row('abcdef\x1b[2J', 'x')
  example['chunk_len_BC'][1:2] = 0  # the first passage is one chunk of two
  text = show.example(example, np.zeros(6, bool), TOKENIZER, passage=2)
  assert text.plain == 'BOS \n  |abcd|\n  |2J|\n  [x EOS]'
  assert '\x1b' not in show.example(row('\x1b[2J', 'x'), np.zeros(6), TOKENIZER)


def test_neighbouring_chunks_and_targets_differ_in_colour():
  out = io.StringIO()
  console = Console(file=out, force_terminal=True, color_system='standard')
  console.print(show.example(row('aaaabbbb', 'cc'), np.zeros(6), TOKENIZER))
  styles = {
    text: piece.partition('m')[0]
    for piece in out.getvalue().split('\x1b[')
    for text in ('aaaa', 'bbbb', 'cc')
    if piece.endswith(text)
  }
  assert len(set(styles.values())) == 3


@pytest.fixture(scope='module')
def printed(tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp('show'))
  out = io.StringIO()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('sys.stdout', out)
    config = f'--config={TINY}:smoke'
    assert main([config, f'--workdir={workdir}', '--mode=data']) == 0
  return out.getvalue(), workdir


def test_every_stage_is_shown_with_corpus_and_curriculum(printed):
  text, workdir = printed
  for stage in ('lm', 'reconstruct', 'cpt', 'mixed', 'grpo', 'sft'):
    assert f'\u2500 {stage} \u2500' in text
  assert 'held out' in text
  assert 'chunks x tokens' in text
  assert 'CLS' in text
  assert 'SEP' in text
  assert 'cpt_trained \u2500' not in text  # fed as its stage
  assert '\x1b' not in text  # not a terminal
  mixed = text.partition('\u2500 mixed \u2500')[2].partition('\u2500\u2500')[2]
  assert '|+' in mixed
  for stage in ('reconstruct', 'cpt'):
    path = os.path.join(workdir, f'curriculum_{stage}.svg')
    with open(path, encoding='utf-8') as file:
      assert '<svg' in file.read()
  assert not [name for name in os.listdir(workdir) if name.endswith('.tmp')]


def test_as_many_chunks_are_expanded_as_the_stage_expands():
  fractions = (0.125, 0.25)
  stage = dataclasses.make_dataclass('S', ['expand_fractions'])(fractions)
  config = dataclasses.make_dataclass('C', ['stage', 'seed'])
  expand_BC = show._expand(
    config({'mixed': stage}, 0), 'mixed', np.full((3, 8), 4)
  )
  assert (expand_BC.sum(axis=1) == config_lib.expanded_chunks(0.25, 8)).all()
