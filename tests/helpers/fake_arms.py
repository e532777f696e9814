"""Made-up arms whose every cell has a known level, for claims and reports.

A cell's value at a document is its level, plus what the document adds to all
cells, plus a little of its own. With LEVELS as they are each claim holds.
"""

import functools
import hashlib
import pathlib
import tomllib

import numpy as np

from refrag_jax.repro import questions
from refrag_jax.repro.records import Records, Run
from refrag_jax.runtime import files
from refrag_jax.runtime.environment import ROOT

CORPUS = 'c0ffee' * 10
DATASETS = {'books': 26, 'latex': 44, 'articles': 60, 'papers': 38}

# cell (the first prefix that fits): level. P4 stands before P16.
LEVELS = {
  'main/copying/first': 4.6,
  'main/copying/second': 1.0,
  'small_decoder/copying/first': 4.7,
  'small_decoder/copying/second': 1.4,
  'main/reconstruction/refrag_k8/': 1.40,
  'main/reconstruction/refrag_k8_shuffled/': 2.30,
  'main/reconstruction/no_context/': 2.20,
  'reconstruct_direct_steps/reconstruction/refrag_k8/': 2.19,
  'reconstruct_direct_tokens/reconstruction/refrag_k8/': 2.20,
  'reconstruct_direct_steps/reconstruction/refrag_k8_shuffled/': 2.19,
  'main/log_perplexity/no_context/': 2.40,
  'main/log_perplexity/no_context_trained/': 2.20,
  'main/log_perplexity/no_context_cpt_trained/': 2.21,
  'main/log_perplexity/full_context/': 1.80,
  'main/log_perplexity/full_context_trained/': 1.50,
  'main/log_perplexity/full_context_cpt_trained/': 1.51,
  'main/log_perplexity/last_k/': 2.30,
  'main/log_perplexity/last_k_trained/': 2.00,
  'main/log_perplexity/replug/': 2.35,
  'main/log_perplexity/replug_trained/': 2.10,
  'main/log_perplexity/refrag_k8/': 1.79,
  'main/log_perplexity/refrag_k8_shuffled/': 2.40,
  'main/log_perplexity/refrag_k8_cpt/P4': 1.90,
  'main/log_perplexity/refrag_k8_cpt/': 1.80,
  'main/log_perplexity/refrag_k8_cpt_shuffled/': 2.40,
  'main/log_perplexity/refrag_k8_cpt_random': 1.81,
  'main/log_perplexity/refrag_k8_random': 1.70,
  'main/log_perplexity/refrag_k8_last': 1.65,
  'main/log_perplexity/refrag_k8_rl': 1.62,
  'cpt_direct/log_perplexity/refrag_k8_cpt/P4': 2.50,
  'cpt_direct/log_perplexity/refrag_k8_cpt/': 2.00,
  'cpt_direct/log_perplexity/refrag_k8_cpt_shuffled/': 2.30,
  'cpt_no_curriculum/log_perplexity/refrag_k8_cpt/': 1.90,
  'k4/log_perplexity/refrag_k4_cpt/': 1.70,
  'k4/log_perplexity/refrag_k4_cpt_shuffled/': 2.40,
  'k16/log_perplexity/refrag_k16_cpt/': 1.90,
  'k16/log_perplexity/refrag_k16_cpt_shuffled/': 2.40,
  'k32/log_perplexity/refrag_k32_cpt/': 2.05,
  'k32/log_perplexity/refrag_k32_cpt_shuffled/': 2.40,
  'main/context_length/no_context_trained/': 2.20,
  'main/context_length/full_context_trained_s128/': 1.50,
  'main/context_length/full_context_trained_s': 4.00,
  'main/context_length/refrag_k8_s512_shuffled/': 2.40,
  'main/context_length/refrag_k8_s32/': 2.00,
  'main/context_length/refrag_k8_s64/': 1.90,
  'main/context_length/refrag_k8_s128/': 1.79,
  'main/context_length/refrag_k8_s256/': 1.80,
  'main/context_length/refrag_k8_s512/': 1.83,
  'main/context_length/refrag_k8_s1024/': 1.95,
  'main/context_length/refrag_k8_s2048/': 2.30,
  'main/selection/none/': 1.79,
  'main/selection/rl_p': 1.62,
  'main/selection/ppl_desc_p': 1.68,
  'main/selection/random_p': 1.70,
  'main/selection/ppl_asc_p': 1.74,
  'main/selection/last_p': 1.65,
  'main/selection/oracle_p': 1.55,
  'main/selection/none_tail/': 1.66,
  'main/passages/rl_p0.125/hit': 0.5,
  'main/passages/chance/': 0.25,
  'main/passages/rl_p': 1.75,
  'main/passages/': 1.85,
  'policy_no_positions/selection/rl_p': 1.66,
  'small_decoder/log_perplexity/no_context_cpt_trained/': 2.60,
  'small_decoder/log_perplexity/full_context_cpt_trained/': 2.00,
  'small_decoder/log_perplexity/refrag_k8_cpt/': 2.40,
  'small_decoder/log_perplexity/refrag_k8_cpt_shuffled/': 2.70,
  'small_decoder_large_encoder/log_perplexity/refrag_k8_cpt/': 2.38,
  'large_encoder/log_perplexity/refrag_k8_cpt/': 1.79,
  'encoder_mlm/log_perplexity/refrag_k8_cpt/': 1.78,
  'encoder_embeddings/log_perplexity/refrag_k8_cpt/': 1.78,
  'frozen/log_perplexity/refrag_k8_frozen/': 1.95,
  'cepe/log_perplexity/cepe/': 2.00,
  'cepe/log_perplexity/cepe_shuffled/': 2.45,
  'cepe_unfrozen/log_perplexity/cepe_unfrozen/': 1.85,
}


