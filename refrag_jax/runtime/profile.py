"""JAX's profiler over some steps of a stage, for XProf."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import jax

from refrag_jax.runtime.progress import say


class Trace:
  """Traces those steps of a stage that are asked for; process 0 only."""

  def __init__(
    self,
    workdir: str,
    stage: str,
    steps: tuple[int, ...],
    aside: Callable[[str], Any] = contextlib.nullcontext,
  ):
    """Begins nothing yet.

    Args:
      steps: the first and the last, counted from 1; (): none.
      aside: a context for time that is in no rate, as of Progress.excluded.
    """
    self._directory = os.path.join(workdir, 'profile', stage)
    active = steps and jax.process_index() == 0
    self._steps = range(steps[0], steps[1] + 1) if active else range(0)
    self._aside = aside
    self._running = False

  def step(self, step: int) -> contextlib.AbstractContextManager:
    """What a step is dispatched in: XProf finds the steps by it.

    The trace begins here, in a run that is resumed behind the first of the
    steps as well.
    """
    if step not in self._steps:
      return contextlib.nullcontext()
    if not self._running:
      with self._aside('profile'):
        jax.profiler.start_trace(self._directory)
      self._running = True
    return jax.profiler.StepTraceAnnotation('train', step_num=step)

  def after(self, step: int, result: Any) -> None:
    """Ends behind the last one, once its result is there."""
    if self._running and step == self._steps[-1]:
      jax.block_until_ready(result)
      self.close()

  def close(self) -> None:
    """Ends a trace that is under way, also of a run that was stopped."""
    if self._running:
      with self._aside('profile'):
        jax.profiler.stop_trace()
      self._running = False
      say(f'traced: {self._directory}')
