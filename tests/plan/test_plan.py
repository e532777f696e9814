"""Plans: sizes as they are, bounds by hand, fixes that fit, clear refusals."""

import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import toy_config
import toy_run

from refrag_jax import compilation, evaluate, flops, sharding
from refrag_jax import session as session_lib
from refrag_jax.errors import UserError
from refrag_jax.models.refrag import init_params
from refrag_jax.plan import collectives, compiled, serving, topologies
from refrag_jax.plan import run as plan
from refrag_jax.serve.engine import Engine
from refrag_jax.session import Session, settle_attention, to_device
from refrag_jax.stages import STAGES
from refrag_jax.state import TrainState
from refrag_jax.step import init_opt_state

KEYS = {  # of plan.json, which others read
  'parameter_bytes', 'optimizer_bytes', 'argument_bytes', 'temp_bytes',
  'peak_bytes', 'fits', 'flops', 'collectives', 'compile_s', 'bound_step_s',
  'bound_by', 'tokens_per_s', 'mfu_ceiling',
}  # fmt: skip
# Eight devices of a made-up chip.
CHIP = topologies.Chip('cuda', 1e12, 1 << 30, 1e9, 1e8, 1e7)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return toy_config.write_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def cfg(folder):
  return toy_run.config(
    folder, stages=('reconstruct', 'cpt', 'mixed_trained'),
    mesh__data=2, mesh__fsdp=2, mesh__tensor=2,
  )  # fmt: skip


def eight(**chip):
  return topologies.Topology(
    'toy:2x4', CHIP._replace(**chip), jax.devices(), 4, {}
  )


@pytest.fixture(scope='module')
def planned(cfg):
  session = plan.open_planned(cfg, eight())
  return session, plan.plan_stage(session, eight(), 'cpt')


def test_predicted_sizes_are_those_of_real_arrays(cfg, planned, folder):
  _, stage = planned
  opened = toy_run.open_session(cfg, f'{folder}/run', toy_run.mesh(2, 2, 2))
  params = toy_run.fresh_params(opened)
  state = TrainState(np.int32(0), params, init_opt_state(params, STAGES['cpt']))
  state = jax.device_put(state, sharding.infer_shardings(state, opened.mesh))
  rows = np.arange(cfg.stage['cpt'].batch_size)
  sample = STAGES['cpt'].sampler(cfg, opened.corpus)
  keys = STAGES['cpt'].chunks_of_steps(cfg)
  batch = to_device(sample(int(keys.argmax()), rows), opened.mesh)

  def held(tree):
    return sum(
      shard.data.nbytes
      for x in jax.tree.leaves(tree)
      for shard in x.addressable_shards
      if shard.device == jax.devices()[5]
    )

  assert stage.parameter_bytes == held(state.params)
  assert stage.optimizer_bytes == held(state.opt_state)
  assert stage.batch_bytes == held(batch)
  # The program leaves out what it does not read, such as document numbers.
  whole = held((state, batch))
  assert whole - 400 <= stage.argument_bytes <= whole + 100


def test_bounds_by_hand(planned):
  session, stage = planned
  assert stage.chunks == max(session.config.stage['cpt'].factors[:3])
  assert stage.compute_s == stage.flops / 1e12
  changing = stage.optimizer_bytes + stage.gradient_bytes
  assert stage.hbm_s == 2 * changing / 1e9  # float32: gradients as parameters
  assert changing < stage.argument_bytes
  times = {k: getattr(stage, f'{k}_s') for k in ('compute', 'hbm', 'network')}
  assert stage.bound_step_s == max(times.values()) == times[stage.bound_by]
  assert stage.mfu_ceiling == pytest.approx(
    stage.model_flops / 1e12 / stage.bound_step_s
  )
  assert stage.model_flops <= stage.flops
  steps = session.config.stage['cpt'].num_train_steps
  assert 0 < stage.bound_hours * 3600 <= steps * stage.bound_step_s * 1.0001
  assert {c['axis'] for c in stage.collectives} >= {'fsdp', 'tensor'}


def test_frozen_weights_that_are_multiplied_with_are_read(cfg):
  """`grpo` trains next to nothing, and reads a whole decoder and encoder."""
  session = plan.open_planned(cfg, eight())
  stage = plan.plan_stage(session, eight(), 'grpo')
  changing = stage.optimizer_bytes + stage.gradient_bytes
  rest = stage.parameter_bytes - stage.gradient_bytes
  tables = compiled.device_bytes([
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      compilation.abstract_state(session, 'grpo').params
    )
    if 'embed' in jax.tree_util.keystr(path)
  ])  # fmt: skip
  assert tables < rest
  assert stage.hbm_s == pytest.approx((2 * changing + rest - tables) / 1e9)


