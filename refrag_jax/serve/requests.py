"""A question and its passages, as ids: what an engine is to answer.

Dimension key: C chunks of all passages, K chunk size, M encoder tokens.

The templates are those of training (data/questions/prompts.py), and so is the
way in which passages are cut: each on its own, in the order given, nothing of
it left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from refrag_jax.config.schema import Config
from refrag_jax.data import chunking
from refrag_jax.data.passages import Passage, of_record
from refrag_jax.data.questions import prompts
from refrag_jax.data.questions.records import fill
from refrag_jax.errors import UserError

MOST_CHARACTERS = 1 << 22  # of one passage: a book or two


class Request(NamedTuple):
  """What is asked, cut up."""

  prefix: np.ndarray  # int32, before the passages
  given: np.ndarray  # int32, between them and the answer
  chunks_CK: np.ndarray  # int32, decoder ids
  chunk_len_C: np.ndarray  # int32, all above 0
  encoder_CM: np.ndarray  # int32
  encoder_len_C: np.ndarray  # int32
  passage_C: np.ndarray  # int32, of which passage each chunk is
  text_C: tuple[str, ...]
  passages: tuple[Passage, ...]  # those that are read
  notes: tuple[str, ...]  # what was left out or cut short, for people


class Reader:
  """Cuts questions and passages as one model was trained to read them."""

  def __init__(self, config: Config, tokenizer: Any, encoder_tokenizer: Any):
    self.data, self.chunk_size = config.data, config.model.chunk_size
    self.tokenizer, self.encoder_tokenizer = tokenizer, encoder_tokenizer
    self._templates = prompts.templates(config.data, tokenizer)

  def __call__(
    self, question: str, passages: Sequence[str | Passage | Mapping] = ()
  ) -> Request:
    """The request that a question over passages is.

    Blank passages and repeated ones are left out, and the notes say so.

    Args:
      passages: texts, or with "text", "title" and "id"; none: the decoder's
        own knowledge.

    Raises:
      UserError: there is no question, or a passage is no text or too long.
    """
    if not isinstance(question, str) or not question.strip():
      raise UserError('the question is empty')
    around = prompts.around(
      question, self.data, self._templates, self.tokenizer, 1 << 30
    )
    kept, notes = _kept([passage(p, i) for i, p in enumerate(passages)])
    parts = [
      chunking.chunk_passage(
        self._shown(p), self.tokenizer, self.encoder_tokenizer,
        self.chunk_size, self.data.max_encoder_tokens,
      )
      for p in kept
    ]  # fmt: skip
    cut = sum(int(part.truncated_C.sum()) for part in parts)
    if cut:
      notes.append(
        f'{cut} chunks have more encoder tokens than '
        f'{self.data.max_encoder_tokens}, whose rest it does not see'
      )
    k, M = self.chunk_size, self.data.max_encoder_tokens
    joined = lambda name, *shape: np.concatenate(
      [np.zeros((0, *shape), np.int32), *(getattr(x, name) for x in parts)]
    )
    return Request(
      prefix=around.prefix,
      given=around.given,
      chunks_CK=joined('chunks_CK', k),
      chunk_len_C=joined('chunk_len_C'),
      encoder_CM=joined('encoder_CM', M),
      encoder_len_C=joined('encoder_len_C'),
      passage_C=np.repeat(
        np.arange(len(parts), dtype=np.int32),
        [len(part.chunk_len_C) for part in parts],
      ),
      text_C=tuple(
        self._shown(p)[a:b]
        for p, part in zip(kept, parts, strict=True)
        for a, b in part.spans_C2
      ),
      passages=tuple(kept),
      notes=tuple(notes),
    )

  def _shown(self, p: Passage) -> str:
    template = self.data.passage_template
    return fill(template, title=p.title, text=p.text)


def passage(value: str | Passage | Mapping, place: int = 0) -> Passage:
  """One passage, whatever form it is given in.

  Raises:
    UserError: it is no text, or longer than MOST_CHARACTERS.
  """
  where = f'passage {place + 1}'
  if isinstance(value, Passage):
    value = value._asdict()
  found = of_record(value, where)
  if len(found.text) > MOST_CHARACTERS:
    raise UserError(
      f'{where} has {len(found.text):,} characters, more than '
      f'{MOST_CHARACTERS:,}: cut it into passages of some hundred words'
    )
  return found


def _kept(passages: list[Passage]) -> tuple[list[Passage], list[str]]:
  """Those with text, each once; and what was left out."""
  there = [p for p in passages if p.text.strip()]
  once = list({(p.title, p.text): p for p in reversed(there)}.values())[::-1]
  notes = []
  if len(there) < len(passages):
    notes.append(f'{len(passages) - len(there)} blank passages left out')
  if len(once) < len(there):
    notes.append(f'{len(there) - len(once)} repeated passages left out')
  return once, notes
