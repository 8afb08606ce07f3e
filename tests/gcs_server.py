"""A GCS emulator that keeps to generations, as the real service does.

  python gcs_server.py PORT BUCKET

The package's own neither tells an object's generation when it is read, nor
looks at the one that a write asks for; without them, nobody can write an object
only if it is not there, or has not changed. And of what ends in a carriage
return it would take that for a part of the line's end after it.
"""

import email.parser
import http
import sys
import threading

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

_one_at_a_time = threading.RLock()  # `get` calls `download`


def _generation(request, storage):
  """Returns the generation of the object that a request names, 0 if none."""
  name = request.params.get("object_id") or request.query.get("name", [""])[0]
  if not name and isinstance(request.data, dict):
    name = request.data["meta"]["name"]
  try:
    found = storage.get_file_obj(request.params["bucket_name"], name)
  except NotFound:
    return "0"
  return found["generation"]


def _with_generations(handle):
  def handler(request, response, storage, *args, **kwargs):
    with _one_at_a_time:
      found = _generation(request, storage)
      query = request.query
      if query.get("ifGenerationMatch", [found])[0] != found:
        response.status = http.HTTPStatus.PRECONDITION_FAILED
        return
      if query.get("ifGenerationNotMatch", [None])[0] == found:
        response.status = http.HTTPStatus.NOT_MODIFIED
        return
      response["X-Goog-Generation"] = found
      handle(request, response, storage, *args, **kwargs)

  return handler


for _name in ("get", "download", "insert"):
  setattr(objects, _name, _with_generations(getattr(objects, _name)))

from gcp_storage_emulator import server  # noqa: E402  binds the handlers


class _Parser(email.parser.BytesParser):
  """Parses parts that gcsfs separates by a line feed alone."""

  def parsebytes(self, text):
    return super().parsebytes(text.replace(b"\n--==0==", b"\r\n--==0=="))


server.BytesParser = _Parser

if __name__ == "__main__":
  _, _port, _bucket = sys.argv
  server.create_server(
    "127.0.0.1", int(_port), in_memory=True, default_bucket=_bucket
  ).run()