def test_model_flops_are_of_nothing_twice(cfg):
  """However a step comes by them: the MFU of plans and of log lines."""
  model = dataclasses.replace(
    cfg.model, remat='full', attention='blockwise', loss_block=8
  )
  other = plan.open_planned(dataclasses.replace(cfg, model=model), eight())
  session, name = plan.open_planned(cfg, eight()), 'cpt'
  state, key = compilation.abstract_state(session, name), (2, None)
  batch = compilation.abstract_batch(session, name, key[0])
  with jax.set_mesh(session.mesh):
    plain, heavy = (
      flops.count(compilation.trace_step(s, name, state, batch, key[1]).jaxpr)
      for s in (session, other)
    )
  assert heavy > 1.1 * plain
  assert compilation.model_flops(session, name, state, key) == plain
  assert compilation.model_flops(other, name, state, key) == plain


def test_the_time_of_the_network_by_hand():
  """Two hosts of four; data lies over the hosts, the others within."""
  there, mesh = eight(), toy_run.mesh(2, 2, 2)
  spread = lambda *axes, group=0: plan.spread(
    collectives.Collective('all-gather', axes, group, 1, 1), mesh, there.near
  )
  assert spread('fsdp') == spread('tensor') == (1, 2)
  assert spread('fsdp', 'tensor') == (1, 4)
  assert spread('data') == (2, 1)
  assert spread('data', 'fsdp') == (2, 2)
  assert spread(group=8) == (2, 4)  # no axes of the mesh
  assert spread(group=4) == (1, 4)
  of = lambda *sent: plan.network_seconds(
    [collectives.Collective(*c) for c in sent], mesh, there
  )
  gather = ('all-gather', ('fsdp',), 2, 1000, 3)
  assert of(gather) == pytest.approx(3 * 500 / 1e8)
  reduce = ('all-reduce', ('data',), 2, 1000, 1)
  assert of(reduce) == pytest.approx(2 * 500 / 1e7)
  # Both wires at once: the slower one counts.
  assert of(gather, reduce) == pytest.approx(2 * 500 / 1e7)
  # Four devices on two hosts: half comes from outside, through two cards.
  both = ('all-gather', ('data', 'fsdp'), 4, 1000, 1)
  assert of(both) == pytest.approx(1000 / 2 / 2 / 1e7)
  # Each device has a quarter for each of the four: half of it goes outside,
  # through its own card. And a ring has two that are neighbours across.
  swap = ('all-to-all', ('data', 'fsdp'), 4, 1000, 1)
  assert of(swap) == pytest.approx(500 / 1e7)
  ring = ('collective-permute', ('data', 'fsdp'), 4, 1000, 1)
  assert of(ring) == pytest.approx(1000 / 1e7)
  # What a TPU gives its host for the other slices leaves whole.
  assert of(('send', ('data',), 2, 1000, 3)) == pytest.approx(3000 / 1e7)


@pytest.mark.slow
def test_what_does_not_fit_gets_fixes_that_do(cfg, planned, monkeypatch):
  session, stage = planned
  small = eight(hbm=int(stage.peak_bytes / compiled.USABLE) - 1)
  tight = plan.plan_stage(session, small, 'cpt')
  assert not tight.fits and stage.fits
  assert plan.worst_of({'cpt': tight, 'lm': stage}) == 'cpt'
  assert plan.worst_of({'lm': stage}) == ''
  all_of_them = plan.candidates
  monkeypatch.setattr(  # each is compiled
    plan,
    'candidates',
    lambda *args: [
      change
      for change in all_of_them(*args)
      if change in (('model.remat=full',), ('mesh.data=1', 'mesh.fsdp=4'))
    ],
  )
  found = list(plan.fixes_of(cfg, small, 'cpt'))
  assert 1 <= len(found) <= plan.MOST_FIXES
  for fix in found:
    assert fix['peak_bytes'] <= compiled.usable(small)
    changes = [c.removeprefix('--config.') for c in fix['change'].split()]
    changed = plan.open_planned(plan.changed(cfg, changes), small)
    assert plan.plan_stage(changed, small, 'cpt').fits
  hopeless = eight(hbm=1000)
  assert list(plan.fixes_of(cfg, hopeless, 'cpt')) == []