def claims_file():
  with open(pathlib.Path(ROOT) / 'configs' / 'claims.toml', 'rb') as f:
    return tomllib.load(f)


def cells_of(spec, preset='repro_cpu'):
  """Every cell that the file names."""
  found = {}

  def visit(value):
    if isinstance(value, dict):
      list(map(visit, value.values()))
    elif isinstance(value, list):
      list(map(visit, value))
    elif isinstance(value, str) and value.count('/') == 3 and ' ' not in value:
      found[value] = None

  parts = {k: spec[k] for k in ('claim', 'precondition', 'table', 'statistics')}
  visit(questions.filled(parts, spec['preset'][preset]))
  return list(found)


def level(cell, levels):
  for prefix, value in levels.items():
    if cell.startswith(prefix):
      return value
  raise KeyError(cell)


def rng(*key):
  digest = hashlib.sha256(repr(key).encode()).digest()
  return np.random.default_rng(list(digest[:16]))


@functools.cache
def normal(n, *key):
  return rng(*key).normal(size=n)


def documents(cells, levels, seed, noise=0.02):
  """The `evals` of documents.json of one arm, from its cells."""
  out = {}
  for cell in cells:
    _, part, row, column = cell.split('/')
    for dataset, n in DATASETS.items():
      own = normal(n, dataset) * 0.3  # what a document adds everywhere
      if column in ('hit', 'exact'):
        own = own * 0.1
      value = level(cell, levels) + own
      value = value + noise * normal(n, cell, dataset, seed)
      table = out.setdefault(part, {}).setdefault(
        dataset, {'doc': [3 * i + 1 for i in range(n)], 'rows': {}}
      )
      table['rows'].setdefault(row, {})[column] = value.tolist()
  return out


def arms_of(spec, *, seeds=(0, 1), leave_out=(), **changes):
  """The `evals` of all arms of the claims file by (seed, arm).

  Args:
    **changes: of LEVELS, '/' as '__'; they come before the others.
  """
  levels = {k.replace('__', '/'): v for k, v in changes.items()}
  levels |= {k: v for k, v in LEVELS.items() if k not in levels}
  of_arm = {}
  for cell in cells_of(spec):
    of_arm.setdefault(cell.split('/')[0], []).append(cell)
  return {
    (seed, arm): documents(cells, levels, seed)
    for seed in seeds
    for arm, cells in of_arm.items()
    if arm not in leave_out
  }


def records_of(spec, **options):
  """The same as records, without files."""
  runs = {
    (seed, arm): Run(seed, arm, '', {'corpus': CORPUS}, {}, evals, {})
    for (seed, arm), evals in arms_of(spec, **options).items()
  }
  return Records('repro_cpu', CORPUS, runs, ())


def write_run(
  workdir, seed, arm, evals, *, corpus=CORPUS, config='repro_cpu', mark=None,
  stages=None, saved=None, datasets=None, **more,
):  # fmt: skip
  """results.json, documents.json and config.json of one arm."""
  directory = pathlib.Path(workdir) / f'seed{seed}' / arm
  head = {
    'config': f'{config}_{arm}',
    'fingerprint': mark or f'{arm}{seed}',
    'versions': {'python': '3.11.7', 'jax': '0.10.2'},
    'git': '0123abc',
    'device': '1 x cpu',
    'corpus': corpus,
    'date': f'2026-11-2{seed} 10:00',
  }
  numbers = head | {'stages': stages or {}, 'evals': {}} | more
  files.write_json(directory / 'results.json', numbers)
  texts = {'datasets': {'d': 'c0ffee'} | (datasets or {})}
  files.write_json(
    directory / 'documents.json', head | texts | {'evals': evals}
  )
  saved = {'name': f'{config}_{arm}', 'seed': seed} | (saved or {})
  files.write_json(
    directory / 'config.json', {'config': saved, 'changes': [f'name={arm}']}
  )
  return directory


