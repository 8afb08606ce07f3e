"""Safetensors are read as written; damaged and hostile files are refused."""

import json

import huggingface_harness as harness
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.core.errors import UserError
from mdm_jax.huggingface import safetensors

TENSORS = {
  "a": np.arange(6, dtype=np.float32).reshape(2, 3),
  "b": np.array([1.5, -2.0], jnp.bfloat16),
  "empty": np.zeros((0, 4), np.float16),
}


def test_tensors_come_back_as_they_were_written(tmp_path):
  safetensors.write(tmp_path / safetensors.FILE, TENSORS)
  found = safetensors.read(tmp_path)
  assert list(found) == list(TENSORS)
  for name, tensor in TENSORS.items():
    assert found[name].dtype == tensor.dtype
    np.testing.assert_array_equal(found[name], tensor)
  # A view of the file, which is read only where it is used.
  assert isinstance(found["a"].base.base, np.memmap)


def test_shards_are_one_mapping(tmp_path):
  harness.save_shards(tmp_path, TENSORS)
  found = safetensors.read(tmp_path)
  assert set(found) == set(TENSORS)
  np.testing.assert_array_equal(found["b"], TENSORS["b"])


def _file(header, data=b""):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return len(text).to_bytes(8, "little") + text + data


def _entry(dtype="F32", shape=(2,), start=0, end=8):
  fields = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
  return {"x": fields}


DAMAGED = {
  "empty": (b"", "it is empty"),
  "short": (b"abc", "its header would have"),
  "a header past the end": (b"\xff" * 7 + b"\x7f", "its header would have"),
  "a header that is cut": (_file(_entry())[:30], "its header would have"),
  "no JSON": (_file(b"{]"), "not valid JSON"),
  "nested deeply": (_file(b"[" * 100_000), "not valid JSON"),
  "a list": (_file([1]), "not a JSON object"),
  "a name twice": (_file(b'{"x": 1, "x": 2}'), "a name occurs twice"),
  "data that is cut": (
    _file(_entry(), b"1234"),
    "have 8 bytes, the file has 4",
  ),
  "data left over": (_file(_entry(), b"1" * 12), "the file has 12"),
  "an unknown dtype": (_file(_entry("F7"), b"1" * 8), "describes 'x' as"),
  "a negative shape": (_file(_entry(shape=(-2,)), b"1" * 8), "describes 'x'"),
  "a shape of booleans": (_file(_entry(shape=(True,)), b"1" * 4), "describes"),
  "a wrong size": (_file(_entry(shape=(3,)), b"1" * 8), "needs 12"),
  "a gap": (_file(_entry(start=4, end=12), b"1" * 12), "begins at byte 4"),
  "an overlap": (
    _file(_entry() | {"y": _entry(start=4, end=12)["x"]}, b"1" * 12),
    "begins at byte 4 of the data, not 8",
  ),
  "no offsets": (_file({"x": {"dtype": "F32", "shape": []}}), "describes 'x'"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, what):
  content, message = DAMAGED[what]
  path = tmp_path / safetensors.FILE
  path.write_bytes(content)
  with pytest.raises(UserError, match=message) as error:
    safetensors.read(tmp_path)
  assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_an_unsupported_dtype_is_named_when_it_is_used(tmp_path):
  path = tmp_path / safetensors.FILE
  path.write_bytes(_file(_entry("F8_E4M3", (8,)), b"1" * 8))
  found = safetensors.read(tmp_path)
  with pytest.raises(UserError, match="x has dtype F8_E4M3; supported: F64"):
    found["x"]


INDICES = {
  "outside": ({"a": "../model.safetensors"}, "only plain names"),
  "a missing file": ({"a": "gone.safetensors"}, "can't be read"),
  "a missing tensor": ({"c": "part.safetensors"}, "disagree about 'a'"),
  "no map": (None, "has no weight_map"),
}


@pytest.mark.parametrize("what", INDICES)
def test_a_wrong_index_is_refused(tmp_path, what):
  files, message = INDICES[what]
  safetensors.write(tmp_path / "part.safetensors", TENSORS)
  index = json.dumps({"weight_map": files})
  (tmp_path / safetensors.INDEX).write_text(index)
  with pytest.raises(UserError, match=message):
    safetensors.read(tmp_path)


def test_pickles_are_not_opened(tmp_path):
  (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
  with pytest.raises(UserError, match="pytorch_model.bin is a pickle"):
    safetensors.read(tmp_path)