def test_layouts_to_search(cfg):
  rows = list(plan.layouts(cfg, eight()))
  assert len(set(rows)) == len(rows)
  for *mesh, _ in rows:
    sizes = [int(change.partition('=')[2]) for change in mesh]
    assert math.prod(sizes) == 8 and math.prod(sizes[2:]) <= 4
  assert (
    'mesh.data=1',
    'mesh.fsdp=8',
    'mesh.tensor=1',
    'mesh.sequence=1',
    'model.remat=full',
  ) in rows
  # Within a host, between them only data.
  assert (
    'mesh.data=2',
    'mesh.fsdp=4',
    'mesh.tensor=1',
    'mesh.sequence=1',
    'model.remat=dots',
  ) in rows


@pytest.mark.slow
def test_layouts_are_ranked(cfg, monkeypatch):
  few = [row for row in plan.layouts(cfg, eight()) if 'model.remat=full' in row]
  monkeypatch.setattr(plan, 'layouts', lambda config, there: few[:3])
  rows = plan.search_layouts(cfg, eight(), 'cpt')
  assert len(rows) == 3
  times = [row['bound_step_s'] for row in rows]
  assert all(row['fits'] for row in rows) and times == sorted(times)
  middle = sorted(row['peak_bytes'] for row in rows)[1]
  small = eight(hbm=int(middle / compiled.USABLE) + 1)
  rows = plan.search_layouts(cfg, small, 'cpt')
  fits = [row['fits'] for row in rows]
  assert fits == sorted(fits, reverse=True) and not fits[-1]


def test_a_plan_of_this_machine(cfg, tmp_path, capsys, monkeypatch):
  two = toy_run.replaced(cfg, stages=('reconstruct', 'cpt'))
  monkeypatch.setattr(
    plan, 'layouts', lambda config, there: [('mesh.data=2', 'model.remat=full')]
  )
  assert plan.run(two, str(tmp_path), 'cpu:8', True, True) == 0
  out = json.loads((tmp_path / 'plan.json').read_text())
  assert out['devices'] == 8 and out['topology'] == 'cpu:8'
  assert out['stages'].keys() == set(two.stages)
  for stage in out['stages'].values():
    assert stage.keys() >= KEYS and stage['fits'] is True
    for c in stage['collectives']:
      assert c.keys() == {'op', 'axis', 'bytes', 'count'}
  assert [row['stage'] for row in out['search']] == [
    'reconstruct'
  ]  # the most expensive
  said = capsys.readouterr().out
  assert 'cpt  ' in said and 'nan' not in said
  page = (tmp_path / 'plan.html').read_text()
  assert 'decoder/layers/down_proj/kernel' in page and 'nan' not in page


def test_serving_by_hand(folder):
  """What the engine holds, and bounds of its programs, on eight devices."""
  bench = dict(contexts=(64,), question_tokens=8, output_tokens=8, batches=(6,))
  cfg = toy_run.config(
    folder, stages=(), mesh__data=2, mesh__fsdp=2, mesh__tensor=2,
    **{f'bench__{name}': value for name, value in bench.items()},
  )  # fmt: skip
  session = plan.open_planned(cfg, eight())
  found = serving.plan(session, eight())
  assert (found.slots, found.positions) == (8, 80)  # four ways to share rows
  assert [(p.name, p.positions) for p in found.programs] == [
    ('prefill, full context', 72), ('prefill, k = 4', 24),
    ('decode, full context', 80), ('decode, k = 4', 32),
  ]  # fmt: skip
  # They lie as the engine's own do.
  with jax.set_mesh(session.mesh):
    shapes = session_lib.abstract_params(session)
    drawn = jax.jit(
      lambda: init_params(cfg.model, jax.random.key(0)),
      out_shardings=jax.tree.map(lambda x: x.sharding, shapes),
    )()
    engine = Engine(cfg.model, drawn, 0, [(8, 80)], 4, 6)
  for real, planned in (
    (engine.weights, serving.abstract_weights(session)),
    (engine.pools[0].slots, serving.abstract_slots(session, 8, 80)),
  ):
    for x, y in zip(jax.tree.leaves(real), jax.tree.leaves(planned)):
      assert (x.shape, x.dtype) == (y.shape, y.dtype)
      assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
  weights = compiled.device_bytes(serving.abstract_weights(session))
  held = weights + compiled.device_bytes(
    {x: shapes[x] for x in ('encoder', 'projection', 'policy')}
  )
  assert found.weight_bytes == held
  d = cfg.model.decoder
  heads = max(1, d.num_kv_heads // 2)
  assert found.slot_bytes == 2 * d.num_layers * 80 * heads * d.head_dim * 4
  temp = max(p.temp_bytes for p in found.programs)
  room = compiled.USABLE * CHIP.hbm - held - temp
  assert found.sequences_that_fit == 4 * int(room // found.slot_bytes)
  decode = found.programs[2]
  assert decode.hbm_s == pytest.approx((weights + 2 * found.slot_bytes) / 1e9)
  assert decode.bound_s == max(decode.hbm_s, decode.compute_s)
  whole, short = found.programs[:2]
  assert 0 < short.flops < whole.flops


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('h10:8x8', "no chip 'h10'; did you mean 'h100'"),
    ('', 'no chip'),
    ('h100', 'written h100:8x8, hosts x cards'),
    ('h100:8', 'written h100:8x8'),
    ('h100:0x8', 'written h100:8x8'),
    ('v5p:4x4', 'written v5p:4x4x4'),
    ('v5e:4x4x4', 'written v5e:4x4'),
    ('cpu:2x2', 'written cpu:8'),
    ('h100:8x8@2', 'written h100:8x8'),
    ('v5e:4x4@', 'written v5e:4x4; two slices: v5e:4x4@2'),
  ],
)
def test_what_is_no_topology(name, message):
  with pytest.raises(UserError, match=message):
    topologies.parse(name)


