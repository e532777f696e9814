"""Verdicts from made-up records with known answers.

Dimension key: N documents.
"""

import json

import fake_arms
import numpy as np
import pytest

from refrag_jax import results
from refrag_jax.errors import UserError
from refrag_jax.repro import questions
from refrag_jax.repro import verdicts as claims
from refrag_jax.repro.estimate import (
  Rule,
  contrast,
  estimates,
  plus,
  share,
  slope,
)
from refrag_jax.repro.paper_tables import TABLES
from refrag_jax.repro.records import (
  Records,
  Run,
  by_seed,
  load,
  measured,
  over_seeds,
)
from refrag_jax.runtime import files

RULE = Rule(standard_errors=3.0, resamples=2000, level=0.9973, seed=0)
STATISTICS = RULE._asdict() | {
  'margin': 0.1,
  'gap': ['a/e/none/P', 'a/e/full/P'],
}
A, B = 'a/e/row/P', 'b/e/row/P'


# --- Records by hand ----------------------------------------------------------


def records_of(cells, config='c', corpus='x'):
  """Records of {(seed, cell): {data set: (docs, values)}}."""
  runs = {}
  for (seed, cell), of_dataset in cells.items():
    arm, part, row, column = cell.split('/')
    head = {'config': f'{config}_{arm}', 'corpus': corpus, 'stages': {}}
    run = runs.setdefault((seed, arm), Run(seed, arm, '', head, {}, {}, {}))
    for dataset, (docs, values) in of_dataset.items():
      table = run.evals.setdefault(part, {}).setdefault(
        dataset, {'doc': list(docs), 'rows': {}}
      )
      table['rows'].setdefault(row, {})[column] = list(values)
  return Records(config, corpus, runs, ())


def levels(means, *, seeds=(0,), datasets=('d',), n=30, noise=0.01):
  """Cells at these means over documents that all share; 'seed' may shift."""
  out = {}
  docs = np.arange(n)
  for cell, mean in means.items():
    for seed in seeds:
      at = mean[seed] if isinstance(mean, (tuple, list)) else mean
      out[seed, cell] = {
        d: (docs, at + fake_arms.rng(d).normal(size=n)
            + noise * fake_arms.rng(cell, seed, d).normal(size=n))
        for d in datasets
      }  # fmt: skip
  return records_of(out)


def spec_of(*tests, seeds=1, domains=1, needs=(), **more):
  claim = {
    'number': 1, 'title': 't', 'sentence': 's', 'paper': 'Table 0',
    'needs': list(needs), 'test': list(tests),
  }  # fmt: skip
  preset = {'seeds': seeds, 'domains': domains}
  spec = {'statistics': STATISTICS, 'preset': {'c': preset}, 'claim': [claim]}
  return spec | more


def verdict_of(records, *tests, **options):
  (verdict,) = claims.judge(spec_of(*tests, **options), records)
  return verdict


LOWER = {'test': 'lower', 'cells': [A, B]}


# --- The claims of the project ------------------------------------------------


@pytest.fixture(scope='module')
def spec():
  """With fewer resamples: what lies far from 0 needs no more."""
  found = fake_arms.claims_file()
  assert found['statistics']['resamples'] == 10_000
  return found | {'statistics': found['statistics'] | {'resamples': 500}}


def judged(spec, number, **options):
  only = [claim for claim in spec['claim'] if claim['number'] == number]
  records = fake_arms.records_of(spec, **options)
  (verdict,) = claims.judge(spec | {'claim': only}, records)
  return verdict


def test_all_claims_can_be_confirmed(tmp_path):
  spec = fake_arms.claims_file()
  fake_arms.write_arms(tmp_path, spec)
  verdicts = claims.judge(spec, load(tmp_path))
  assert [v.number for v in verdicts] == list(range(1, 11))
  assert {v.number: v.verdict for v in verdicts} == dict.fromkeys(
    range(1, 11), 'confirmed'
  )
  # With numbers behind each: mean, se, n and interval, by data set and seed.
  for part in (part for v in verdicts for part in v.parts):
    assert [f.dataset for f in part.findings] == list(fake_arms.DATASETS)
    for f in part.findings:
      assert f.pooled.n == fake_arms.DATASETS[f.dataset]
      assert f.pooled.low < f.pooled.mean < f.pooled.high
      assert f.pooled.se > 0 and list(f.seeds) == [0, 1]


