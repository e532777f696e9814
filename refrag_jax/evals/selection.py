"""Which chunks to expand: the policy against simple rules (paper Figure 3).

Dimension key: W windows, B batch of them, C chunks, K chunk size, O outputs, R
expanded chunks.

Each selector is a score per chunk; the T' highest are expanded. So all of them
run through one program, and differ in nothing but the score:

  rl         the policy's logits (greedy: the mode of the policy)
  ppl_desc   the chunk's own perplexity in context under the decoder before
             REFRAG: expand what is hard (paper section 4: compresses the easy)
  ppl_asc    the opposite
  random     one draw
  last       the nearest to the output
  oracle     how much expanding this chunk alone lowers the output's NLL
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from refrag_jax import results
from refrag_jax.config.schema import Config, expanded_chunks
from refrag_jax.data.tasks.windows import eval_windows
from refrag_jax.errors import UserError
from refrag_jax.evals import common
from refrag_jax.evals.eval import Eval, continued
from refrag_jax.models import losses, policy
from refrag_jax.models.refrag import Refrag
from refrag_jax.report import tables


def selecting_role(context: common.Context) -> str:
  """Whose weights chunks are selected for: `mixed`, with its policy if any.

  A checkpoint of the policy holds the `mixed` that it was trained on.
  """
  roles = ('policy', 'mixed')
  return next((role for role in roles if context.available(role)), '')


def scores(context: common.Context, windows: dict, tail: int) -> dict:
  """float32 (W, C) for each configured selector that has its checkpoint."""
  return common.once(
    context, windows, ('scores', tail), lambda: _scores(context, windows, tail)
  )


def nll_by_selector(
  context: common.Context, windows: dict, draws: int, tail: int = 0
) -> dict[str, np.ndarray]:
  """Selector -> NLL of the outputs with its `draws` chunks expanded, (W, O)."""
  role = selecting_role(context)
  make = lambda: {
    name: selected_nll(context, role, windows, score_WC, draws, tail)
    for name, score_WC in scores(context, windows, tail).items()
  }
  return common.once(context, windows, ('nll', draws, tail), make)


def _scores(context: common.Context, windows: dict, tail: int) -> dict:
  return _wanted(
    context,
    windows,
    lambda: common.apply(context, 'before', chunk_nll, windows),
    lambda: oracle(context, windows, tail),
  )


def ragged_scores(
  context: common.Context, asked: dict, role: str
) -> dict[str, np.ndarray]:
  """As `scores`, of questions, whose chunks may be ragged or absent.

  Args:
    role: whose gain of each chunk the oracle knows.
  """
  return _wanted(
    context,
    asked,
    lambda: ragged_nll(context, asked),
    lambda: common.apply(context, role, single_gains, asked, tail=0),
  )


def _wanted(
  context: common.Context,
  batch: dict,
  hardness: Callable[[], np.ndarray],
  gains: Callable[[], np.ndarray],
) -> dict[str, np.ndarray]:
  """float32 (W, C) for each configured selector that has its checkpoint.

  Args:
    hardness: the NLL of each chunk, for the selectors of perplexity.
    gains: what expanding each chunk alone brings, for the oracle.
  """
  config = context.session.config
  W, C = batch['chunk_len_BC'].shape
  wanted = config.eval.selectors
  out = {}
  if 'rl' in wanted and context.available('policy'):
    out['rl'] = common.apply(context, 'policy', Refrag.chunk_scores, batch)
  if {'ppl_desc', 'ppl_asc'} & set(wanted) and context.available('before'):
    nll_WC = hardness()
    out['ppl_desc'], out['ppl_asc'] = nll_WC, -nll_WC
  out['random'] = np.random.default_rng(config.seed).random((W, C))
  out['last'] = np.broadcast_to(np.arange(C, dtype=np.float64), (W, C))
  if 'oracle' in wanted:
    out['oracle'] = gains()
  for name in wanted:
    if name not in out:
      needed = 'policy' if name == 'rl' else 'before'
      context.leave_out(f'selector {name}', common.missing(needed))
  return {name: out[name] for name in wanted if name in out}


def oracle(context: common.Context, windows: dict, tail: int) -> np.ndarray:
  """`single_gains` of all windows, (W, C)."""
  role = selecting_role(context)
  make = lambda: common.apply(context, role, single_gains, windows, tail=tail)
  return common.once(context, windows, ('oracle', tail), make)


def chunk_nll(model, params, batch) -> jax.Array:
  """Mean NLL of each chunk's tokens after all text before it, (B, C)."""
  chunks_BCK = batch['chunks_BCK']
  B, C, K = chunks_BCK.shape
  as_output = batch | {
    'chunks_BCK': chunks_BCK[:, :0],
    'chunk_len_BC': batch['chunk_len_BC'][:, :0],
    'output_BO': chunks_BCK.reshape(B, C * K),
    'output_len_B': jnp.full((B,), C * K, jnp.int32),
  }
  none_BC = jnp.zeros((B, 0), bool)
  nll_BO = model.apply(
    {'params': params}, as_output, None, none_BC, 0, method=Refrag.output_nll
  )
  return nll_BO.reshape(B, C, K).mean(-1)


