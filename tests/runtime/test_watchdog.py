"""A phase that lasts too long names itself and shows where all threads are."""

import threading
import time

from refrag_jax.runtime import watchdog


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