CPT = 'main__log_perplexity__refrag_k8_cpt__'
MAIN = 'main__log_perplexity__refrag_k8__'
DIRECT = 'reconstruct_direct_steps__reconstruction__refrag_k8__'


@pytest.mark.parametrize(
  ('number', 'changes', 'says'),
  [
    # A plastic decoder that needs no reconstruction, as a toy trial found.
    (1, {DIRECT: 1.2}, 'at equal steps'),
    (1, {DIRECT: 2.0}, 'about as no context'),
    (2, {'cpt_direct__log_perplexity__refrag_k8_cpt__': 1.7}, 'with reconstr'),
    (2, {'cpt_direct__log_perplexity__refrag_k8_cpt__P16': 2.3}, 'no context'),
    (
      2,
      {'cpt_direct__log_perplexity__refrag_k8_cpt__P4': 1.95},
      'larger at P4',
    ),
    (3, {'k4__log_perplexity__refrag_k4_cpt__': 2.15}, 'rises'),
    (3, {'k32__log_perplexity__refrag_k32_cpt__': 2.4}, 'k = 32 < no context'),
    (4, {'main__context_length__refrag_k8_s32__': 1.6}, 'falls with log2 s'),
    (4, {'main__context_length__refrag_k8_s256__': 1.95}, 'at twice'),
    (4, {'main__context_length__refrag_k8_s512__': 2.3}, 'at 4 times'),
    (5, {'main__log_perplexity__refrag_k8_random': 1.9}, 'random chunks'),
    (5, {'main__log_perplexity__refrag_k8_cpt_random': 1.6}, 'than before it'),
    (5, {MAIN: 1.95}, 'at most a little worse than before'),
    (6, {'main__selection__rl_p': 1.75}, 'rl < random'),
    (6, {'main__selection__ppl_desc_p': 1.58}, 'rl < ppl_desc'),
    (6, {'main__selection__ppl_desc_p': 1.80}, 'ppl_desc at most'),
    (6, {'main__selection__ppl_asc_p': 1.65}, 'random < ppl_asc'),
    (7, {'main__log_perplexity__refrag_k8_rl': 1.75}, '2k with expansion'),
    (8, {CPT: 2.05}, 'share of the gap'),
    (9, {'cepe__log_perplexity__cepe__': 1.7}, 'REFRAG < CEPE'),
    (9, {'main__log_perplexity__replug_trained__': 1.7}, 'REFRAG < REPLUG'),
    (9, {'main__log_perplexity__last_k_trained__': 1.6}, 'the last tokens'),
    (10, {'main__log_perplexity__no_context_trained__': 1.9}, 'below half'),
    (10, {MAIN: 2.25}, 'REFRAG < no context'),
    (10, {'main__log_perplexity__refrag_k8_shuffled__': 1.7}, 'another docu'),
  ],
)
def test_each_test_of_each_claim_can_come_out_the_other_way(
  spec, number, changes, says
):
  verdict = judged(spec, number, **changes)
  assert verdict.verdict == 'contrary', verdict.why
  assert says in verdict.why
  assert 'comes out the other way on books, latex, articles, papers' in (
    verdict.why
  )


@pytest.mark.parametrize(
  ('changes', 'name', 'numbers'),
  [
    ({'main__copying__second': 3.2}, 'copying', range(1, 11)),
    ({'main__log_perplexity__full_context_trained__': 2.2}, 'context_helps',
     range(2, 11)),
    ({'main__log_perplexity__refrag_k8_shuffled__': 1.79}, 'refrag_reads',
     (4, 6, 7, 9)),
    ({'main__selection__oracle_p': 1.79}, 'expansion_matters', (6,)),
    ({'small_decoder__copying__second': 4.0}, 'small_decoder', (8,)),
    ({'cepe__log_perplexity__cepe_shuffled__': 2.0}, 'cepe_reads', (9,)),
    ({'k4__log_perplexity__refrag_k4_cpt_shuffled__': 1.7},
     'compressed_reads', (7,)),
    # Where neither arm reads its chunks there is nothing to compare.
    ({'main__reconstruction__refrag_k8__': 2.3},
     'reconstruction_reads or reconstruction_direct_reads', (1,)),
    ({CPT: 2.4, 'cpt_direct__log_perplexity__refrag_k8_cpt__': 2.3},
     'cpt_reads', (2, 3, 5, 8)),
  ],
)  # fmt: skip
def test_a_precondition_that_fails_leaves_nothing_to_test(
  spec, changes, name, numbers
):
  for verdict in claims.judge(spec, fake_arms.records_of(spec, **changes)):
    if verdict.number in numbers:
      assert verdict.verdict == 'not testable', (verdict.number, verdict.why)
      assert f'precondition {name}' in verdict.why
      assert '0 of 4 data sets are left and 3 are needed' in verdict.why
    else:
      assert verdict.verdict != 'not testable', (verdict.number, verdict.why)


