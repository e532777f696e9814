"""Weights in the Hugging Face layout; the only file that imports safetensors.

Reading: of each tensor what this host's devices need is read once, and cut into
their shards: a host holds its shards and one tensor more, never a whole model.
Writing: one file of about a gigabyte after the other, with an index.
Which tensor is which parameter stands in families.py.

Dimension key: Y layers.
"""

import collections
import functools
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
from safetensors.numpy import save_file

from refrag_jax.config.schema import LoraConfig
from refrag_jax.errors import UserError
from refrag_jax.hf import families, gguf, hub
from refrag_jax.hf.families import FAMILIES, Family, Tensor
from refrag_jax.runtime import files as files_lib
from refrag_jax.runtime.paths import refuse_pointer
from refrag_jax.runtime.progress import say
from refrag_jax.sharding import path_str

INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
# As they are in files, and as they go out again. Ours are float32.
DTYPES = {'F64': 'float32', 'F32': 'float32', 'F16': 'float16',
          'BF16': 'bfloat16'}  # fmt: skip
PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.msgpack', '.h5')
SHARD_BYTES = 1 << 30  # of a file that is written, gathered as a whole


# --- Reading ------------------------------------------------------------------


class Files:
  """The tensors of a directory, by name, read by range."""

  def __init__(self, directory: str):
    """Reads the headers of all files.

    Raises:
      UserError: a file is missing or damaged, or there are only pickles.
    """
    self.directory = directory
    self._file_of, self._shape_of = {}, {}
    for file, names in self._listed().items():
      handle = self._opened(file)
      there = set(handle.keys())
      for name in names or there:
        if name not in there:
          raise UserError(
            f'{directory}: {INDEX} says that {name} is in {file}, where it is '
            'not; download both again'
          )
        self._file_of[name] = file
        self._shape_of[name] = tuple(handle.get_slice(name).get_shape())

  def _listed(self) -> dict[str, list[str]]:
    """file: the names that it should hold; []: whatever it holds."""
    if self._exists(SINGLE):  # as transformers does where there are both
      return {SINGLE: []}
    index = os.path.join(self.directory, INDEX)
    if os.path.exists(index):
      files = collections.defaultdict(list)
      try:
        for name, file in hub.read_json(index)['weight_map'].items():
          files[file].append(name)
      except (KeyError, TypeError, AttributeError):
        raise UserError(
          f'{index} has no weight_map: download it again'
        ) from None
      missing = [f for f in sorted(files) if not self._exists(f)]
      if missing:
        raise UserError(
          f'{self.directory} lacks {", ".join(missing)} of the {len(files)} '
          f'files that its {INDEX} names: download it again'
        )
      return files
    names = sorted(os.listdir(self.directory))
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
      raise UserError(
        f'{self.directory} has its weights as {pickles[0]} only, a pickle, '
        'which can run any program when it is opened: convert it to '
        'safetensors where you trust it (transformers: from_pretrained, then '
        'save_pretrained)'
      )
    raise UserError(
      f'{self.directory} has no {SINGLE} and no {INDEX} (of hub models nothing '
      'else is fetched: pickles can run any program when they are opened)'
    )

  def _exists(self, file: str) -> bool:
    return os.path.exists(os.path.join(self.directory, file))

  def _opened(self, file: str):
    path = os.path.join(self.directory, file)
    try:
      refuse_pointer(path)
      return safetensors.safe_open(path, 'numpy')
    except (safetensors.SafetensorError, OSError) as e:
      raise UserError(
        f'{path} is damaged or cut off ({e}): download it again'
      ) from None

  def names(self) -> list[str]:
    return list(self._file_of)

  def slice(self, name: str):
    """The tensor by name, from which ranges are read when it is indexed."""
    # Opened anew: what an open file has read stays mapped into memory.
    return self._opened(self._file_of[name]).get_slice(name)

  def shape(self, name: str) -> tuple[int, ...]:
    return self._shape_of[name]


def open_files(directory: str) -> Files | gguf.Files:
  """The tensors of a model's directory, in whatever files they are."""
  ours = any(name.endswith('.safetensors') for name in os.listdir(directory))
  there = not ours and gguf.files(directory)
  return gguf.Files(directory) if there else Files(directory)


