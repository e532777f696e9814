"""The report of a made-up run: whole, partial, honest, self-contained."""

import html
import json
import re
import xml.etree.ElementTree

import numpy as np
import pytest
from well_formed import parsed

from refrag_jax.evals import EVALS
from refrag_jax.report import figures, page, tables
from refrag_jax.report import run as report
from refrag_jax.runtime import files


def stat(mean, se=0.012, n=120):
  return {'mean': mean, 'se': se, 'n': n}


def row(means, **vs):
  """A row of P8, P16 and its differences, all of one standard error."""
  lengths = ('P8', 'P16')
  return {
    **{
      x: stat(m) | {'bits_per_byte': m / 0.693} for x, m in zip(lengths, means)
    },
    'vs': {
      other: {x: stat(d) for x, d in zip(lengths, diffs)}
      for other, diffs in vs.items()
    },
  }


def fake_results():
  stages = ('lm', 'reconstruct', 'cpt', 'mixed', 'grpo', 'sft', 'cpt_trained')
  selection = []
  for tail in (False, True):
    selection.append(
      {
        'selector': 'none',
        'p': 0.0,
        'rate': 8.0,
        'nll': stat(1.71 - 0.15 * tail),
        'tail_expanded': tail,
      }
    )
    for i, name in enumerate(figures.SELECTORS):
      for p in (0.125, 0.25, 0.5) if name != 'oracle' else (0.125,):
        gain = (0.3 - 0.05 * i) * p * (0.2 if tail else 1.0)
        selection.append({
          'selector': name, 'p': p, 'rate': 8 / (1 - p + 8 * p),
          'nll': stat(1.71 - gain - 0.15 * tail), 'tail_expanded': tail,
          'vs_random': stat(-gain / 2, 0.004),
          'vs_last': stat(0.006 - 0.002 * i, 0.003),
        })  # fmt: skip
  return {
    'config': 'tiny',
    'git': '0123abc',
    'versions': {'python': '3.11.7', 'jax': '0.10.2', 'flax': '0.12.8'},
    'stages': {
      stage: {
        'steps': 400, 'heldout_before': stat(2.5 - 0.1 * i, 0.04, 32),
        'heldout_after': stat(1.5 - 0.1 * i, 0.03, 32),
        'paired_gain': stat(1.0 - 0.3 * i, 0.02, 32), 'wall_s': 61.25,
        'compile_s': 9.5, 'tokens_per_s': 12345.6, 'trainable_params': 841_216,
        'frozen_params': 0 if stage == 'lm' else 640_000,
        'frozen_unchanged': stage != 'sft',
        'encoder_cut': 12 * (stage == 'cpt'), 'chunks': 4096,
        'measures': 'reward' if stage == 'grpo' else 'loss',
      } for i, stage in enumerate(stages)
    },
    'evals': {
      'log_perplexity': {'heldout': {
        'no_context': row((2.31, 2.2)),
        'no_context_trained': row((1.90, 1.85)),
        'full_context': row((2.05, 1.95)),
        'full_context_trained': row((1.5, 1.45), no_context_trained=(-.4, -.4)),
        'last_k_trained': row((1.56, 1.6), no_context_trained=(-.34, -.25)),
        'refrag_k8': row(
          (1.71, 1.76), no_context_trained=(-0.19, -0.09),
          refrag_k8_shuffled=(-0.43, -0.020), last_k_trained=(0.15, 0.16),
        ),
        'refrag_k8_shuffled': row((2.14, 1.78), no_context_trained=(.24, -.07)),
        'refrag_k8_rl_p0.25': row((1.62, 1.68), no_context_trained=(-.28, -.17),
                                  refrag_k8_shuffled=(-.52, -.1)),
      }},
      'reconstruction': {'heldout': {
        'refrag_k8': row((0.9, 1.9), refrag_k8_shuffled=(-0.93, -0.08)),
        'refrag_k8_shuffled': row((1.83, 1.98)),
      }},
      'selection': {'heldout': selection},
      'qa': {'stdlib': {
        'verdict': 'uninformative',
        'no_passage': {'gold_nll': stat(1.2), 'em': stat(0.1), 'f1': stat(0.2)},
        'gold': {'gold_nll': stat(1.1), 'em': stat(0.125), 'f1': stat(0.25),
                 'vs': {'no_passage': {'gold_nll': stat(-0.1),
                                       'em': stat(-0.05)}}},
      }},
    },
  }  # fmt: skip