def write_arms(workdir, spec, **options):
  """All arms of the claims file, with the options of `arms_of`.

  Returns:
    The directories by (seed, arm).
  """
  return {
    (seed, arm): write_run(workdir, seed, arm, evals)
    for (seed, arm), evals in arms_of(spec, **options).items()
  }


def enrich(directory, arm, seed):
  """What a run leaves beside its evals: stages, curves, sizes, details."""
  stages = {'main': ('lm', 'reconstruct', 'cpt', 'grpo')}.get(arm, ('cpt',))
  numbers = files.read_json(directory / 'results.json')
  stat = lambda mean: {'mean': mean, 'se': 0.01, 'n': 150}
  numbers['stages'] = {
    stage: {
      'steps': 300, 'measures': 'reward' if stage == 'grpo' else 'loss',
      'heldout_before': stat(2.5), 'heldout_after': stat(1.7),
      'paired_gain': stat(0.8), 'wall_s': 321.5, 'compile_s': 4.0,
      'trainable_params': 1_234_567,
    }
    for stage in stages
  }  # fmt: skip
  if arm == 'main':
    numbers['evals']['selection'] = {
      dataset: [
        {'selector': 'none', 'p': 0.0, 'rate': 8.0, 'nll': stat(1.79)},
        *(
          {'selector': name, 'p': p, 'rate': 8 / (1 - p + 8 * p),
           'nll': stat(1.79 - gain * p)}
          for name, gain in (('rl', 1.4), ('random', 0.8), ('last', 1.2))
          for p in (0.0625, 0.125, 0.25)
        ),
      ]
      for dataset in DATASETS
    }  # fmt: skip
  files.write_json(directory / 'results.json', numbers)
  lines = [
    {'stage': stage, 'step': step, 'split': 'heldout',
     'reward' if stage == 'grpo' else 'loss':
       1.7 + np.exp(-step / 60) + 0.01 * seed + 0.002 * len(arm)}
    for stage in stages for step in range(0, 301, 50)
  ]  # fmt: skip
  text = ''.join(map(files.json_line, lines))
  (directory / 'metrics.jsonl').write_text(text)
  saved = files.read_json(directory / 'config.json')
  rates = dict.fromkeys(stages, 1.5e-3)
  saved['config'] |= {
    'model': {
      'decoder': dict(
        num_layers=4, width=192, mlp_width=576, num_heads=6, num_kv_heads=2,
        head_dim=32,
      ),
      'encoder': dict(num_layers=2, width=128, mlp_width=512),
      'policy': dict(num_layers=2, mlp_width=512),
      'piece_length': 128,
      'chunk_size': 8,
    },
    'stage': {
      stage: dict(
        peak_learning_rate=rate, batch_size=128, context_length=128,
        output_length=16, num_train_steps=300,
      )
      for stage, rate in rates.items()
    }
    | {'cpt_trained': {'contexts': ['none', 'full']}},
    'data': {'tokenizer': 'bytes'},
  }  # fmt: skip
  files.write_json(directory / 'config.json', saved)
  if arm != 'main':
    return
  kept = files.read_json(directory / 'documents.json')
  for dataset, n in DATASETS.items():
    own = rng(dataset).normal(0.0, 0.3, n)
    noisy = lambda mean, *key: (
      mean + own + rng(key).normal(0, 0.02, n)
    ).tolist()
    rows = {
      row: {
        f'o{i}': noisy(base + gain * np.exp(-i / 4), row, i, dataset, seed)
        for i in range(1, 17)
      }
      for row, base, gain in (
        ('refrag_k8', 1.7, 0.5), ('refrag_k8_shuffled', 1.9, 1.5),
        ('no_context_trained', 1.8, 1.2),
      )
    }  # fmt: skip
    rows['expand_one_gain'] = {
      f'd{i}': (0.2 * np.exp(-i) + rng(i, seed).normal(0, 0.02, n)).tolist()
      for i in range(1, 17)
    }
    docs = [3 * i + 1 for i in range(n)]
    details = kept['evals'].setdefault('details', {})
    details[dataset] = {'doc': docs, 'rows': rows}
    for kind in ('digits', 'identifiers'):
      exact = kept['evals'].setdefault(f'details_{kind}_P32', {})
      exact[dataset] = {
        'doc': docs[:9],
        'rows': {
          f'{kind}_P32_{which}': {'exact': [share] * 9}
          for which, share in (
            ('compressed', 0.25), ('expanded', 0.9), ('shuffled', 0.01),
          )
        },
      }  # fmt: skip
  files.write_json(directory / 'documents.json', kept)
