"""What transformers makes of an exported folder.

  python export_peer.py FOLDER REQUEST.json ANSWER.npz

runs in an environment with torch and transformers. The request has rows of
"ids", "texts" to encode, and "draws", each arguments of generate().
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers


def main(folder, request, answer):
  asked, found = json.loads(request.read_text()), {}
  gguf = {"gguf_file": "model.gguf"} if asked.get("gguf") else {}
  model, report = transformers.AutoModelForCausalLM.from_pretrained(
    folder, output_loading_info=True, dtype=torch.float32, **gguf
  )
  assert not any(report.values()), report
  model.eval()
  if "ids" in asked:
    with torch.no_grad():
      found["logits"] = model(torch.tensor(asked["ids"])).logits.numpy()
  if "texts" in asked:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for i, text in enumerate(asked["texts"]):
      ids = tokenizer(text, add_special_tokens=False).input_ids
      found[f"text{i}"] = np.array(ids, np.int32)
      assert tokenizer.decode(ids) == text
  for i, fields in enumerate(asked.get("draws", ())):
    if "input_ids" in fields:
      fields["input_ids"] = torch.tensor(fields["input_ids"])
    if "seed" not in fields:  # transformers' own loop
      torch.manual_seed(0)
      drawn = model.generate(**fields)
    else:
      drawn = model.generate(
        custom_generate=str(folder), trust_remote_code=True, **fields
      )
    found[f"draw{i}"] = drawn.numpy()
  np.savez(answer, **found)


if __name__ == "__main__":
  main(*map(pathlib.Path, sys.argv[1:]))
