"""Tokens to text as they come: whole characters, nothing of a stop string."""

from collections.abc import Sequence
from typing import Any

UNFINISHED = '\ufffd'  # what a decoder writes for a character's first bytes


class Writer:
  """The text of one answer, while it is written.

  What may still turn out otherwise is held back: a character of which there are
  only some bytes, and an end that a stop string may begin with.
  """

  def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
    self._tokenizer, self._stops = tokenizer, tuple(stops)
    self._ids: list[int] = []
    self.text = ''  # what was given out
    self.closed = False  # it ended, or a stop string came: nothing follows

  def take(self, ids: Sequence[int]) -> str:
    """More tokens; returns the text that they add for certain."""
    self._ids += ids
    return self._give(final=False)

  def end(self) -> str:
    """No more tokens; returns what was held back."""
    return self._give(final=True)

  def _give(self, final: bool) -> str:
    if self.closed:
      return ''
    self.closed = final
    whole = self._tokenizer.decode(self._ids)
    found = [at for stop in self._stops if (at := whole.find(stop)) >= 0]
    if found:
      whole, self.closed = whole[: min(found)], True
    elif not final:
      whole = whole.rstrip(UNFINISHED)
      whole = whole[: len(whole) - self._may_stop(whole)]
    # A decoder that takes back what it wrote has to wait until it is done.
    if not whole.startswith(self.text) and not self.closed:
      return ''
    new = whole[len(self.text) :]
    self.text += new
    return new

  def _may_stop(self, text: str) -> int:
    """Characters at the end that are the beginning of a stop string."""
    return max(
      (
        length
        for stop in self._stops
        for length in range(1, len(stop))
        if text.endswith(stop[:length])
      ),
      default=0,
    )