def test_what_works_without_reconstruction_alone_is_contrary(spec):
  """The precondition must not hide that the arm beside it does better."""
  direct = 'cpt_direct__log_perplexity__refrag_k8_cpt__'
  verdict = judged(spec, 2, **{CPT + 'P4': 2.6, CPT: 2.4, direct: 1.8})
  assert verdict.verdict == 'contrary'


def test_a_missing_arm_is_named(spec):
  records = fake_arms.records_of(spec, leave_out=('k32', 'frozen'))
  verdicts = {v.number: v for v in claims.judge(spec, records)}
  assert verdicts[3].verdict == 'not testable'
  assert verdicts[3].why == 'not run yet: `k32`'
  # Of a test that decides nothing it changes nothing.
  assert verdicts[9].verdict == 'confirmed'
  (beside,) = (p for p in verdicts[9].parts if 'a frozen' in p.test.says)
  assert beside.outcome == 'not testable'
  assert beside.why == 'not run yet: `frozen`'
  # A run that lacks a row is another matter.
  for run in records.runs.values():
    if run.arm == 'k16':
      for table in run.evals['log_perplexity'].values():
        del table['rows']['refrag_k16_cpt']
  verdict = claims.judge(spec, records)[2]
  assert verdict.why == (
    'not run yet: `k32`, there is no k16/log_perplexity/refrag_k16_cpt/P16; '
    'there is no k16/log_perplexity/refrag_k16_cpt/P16; not run yet: `k32`'
  )


def test_one_seed_of_two_is_undecided(spec):
  for verdict in claims.judge(spec, fake_arms.records_of(spec, seeds=(0,))):
    assert verdict.verdict == 'undecided'
    assert 'has 1 of 2 seeds (0)' in verdict.why


def test_every_preset_has_what_the_cells_need(spec):
  for name in spec['preset']:
    cells = fake_arms.cells_of(spec, name)
    assert len(cells) > 80 and not any('{' in cell for cell in cells)
  rates = spec['learning_rates']
  assert all(rates.values()) and {'lm', 'reconstruct', 'cpt'} <= rates.keys()


def test_nothing_has_run(tmp_path, spec):
  records = load(tmp_path)
  assert records == Records('', '', {}, ())
  for verdict in claims.judge(spec, records):
    assert verdict.verdict == 'not testable' and 'not run yet' in verdict.why
  assert claims.judge({}, records) == []


# --- What makes an outcome ----------------------------------------------------


@pytest.mark.parametrize(
  ('b', 'verdict'),
  [(1.1, 'confirmed'), (0.9, 'contrary'), (1.001, 'undecided')],
)
def test_lower(b, verdict):
  """With noise 0.01 and 30 documents three standard errors are 0.008."""
  found = verdict_of(levels({A: 1.0, B: b}), LOWER)
  assert found.verdict == verdict
  (finding,) = found.parts[0].findings
  assert finding.pooled.mean == pytest.approx(1.0 - b, abs=0.008)


@pytest.mark.parametrize('by', [0.05, 0.2])
def test_lower_by_so_much(by):
  found = verdict_of(levels({A: 1.0, B: 1.1}), LOWER | {'by': by})
  assert found.verdict == ('confirmed' if by < 0.1 else 'contrary')


@pytest.mark.parametrize(
  ('kind', 'a', 'verdict'),
  [
    ('about', 1.0, 'confirmed'), ('about', 1.03, 'confirmed'),
    ('about', 1.05, 'undecided'), ('about', 0.95, 'undecided'),
    ('about', 1.07, 'contrary'), ('about', 0.9, 'contrary'),
    ('little', 1.03, 'confirmed'), ('little', 1.05, 'undecided'),
    ('little', 1.07, 'contrary'), ('little', 0.5, 'confirmed'),
  ],
)  # fmt: skip
def test_margins_are_a_tenth_of_the_gap(kind, a, verdict):
  """A gap of 0.5 is a margin of 0.05."""
  records = levels({A: a, B: 1.0, 'a/e/none/P': 2.0, 'a/e/full/P': 1.5})
  found = verdict_of(records, {'test': kind, 'cells': [A, B]})
  assert found.verdict == verdict
  assert found.parts[0].findings[0].margin == pytest.approx(0.05, abs=0.002)


