"""Each signal that asks for a stop does, and a lost terminal is no error."""

import os
import pty
import signal
import sys

import pytest

from refrag_jax.runtime import progress, stopping

ALL = (*stopping.SIGNALS, signal.SIGINT)


def test_these_signals_ask_for_a_stop():
  names = {s.name for s in ALL}
  assert names == {'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGINT'}


@pytest.mark.parametrize('signum', ALL, ids=lambda s: s.name)
def test_a_signal_asks_for_a_stop(signum, capsys):
  before = signal.getsignal(signum)
  with stopping.stop_on_signal() as stop:
    os.kill(os.getpid(), signum)
    assert stop.wait(5)
  assert signal.getsignal(signum) == before
  said = f'{signum.name}: stopping after this step\n'
  assert capsys.readouterr().out == said


def test_nohup_goes_on():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with stopping.stop_on_signal() as stop:
      os.kill(os.getpid(), signal.SIGHUP)
      assert not stop.wait(0.1)
  finally:
    signal.signal(signal.SIGHUP, before)


def test_a_lost_terminal_is_no_error(monkeypatch):
  """It sends HUP, and what is printed until the state is saved must not end it."""
  master, slave = pty.openpty()
  with open(slave, 'w') as terminal:
    os.close(master)
    monkeypatch.setattr(sys, 'stdout', terminal)
    progress.say('lm  1/2')
    progress.say('lm  2/2')
