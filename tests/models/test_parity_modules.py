"""Each module of a block against its twin in transformers, on the same input.

Dimension key: B batch or chunks, T positions, D width; X, M and E are an
encoder's.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch')
hf_torch = pytest.importorskip('hf_torch')

from refrag_jax.models import attention, encoder, layers, modernbert  # noqa: E402
from refrag_jax.models.decoder import Block  # noqa: E402

# Ours: theirs. A module's output is compared; that of attention is its last
# projection's, that of the MLP likewise.
DECODER = {
  'input_layernorm': 'input_layernorm',
  'q_norm': 'self_attn.q_norm',
  'k_norm': 'self_attn.k_norm',
  'o_proj': 'self_attn',
  'post_attention_layernorm': 'post_attention_layernorm',
  'down_proj': 'mlp',
}
BERT = {
  'o_proj': 'attention.output.dense',
  'attention_norm': 'attention.output.LayerNorm',
  'down_proj': 'output.dense',
  'output_norm': 'output.LayerNorm',
}
MODERNBERT = {
  'attention_norm': 'attn_norm',
  'o_proj': 'attn',
  'mlp_norm': 'mlp_norm',
  'down_proj': 'mlp',
}
B, T = 2, 13
IDS_BT = np.random.default_rng(0).integers(2, 40, (B, T))


def recorded(model, blocks, names, **given):
  """Runs the torch model; each block's input, and its modules' outputs."""
  inputs, outputs, hooks = [], [{} for _ in blocks], []
  first = lambda out: (out[0] if isinstance(out, tuple) else out).numpy()
  for out, block in zip(outputs, blocks):
    hooks.append(
      block.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append(
          first(args or kwargs['hidden_states'])
        ),
        with_kwargs=True,
      )
    )
    modules = dict(block.named_modules())
    for ours, theirs in names.items():
      if theirs in modules:
        hooks.append(
          modules[theirs].register_forward_hook(
            lambda _, args, found, out=out, ours=ours: out.update(
              {ours: first(found)}
            )
          )
        )
  with torch.no_grad():
    model(**given)
  for hook in hooks:
    hook.remove()
  return inputs, outputs


def assert_modules(block, params, layer, args, wanted):
  """The block's modules, run on the recorded input, give what was recorded."""
  own = jax.tree.map(lambda x: x[layer], params['layers'])
  _, found = block.apply(
    {'params': own}, *args, capture_intermediates=True, mutable='intermediates'
  )
  assert len(wanted) >= 3
  for name, theirs in wanted.items():
    ours = np.asarray(found['intermediates'][name]['__call__'][0])
    apart = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert apart <= 1e-5, (layer, name, apart)


def decoder(name, tmp_path):
  """A decoder in torch, what its modules gave, and the same model here."""
  model = hf_torch.decoder(name, seed=3)
  cfg, params = hf_torch.read(hf_torch.saved(model, tmp_path))
  inputs, wanted = recorded(
    model, model.model.layers, DECODER, input_ids=torch.tensor(IDS_BT)
  )
  scaling = layers.RopeScaling(
    cfg.rope_factor,
    cfg.rope_low_freq_factor,
    cfg.rope_high_freq_factor,
    cfg.rope_original_length,
  )
  positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
  angles = layers.rope_angles(
    positions_BT, cfg.head_dim, cfg.rope_theta, scaling
  )
  places = attention.Places(jnp.arange(T)[None])
  args = [(x_BTD, None, angles, places, places, None) for x_BTD in inputs]
  assert len(args) == cfg.num_layers
  return model, cfg, params, args, wanted


@pytest.mark.parametrize('name', hf_torch.DECODERS)
def test_modules_of_a_decoder(name, tmp_path):
  model, cfg, params, args, wanted = decoder(name, tmp_path)
  x_BTD, _, angles, *_ = args[0]
  positions_BT = torch.arange(T).expand(B, T)
  cos, sin = model.model.rotary_emb(torch.tensor(x_BTD), positions_BT)
  for ours, theirs in zip(angles, (sin, cos)):
    # Theirs is written twice, once for each half of a head.
    theirs = theirs.numpy()[..., : cfg.head_dim // 2]
    np.testing.assert_allclose(ours[:, :, 0], theirs, atol=1e-5)
  block = Block(cfg, 'dense', None, None)
  for layer in range(cfg.num_layers):
    assert_modules(block, params, layer, args[layer], wanted[layer])


@pytest.mark.parametrize('name', hf_torch.ENCODERS)
def test_modules_of_an_encoder(name, tmp_path):
  model = hf_torch.encoder(name, seed=3)
  cfg, params = hf_torch.read(hf_torch.saved(model, tmp_path))
  modern = name == 'modernbert'
  blocks = model.layers if modern else model.encoder.layer
  inputs, wanted = recorded(
    model,
    blocks,
    MODERNBERT if modern else BERT,
    input_ids=torch.tensor(IDS_BT),
    attention_mask=torch.ones(B, T, dtype=torch.long),
  )
  real_XMM = jnp.ones((B, T, T), bool)
  assert len(inputs) == cfg.num_layers
  for layer, x_XME in enumerate(inputs):
    if not modern:
      block, args = encoder.EncoderBlock(cfg), (x_XME, real_XMM)
    else:
      place_M = jnp.arange(T)
      apart_MM = jnp.abs(place_M[:, None] - place_M[None])
      angles = [
        layers.rope_angles(place_M[None], cfg.width // cfg.num_heads, theta)
        for theta in (cfg.rope_theta, cfg.local_rope_theta)
      ]
      block = modernbert.ModernBertBlock(cfg)
      args = (x_XME, layer, (apart_MM <= cfg.local_window)[None], real_XMM)
      args += tuple(angles)
      if layer == 0:  # it has no such norm
        del wanted[layer]['attention_norm']
    assert_modules(block, params, layer, args, wanted[layer])


def test_another_module_would_be_seen(tmp_path):
  _, cfg, params, args, wanted = decoder('llama', tmp_path)
  norm = params['layers']['post_attention_layernorm']
  norm['scale'] += 1e-3
  with pytest.raises(AssertionError, match='post_attention_layernorm'):
    assert_modules(
      Block(cfg, 'dense', None, None), params, 0, args[0], wanted[0]
    )