def test_without_a_gap_there_is_no_margin():
  records = levels({A: 1.0, B: 1.0, 'a/e/none/P': 1.5, 'a/e/full/P': 1.5})
  found = verdict_of(records, {'test': 'about', 'cells': [A, B]})
  assert found.verdict == 'undecided' and 'no gap' in found.why


def test_slopes():
  cells = [f'a/e/k{k}/P' for k in (4, 8, 16, 32)]
  records = levels(dict(zip(cells, (1.0, 1.2, 1.4, 1.6))))
  test = {'cells': cells, 'over': [4, 8, 16, 32]}
  rises = verdict_of(records, test | {'test': 'rises'})
  falls = verdict_of(records, test | {'test': 'falls'})
  assert (rises.verdict, falls.verdict) == ('confirmed', 'contrary')
  slope_of = rises.parts[0].findings[0].pooled
  assert slope_of.mean == pytest.approx(0.2, abs=0.005)  # a doubling


def test_wider():
  cells = ['a/e/w/P4', 'b/e/w/P4', 'a/e/w/P16', 'b/e/w/P16']
  test = {'test': 'wider', 'cells': cells}
  for gain, verdict in ((0.5, 'confirmed'), (0.1, 'contrary')):
    records = levels(dict(zip(cells, (2.0, 2.0 + gain, 1.0, 1.3))))
    assert verdict_of(records, test).verdict == verdict


@pytest.mark.parametrize(
  ('bound', 'verdict'),
  [({'above': 0.6}, 'confirmed'), ({'below': 0.6}, 'contrary'),
   ({'below': 0.8}, 'confirmed'), ({'above': 0.75}, 'undecided')],
)  # fmt: skip
def test_share(bound, verdict):
  cells = ['a/e/no/P', 'b/e/x/P', 'a/e/all/P']
  records = levels(dict(zip(cells, (2.0, 1.25, 1.0))))  # 3/4 of the gap
  found = verdict_of(records, {'test': 'share', 'cells': cells} | bound)
  assert found.verdict == verdict
  assert found.parts[0].findings[0].pooled.mean == pytest.approx(0.75, abs=0.01)


def test_a_share_without_a_bound_is_a_number():
  cells = ['a/e/no/P', 'b/e/x/P', 'a/e/all/P']
  records = levels(dict(zip(cells, (2.0, 1.25, 1.0))))
  measure = {'test': 'share', 'cells': cells, 'also': True}
  found = verdict_of(records, measure, LOWER | {'cells': cells[1::-1]})
  assert found.verdict == 'confirmed'
  assert found.parts[0].outcome == 'measured'
  flat = levels(dict(zip(cells, (2.0, 1.25, 2.0))))
  found = verdict_of(flat, measure, LOWER | {'cells': cells[1::-1]})
  assert found.parts[0].outcome == 'undecided'  # of what would it be a share?


def test_larger_share():
  cells = [f'a/e/{x}/P' for x in ('no', 'x', 'all', 'no2', 'y', 'all2')]
  test = {'test': 'larger_share', 'cells': cells}
  # 0.6 of a gap of 1, against 0.5 (and 0.7) of a gap of 2.
  for y, verdict in ((3.0, 'confirmed'), (2.6, 'contrary')):
    records = levels(dict(zip(cells, (2.0, 1.4, 1.0, 4.0, y, 2.0))))
    assert verdict_of(records, test).verdict == verdict


def test_seeds_of_opposite_sign_are_undecided():
  """Sure when pooled, and surely the other way with one seed."""
  means = {A: (1.0, 1.0, 1.0), B: (1.3, 1.3, 0.9)}
  records = levels(means, seeds=(0, 1, 2))
  found = verdict_of(records, LOWER, seeds=3)
  (finding,) = found.parts[0].findings
  assert finding.pooled.sign(RULE) == -1 and finding.seeds[2].sign(RULE) == 1
  assert found.verdict == 'undecided' and 'sign from seed to seed' in found.why
  same = levels({A: (1.0, 1.0, 1.0), B: (1.3, 1.3, 1.001)}, seeds=(0, 1, 2))
  assert verdict_of(same, LOWER, seeds=3).verdict == 'confirmed'