def test_topologies_are_parsed():
  assert topologies.parse('h200:2x8') == ('h200', (2, 8), 1)
  assert topologies.parse('v5p:4x4x8@4') == ('v5p', (4, 4, 8), 4)
  assert topologies.parse('cpu:8') == ('cpu', (8,), 1)


def test_a_missing_compiler_is_an_install_line(monkeypatch):
  monkeypatch.setattr(topologies, '_where', lambda package: '')
  for name, extra in (('h100:1x8', 'plan-gpu'), ('v5e:2x2', 'plan-tpu')):
    with pytest.raises(
      UserError, match=rf'python\S* -m pip install "\.\[{extra}\]"'
    ):
      topologies.load(name)


def test_a_mesh_and_a_batch_must_fit_the_topology(cfg):
  three = toy_run.replaced(cfg, mesh=dataclasses.replace(cfg.mesh, data=3))
  with pytest.raises(UserError, match='is not the 8 devices'):
    plan.open_planned(three, eight())
  wide = dataclasses.replace(cfg.mesh, data=8, fsdp=1, tensor=1)
  uneven = plan.changed(cfg, ['stage.cpt.batch_size=4'])
  with pytest.raises(UserError, match='does not divide over 8 devices'):
    plan.open_planned(toy_run.replaced(uneven, mesh=wide), eight())
  fused = plan.changed(cfg, ['model.attention=splash'])
  with pytest.raises(UserError, match='a kernel for tpu devices; these are c'):
    plan.open_planned(fused, eight())
  with pytest.raises(UserError, match='sees a whole row'):
    plan.changed(fused, ['mesh.sequence=2'])
  with pytest.raises(UserError, match='needs --topology='):
    plan.run(cfg, '', '', False, False)


BFLOAT16 = 'model.compute_dtype=bfloat16'


@pytest.mark.parametrize(
  ('platform', 'capability', 'here', 'changes', 'kind'),
  [
    ('gpu', '9.0', True, (BFLOAT16,), 'cudnn'),
    ('gpu', '9.0', True, (), 'blockwise'),  # cuDNN's has no float32
    ('gpu', '7.5', True, (BFLOAT16,), 'blockwise'),  # a T4
    ('gpu', 'gfx942', True, (BFLOAT16,), 'blockwise'),  # AMD's
    # What is described has no cuDNN to ask.
    ('gpu', '9.0', False, (BFLOAT16,), 'blockwise'),
    ('gpu', '9.0', True, (BFLOAT16, 'model.decoder.head_dim=256'), 'cudnn'),
    ('gpu', '8.0', True, (BFLOAT16, 'model.decoder.head_dim=256'), 'blockwise'),
    ('tpu', '', True, (), 'splash'),
    ('tpu', '', False, (), 'splash'),
    ('tpu', '', True, ('mesh.sequence=2',), 'blockwise'),  # sees a whole row
    ('tpu', '', True, ('mesh.sequence=-1',), 'splash'),  # what is left is 1
    ('cpu', '', True, (), 'blockwise'),
  ],
)
def test_fused_attention_is_what_the_devices_have(
  cfg, monkeypatch, platform, capability, here, changes, kind
):
  config = plan.changed(cfg, ['model.attention=fused', *changes])
  device = SimpleNamespace(platform=platform, compute_capability=capability)
  monkeypatch.setattr(jax, 'devices', lambda: [device] if here else [])
  mesh = SimpleNamespace(
    devices=np.array([device]), shape={'sequence': abs(config.mesh.sequence)}
  )
  asked = Session(config, '', mesh, None, None, None, {})
  found = settle_attention(asked)
  assert found.config.model.attention == kind == found.model.cfg.attention
  assert evaluate.fingerprint(config) == evaluate.fingerprint(found.config)


