"""The stages by name; the order of a run comes from `config.stages`."""

from refrag_jax.config import check as checks
from refrag_jax.config.schema import Config
from refrag_jax.errors import UserError
from refrag_jax.stages import baselines, compressed, grpo, lm, mlm
from refrag_jax.stages.stage import Stage

STAGES: dict[str, Stage] = {
  stage.name: stage
  for stage in (
    lm.LM,
    mlm.MLM,
    compressed.RECONSTRUCT,
    compressed.CPT,
    compressed.MIXED,
    grpo.GRPO,
    compressed.SFT,
    # Never part of REFRAG itself.
    baselines.CPT_TRAINED,
    baselines.MIXED_TRAINED,
    baselines.SFT_FULL,
    baselines.SFT_NONE,
    compressed.RECONSTRUCT_UNFROZEN,
    compressed.CPT_FROZEN,
    # The paper's strongest baseline.
    baselines.CEPE_WARMUP,
    baselines.CEPE,
    baselines.CEPE_UNFROZEN,
  )
}
IMPORTED = 'imported'  # what --mode=import writes, beside the stages


def check(config: Config) -> None:
  """Refuses stages that there are not, and sections that cannot work.

  Raises:
    UserError: in one line, what to change.
  """
  checks.names(config.stages, STAGES, 'stages')
  for name in config.stages:
    if name not in config.stage:
      raise UserError(
        f'config.stages names {name!r}, but config.stage.{name} is missing: '
        'add it to the config file'
      )
  starts = {'init_from': config.init_from} | {
    f'stage.{name}.init_from': config.stage[name].init_from
    for name in config.stages
  }
  for key, source in starts.items():
    if source.startswith('@'):
      beside(source, key)
  for name in config.stages:
    STAGES[name].check(config)


def beside(source: str, key: str) -> tuple[str, str]:
  """(run, stage) of '@RUN/STAGE': a stage of the workdir RUN beside this one.

  Args:
    source: what the config says.
    key: where it says it, for the message.

  Raises:
    UserError: it is not in this form, or there is no such stage.
  """
  run, _, stage = source.removeprefix('@').partition('/')
  if run in ('', '.', '..') or not stage or '/' in stage:
    raise UserError(
      f'config.{key} is {source!r}: write @RUN/STAGE, such as @main/lm, for a '
      'stage of the workdir RUN beside this one; other checkpoints by their '
      'path'
    )
  checks.known((stage,), (*STAGES, IMPORTED), key)
  return run, stage