def test_data_sets_that_disagree_are_undecided():
  good = levels({A: 1.0, B: 1.1}, datasets=('d', 'e', 'f'))
  bad = levels({A: 1.0, B: 0.9}, datasets=('g',))
  for key, run in bad.runs.items():
    good.runs[key].evals['e'] |= run.evals['e']
  found = verdict_of(good, LOWER, domains=3)
  assert found.verdict == 'undecided'
  assert 'holds on d, e, f, comes out the other way on g' in found.why


def test_a_test_needs_its_number_of_data_sets():
  records = levels({A: 1.0, B: 1.1}, datasets=('d', 'e'))
  assert verdict_of(records, LOWER, domains=2).verdict == 'confirmed'
  found = verdict_of(records, LOWER, domains=3)
  assert found.verdict == 'not testable' and '2 of 2 data sets' in found.why


def test_the_order_of_reasons():
  """One contrary test refutes, whatever the others lack."""
  records = levels({A: 1.0, B: 1.1})
  wrong = LOWER | {'cells': [B, A]}
  lost = LOWER | {'cells': [A, 'nobody/e/row/P']}
  assert verdict_of(records, LOWER, wrong, lost).verdict == 'contrary'
  assert verdict_of(records, LOWER, lost).verdict == 'not testable'
  beside = (wrong | {'also': True}, lost | {'also': True})
  assert verdict_of(records, LOWER, *beside).verdict == 'confirmed'


def test_preconditions_count_by_data_set():
  means = {A: 1.0, B: 1.1, 'a/e/x/P': 1.0, 'a/e/y/P': 1.2}
  records = levels(means, datasets=('d', 'e'))
  records.runs[0, 'a'].evals['e']['e']['rows']['y']['P'] = records.runs[
    0, 'a'
  ].evals['e']['e']['rows']['x']['P']
  need = {
    'says': 'x below y',
    'test': [{'test': 'lower', 'cells': ['a/e/x/P', 'a/e/y/P']}],
  }
  spec = spec_of(LOWER, needs=['n'], precondition={'n': need})
  (verdict,) = claims.judge(spec, records)
  assert verdict.verdict == 'confirmed' and verdict.failed == {'e': ('n',)}
  outcomes = {f.dataset: f.outcome for f in verdict.parts[0].findings}
  assert outcomes == {'d': 'holds', 'e': 'not testable'}
  (found,) = claims.preconditions(spec, records)
  assert found.holds == {'d': True, 'e': False}
  need['test'].append({'test': 'lower', 'cells': ['a/e/x/P', 'nobody/e/y/P']})
  (found,) = claims.preconditions(spec, records)
  assert found.holds == {}  # nothing has failed: an arm is missing
  (verdict,) = claims.judge(spec, records)
  assert verdict.verdict == 'not testable'
  assert set(verdict.failed.values()) == {('n (not run yet)',)}
  either = {'n': need, 'other': need | {'test': need['test'][:1]}}
  spec = spec_of(LOWER, needs=[['n', 'other']], precondition=either)
  (verdict,) = claims.judge(spec, records)
  assert verdict.verdict == 'confirmed'
  assert verdict.failed == {'e': ('n or other (not run yet)',)}


# --- Pairing ------------------------------------------------------------------


def test_pairing_is_by_document_number():
  rng = np.random.default_rng(0)
  docs = np.array([4, 7, 19, 23, 40])
  a, b = rng.normal(size=5), rng.normal(size=5)
  order = rng.permutation(5)
  straight = records_of({(0, A): {'d': (docs, a)}, (0, B): {'d': (docs, b)}})
  permuted = records_of({
    (0, A): {'d': (docs, a)}, (0, B): {'d': (docs[order], b[order])}
  })  # fmt: skip
  weights = {A: 1.0, B: -1.0}
  assert measured(straight, weights, 'd') == results.paired(a, b)
  assert measured(permuted, weights, 'd') == results.paired(a, b)
  assert results.paired(a, b[order])['se'] != results.paired(a, b)['se']