def read_params(directory: str, abstract: Any) -> Any:
  """A model's parameters, straight into the shardings of `abstract`.

  Args:
    directory: with config.json and safetensors.
    abstract: a group's tree of ShapeDtypeStructs with shardings; values are
      cast to their dtype on the way.

  Raises:
    UserError: a tensor is missing, left over, of another shape or not finite,
      or a file is damaged.
  """
  config = families.read_config(directory)
  family = FAMILIES[families.family_of(config, directory)]
  files = open_files(directory)
  tied = config.get('tie_word_embeddings', True)
  name_of = _checked_names(files, family, abstract, directory, tied)
  clock, size = time.monotonic(), 0
  leaves = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
    tensor = _tensor_of(family, path_str(path))
    leaves[path_str(path)] = array = _read_leaf(files, tensor, leaf, name_of)
    size += array.nbytes
    if not bool(jax.numpy.isfinite(array).all()):
      raise UserError(
        f'{directory}: {tensor.theirs} has values that are not finite; the '
        'file is damaged, or was never a model'
      )
  seconds = max(time.monotonic() - clock, 1e-9)
  say(f'{directory}  read {size / 1e9:.2f} GB in {seconds:.1f} s, '
      f'{size / 1e9 / seconds:.2f} GB/s')  # fmt: skip
  return jax.tree_util.tree_map_with_path(
    lambda path, _: leaves[path_str(path)], abstract
  )


def _tensor_of(family: Family, path: str) -> Tensor:
  found = [tensor for tensor in family.tensors if tensor.ours == path]
  if not found:
    raise UserError(f'{family.architecture} has nothing for our {path}')
  return found[0]


def _needed(family: Family, abstract: Any) -> Iterator[tuple[str, tuple]]:
  """The tensors that a group is made of, and their shapes."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
    tensor = _tensor_of(family, path_str(path))
    shape = leaf.shape
    layers = [None]
    if '{}' in tensor.theirs:
      layers, shape = range(tensor.first, shape[0]), shape[1:]
    theirs = _folded(tensor, shape)
    theirs = (theirs[0] * tensor.parts, *theirs[1:])
    for y in layers:
      yield tensor.theirs.format(y), theirs
    if tensor.added:
      yield tensor.added, (None, *theirs[1:])  # any number of rows


def _folded(tensor: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape there of our array without its layer axis (one part)."""
  if tensor.num_in:
    inputs, outputs = shape[: tensor.num_in], shape[tensor.num_in :]
    return int(np.prod(outputs)), int(np.prod(inputs))
  return (int(np.prod(shape)),) if tensor.ours.endswith('bias') else shape


def _checked_names(files, family, abstract, directory, tied) -> dict[str, str]:
  """Canonical name: name in the files; refuses what does not fit."""
  wrapped = [name for name in files.names() if '.lora_' in name]
  if wrapped:
    families.refuse_adapter(directory, wrapped[0])
  needed, name_of = dict(_needed(family, abstract)), {}
  prefix = families.prefix_of(files.names(), needed, family, directory)
  for name in files.names():
    short = families.canonical(name, prefix, family)
    if short in name_of:
      raise UserError(f'{directory} has both {name} and {name_of[short]}')
    name_of[short] = name
  if prefix not in ('', family.prefix):
    say(f"{directory}  its tensors' names are read without {prefix!r}")
  embedding, head = family.tied
  if embedding not in name_of and head not in needed and tied:
    name_of |= {embedding: name_of.pop(head)} if head in name_of else {}
  missing = [name for name in needed if name not in name_of]
  if missing:
    raise UserError(
      f'{directory} lacks {len(missing)} tensors that its config.json asks '
      f'for: {_some(missing)}'
    )
  extra = [
    name
    for name in name_of
    if name not in needed and not re.search(families.BUFFERS, name)
  ]
  if extra == ['lm_head.weight'] and _same(files, name_of, head, embedding):
    extra = []  # a tied head, written down all the same
  # Of an encoder with a prefix, what has none follows it, as ColBERT's linear.
  own = {prefix, *(name.split('.')[0] for name in needed)}
  beside = lambda name: (
    bool(prefix) and not name_of[name].startswith(tuple(own))
  )
  unused = [
    name
    for name in extra
    if re.search(family.heads, name)
    or (family.group == 'encoder' and beside(name))
  ]
  modules = families.left_out(families.modules(directory))
  if unused or modules:
    names = [f'{m["path"]} ({m["kind"]})' for m in modules]
    names += [f'{len(unused)} tensors ({_some(unused)})'] if unused else []
    say(f'{directory}  left out, not part of what REFRAG runs: '
        f'{" and ".join(names)}')  # fmt: skip
  extra = [name for name in extra if name not in unused]
  if extra:
    raise UserError(
      f'{directory} has {len(extra)} tensors that have no place in this '
      f'model: {_some(extra)}; its config.json does not belong to it'
    )
  for name, wanted in needed.items():
    found = files.shape(name_of[name])
    fits = len(found) == len(wanted) and all(
      w in (None, f) for f, w in zip(found, wanted)
    )
    kind = files.slice(name_of[name]).get_dtype()
    if kind not in DTYPES:
      raise UserError(
        f'{directory}: {name_of[name]} is of type {kind}, which is none of '
        f'{", ".join(DTYPES)}: take the model before it was quantized'
      )
    if not fits:
      raise UserError(
        f'{directory}: {name_of[name]} is {found}, but its config.json makes '
        f'it {tuple("any" if w is None else w for w in wanted)}'
      )
  return name_of


