"""A phase that lasts too long names itself and shows where all threads are."""

import re
import threading
import time

from refrag_jax.runtime import progress, watchdog


def sleepily(event):
  event.wait(30)


def test_a_hang_names_its_phase_and_every_thread(tmp_path):
  end = threading.Event()
  thread = threading.Thread(target=sleepily, args=(end,))
  thread.start()
  with open(tmp_path / 'log', 'w') as log, watchdog.watch(0.2, log):
    watchdog.phase('lm, step 3')
    deadline = time.monotonic() + 20
    while not (tmp_path / 'log').read_text():
      assert time.monotonic() < deadline
      time.sleep(0.05)
    time.sleep(0.5)  # it says so once
  end.set()
  thread.join()
  said = (tmp_path / 'log').read_text()
  assert said.count('has been at "lm, step 3" for 0.2 s') == 1
  assert 'test_watchdog.py", line' in said and 'in sleepily' in said


def test_who_goes_on_is_left_alone(tmp_path):
  with open(tmp_path / 'log', 'w') as log, watchdog.watch(1.0, log):
    for step in range(30):
      watchdog.phase(f'step {step}')
      time.sleep(0.05)
  assert (tmp_path / 'log').read_text() == ''


def test_nothing_is_watched_for_no_time():
  before = threading.active_count()
  with watchdog.watch(0):
    assert threading.active_count() == before


def test_a_pause_is_told_and_then_less_often(capsys):
  """Of one kind: steps 1, 2, 3 … are one, so that slow ones do not fill the log."""
  watchdog.phase('lm, step 0')
  with progress.tell_of_pauses(0.1):
    for step in range(10):
      watchdog.phase(f'lm, step {step}')
      time.sleep(0.1)
    watchdog.phase('lm, checkpoint')
    time.sleep(0.5)
    progress.say('a line')
    time.sleep(0.05)
  lines = capsys.readouterr().out.splitlines()
  steps = [line for line in lines if ', step' in line]
  assert 2 <= len(steps) <= 4, lines  # after 0.1, 0.2 and 0.4 s
  assert all(
    re.fullmatch(r'at work: lm, .*, since [\d:]{8}', x) for x in lines[:-1]
  )
  assert 'lm, checkpoint' in lines[-2] and lines[-1] == 'a line'
