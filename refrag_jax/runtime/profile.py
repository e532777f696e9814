"""JAX's profiler over some steps of a stage, for XProf."""

import os
from typing import Any

import jax

from refrag_jax.runtime.progress import say


class Trace:
  """Traces from the first to the last step; process 0 only."""

  def __init__(self, workdir: str, stage: str, steps: tuple[int, ...]):
    self._directory = os.path.join(workdir, 'profile', stage)
    self._steps = steps if jax.process_index() == 0 else ()
    self._running = False

  def before(self, step: int) -> None:
    """Begins where this is the first step to trace."""
    if self._steps and step == self._steps[0]:
      jax.profiler.start_trace(self._directory)
      self._running = True

  def after(self, step: int, result: Any) -> None:
    """Ends behind the last one, once its result is there."""
    if self._running and step == self._steps[1]:
      jax.block_until_ready(result)
      self.close()

  def close(self) -> None:
    """Ends a trace that is under way, also of a run that was stopped."""
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
      say(f'traced: {self._directory}')
