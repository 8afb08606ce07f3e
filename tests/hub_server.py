"""The part of the Hugging Face hub that reading a dataset asks for.

  python hub_server.py FOLDER

Prints its port. FOLDER/OWNER/NAME/COMMIT holds the files of a commit, and
FOLDER/OWNER/NAME/main the name of the newest one.
"""

import hashlib
import http.server
import json
import pathlib
import re
import sys
import urllib.parse

ROOT = pathlib.Path(sys.argv[1])


class Hub(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def do_GET(self):
    path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
    found = re.match(
      r"(/api)?/datasets/(\w+/\w+)(?:/(\w+)/(\w+)(?:/(.*))?)?$", path
    )
    if not found:
      return self._answer(404)
    api, name, what, revision, inside = found.groups()
    repository = ROOT / name
    if not repository.exists():
      return self._answer(401, X_Error_Code="RepoNotFound")
    commit = revision or "main"
    if commit == "main":
      commit = (repository / "main").read_text()
    folder = repository / commit
    if not folder.exists():
      return self._answer(404, X_Error_Code="RevisionNotFound")
    if not api:
      return self._file(folder / inside, commit)
    if what != "tree":
      return self._json({"id": name, "sha": commit, "siblings": []})
    inside = folder / (inside or "")
    return self._json(
      [
        {
          "type": "directory" if path.is_dir() else "file",
          "path": path.relative_to(folder).as_posix(),
          "size": path.stat().st_size,
          "oid": "0",
        }
        for path in (inside.iterdir() if inside.is_dir() else ())
      ]
    )

  do_HEAD = do_GET

  def _file(self, path, commit):
    about = {"X_Repo_Commit": commit}
    if not path.is_file():
      return self._answer(404, X_Error_Code="EntryNotFound", **about)
    content = path.read_bytes()
    about["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
    wanted = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
    if not wanted:
      return self._answer(200, content, **about)
    start, end = map(int, wanted.groups())
    about["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
    return self._answer(206, content[start : end + 1], **about)

  def _json(self, found):
    self._answer(200, json.dumps(found).encode())

  def _answer(self, code, content=b"", **headers):
    self.send_response(code)
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), value)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(content)

  def log_message(self, *_):
    pass


if __name__ == "__main__":
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
  print(server.server_port, flush=True)
  server.serve_forever()
