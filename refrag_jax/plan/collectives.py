"""What a compiled program sends between devices, read from its HLO text.

XLA's own analysis has no collectives, and counts the body of a loop once; here
each one counts as often as its loop runs.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

OPS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)
BITS = {
  'pred': 8, 's2': 2, 'u2': 2, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16,
  'u16': 16, 's32': 32, 'u32': 32, 's64': 64, 'u64': 64, 'bf16': 16,
  'f16': 16, 'f32': 32, 'f64': 64, 'c64': 64, 'c128': 128,
}  # fmt: skip

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?[\w.-]+ = (.*)$')
_OPCODE = re.compile(r'^([a-z][\w-]*)\(')
_CALLED = re.compile(
  r'(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)'
)
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r'condition=%?([\w.-]+)')
_LIMIT = re.compile(r'%?([\w.-]+) = s32\[\]\S* constant\((\d+)\)')
_COMPARED = re.compile(r' compare\([^,]*, %?([\w.-]+)\), direction=LT')
# What a TPU runs beside its arithmetic stands in every fusion of its chain.
_CHAIN = re.compile(r'channel_id=(\d+),.*chain_id="(\d+)"')
# Between TPU slices the hosts carry it: a program has what one device gives.
_TO_SLICES = 'handler_name="xla_megascale_runtime"'
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\]')


@dataclasses.dataclass(frozen=True)
class Collective:
  """Collectives of one kind over one set of devices."""

  op: str
  axes: tuple[str, ...]  # of the mesh; () if its groups are no axes of it
  group: int  # devices that take part in each one
  bytes: int  # of one of them: the whole that a device gives or gets
  count: int  # how often it runs in a step

  @property
  def sent(self) -> float:
    """Bytes that each device has to send in all, in the best algorithm."""
    if self.op in ('collective-permute', 'send'):
      return self.passed
    return self.passed * (self.group - 1) / self.group

  @property
  def passed(self) -> float:
    """Bytes that pass any one place of its group; a reduction passes twice."""
    return self.bytes * self.count * (2 if self.op == 'all-reduce' else 1)


def read(
  text: str, axis_names: Sequence[str], axis_sizes: Sequence[int]
) -> list[Collective]:
  """The collectives of a partitioned module, equal ones counted together.

  Args:
    text: `compiled.as_text()`; '' of what could not be compiled.
    axis_names: of the mesh.
    axis_sizes: likewise; the devices are numbered in the mesh's order.
  """
  computations = _computations(text)
  if not computations:
    return []
  entry = next(name for name, c in computations.items() if c.entry)
  runs = collections.Counter()
  _count_runs(computations, entry, 1, runs)
  chains = {}
  for name, times in runs.items():
    for number, (chain, *what) in enumerate(computations[name].collectives):
      key = chain or (name, number)
      chains[key] = max(chains.get(key, (0,)), (times, *what))
  found = collections.Counter()
  for times, op, size, groups in chains.values():
    if op == 'send':  # only the first axis lies across slices (sharding.py)
      axes, members = tuple(axis_names[:1]), axis_sizes[0]
    else:
      axes = axes_of(groups, axis_names, axis_sizes)
      members = len(groups[0]) if groups else math.prod(axis_sizes)
    if members > 1:
      found[op, axes, members, size] += times
  return [Collective(*key, times) for key, times in found.items()]


def axes_of(
  groups: Sequence[Sequence[int]],
  axis_names: Sequence[str],
  axis_sizes: Sequence[int],
) -> tuple[str, ...]:
  """The mesh axes along which the devices of each group differ.

  () where the groups are not whole axes. No groups means all devices.
  """
  total = math.prod(axis_sizes)
  if not groups:
    groups = [range(total)]
  place = np.stack(np.unravel_index(np.arange(total), axis_sizes), -1)
  first = place[list(groups[0])]
  varies = (first != first[0]).any(0)
  if math.prod(np.asarray(axis_sizes)[varies]) != len(groups[0]):
    return ()
  for group in groups:
    if ((place[list(group)] != place[group[0]]).any(0) & ~varies).any():
      return ()
  return tuple(n for n, v in zip(axis_names, varies) if v)


@dataclasses.dataclass
class _Computation:
  entry: bool
  calls: list[tuple[str, int]]  # another computation, how often
  collectives: list[tuple]  # chain or None, op, bytes, groups
  limit: int = 1  # of a loop's condition: how often it holds, from 0 on


def _computations(text: str) -> dict[str, _Computation]:
  out, current, constants, loops = {}, None, {}, []
  for line in text.splitlines():
    head = _COMPUTATION.match(line)
    if head:
      current = out[head[2]] = _Computation(bool(head[1]), [], [])
      constants = {}
      continue
    for limit in _LIMIT.finditer(line):
      constants[limit[1]] = int(limit[2])
    compared = _COMPARED.search(line)
    if current and compared and compared[1] in constants:
      current.limit = constants[compared[1]]
    instruction = current and _INSTRUCTION.match(line)
    if not instruction:
      continue
    kind, rest = _split_type(instruction[1])
    opcode = _OPCODE.match(rest)
    if not opcode:
      continue
    op = opcode[1]
    if op == 'while':
      loops.append((current, rest))
    else:
      current.calls += [(name, 1) for name in _called(rest)]
    base = op.removesuffix('-start')
    if op == 'send' and _TO_SLICES in rest:
      current.collectives.append((None, op, _size(_halves(kind)[0]), None))
    if base in OPS:
      size = _payload(base, op != base, kind, rest)
      chain = _CHAIN.search(rest)
      key = chain and chain.groups()
      current.collectives.append((key, base, size, _groups(base, rest)))
  for computation, rest in loops:
    trips, condition = _TRIPS.search(rest), _CONDITION.search(rest)[1]
    times = int(trips[1]) if trips else out[condition].limit
    computation.calls += [(name, times) for name in _called(rest)]
  return out


def _called(rest: str) -> Iterator[str]:
  for match in _CALLED.finditer(rest):
    yield match[1]
  for match in _BRANCHES.finditer(rest):
    yield from (name.strip().lstrip('%') for name in match[1].split(','))


def _count_runs(computations, name: str, times: int, runs) -> None:
  if name not in computations:
    return
  runs[name] += times
  for callee, each in computations[name].calls:
    _count_runs(computations, callee, times * each, runs)


def _split_type(text: str) -> tuple[str, str]:
  """'(f32[2], s32[]) op(...)' -> its type, and the rest."""
  if not text.startswith('('):
    kind, _, rest = text.partition(' ')
    return kind, rest
  depth = 0
  for i, c in enumerate(text):
    depth += (c == '(') - (c == ')')
    if not depth:
      return text[: i + 1], text[i + 2 :]
  return text, ''


def _halves(kind: str) -> list[str]:
  """The parts of a tuple type; the type itself if it is none."""
  if not kind.startswith('('):
    return [kind]
  parts, depth, start = [], 0, 1
  for i, c in enumerate(kind):
    depth += (c in '([{') - (c in ')]}')
    if (c == ',' and depth == 1) or not depth:
      parts.append(kind[start:i].strip())
      start = i + 1
  return parts


def _size(kind: str) -> int:
  """Bytes of all arrays in a type."""
  total = 0
  for name, shape in _ARRAY.findall(kind):
    bits = 8 if name.startswith('f8') else 4 if name == 'f4e2m1fn' else None
    bits = bits or BITS.get(name, 0)
    total += bits * math.prod(map(int, filter(None, shape.split(',')))) // 8
  return total


def _payload(op: str, started: bool, kind: str, rest: str) -> int:
  """What a device gives or gets in whole, the larger of both."""
  if started and op != 'all-reduce':  # (what goes in, what comes out, ...)
    return max(map(_size, _halves(kind)[:2]))
  size = _size(kind)
  if op == 'reduce-scatter':
    groups = _groups(op, rest)
    size *= len(groups[0]) if groups else 1
  return size


def _groups(op: str, rest: str) -> list[list[int]]:
  """Who takes part in each: by explicit lists, an iota, or a mesh."""
  if op == 'collective-permute':
    pairs = re.search(r'source_target_pairs=\{(.*?)\}\}?(?:,|$| )', rest)
    pairs = pairs and re.findall(r'\{?(\d+),(\d+)\}', pairs[1] + '}')
    return _cycles([(int(a), int(b)) for a, b in pairs or ()])
  mesh = re.search(
    r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}',
    rest,
  )
  if mesh:
    names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    sizes = list(map(int, sizes))
    ids = _iota(mesh[2]) if mesh[2] else np.arange(math.prod(sizes))
    over = [names.index(name) for name in re.findall(r"'(\w+)'", mesh[3])]
    rest_axes = [i for i in range(len(sizes)) if i not in over]
    members = math.prod(sizes[i] for i in over)
    table = ids.reshape(sizes).transpose(*rest_axes, *over)
    return table.reshape(-1, members).tolist()
  iota = re.search(
    r'replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)', rest
  )
  if iota:
    return _iota(iota[1]).tolist()
  listed = re.search(r'replica_groups=\{(\{[\d,{} ]*\})\}', rest)
  if listed:
    groups = re.findall(r'\{([\d, ]+)\}', listed[1])
    return [[int(x) for x in group.split(',')] for group in groups]
  return []


def _iota(text: str) -> np.ndarray:
  """'[8,8]<=[64]' or '[8,8]<=[8,8]T(1,0)'; '[8,8]T(1,0)' has no first part."""
  numbers = lambda part: [int(x) for x in part.split(',')]
  shape, _, source = text.rpartition('<=')
  dims = re.match(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', source)
  ids = np.arange(math.prod(numbers(dims[1]))).reshape(numbers(dims[1]))
  if dims[2]:
    ids = ids.transpose(numbers(dims[2]))
  return ids.reshape(numbers(shape[1:-1])) if shape else ids


def _cycles(pairs: list[tuple[int, int]]) -> list[list[int]]:
  """Rings of a permutation, longest first."""
  after: dict[int, Any] = dict(pairs)
  rings = []
  while after:
    start, target = after.popitem()
    ring = [start]
    while target in after:
      ring.append(target)
      target = after.pop(target)
    if target not in ring:
      ring.append(target)
    rings.append(sorted(ring))
  return sorted(rings, key=len, reverse=True)
