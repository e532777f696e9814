"""RESULTS.md and repro.html of made-up arms: whole, equal, honest."""

import html
import re
import xml.etree.ElementTree

import fake_arms
import numpy as np
import pytest
from well_formed import parsed

from refrag_jax.report import page
from refrag_jax.repro import records as records_lib
from refrag_jax.repro import report
from refrag_jax.repro import tables as repro_tables
from refrag_jax.repro import verdicts as claims
from refrag_jax.repro.page import (
  Items,
  Section,
  Table,
  Text,
  markdown,
)
from refrag_jax.repro.page import html as html_page
from refrag_jax.runtime import files

COMMAND = ['python', '-m', 'refrag_jax.main', '--mode=repro', '--x=<&>']
FAILED = {'seed0/k32': 'stage cpt: loss nan at step 7'}


def claims_file():
  """With fewer resamples, which the page must say."""
  spec = fake_arms.claims_file()
  spec['statistics']['resamples'] = 1_234
  return spec


def write(workdir, spec, records, failures=FAILED):
  verdicts = claims.judge(spec, records)
  report.write(str(workdir), spec, records, verdicts, failures)
  text = (workdir / 'RESULTS.md').read_text(encoding='utf-8')
  return text, (workdir / 'repro.html').read_text(encoding='utf-8')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """All arms but two, one of another text, and a claim that is contrary."""
  workdir = tmp_path_factory.mktemp('repro')
  spec = claims_file()
  directories = fake_arms.write_arms(
    workdir, spec, leave_out=('k32', 'cepe_unfrozen'),
    main__log_perplexity__last_k_trained=1.6,
  )  # fmt: skip
  for (seed, arm), directory in directories.items():
    fake_arms.enrich(directory, arm, seed)
  fake_arms.write_run(workdir, 0, 'stranger', {}, corpus='feed' * 10)
  files.write_json(workdir / 'config_repro.json', {
    'command_line': COMMAND,
    'config': {'repro': {'arms': [], 'seeds': [0, 1], 'arm': {'main': {}}}},
  })  # fmt: skip
  return workdir, spec


@pytest.fixture(scope='module')
def written(folder):
  workdir, spec = folder
  records = claims.load(workdir)
  return *write(workdir, spec, records), records, spec


def sections(text):
  """title: body, of the Markdown."""
  parts = re.split(r'^## (.*)$', text, flags=re.MULTILINE)
  return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text):
  """The cells of all tables of a Markdown text, without emphasis."""
  lines = [line for line in text.split('\n') if line.startswith('| ')]
  split = [re.split(r'(?<!\\) \| ', line[2:-2]) for line in lines]
  bare = lambda cell: re.sub(r'^\*\*(.*)\*\*$', r'\1', cell).replace('\\|', '|')
  return [
    [bare(cell).strip() for cell in row] for row in split if set(row) != {'---'}
  ]


def html_rows(text):
  found = re.findall(r'<tr>(.*?)</tr>', text, re.DOTALL)
  strip = lambda cell: html.unescape(re.sub(r'<[^>]*>', '', cell)).strip()
  return [[strip(c) for c in re.split(r'</t[dh]>', r)[:-1]] for r in found]


def test_both_pages_have_the_same_tables(written):
  text, whole, *_ = written
  plain = [[cell.replace('`', '') for cell in row] for row in rows(text)]
  assert len(plain) > 300
  assert plain == html_rows(whole)


def test_the_page_is_well_formed_and_needs_no_network(written):
  whole = written[1]
  checker = parsed(whole)
  assert len(checker.ids) == len(set(checker.ids))
  for link in checker.links:
    assert link.startswith('#') and link[1:] in checker.ids, link
  assert '<script' not in whole and 'url(http' not in whole
  for picture in re.findall(r'<svg.*?</svg>', whole, re.DOTALL):
    xml.etree.ElementTree.fromstring(picture)
    assert not re.search(r'#0a0b[0-9a-f]{2}', picture)
    colours = set(re.findall(r'(?:fill|stroke): ?(#\w+)', picture))
    assert not colours, colours  # all are variables: light or dark
  pictures = len(re.findall('<svg', whole))
  # A forest for each claim (two for 10), the paper's selection figure for each
  # data set, three curves of details, four stages.
  assert pictures == 11 + 4 + 3 + 4


def test_verdicts_stand_first(written):
  text, _, records, spec = written
  verdicts = claims.judge(spec, records)
  shown = rows(sections(text)['Verdicts'])[1:]
  assert [row[0] for row in shown] == [str(v.number) for v in verdicts]
  assert [row[3] for row in shown] == [v.verdict for v in verdicts]
  found = {row[0]: row[3] for row in shown}
  assert (found['1'], found['3'], found['9']) == (
    'confirmed', 'not testable', 'contrary',
  )  # fmt: skip
  assert '8 confirmed, 1 contrary, 0 undecided, 1 not testable' in text
  assert (
    'In `main`: decoder 4 layers deep and 192 wide (1,234,567 parameters), '
    'encoder 2 layers deep and 128 wide; tokens of `bytes`; s = 128 tokens of '
    'context in chunks of k = 8, o = 16 of output.'
  ) in sections(text)['Verdicts']
  assert 'drawn at random: none, full.' in sections(text)['How it is decided']


