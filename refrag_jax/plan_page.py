"""plan.html: memory, network and bounds of each stage, to be looked at."""


def write(path, out, session):
  pass