def test_documents_that_one_arm_lacks_drop_out():
  docs, values = np.arange(6), np.arange(6.0)
  holes = [1.0, None, float('nan'), 3.0, 4.0, 5.0]
  records = records_of({
    (0, A): {'d': (docs, values)}, (0, B): {'d': (docs + 1, holes)}
  })  # fmt: skip
  doc_N, value_N2 = by_seed(records, [A, B], 'd')[0]
  np.testing.assert_array_equal(doc_N, [1, 4, 5])
  np.testing.assert_array_equal(value_N2, [[1, 1.0], [4, 3.0], [5, 4.0]])
  found = verdict_of(records, LOWER)
  assert found.parts[0].findings[0].pooled.n == 3


def test_a_document_counts_once_over_seeds():
  records = records_of({
    (0, A): {'d': ([1, 2], [1.0, 2.0])}, (1, A): {'d': ([2, 3], [4.0, 5.0])}
  })  # fmt: skip
  doc_N, value_N1 = over_seeds(by_seed(records, [A], 'd'))
  np.testing.assert_array_equal(doc_N, [1, 2, 3])
  np.testing.assert_array_equal(value_N1[:, 0], [1.0, 3.0, 5.0])


def test_a_seed_without_a_cell_does_not_count():
  cells = levels({A: 1.0, B: 1.1}, seeds=(0, 1))
  del cells.runs[1, 'b']
  found = verdict_of(cells, LOWER, seeds=2)
  assert found.verdict == 'undecided' and 'has 1 of 2 seeds (0)' in found.why


# --- Reading runs -------------------------------------------------------------


EVALS = {'e': {'d': {'doc': [1, 2], 'rows': {'row': {'P': [1.0, 2.0]}}}}}


def test_runs_are_read_by_seed_and_arm(tmp_path):
  for seed, arm in ((0, 'main'), (0, 'k4'), (10, 'main'), (2, 'main')):
    fake_arms.write_run(tmp_path, seed, arm, EVALS)
  (tmp_path / 'data').mkdir()
  (tmp_path / 'seed0' / 'notes.txt').write_text('mine')
  records = load(tmp_path)
  assert list(records.runs) == [
    (0, 'k4'),
    (0, 'main'),
    (2, 'main'),
    (10, 'main'),
  ]
  assert records.config == 'repro_cpu' and records.corpus == fake_arms.CORPUS
  assert records.notes == ()
  assert records.runs[0, 'k4'].config['seed'] == 0


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(corpus='abcdef0123456789'),
     'seed0/odd is left out: its text is corpus abcdef012345, and that of '
     'seed0/main is c0ffeec0ffee'),
    (dict(config='repro_gpu'), 'an arm of the config repro_gpu'),
    (dict(mark='main0'), 'the same run as seed0/main, which counts once'),
    (dict(saved={'seed': 7}), 'it was trained with seed 7'),
    (dict(datasets={'d': 'x'}), 'its data set d is another text than that of '
     'seed0/main'),
  ],
)  # fmt: skip
def test_what_cannot_be_compared_is_left_out_by_name(tmp_path, change, message):
  fake_arms.write_run(tmp_path, 0, 'main', EVALS)
  fake_arms.write_run(tmp_path, 0, 'odd', EVALS, **change)
  records = load(tmp_path)
  assert list(records.runs) == [(0, 'main')]
  (note,) = records.notes
  assert message in note


def test_a_copied_seed_counts_once(tmp_path):
  """seed0 copied to seed1: two seeds that are one."""
  fake_arms.write_run(tmp_path, 0, 'main', EVALS, mark='m', saved={'seed': 0})
  copy = fake_arms.write_run(tmp_path, 1, 'main', EVALS, mark='m')
  (copy / 'config.json').unlink()
  records = load(tmp_path)
  assert list(records.runs) == [(0, 'main')]
  assert 'seed1/main is left out: it is the same run as' in records.notes[0]