def _some(names: list[str]) -> str:
  return ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')


def _same(files: Files, name_of: Mapping[str, str], a: str, b: str) -> bool:
  if files.shape(name_of[a]) != files.shape(name_of[b]):
    return False
  one, other = (files.slice(name_of[name]) for name in (a, b))
  rows = files.shape(name_of[a])[0]
  return all(
    np.array_equal(one[i : min(i + 4096, rows)], other[i : min(i + 4096, rows)])
    for i in range(0, rows, 4096)
  )


def _read_leaf(files, tensor, leaf, name_of) -> jax.Array:
  """One of our arrays; this host's devices share what was read."""
  where = leaf.sharding.addressable_devices_indices_map(leaf.shape)
  by_index = collections.defaultdict(list)
  for device, index in where.items():
    bounds = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape))
    by_index[bounds].append(device)
  parts = _read_parts(files, tensor, leaf, name_of, list(by_index))
  pieces = {}
  for bounds, devices in by_index.items():
    part = parts.pop(bounds)
    for device in devices:
      pieces[device] = jax.device_put(part, device)
    jax.block_until_ready([pieces[device] for device in devices])
  return jax.make_array_from_single_device_arrays(
    leaf.shape, leaf.sharding, [pieces[device] for device in where]
  )


def _read_parts(files, tensor, leaf, name_of, wanted) -> dict:
  """Bounds, a (begin, end) for each axis: our array between them."""
  parts = {
    bounds: np.empty([end - begin for begin, end in bounds], leaf.dtype)
    for bounds in wanted
  }
  # What spans them all is read; a column of shards would touch every page.
  box = tuple(
    (min(begin for begin, _ in axis), max(end for _, end in axis))
    for axis in zip(*wanted)
  )
  stacked = '{}' in tensor.theirs
  layers = range(*box[0]) if stacked else (None,)
  shape, inner_box = (leaf.shape[1:], box[1:]) if stacked else (leaf.shape, box)
  for y in layers:
    if stacked and y < tensor.first:
      read = np.broadcast_to(1, [end - begin for begin, end in inner_box])
    else:
      name = tensor.theirs.format(y)
      read = _read_range(files, tensor, name, name_of, shape, inner_box)
    for bounds, part in parts.items():
      if not stacked:
        part[...] = read[_within(box, bounds)]
      elif bounds[0][0] <= y < bounds[0][1]:
        part[y - bounds[0][0]] = read[_within(inner_box, bounds[1:])]
  return parts


def _within(box, bounds) -> tuple[slice, ...]:
  """Where `bounds` lie in what was read of `box`."""
  return tuple(
    slice(begin - first, end - first)
    for (first, _), (begin, end) in zip(box, bounds)
  )


def _transposed(matrix: np.ndarray) -> np.ndarray:
  """A copy in rows; numpy's own, column by column, takes twice as long."""
  out = np.empty(matrix.shape[::-1], matrix.dtype)
  for row in range(0, len(matrix), 64):
    out[:, row : row + 64] = matrix[row : row + 64].T
  return out


