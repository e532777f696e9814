"""Adapters against PEFT, in torch, through the directory that we write.

Dimension key: B batch, T positions, R rank.
"""

import dataclasses

import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch')
peft = pytest.importorskip('peft')
hf_torch = pytest.importorskip('hf_torch')

import toy  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from refrag_jax.config.schema import LoraConfig  # noqa: E402
from refrag_jax.hf import convert  # noqa: E402
from refrag_jax.models.refrag import Refrag, init_params  # noqa: E402

TARGETS = [toy.LORA_TARGETS, ('q_proj', 'v_proj')]


@pytest.mark.parametrize('targets', TARGETS, ids=['all', 'two'])
@pytest.mark.parametrize('name', ['llama', 'qwen2', 'qwen3'])
def test_logits_and_gradients_are_those_of_peft(name, targets, tmp_path):
  model = hf_torch.decoder(name, 2)
  cfg, decoder = hf_torch.read(hf_torch.saved(model, tmp_path / 'base'))
  of_lora = LoraConfig(rank=3, alpha=7.0, dropout=0.3, targets=targets)
  config = dataclasses.replace(hf_torch.model_config(cfg), lora=of_lora)
  rng = np.random.default_rng(0)
  adapters = jax.tree.map(
    lambda x: 0.3 * rng.standard_normal(x.shape).astype(np.float32),
    init_params(config, jax.random.key(0))['lora'],
  )
  (tmp_path / 'adapter').mkdir()
  convert.write_adapters(str(tmp_path / 'adapter'), adapters, of_lora, 'base')
  theirs = peft.PeftModel.from_pretrained(
    model, tmp_path / 'adapter', is_trainable=True
  ).eval()  # without dropout, which ours has in training steps alone
  ids_BT = rng.integers(2, 40, (3, 17))
  given = torch.tensor(ids_BT)
  out = theirs(given, labels=given)

  refrag = Refrag(config)

  def run(adapters, of):
    params = {'decoder': decoder, 'lora': adapters}
    ones_BT = np.ones_like(ids_BT)
    positions_BT = np.broadcast_to(np.arange(ids_BT.shape[1]), ids_BT.shape)
    batch = {
      'tokens_BT': ids_BT, 'segment_ids_BT': ones_BT,
      'positions_BT': positions_BT,
    }  # fmt: skip
    nll_BT, _ = refrag.apply(
      {'params': params}, batch, method=Refrag.next_token_nll
    )
    return nll_BT.mean() if of == 'loss' else nll_BT

  loss, grads = jax.value_and_grad(lambda a: run(a, 'loss'))(adapters)
  assert float(loss) == pytest.approx(out.loss.item(), abs=1e-5)
  # Without its adapters the decoder says something else.
  zero = jax.tree.map(np.zeros_like, adapters)
  assert abs(float(run(zero, 'loss')) - out.loss.item()) > 0.01

  out.loss.backward()
  torch_grads = {
    name.replace('.default', ''): x.grad.numpy()
    for name, x in theirs.named_parameters()
    if x.grad is not None
  }
  (tmp_path / 'grads').mkdir()
  convert.write_adapters(str(tmp_path / 'grads'), grads, of_lora, 'base')
  ours = load_file(str(tmp_path / 'grads' / 'adapter_model.safetensors'))
  assert ours.keys() == torch_grads.keys()
  scale = np.sqrt(sum((x.astype(float) ** 2).sum() for x in ours.values()))
  for key, grad in ours.items():
    assert np.linalg.norm(grad - torch_grads[key]) <= 1e-4 * scale, key