def test_fused_attention_is_planned(cfg):
  fused = plan.changed(cfg, ['model.attention=fused'])
  planned = plan.open_planned(fused, eight())
  assert planned.model.cfg.attention == 'blockwise'


def test_cards_are_described_in_full():
  for kind, chip in topologies.CHIPS.items():
    if chip.platform == 'cuda':
      text = topologies.target_config(kind)
      assert f'device_memory_size: {chip.hbm}' in text and '{{' not in text


def test_a_stage_that_a_tpu_s_compiler_refuses_does_not_fit(cfg, monkeypatch):
  def refuse(*_, **__):
    raise jax.errors.JaxRuntimeError(
      'RESOURCE_EXHAUSTED: ... Used 82.20G of 15.75G hbm. Exceeded'
    )

  monkeypatch.setattr(jax.stages.Lowered, 'compile', refuse)
  there = eight(platform='tpu', hbm=16 << 30)
  stage = plan.plan_stage(plan.open_planned(cfg, there), there, 'cpt')
  assert not stage.fits and stage.collectives == []
  assert math.isnan(stage.network_s) and stage.bound_by != 'network'
  assert stage.peak_bytes == int(82.20 * 2**30)


@pytest.mark.parametrize(
  'message',
  [
    'RESOURCE_EXHAUSTED: ... Used 82.20G of 15.75G hbm. Exceeded',
    'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required '
    'for HLO temporaries (82.20G) exceeds available HBM (15.75G).',
  ],
)
def test_a_tpu_that_is_too_small_says_how_much_was_needed(message):
  chip = topologies.CHIPS['v5e']
  found = topologies.exhausted(message, chip)
  assert found['peak_bytes'] == int(82.20 * 2**30)
  assert (
    topologies.exhausted('RESOURCE_EXHAUSTED', chip)['peak_bytes'] > chip.hbm
  )


def test_a_plan_compiles_with_the_flags_of_its_run(cfg):
  cluster = dataclasses.replace(
    cfg.cluster,
    xla_flags=('--xla_a=true', '--xla_b=3'),
    libtpu_flags=('--c=1',),
  )
  gpu = eight()._replace(chip=topologies.CHIPS['h100'])
  assert topologies.flags(gpu, cluster) == {'xla_a': True, 'xla_b': '3'}
  tpu = eight()._replace(chip=topologies.CHIPS['v5p'])
  assert topologies.flags(tpu, cluster) == {'c': '1'}
  assert topologies.flags(topologies.load('cpu:8'), cluster) == {}
  session = plan.open_planned(toy_run.replaced(cfg, cluster=cluster), gpu)
  with pytest.raises(UserError, match='cluster, .* No such compile option'):
    plan.plan_stage(session, gpu, 'lm')


def test_changes_to_try(cfg):
  """One at a time, then together; none twice, and the mesh is one there is."""
  tried = list(plan.candidates(cfg, 8, 'cpt'))
  assert len(set(tried)) == len(tried)
  sizes = [len(change) for change in tried]
  assert tried[0] == ('model.attention=blockwise',)
  assert ('mesh.data=1', 'mesh.fsdp=4') in tried
  assert any({'model.remat=full', 'mesh.fsdp=4'} <= set(c) for c in tried[:24])
  wide = toy_run.replaced(
    cfg, mesh=dataclasses.replace(cfg.mesh, data=2, fsdp=-1)
  )
  assert ('mesh.data=1', 'mesh.fsdp=4') in plan.candidates(wide, 8, 'cpt')
  assert max(sizes) <= 4