def _read_range(files, tensor, name, name_of, shape, bounds) -> np.ndarray:
  """Our array of one layer (or of none) between bounds, in their dtype."""
  theirs = files.slice(name_of[name])
  sizes = tuple(end - begin for begin, end in bounds)
  if not tensor.num_in:
    if len(shape) == len(files.shape(name_of[name])):
      out = theirs[tuple(slice(*b) for b in bounds)]
    else:  # a bias of heads
      begin, end, rest = _flat(shape, bounds)
      out = theirs[begin:end].reshape(rest)
      out = out[_inner(shape, bounds)]
    if tensor.added:
      row = files.slice(name_of[tensor.added])[0:1, slice(*bounds[-1])]
      out = out.astype(np.float32) + row.astype(np.float32)
    return out
  n = tensor.num_in
  in_begin, in_end, in_rest = _flat(shape[:n], bounds[:n])
  out_begin, out_end, out_rest = _flat(shape[n:], bounds[n:])
  offset = tensor.part * int(np.prod(shape[n:]))
  read = theirs[offset + out_begin : offset + out_end, in_begin:in_end]
  read = _transposed(read).reshape(*in_rest, *out_rest)
  inner = _inner(shape[:n], bounds[:n]) + _inner(shape[n:], bounds[n:])
  return read[inner].reshape(sizes)


def _flat(shape, bounds) -> tuple[int, int, tuple[int, ...]]:
  """The range of folded axes that holds these bounds, and its shape.

  The first axis is cut; the others are read whole.
  """
  inner = int(np.prod(shape[1:]))
  begin, end = bounds[0]
  return begin * inner, end * inner, (end - begin, *shape[1:])


def _inner(shape, bounds) -> tuple[slice, ...]:
  return (slice(None), *(slice(*b) for b in bounds[1:]))


def dtypes(directory: str) -> dict[str, str]:
  """What an export of a model is written in: the types that it came in.

  By the names in families.py, of those that are narrower than float32 in all
  layers; sums of two tensors are not.
  """
  values = families.read_config(directory)
  family = FAMILIES[families.family_of(values, directory)]
  files, out = open_files(directory), {}
  for tensor in family.tensors:
    other = family.tied[1] if tensor.theirs == family.tied[0] else ''
    found = _of_name(files, tensor.theirs) or _of_name(files, other)
    kinds = {DTYPES.get(files.slice(name).get_dtype()) for name in found}
    if len(kinds) == 1 and not kinds & {None, 'float32'} and not tensor.added:
      out[tensor.theirs] = kinds.pop()
  return out


def _of_name(files: Files, theirs: str) -> list[str]:
  """The tensors of a name in families.py, whatever stands before it."""
  pattern = re.escape(theirs).replace(r'\{\}', r'\d+')
  pattern = pattern.replace(r'LayerNorm\.weight', r'LayerNorm\.(weight|gamma)')
  pattern = pattern.replace(r'LayerNorm\.bias', r'LayerNorm\.(bias|beta)')
  found = re.compile(rf'(^|\.){pattern}$')
  return [name for name in files.names() if theirs and found.search(name)]


def module_tensors(directory: str, module: str) -> dict[str, np.ndarray]:
  """The tensors of a module that REFRAG does not run, by name from it on."""
  files, out = open_files(directory), {}
  for name in files.names():
    if found := re.search(rf'(?:^|\.)({module}\..+)$', name):
      out[found[1]] = files.slice(name)[...]
  return out


# --- Writing ------------------------------------------------------------------