def test_unfinished_and_broken_runs_are_named(tmp_path):
  for arm in ('main', 'started', 'old', 'torn', 'mixed'):
    fake_arms.write_run(tmp_path, 0, arm, EVALS)
  seed0 = tmp_path / 'seed0'
  (seed0 / 'started' / 'results.json').unlink()
  (seed0 / 'old' / 'documents.json').unlink()
  (seed0 / 'torn' / 'documents.json').write_text('{"evals": ')
  other = files.read_json(seed0 / 'mixed' / 'documents.json')
  files.write_json(
    seed0 / 'mixed' / 'documents.json', other | {'fingerprint': 'z'}
  )
  records = load(tmp_path)
  assert list(records.runs) == [(0, 'main')]
  notes = dict(note.split(' is left out: ') for note in records.notes)
  assert 'interrupted, or still running' in notes['seed0/started']
  assert 'no documents.json' in notes['seed0/old']
  assert 'is not JSON' in notes['seed0/torn']
  assert 'another fingerprint' in notes['seed0/mixed']


def test_tables_that_do_not_add_up_are_left_out(tmp_path):
  evals = json.loads(json.dumps(EVALS))
  evals['e']['d']['rows']['short'] = {'P': [1.0]}
  evals['e']['twice'] = {'doc': [3, 3], 'rows': {'row': {'P': [1.0, 2.0]}}}
  fake_arms.write_run(tmp_path, 0, 'main', evals)
  records = load(tmp_path)
  assert records.runs[0, 'main'].evals == EVALS
  assert 'short/P is left out: 1 values for 2 documents' in records.notes[0]
  assert (
    'e on twice is left out: it counts a document twice' in (records.notes[1])
  )


# --- The numbers --------------------------------------------------------------


def test_estimates_of_sums_are_the_ordinary_ones():
  rng = np.random.default_rng(1)
  value_N3 = rng.normal(size=(80, 3))
  both = contrast({'x': 1.0, 'z': -1.0}), slope(['x', 'y', 'z'], [1, 2, 3])
  difference, rise = estimates(both, ['x', 'y', 'z'], value_N3, RULE)
  stat = results.paired(value_N3[:, 0], value_N3[:, 2])
  assert difference.mean == pytest.approx(stat['mean'])
  assert difference.se == pytest.approx(stat['se'])
  # The interval is that of a normal mean: 3 standard errors to each side.
  for end in (difference.low, difference.high):
    assert abs(end - difference.mean) == pytest.approx(3 * stat['se'], rel=0.15)
  assert rise.mean == pytest.approx(-stat['mean'] / 2)
  assert rise.se == pytest.approx(stat['se'] / 2)


def test_the_error_of_a_share():
  """Its first-order error is what the bootstrap sees, not that of its top."""
  rng = np.random.default_rng(2)
  none_N, gap_N = rng.normal(2.0, 0.3, 400), rng.uniform(0.5, 1.5, 400)
  closed_N = gap_N * rng.normal(0.75, 0.05, 400)  # much of a large gap
  value_N3 = np.stack([none_N, none_N - closed_N, none_N - gap_N], 1)
  shares = share('no', 'x', 'all'), share('no', 'x', 'all').negative()
  rule = RULE._replace(level=0.6827)
  found, minus = estimates(
    [*shares], ['no', 'x', 'all'], value_N3, rule
  )  # fmt: skip
  mean_3 = value_N3.mean(0)
  assert found.mean == pytest.approx(
    (mean_3[0] - mean_3[1]) / (mean_3[0] - mean_3[2])
  )
  assert minus.mean == -found.mean and minus.se == found.se
  assert (found.high - found.low) / 2 == pytest.approx(found.se, rel=0.1)
  zero = plus(*shares)
  (nothing,) = estimates([zero], ['no', 'x', 'all'], value_N3, rule)
  assert nothing.mean == 0 and nothing.se == pytest.approx(0, abs=1e-12)


def test_the_bootstrap_is_seeded():
  value_N1 = np.random.default_rng(3).normal(size=(20, 1))
  ask = lambda seed: estimates(
    [contrast({'x': 1.0})], ['x'], value_N1, RULE._replace(seed=seed)
  )[0]
  assert ask(0) == ask(0)
  assert ask(0).low != ask(1).low and ask(0).mean == ask(1).mean


def test_too_few_documents():
  for n in (0, 1):
    (found,) = estimates([contrast({'x': 1.0})], ['x'], np.ones((n, 1)), RULE)
    assert found.n == n and found.se is None and found.sign(RULE) == 0
  one = levels({A: 1.0, B: 1.1}, n=1)
  found = verdict_of(one, LOWER)
  assert found.verdict == 'undecided' and 'has 1 document only' in found.why