def test_what_ran_and_what_did_not(written):
  text, _, records, _ = written
  body = sections(text)['What ran']
  assert ' '.join(COMMAND) in body
  assert f'Corpus `{fake_arms.CORPUS[:12]}`' in body and 'jax 0.10.2' in body
  arms = {row[0]: row for row in rows(body) if len(row) > 2}
  assert arms['`main`'] == [
    '`main`', '`lm` 300 × 128, `reconstruct` 300 × 128, `cpt` 300 × 128, '
    '`grpo` 300 × 128', '1,286', '1,286', '1 x cpu', '`0123abc`',
    '2026-11-20 10:00, 2026-11-21 10:00',
  ]  # fmt: skip
  assert ['`k4`', '`name=k4`'] in rows(body)
  assert arms['`k32`'][2:4] == ['missing', 'missing']
  assert arms['`k4`'][2:4] == ['322', '322']
  walls = [321.5 * len(run.results['stages']) for run in records.runs.values()]
  assert f'{round(sum(walls)):,} s in all' in body
  assert '`seed0/k32`: stage cpt: loss nan at step 7' in body
  assert 'seed0/stranger is left out: its text is corpus feedfeedfeed' in body
  # Equal rates that are in the grid; the one of `reconstruct` as well.
  assert arms['`cpt`'] == [
    '`cpt`', '0.00075, 0.0015, 0.003', '0.0015 (30 runs)', '–',
  ]  # fmt: skip
  assert '0.0015 is not in the grid' in arms['`lm`'][-1]


def test_rules_and_preconditions_are_printed(written):
  text, _, _, spec = written
  body = sections(text)['How it is decided']
  for words in ('3 of its standard errors', '1,234 resamples', '10%',
                'each of 2 seeds', 'needs 3 data sets'):  # fmt: skip
    assert words in body
  found = rows(sections(text)['Preconditions'])
  table = {row[0].strip('`'): row[2:] for row in found if len(row) == 6}
  assert table.keys() - {'precondition'} == spec['precondition'].keys()
  assert table['precondition'] == list(fake_arms.DATASETS)
  assert table['copying'] == ['yes'] * 4
  assert table['reconstruction_direct_reads'] == ['no'] * 4


def test_a_test_has_its_numbers_by_data_set_and_seed(written):
  text, _, records, _ = written
  body = sections(text)['Claims'].split('### 9. ')[1].split('### 10. ')[0]
  assert body.startswith('REFRAG beats CEPE, REPLUG and the last tokens: contr')
  table = rows(body)
  start = [row[0] for row in table].index('REFRAG < the last tokens, trained '
                                          'alike')  # fmt: skip
  own, other = (
    f'main/log_perplexity/{row}/P16' for row in ('refrag_k8', 'last_k_trained')
  )
  assert table[start][1] == 'contrary'
  for offset, name in enumerate(fake_arms.DATASETS, 1):
    row = table[start + offset]
    stat = records_lib.measured(records, {own: 1.0, other: -1.0}, name)
    shown = (
      f'{page.number(stat["mean"], 4, True)} ± {page.number(stat["se"], 4)}'
    )
    assert row[:3] == [f'– {name}', 'contrary', shown]
    low, high = (float(x.replace('−', '-')) for x in row[3].split(' to '))
    assert low < stat['mean'] < high
    assert row[4] == str(stat['n']) == str(fake_arms.DATASETS[name])
    assert len(row) == 8 and row[6] != row[7]  # two seeds
  assert (
    '`main/log_perplexity/refrag_k8/P16` < '
    '`main/log_perplexity/last_k_trained/P16`'
  ) in body


def test_tables_beside_the_papers(written):
  text, _, records, _ = written
  body = sections(text)['Beside the paper']
  table = {row[0]: row for row in rows(body.split('### Table 2')[0])}
  assert table['REFRAG_8'][1:5] == ['1.062', '1.844', '1.927', '0.916']
  assert table['REFRAG_8'][6] == '`main/refrag_k8_cpt`'
  name = 'main/log_perplexity/refrag_k8_cpt/P16'
  levels = [
    records_lib.measured(records, {name: 1.0}, d)['mean']
    for d in fake_arms.DATASETS
  ]
  assert table['REFRAG_8'][8:12] == [
    cell for cell in table['REFRAG_8'][8:12]
    if any(cell.startswith(page.number(x)) for x in levels)
  ]  # fmt: skip
  assert table['REFRAG_8'][12] == '26 / 44 / 60 / 38'
  # By the paper's metric: (2.20 - 1.80) / (2.20 - 1.50), up to the noise.
  assert float(table['REFRAG_8'][7].split()[0]) == pytest.approx(57, abs=1)
  assert table['REFRAG_32'][8:12] == ['missing'] * 4
  assert table['CEPE'][5] == '75.4 %'  # of the paper's own numbers
  second = body.split('### Table 2')[1].split('### ')[0]
  at_16k = {row[0]: row[5] for row in rows(second)}
  assert (at_16k['REFRAG_16 s=16384'], at_16k['CEPE s=16384']) == (
    '80.5 %', '71.2 %',
  )  # fmt: skip