def write_params(
  directory: str,
  group: str,
  params: Any,
  config: Mapping[str, Any],
  dtype: Any,
  more: Mapping[str, np.ndarray] | None = None,
) -> list[str]:
  """Writes a group as a model of the family that its config.json names.

  Args:
    directory: exists.
    params: the group's arrays, on a mesh of this process; the tensors of a file
      are gathered when it is written.
    dtype: of the tensors that are written; or one each, as `dtypes` has them.
    more: further tensors, written as they are.

  Returns:
    The names of the files.
  """
  family = FAMILIES[config['model_type']]
  assert family.group == group, (family, group)
  plan = _written(family, params, dtype, config.get('type_vocab_size'))
  for name, array in (more or {}).items():
    plan[name] = Plan(array.shape, array.dtype, lambda array=array: array)
  sizes = {
    name: int(np.prod(shape)) * kind.itemsize
    for name, (shape, kind, _) in plan.items()
  }
  files, last, used = [[]], 0, 0
  for name, size in sizes.items():
    if files[last] and used + size > SHARD_BYTES:
      files.append([])
      last, used = last + 1, 0
    files[last].append(name)
    used += size
  names = [SINGLE]
  if len(files) > 1:
    names = [
      f'model-{i + 1:05d}-of-{len(files):05d}.safetensors'
      for i in range(len(files))
    ]
  for file, of_file in zip(names, files, strict=True):
    tensors = {
      name: np.ascontiguousarray(fetch().astype(kind))
      for name in of_file
      for _, kind, fetch in [plan[name]]
    }
    _save(tensors, os.path.join(directory, file), metadata={'format': 'pt'})
    del tensors
  if len(files) > 1:
    weight_map = {
      name: file
      for file, of_file in zip(names, files, strict=True)
      for name in of_file
    }
    files_lib.write_json(
      os.path.join(directory, INDEX),
      {
        'metadata': {'total_size': sum(sizes.values())},
        'weight_map': weight_map,
      },
    )
    names.append(INDEX)
  by_kind = collections.Counter()
  for name, (_, kind, _) in plan.items():
    by_kind[kind.name] += sizes[name]
  files_lib.write_json(
    os.path.join(directory, 'config.json'),
    {**config, 'dtype': by_kind.most_common(1)[0][0]},
  )
  return [*names, 'config.json']


def _save(tensors: dict[str, np.ndarray], path: str, **more: Any) -> None:
  """A file of tensors with the permissions that any new file gets here.

  safetensors gives its own to the owner alone, and tells the disk's errors as
  one of its own kind.
  """
  with open(path, 'wb') as f:
    mode = stat.S_IMODE(os.fstat(f.fileno()).st_mode)
  try:
    save_file(tensors, path, **more)
  except safetensors.SafetensorError as e:
    number = re.search(r'os error (\d+)', str(e))
    if number is None:
      raise
    raise OSError(int(number[1]), os.strerror(int(number[1])), path) from e
  os.chmod(path, mode)


class Plan(NamedTuple):
  """A tensor that is to be written."""

  shape: tuple[int, ...]
  kind: np.dtype
  fetch: Callable[[], np.ndarray]


def _written(
  family: Family, params: Any, dtype: Any, token_types: int | None
) -> dict[str, Plan]:
  """The tensors of a group by name, in the order of the layers."""
  kind_of = lambda tensor: jax.numpy.dtype(
    dtype.get(tensor.theirs, 'float32') if isinstance(dtype, Mapping) else dtype
  )
  fused, plain = collections.defaultdict(dict), {}
  for path, array in jax.tree_util.tree_leaves_with_path(params):
    tensor = _tensor_of(family, path_str(path))
    layers = [None]
    if '{}' in tensor.theirs:
      layers = range(tensor.first, array.shape[0])
    for y in layers:
      name = tensor.theirs.format(y)
      fused[name][tensor.part] = (tensor, array, y)
    if tensor.added:  # folded into ours: nothing is left for it
      rows = (token_types or 2, array.shape[-1])
      plain[tensor.added] = Plan(
        rows, kind_of(tensor), lambda rows=rows: np.zeros(rows, np.float32)
      )
  out = {}
  for name, parts in fused.items():
    ordered = [parts[i] for i in sorted(parts)]
    tensor, array, y = ordered[0]
    shape = _folded(tensor, array.shape if y is None else array.shape[1:])
    fetch = lambda ordered=ordered: np.concatenate(
      [_fetch(*of) for of in ordered]
    )
    whole = (shape[0] * len(ordered), *shape[1:])
    out[name] = Plan(whole, kind_of(tensor), fetch)
  out |= plain
  if family.group == 'decoder':  # of the class with a head
    out = {
      name if name.startswith('lm_head') else family.prefix + name: value
      for name, value in out.items()
    }
  number = lambda name: int((re.findall(r'\.(\d+)\.', name) or [-1])[0])
  return dict(sorted(out.items(), key=lambda item: number(item[0])))


def _fetch(tensor: Tensor, array: jax.Array, y: int | None) -> np.ndarray:
  """One layer of ours as theirs."""
  ours = np.asarray(array if y is None else array[y])
  shape = _folded(tensor, ours.shape)
  if tensor.num_in:
    return ours.reshape(shape[::-1]).T
  return ours.reshape(shape)


