"""What llama.cpp makes of a GGUF file.

  python llama_cpp_peer.py FILE.gguf REQUEST.json ANSWER.npz

runs in an environment with llama-cpp-python. The request has rows of "ids" of
one length, and "texts" to encode.
"""

import ctypes
import json
import pathlib
import sys

import llama_cpp as lib
import numpy as np


def main(file, request, answer):
  asked, found = json.loads(request.read_text()), {}
  lib.llama_backend_init()
  params = lib.llama_model_default_params()
  model = lib.llama_model_load_from_file(bytes(file), params)
  assert model
  if asked.get("ids"):
    found["logits"] = np.stack([logits(model, row) for row in asked["ids"]])
  for i, text in enumerate(asked.get("texts", ())):
    found[f"text{i}"], found[f"back{i}"] = encode(model, text)
  np.savez(answer, **found)


def logits(model, row):
  params = lib.llama_context_default_params()
  params.n_ctx = params.n_batch = params.n_ubatch = 64
  params.n_threads = params.n_threads_batch = 1
  # Its default keeps keys and values in float16.
  params.type_k = params.type_v = lib.GGML_TYPE_F32
  params.flash_attn_type = 0
  context = lib.llama_init_from_model(model, params)
  batch = lib.llama_batch_init(len(row), 0, 1)
  batch.n_tokens = len(row)
  for i, token in enumerate(row):
    batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
    batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
  assert lib.llama_decode(context, batch) == 0
  rows = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
  flat = lib.llama_get_logits(context)
  found = np.ctypeslib.as_array(flat, (len(row), rows)).copy()
  lib.llama_batch_free(batch)
  lib.llama_free(context)
  return found


def encode(model, text):
  """Returns ids with what llama.cpp adds to a text, and the text of them."""
  vocab, data = lib.llama_model_get_vocab(model), text.encode()
  ids = (ctypes.c_int32 * (len(data) + 2))()
  count = lib.llama_tokenize(vocab, data, len(data), ids, len(ids), True, False)
  assert count >= 0
  back, piece = b"", ctypes.create_string_buffer(256)
  for i in ids[:count]:
    size = lib.llama_token_to_piece(vocab, i, piece, len(piece), 0, False)
    back += piece.raw[:size]
  return np.array(ids[:count], np.int32), np.frombuffer(back, np.uint8)


if __name__ == "__main__":
  main(*map(pathlib.Path, sys.argv[1:]))