def ragged_nll(context: common.Context, asked: dict) -> np.ndarray:
  """As `chunk_nll` of questions, (W, C), where a chunk may have fewer tokens.

  All passages after each other, by the decoder before REFRAG.
  """
  len_WC = asked['chunk_len_BC']
  W, C, K = asked['chunks_BCK'].shape
  there_WCK = np.arange(K) < len_WC[:, :, None]
  ids_WT = np.zeros((W, C * K), np.int32)
  total_W = len_WC.sum(1)
  placed_WT = np.arange(C * K) < total_W[:, None]
  ids_WT[placed_WT] = asked['chunks_BCK'][there_WCK]
  as_output = asked | {
    'output_BO': ids_WT,
    'output_len_B': total_W.astype(np.int32),
    'loss_mask_BO': placed_WT,
  }
  nll_WT = common.apply(
    context, 'before', Refrag.plain_nll, as_output, context='none'
  )
  of_WCK = np.zeros((W, C, K))
  of_WCK[there_WCK] = nll_WT[placed_WT]
  return of_WCK.sum(2) / np.maximum(len_WC, 1)


def with_tail(expand_BC, tail: int):
  """Adds the last `tail` chunks to an expansion mask."""
  C = expand_BC.shape[-1]
  return expand_BC | (jnp.arange(C) >= C - tail)[None]


def single_gains(model, params, batch, tail: int) -> jax.Array:
  """-NLL of the output with each chunk expanded alone (plus tail), (B, C)."""
  variables = {'params': params}
  c_BCE = model.apply(variables, batch, method=Refrag.chunk_embeddings)
  B, C, _ = c_BCE.shape

  def one(i):
    expand_BC = with_tail(jnp.arange(C)[None] == jnp.full((B, 1), i), tail)
    nll_BO = model.apply(
      variables, batch, c_BCE, expand_BC, 1 + tail, method=Refrag.output_nll
    )
    return -losses.masked_mean(nll_BO, batch['loss_mask_BO'])

  return jax.lax.map(one, jnp.arange(C)).T


def expand_top(score_BC, draws: int, tail: int):
  """The mask of the `draws` best chunks outside the tail, and the tail."""
  C = score_BC.shape[1]
  in_tail_C = jnp.arange(C) >= C - tail
  score_BC = jnp.where(in_tail_C[None], policy.NEG, score_BC)
  picks_BR = policy.greedy(score_BC, draws)
  return with_tail(policy.to_mask(picks_BR, C), tail)


def selected_nll(
  context: common.Context,
  role: str,
  windows: dict,
  score_WC,
  draws: int,
  tail: int = 0,
  rows: int = 0,
) -> np.ndarray:
  """NLL of the outputs with the best chunks expanded, (W, O).

  Args:
    score_WC: of each chunk; `draws` of them are expanded, and the tail.
    rows: of a batch; 0 takes the config's.
  """
  scored = windows | {'score_BC': np.asarray(score_WC, np.float32)}
  return common.apply(
    context, role, expanded_nll, scored, rows, draws=draws, tail=tail
  )


def expanded_nll(model, params, batch, draws: int, tail: int) -> jax.Array:
  """NLL of the outputs with the best chunks of score_BC expanded, (B, O)."""
  expand_BC = expand_top(batch['score_BC'], draws, tail)
  return model.apply(
    {'params': params},
    batch | {'expand_BC': expand_BC},
    draws + tail,
    method=Refrag.mixed_nll,
  )