def test_a_large_mean_with_an_interval_on_both_sides_is_unsure():
  found = claims.Estimate(mean=-1.0, se=0.3, n=9, low=-2.0, high=0.1)
  assert found.sign(RULE) == 0
  assert 'on both sides' in claims._unsure(found, RULE)


def test_the_papers_9_30():
  """Footnote 2, from Table 2 at s = 16,384 of the paper."""
  none = [1.174, 1.939, 2.041, 1.081]
  full = [9.043, 8.913, 8.848, 8.989], [0.865, 1.840, 1.943, 0.770]
  refrag_16, cepe = [0.942, 1.840, 1.945, 0.850], [0.960, 1.864, 1.966, 0.863]
  gain = claims.gap_closed(none, refrag_16, *full) - claims.gap_closed(
    none, cepe, *full
  )
  assert round(100 * gain, 2) == 9.30
  # The same from our copy of the table; and two others.
  at = lambda name: TABLES['Table 2'].rows[f'{name} s=16384']
  closed = lambda name: 100 * claims.gap_closed(
    at('LLaMA-No Context'), at(name), at('LLaMA-Full Context'),
    at('LLaMA-32K'),
  )  # fmt: skip
  assert round(closed('REFRAG_16') - closed('CEPE'), 2) == 9.30
  assert round(closed('REFRAG_32') - closed('CEPE'), 2) == -0.37
  assert round(closed('REFRAG_8') - closed('CEPE'), 2) == 0.73


def test_the_tables_of_the_paper_are_whole():
  for name, table in TABLES.items():
    assert len(set(table.columns)) == len(table.columns), name
    for row, values in table.rows.items():
      assert len(values) == len(table.columns), (name, row)
  # Table 13's REFRAG_8 is Table 1's, and RL at rate 8.02 is Figure 3's.
  assert (
    TABLES['Table 13'].rows['REFRAG_8 s=2048']
    == TABLES['Table 1'].rows['REFRAG_8']
  )
  columns = ['Arxiv P2048', 'Book P2048', 'PG19 P2048', 'ProofPile P2048']
  rl = TABLES['Table 13'].row('REFRAG_16+RL s=4096', columns)
  figure = TABLES['Figure 3'].row(
    'RL', [c.split()[0] + ' 8.02' for c in columns]
  )
  np.testing.assert_allclose(rl, figure, atol=6e-4)


def test_learning_rates_are_held_against_the_grid():
  spec = {'learning_rates': {'cpt': [1e-3]}}
  records = levels({A: 1.0, B: 1.1})
  for (_, arm), run in records.runs.items():
    run.results['stages'] = {'cpt': {}, 'cpt_trained': {}, 'strange': {}}
    rate = {'a': 1e-3, 'b': 2e-3}[arm]
    run.saved['config'] = {
      'stage': {
        name: {'peak_learning_rate': rate} for name in run.results['stages']
      }
    }
  used = {1e-3: ['seed0/a'], 2e-3: ['seed0/b']}
  assert claims.learning_rates(spec, records) == [
    ('cpt', (1e-3,), used), ('cpt_trained', (1e-3,), used),
    ('strange', (), used),
  ]  # fmt: skip


# --- A claims file that cannot be right ---------------------------------------


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      {'test': 'lowest'},
      "claim 1 of the claims file: there is no test 'lowest'",
    ),
    ({'cells': [A]}, 'lower takes 2 cells, not 1'),
    ({'cells': [A, 'a/e/row']}, "arm/eval/row/column, not 'a/e/row'"),
    ({'cells': [A, 'a/e/row/{all}']}, "the preset of these runs no 'all'"),
    ({'needs': ['luck']}, "needs 'luck'"),
    ({'margins': 3}, 'a test has no margins'),
    ({'test': 'rises', 'over': [1, 2, 3]}, 'rises takes 3 cells, not 2'),
  ],
)
def test_mistakes_are_named(change, message):
  with pytest.raises(UserError) as e:
    verdict_of(levels({A: 1.0, B: 1.1}), LOWER | change)
  assert message in str(e.value) and '\n' not in str(e.value)


def test_a_config_without_a_preset_is_named():
  spec = spec_of(LOWER)
  records = levels({A: 1.0, B: 1.1})._replace(config='mine')
  with pytest.raises(UserError, match=r'no \[preset.mine\].*it has c'):
    claims.judge(spec, records)
  assert questions.preset_of({}, records) == {}