def write_adapters(
  directory: str, params: Any, cfg: LoraConfig, base: str
) -> list[str]:
  """Writes the group `lora` as a directory that PEFT loads.

  Args:
    directory: exists.
    base: the name of the decoder that they were trained for.

  Returns:
    The names of the files.
  """
  tensors, theirs = {}, {tensor.ours: tensor for tensor in families.DECODER}
  for name, adapter in params.items():
    tensor = theirs[f'layers/{name}/kernel']
    stem = f'base_model.model.model.{tensor.theirs.removesuffix(".weight")}'
    a_YR = np.asarray(adapter['a']['kernel'])
    b_YR = np.asarray(adapter['b']['kernel'])
    for y, (a, b) in enumerate(zip(a_YR, b_YR)):
      of_layer = stem.format(y)
      tensors[f'{of_layer}.lora_A.weight'] = a.reshape(-1, cfg.rank).T
      tensors[f'{of_layer}.lora_B.weight'] = b.reshape(cfg.rank, -1).T
  file, config = families.ADAPTERS[1], families.ADAPTERS[0]
  _save(
    {name: np.ascontiguousarray(x) for name, x in tensors.items()},
    os.path.join(directory, file),
  )
  files_lib.write_json(
    os.path.join(directory, config),
    {
      'peft_type': 'LORA',
      'task_type': 'CAUSAL_LM',
      'base_model_name_or_path': base,
      'r': cfg.rank,
      'lora_alpha': cfg.alpha,
      'target_modules': sorted(params),
      'lora_dropout': cfg.dropout,
      'bias': 'none',
      'inference_mode': True,
    },
  )
  return [file, config]


def save_arrays(
  path: str,
  params: Any,
  names: Collection[str] | None = None,
  dtype: Any = np.float32,
) -> None:
  """A tree of arrays by its own names, or those that are named of it."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  _save(
    {
      path_str(p): np.asarray(x).astype(dtype)
      for p, x in leaves
      if names is None or path_str(p) in names
    },
    path,
  )


def load_arrays(path: str, abstract: Any, known: Any = None) -> Any:
  """What `save_arrays` wrote, in the shardings of `abstract`.

  Args:
    known: a tree whose arrays stand for those that the file has not.

  Raises:
    UserError: the file is damaged or holds something else.
  """
  known = {
    path_str(p): x for p, x in jax.tree_util.tree_leaves_with_path(known or {})
  }
  try:
    file = safetensors.safe_open(path, 'numpy')
  except (safetensors.SafetensorError, OSError) as e:
    raise UserError(f'{path} is damaged or cut off ({e})') from None
  leaves = jax.tree_util.tree_leaves_with_path(abstract)
  wanted, there = {path_str(p): x for p, x in leaves}, set(file.keys())
  other = (wanted.keys() - known.keys() - there) | (there - wanted.keys())
  if other:
    raise UserError(
      f'{path} holds other arrays than this config has: {_some(sorted(other))}'
    )

  def load(p, x):
    if path_str(p) not in there:
      return known[path_str(p)]
    value = file.get_tensor(path_str(p))
    if value.shape != x.shape:
      raise UserError(
        f'{path}: {path_str(p)} is {value.shape} there and {x.shape} here'
      )
    return jax.device_put(value.astype(x.dtype), x.sharding)

  return jax.tree_util.tree_map_with_path(load, abstract)


@functools.lru_cache(maxsize=256)
def digest(path: str, size: int, changed: int) -> str:
  """SHA-256 of a file; `size` and `changed` (its mtime) tell its versions."""
  del size, changed
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def fingerprint(directory: str) -> str:
  """What tells one model's directory from another, without reading weights."""
  parts = [json.dumps(families.read_config(directory), sort_keys=True)]
  for name in sorted(os.listdir(directory)):
    path = os.path.join(directory, name)
    if name.endswith('.safetensors'):
      with open(path, 'rb') as f:
        length = int.from_bytes(f.read(8), 'little')
        header = f.read(min(length, 1 << 24))
      parts += [name, str(os.path.getsize(path)), header.hex()]
    elif gguf.is_file(name):  # no length of its header in front
      with open(path, 'rb') as f:
        header = f.read(1 << 24)
      parts += [name, str(os.path.getsize(path)), header.hex()]
  return hashlib.sha256('\n'.join(parts).encode()).hexdigest()[:16]