def rate(chunk_size: int, expanded: int, chunks: int) -> float:
  """Effective compression k / (1 - p + kp) at the realised p (paper 2)."""
  p = expanded / chunks
  return chunk_size / (1 - p + chunk_size * p)


def run(context: common.Context) -> dict:
  """The `selection` table of results.json, a list of rows a dataset."""
  config, role = context.session.config, selecting_role(context)
  if not role:
    return {}
  cfg, k = config.stage['mixed'], config.model.chunk_size
  out = {}
  for name in context.datasets:
    windows = common.text_windows(context, name, cfg.context_length)
    C = windows['chunk_len_BC'].shape[1]
    documents = context.documents_of('selection', name)
    documents['doc'] = np.unique(windows['doc_B'])
    rows = []
    for tail in dict.fromkeys((0, config.eval.tail_chunks)):
      rows += _rows(context, role, windows, C, k, tail, documents)
    out[name] = rows
  return out


def _rows(context, role, windows, C, k, tail, documents) -> list[dict]:
  config, docs = context.session.config, windows['doc_B']
  mean = lambda nll_WO: results.by_document(nll_WO.mean(1), docs)
  tail_key = {'tail_expanded': True} if tail else {}
  nobody_WC = np.zeros((len(docs), C))
  base = mean(selected_nll(context, role, windows, nobody_WC, 0, tail))
  suffix = '_tail' if tail else ''
  documents['rows'][f'none{suffix}'] = {'nll': base}
  rows = [{
      'selector': 'none', 'p': 0.0, 'expanded': tail, 'rate': rate(k, tail, C),
      'nll': results.stat(base), **tail_key,
  }]  # fmt: skip
  for p in config.eval.expand_fractions:
    draws = expanded_chunks(p, C)
    if not 0 < draws <= C - tail:
      continue
    by_selector = nll_by_selector(context, windows, draws, tail)
    nll = {name: mean(nll_WO) for name, nll_WO in by_selector.items()}
    for name, values in nll.items():
      documents['rows'][f'{name}_p{p:g}{suffix}'] = {'nll': values}
      rows.append(
        {
          'selector': name,
          'p': p,
          'expanded': draws + tail,
          'rate': rate(k, draws + tail, C),
          'nll': results.stat(values),
          **{
            f'vs_{other}': results.paired(values, nll[other])
            for other in ('random', 'last')
            if other in nll
          },
          'vs_none': results.paired(values, base),
          **tail_key,
        }
      )
  return rows


def policy_pictures(context: common.Context, num: int = 6) -> list[dict]:
  """Contexts with the policy's score of each chunk, for the report."""
  if not context.available('policy'):
    return []
  config, tokenizer = context.session.config, context.session.tokenizer
  name, corpus = next(iter(context.datasets.items()))
  cfg = config.stage['mixed']
  windows = eval_windows(
    config, corpus, cfg.context_length, max(config.eval.output_lengths), num
  )
  score_WC = common.apply(context, 'policy', Refrag.chunk_scores, windows)
  draws = max(
    1, expanded_chunks(max(config.eval.expand_fractions), score_WC.shape[1])
  )
  expand_WC = np.asarray(expand_top(jnp.asarray(score_WC), draws, 0))
  return [
    {
      'doc': f'{name} {windows["doc_B"][w]}',
      'text_chunks': [
        tokenizer.decode(ids[:n])
        for ids, n in zip(
          windows['chunks_BCK'][w].tolist(), windows['chunk_len_BC'][w]
        )
      ],
      'scores': score_WC[w].tolist(),
      'expanded': expand_WC[w].tolist(),
      'output': tokenizer.decode(windows['output_BO'][w].tolist()),
    }
    for w in range(len(score_WC))
  ]


def check_tail(config: Config) -> None:
  """Refuses a tail that is all of the context."""
  chunks = config.stage['mixed'].context_length // config.model.chunk_size
  if 0 < chunks <= config.eval.tail_chunks:
    raise UserError(
      f'config.eval.tail_chunks {config.eval.tail_chunks} leaves nothing of '
      f'the {chunks} chunks of config.stage.mixed.context_length: use fewer'
    )


EVAL = Eval(
  run=run,
  title='Which chunks to expand',
  table=tables.selection,
  needs=('output_lengths', 'expand_fractions', 'selectors'),
  stage='mixed',
  windows=continued('mixed'),
  check=check_tail,
)