def fake_run(workdir):
  """Everything that a run leaves for its report."""
  rng = np.random.default_rng(0)
  numbers = fake_results()
  files.write_json(workdir / 'results.json', numbers)
  files.write_json(workdir / 'config.json', {
    'config': {'name': 'tiny', 'seed': 0, 'model': {'chunk_size': 8}},
    'sources': {'seed': 'command line', 'model.chunk_size': 'configs/tiny.py'},
    'command_line': ['python', '-m', 'refrag_jax.main', '--config=tiny.py'],
  })  # fmt: skip
  lines = []
  for stage in numbers['stages']:
    name = 'reward' if stage == 'grpo' else 'loss'
    sign = -1 if stage == 'grpo' else 1
    for step in range(0, 400, 5):
      value = sign * (1.4 + np.exp(-step / 80) + 0.08 * rng.normal())
      lines.append(
        {'stage': stage, 'step': step, 'split': 'train', name: value}
      )
    for step in (0, 200, 400):
      value = sign * (1.45 + np.exp(-step / 80))
      lines.append(
        {'stage': stage, 'step': step, 'split': 'heldout', name: value}
      )
  text = ''.join(map(files.json_line, lines))
  (workdir / 'metrics.jsonl').write_text(text)
  sample = {'source': 'the <b>context</b>', 'output': 'the \x00 co', 'nll': 1.2}
  (workdir / 'samples.jsonl').write_text(''.join(
    files.json_line({'stage': 'cpt', 'step': s, 'rows': [sample, sample]})
    for s in (100, 200)
  ))  # fmt: skip
  words = (
    'Return a new list containing all items from the iterable in ascending '
    'order.\n\nA custom key function can be supplied to customize the sort '
    'order, and the reverse flag can be set to request the result in '
    'descending order.'
  )
  chunks = [words[i : i + 8] for i in range(0, len(words), 8)]
  scores = rng.normal(size=len(chunks))
  expanded = scores >= np.sort(scores)[-5]
  files.write_json(workdir / 'policy_scores.json', {'examples': [
    {'doc': 17, 'text_chunks': chunks, 'scores': scores, 'expanded': expanded,
     'output': ' This is'},
  ] * 2})  # fmt: skip
  (workdir / 'curriculum.png').write_bytes(b'\x89PNG')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  fake_run(workdir)
  path = report.write(workdir, EVALS)
  assert path == str(workdir / 'report.html')
  return (workdir / 'report.html').read_text(encoding='utf-8')


def test_the_page_is_well_formed_and_needs_no_network(whole):
  checker = parsed(whole)
  assert len(checker.ids) == len(set(checker.ids))
  for link in checker.links:
    assert link.startswith(('#', 'data:image/')), link
    assert not link.startswith('#') or link[1:] in checker.ids
  assert 'url(http' not in whole and '@import' not in whole
  assert "default-src 'none'" in whole and '<script' not in whole


def test_figures_are_valid_svg_in_the_colours_of_the_page(whole):
  pictures = re.findall(r'<svg.*?</svg>', whole, re.DOTALL)
  assert len(pictures) == 7 + 2  # stages; selection, plain and tail expanded
  for picture in pictures:
    xml.etree.ElementTree.fromstring(picture)
    assert not re.search(r'#0a0b[0-9a-f]{2}', picture)
    colours = set(re.findall(r'(?:fill|stroke): ?(#\w+)', picture))
    assert not colours, colours  # all are variables
    assert picture.startswith('<svg role="img" aria-label="')


def cells(whole, anchor):
  """The text of a section's table cells, row by row."""
  part = re.search(rf'<section id="{anchor}">.*?</section>', whole, re.DOTALL)
  rows = re.findall(r'<tr>(.*?)</tr>', part.group(0), re.DOTALL)
  strip = lambda text: re.sub(r'<[^>]*>', '', text).strip()
  split = [re.split(r'</t[dh]>', r)[:-1] for r in rows]
  return [[strip(cell) for cell in r] for r in split]


def test_levels_and_differences(whole):
  table = cells(whole, 'log-perplexity-on-held-out-documents')
  levels, differences, rest = (
    list(block)
    for block in split_at(table, lambda r: len(r) > 1 and 'row' in r)
  )
  own = {r[0]: r[1:] for r in levels}['refrag_k8']
  bits = [f'{x / 0.693:.3f}' for x in (1.71, 1.76)]
  assert own == ['1.710 ± 0.012', '1.760 ± 0.012', *bits, '120']
  found = {r[0]: r[1:] for r in differences}
  assert found['refrag_k8'] == [
    '−0.1900 ± 0.0120 ✓', '−0.0900 ± 0.0120 ✓',  # no_context_trained
    '−0.4300 ± 0.0120 ✓', '−0.0200 ± 0.0120',  # shuffled; 1.7 se: no mark
    '120',
  ]  # fmt: skip
  assert found['refrag_k8_shuffled'][0] == '+0.2400 ± 0.0120 ✗'
  assert 'no_context' not in found  # it has no comparisons
  others = [r[3] for r in rest if r[:2] == ['refrag_k8', 'last_k_trained']]
  assert others == ['+0.1500 ± 0.0120 ✗', '+0.1600 ± 0.0120 ✗']


