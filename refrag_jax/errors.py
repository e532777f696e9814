"""The ways in which a run ends early on purpose, and their exit codes."""


class UserError(Exception):
  """The user's input is wrong: one line that says what, and what to do.

  `main` prints the message without a traceback and exits with 2.
  """

  exit_code = 2


class Stopped(BaseException):
  """Asked to stop by a signal: a training has saved its state; the same
  command continues, or starts again what keeps none.

  `main` prints the message and exits with 75 (EX_TEMPFAIL: run me again). Not
  an Exception: it may come at any place, and an `except Exception` around a
  file or a library would swallow it.
  """

  exit_code = 75


class NonFinite(Exception):
  """A loss or gradient overflowed; the message names step, batch and the last
  good checkpoint. One line, exit code 1.
  """

  exit_code = 1