def test_extra_tables(written):
  text = written[0]
  body = sections(text)['Beyond the paper']
  found = rows(body)
  assert found[0] == [
    'data set', 'o1', 'o2', 'o4', 'o8', 'o16', 'mean from o2 on', 'n',
  ]  # fmt: skip
  assert found[1][0] == 'books' and found[1][-1] == '26'
  # 0.1 + 0.7 exp(-1/4) by construction; then less with each position.
  gains = [float(cell.split(' ')[0]) for cell in found[1][1:6]]
  assert gains[0] == pytest.approx(0.645, abs=0.02)
  assert gains == sorted(gains, reverse=True)
  later = float(found[1][6].split(' ')[0])
  wanted = 0.1 + 0.7 * np.exp(-np.arange(2, 17) / 4).mean()
  assert later == pytest.approx(wanted, abs=0.02)
  assert [
    'data set', 'd1', 'd2', 'd4', 'd8', 'd16', 'mean from d2 on', 'n',
  ] in found  # fmt: skip
  # By the levels of `folder` and of the made-up arms, less k4's 1.70.
  rate = {row[0]: row[2:] for row in found if row[1].startswith('`main/log_p')}
  for what, wanted in (
    ('the policy expands', -0.08),
    ('the rule `last` expands', -0.05),
    ('random chunks expanded', 0.0),
    ('last tokens alone, trained alike', -0.1),
  ):
    value = float(rate[what][0].split(' ')[0].replace('−', '-'))
    assert value == pytest.approx(wanted, abs=0.02)
  assert [
    'digits in 32 tokens', 'books', '0.250 ± 0.000', '0.900 ± 0.000',
    '0.010 ± 0.000', '9',
  ] in found  # fmt: skip
  costs = {
    row[0]: row[1] for row in rows(sections(text)['What the context costs'])
  }
  assert costs['REFRAG, k = 8'] == costs['the last 16 tokens'] == '17'
  assert costs['REFRAG, k = 8, 2 of 16 chunks expanded by the policy'] == '31'
  curves = rows(sections(text)['Learning curves'])
  assert ['`grpo`', '`seed1/main`', '300', '2.500 ± 0.010', '1.700 ± 0.010',
          '0.8000 ± 0.0100', '150'] in curves  # fmt: skip


def test_every_row_is_there(written):
  text, _, records, _ = written
  body = sections(text)['Every row']
  table = {(row[0], row[1]): row[2:] for row in rows(body) if row[0] != 'row'}
  wanted = {
    (f'`{run.arm}/{row}`', column)
    for run in records.runs.values()
    for part, of_dataset in run.evals.items()
    if not part.startswith('details')
    for tables in of_dataset.values()
    for row, columns in tables['rows'].items()
    for column in columns
  }
  assert set(table) == wanted
  assert all('missing' not in cells for cells in table.values())


@pytest.mark.slow
def test_the_same_runs_give_the_same_pages(folder, written):
  workdir, spec = folder
  assert write(workdir, spec, claims.load(workdir)) == written[:2]
  assert not list(workdir.glob('.writing*'))


def test_words_are_text_not_markup(written):
  _, whole, *_ = written
  assert '--x=&lt;&amp;&gt;' in whole and '--x=<&>' not in whole
  table = Table(('a', 'b'), [('x | <b>', 'holds')], folded='all <i>')
  text = markdown('t', [Section('s', [table, Items(['`c`'])])])
  assert (
    '| x \\| <b> | **holds** |' in text and '<summary>all &lt;i&gt;' in text
  )
  shown = html_page('t', [Section('s', [table, Text('`c` <u>')])])
  assert 'x | &lt;b&gt;' in shown and '<span class="name">c</span>' in shown
  parsed(shown)


def test_nothing_to_show(tmp_path):
  """No runs; no claims; runs without details, sizes, curves or configs."""
  spec = claims_file()
  text, whole = write(tmp_path, spec, claims.load(tmp_path), {})
  assert '0 confirmed, 0 contrary, 0 undecided, 10 not testable' in text
  parsed(whole)
  text, whole = write(tmp_path, {}, claims.load(tmp_path), {})
  assert 'The claims file has no claims.' in text
  parsed(whole)
  evals = {'e': {'d': {'doc': [1], 'rows': {'row': {'P': [1.0]}}}}}
  directory = fake_arms.write_run(tmp_path, 0, 'main', evals)
  (directory / 'config.json').unlink()
  text, whole = write(tmp_path, {}, claims.load(tmp_path), FAILED)
  parsed(whole)
  assert ['`main/row`', 'P', '1.000 ± ?', '1'] in rows(text)
  assert 'loss nan at step 7' in text
  text, whole = write(tmp_path, spec, claims.load(tmp_path), {})
  parsed(whole)
  assert list(repro_tables.costs({'k': 8}, claims.load(tmp_path))) == []
