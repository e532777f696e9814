"""The model's methods as functions of (model, params, ...), for the tests."""

import functools

from refrag_jax.models.cepe import Cepe
from refrag_jax.models.refrag import Refrag


def _call(method, model, params, *args, **kwargs):
  return model.apply({'params': params}, *args, method=method, **kwargs)


chunk_vectors = functools.partial(_call, Refrag.chunk_embeddings)
output_nll = functools.partial(_call, Refrag.output_nll)
output_states = functools.partial(_call, Refrag.output_states)
compressed_nll = functools.partial(_call, Refrag.compressed_nll)
plain_nll = functools.partial(_call, Refrag.plain_nll)


def policy_scores(model, params, batch, c_BCE):
  return _call(Refrag.score, model, params, c_BCE, batch['chunk_len_BC'] > 0)


def cepe_nll(model, params, batch):
  return _call(Cepe.output_nll, Cepe(model.cfg), params, batch)