def split_at(rows, is_head):
  """The tables of a section: the rows after each head."""
  heads = [i for i, r in enumerate(rows) if is_head(r)]
  ends = [*heads[1:], len(rows)]
  return [rows[i + 1 : end] for i, end in zip(heads, ends)]


def test_worse_is_said_like_better(whole):
  found = {tuple(r[:3]): r[3:] for r in cells(whole, 'what-this-run-shows')}
  task = 'log-perplexity, heldout, P8'
  assert found[task, 'refrag_k8', 'no_context_trained'] == [
    '−0.1900 ± 0.0120', 'better', '120',
  ]  # fmt: skip
  assert found[task, 'refrag_k8', 'last_k_trained'] == [
    '+0.1500 ± 0.0120', 'worse', '120',
  ]  # fmt: skip
  assert found['selection, heldout, p = 0.25', 'rl', 'last'] == [
    '+0.0060 ± 0.0030', 'within 3 se', '120',
  ]  # fmt: skip
  assert ('selection, heldout, p = 0.5, tail expanded', 'rl', 'last') in found


def test_stages_say_gain_and_frozen(whole):
  table = {r[0]: r for r in cells(whole, 'stages')}
  assert table['lm'][-1] == '–'  # nothing is frozen
  assert table['cpt'][-1] == 'yes' and table['sft'][-1] == 'no: changed'
  assert table['grpo reward'][4] == '−0.2000 ± 0.0200 ✗'
  assert table['lm'][4] == '+1.0000 ± 0.0200 ✓'
  assert table['lm'][6:10] == ['61.2 s', '9.5 s', '12,346', '841,216']
  assert 'beginning only (data.max_encoder_tokens): cpt 12 of 4,096.' in whole


def test_questions(whole):
  table = cells(whole, 'questions')
  assert table[1][:3] == ['no_passage', '1.200 ± 0.012', '0.100 ± 0.012']
  lower, higher = table[-2], table[-1]
  assert lower[3].endswith('✓')  # a lower NLL is better
  assert higher[3] == '−0.0500 ± 0.0120 ✗'  # a lower exact match is not
  assert 'verdict: uninformative' in whole


def test_policy_scores_colour_the_chunks(whole):
  spans = re.findall(r'<span class="(chunk[^"]*)" title="([^"]*)" style', whole)
  assert len(spans) == 2 * 28
  outlined = [title for style, title in spans if 'expanded' in style]
  assert len(outlined) == 10 and all('expanded' in t for t in outlined)
  alphas = [float(a) for a in re.findall(r'rgb\(var\(--score\) / ([\d.]+)\)">',
                                         whole)]  # fmt: skip
  assert min(alphas) == 0.04 and max(alphas) == 0.60


def test_samples_are_text_not_markup(whole):
  assert 'the &lt;b&gt;context&lt;/b&gt;' in whole
  assert '\x00' not in whole and 'the \ufffd co' in whole
  assert 'cpt, step 200' in whole and 'cpt, step 100' not in whole


def test_the_same_run_gives_the_same_report(tmp_path):
  fake_run(tmp_path)
  report.write(tmp_path, EVALS)
  first = (tmp_path / 'report.html').read_bytes()
  report.write(tmp_path, EVALS)
  assert (tmp_path / 'report.html').read_bytes() == first
  assert not list(tmp_path.glob('.writing*'))


def test_any_part_may_be_missing(tmp_path):
  report.write(tmp_path, EVALS)  # nothing at all
  numbers = fake_results()
  for part in ('stages', 'evals'):
    less = {k: v for k, v in numbers.items() if k != part}
    files.write_json(tmp_path / 'results.json', less)
    report.write(tmp_path, EVALS)
    text = (tmp_path / 'report.html').read_text()
    parsed(text)
    assert f'id="{"stages" if part == "stages" else "questions"}"' not in text
  for part in numbers['evals']:
    files.write_json(
      tmp_path / 'results.json', {'evals': {part: numbers['evals'][part]}}
    )
    report.write(tmp_path, EVALS)
  (tmp_path / 'metrics.jsonl').write_text('{"stage": "lm", "step": 1, "loss": ')
  report.write(tmp_path, EVALS)


def test_numbers_that_are_not_there(tmp_path):
  """A run in the middle: null means, one document, a stage not finished."""
  empty = {'mean': None, 'se': None, 'n': 0}
  single = {'mean': 1.5, 'se': None, 'n': 1}
  files.write_json(tmp_path / 'results.json', {
    'stages': {'lm': {'steps': 3, 'heldout_before': empty}},
    'evals': {
      'log_perplexity': {'heldout': {
        'no_context_trained': {'P8': empty},
        'refrag_k8': {
          'P8': single, 'vs': {'no_context_trained': {'P8': single}},
        },
      }},
      'selection': {'heldout': [
        {'selector': 'rl', 'p': 0.25, 'rate': 2.9, 'nll': empty},
        {'selector': 'last', 'p': 0.25, 'rate': 2.9, 'nll': single},
      ]},
      'qa': {'stdlib': {}},
    },
  })  # fmt: skip
  (tmp_path / 'metrics.jsonl').write_text(
    json.dumps({'stage': 'lm', 'step': 1, 'split': 'train', 'loss': None})
  )
  report.write(tmp_path, EVALS)
  text = (tmp_path / 'report.html').read_text()
  parsed(text)
  assert cells(text, 'what-this-run-shows')[1][3:] == [
    '+1.5000 ± ?', 'no se', '1',
  ]  # fmt: skip
  assert 'id="config"' not in text and 'id="training"' not in text


def test_running_mean():
  np.testing.assert_allclose(
    figures.running_mean([1.0, 2.0, 6.0, 4.0], window=3),
    [1.5, 3.0, 4.0, 5.0],
  )
  assert figures.running_mean([2.0]).tolist() == [2.0]


@pytest.mark.parametrize(
  ('value', 'shown'),
  [(-0.1234, '−0.123'), (1234567, '1,234,567'), (None, '–'),
   (float('nan'), '–'), (0.0, '0.000')],
)  # fmt: skip
def test_number(value, shown):
  assert page.number(value) == shown


def test_every_eval_has_its_part(tmp_path):
  """Nine tables, headed by the evals' own titles."""
  stats = {'P4': stat(1.0), 'vs': {}}
  evals = {
    'copying': {'t': {'first': stats, 'second': stats}},
    'context_length': {'t': {'refrag_k8_s64': stats}},
    'passages': {
      't': {
        'chance': {'hit': stat(0.25), 'vs': {}},
        'rl_p0.25': {'nll': stat(1.5), 'hit': stat(0.5), 'vs': {}},
      }
    },
    'details': {
      't': {
        'refrag_k8': {'o1': stat(1.1), 'o3': stat(1.3), 'vs': {}},
        'expand_one_gain': {'d2': stat(0.2), 'vs': {}},
        'digits_P8_compressed': {'exact': stat(0.4), 'vs': {}},
      }
    },
  }
  (tmp_path / 'results.json').write_text(json.dumps({'evals': evals}))
  report.write(str(tmp_path), EVALS)
  text = (tmp_path / 'report.html').read_text()
  for name in evals:
    assert f'<h2>{html.escape(EVALS[name].title)}</h2>' in text
  assert 'output 1' in text and 'output 3' not in text  # powers of two
  assert 'chunk −2' in text and '0.400' in text and 'hit' in text
  # Each kind of detail is a table of its own rows, and says what it holds.
  parts = text.partition('id="where-how-far-and-of-what"')[2].partition(
    '</section>'
  )[0]
  parts = re.findall('<table.*?</table>', parts, re.DOTALL)
  assert [('refrag_k8' in part) for part in parts] == [True, False, False]
  copied = text.partition('id="copying"')[2].partition('</section>')[0]
  assert 'spans of that many tokens' in copied and 'of the output' not in copied


def test_a_row_is_compared_with_its_own_control():
  row = {
    'vs': {
      'refrag_k8_s128_shuffled': {'P4': 1},
      'refrag_k8_s64_shuffled': {'P4': 2},
      'no_context_trained': {'P4': 3},
    }
  }
  for name, differences in {
    'refrag_k8_s64': {'P4': 2},  # its own
    'last_k_trained_s64': {'P4': 2},  # of the same context length
    'refrag_k8': {'P4': 1},  # the first
  }.items():
    assert tables._against(name, row, '.*shuffled') == differences
  assert tables._against('refrag_k8_s64', row, 'no_context_trained')['P4'] == 3
  assert tables._against('refrag_k8', {'vs': {}}, '.*shuffled') == {}


def test_the_top_says_sizes_and_the_glossary_what_occurs(whole):
  assert 'parameters' in whole.partition('<h2>')[0]
  assert 'minutes in' in whole.partition('<h2>')[0]
  names = whole.partition('What the names mean')[2].partition('</dl>')[0]
  assert 'refrag_k and a number' in names and 'REPLUG' not in names


def test_what_a_run_shows_is_told_on_the_terminal_too(whole, tmp_path):
  fake_run(tmp_path)
  lines = report.told(str(tmp_path))
  assert 'What this run shows' in lines[0]
  assert any('rl minus random' in line for line in lines)
  assert all('<' not in line for line in lines)
