"""Pages of HTML as a reader sees them, parsed or in a real browser."""

import html
import html.parser
import json
import os
import re
import select
import shutil
import subprocess

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
  *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
  *("--disable-background-networking", "--remote-debugging-pipe"),
)


class Page(html.parser.HTMLParser):
  """Elements, ids and text of a page; fails where a tag is left open."""

  VOID = {"meta", "link", "input", "br"}

  def __init__(self, page):
    super().__init__()
    self.open, self.tags, self.ids, self.texts = [], [], [], {}
    self.feed(page)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    values = dict(attrs)
    self.tags.append((tag, values))
    self.ids += [values["id"]] if "id" in values else []
    if tag not in self.VOID:
      self.open.append((tag, values.get("id")))

  def handle_endtag(self, tag):
    assert self.open and self.open[-1][0] == tag, (tag, self.getpos())
    self.open.pop()

  def handle_data(self, data):
    for _, name in self.open:
      if name:
        self.texts[name] = self.texts.get(name, "") + data

  def paths(self, name):
    """The paths of a class, as lists of numbers."""
    shapes = [v["d"] for t, v in self.tags if v.get("class") == name]
    return [
      [float(n) for n in re.findall(r"-?[\d.]+", shape)] for shape in shapes
    ]


def visible_text(page):
  """What a reader sees, white space made one."""
  text = re.sub(r"<(script|style)>.*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL)
  return " ".join(html.unescape(text).split())


class Browser:
  """Chromium by its debugging protocol, over pipes 3 and 4 of its process."""

  def __init__(self, program, folder):
    command = [program, *FLAGS, f"--user-data-dir={folder}"]
    (theirs, self._out), (self._in, back) = os.pipe(), os.pipe()
    self._process = subprocess.Popen(
      [
        "sh",
        "-c",
        f'exec "$@" 3</dev/fd/{theirs} 4>/dev/fd/{back}',
        "sh",
        *command,
      ],
      pass_fds=(theirs, back),
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    os.close(theirs)
    os.close(back)
    self._count, self._buffer, self._session = 0, b"", {}
    self.events = []
    target = self.call("Target.createTarget", url="about:blank")["targetId"]
    opened = self.call("Target.attachToTarget", targetId=target, flatten=True)
    self._session = {"sessionId": opened["sessionId"]}
    for domain in ("Page", "Runtime", "Network", "Log"):
      self.call(f"{domain}.enable")

  def close(self):
    os.close(self._out)
    os.close(self._in)
    self._process.kill()
    self._process.wait()

  def call(self, method, **params):
    """Sends a command and returns its result."""
    self._count += 1
    message = {"id": self._count, "method": method, "params": params}
    os.write(self._out, json.dumps(message | self._session).encode() + b"\0")
    while (answer := self._read()).get("id") != self._count:
      self.events.append(answer)
    assert "error" not in answer, (method, answer)
    return answer["result"]

  def _read(self):
    while b"\0" not in self._buffer:
      ready, _, _ = select.select([self._in], [], [], 20)
      part = os.read(self._in, 1 << 20) if ready else b""
      assert part, "the browser does not answer"
      self._buffer += part
    message, _, self._buffer = self._buffer.partition(b"\0")
    return json.loads(message)

  def open(self, path):
    """Loads a file; the events are those of this page alone."""
    self.events = []
    self.call("Page.navigate", url=path.as_uri())
    while not any(e["method"] == "Page.loadEventFired" for e in self.events):
      self.events.append(self._read())

  def run(self, script):
    """Returns the value of an expression in the page."""
    params = {"returnByValue": True, "awaitPromise": True}
    answer = self.call("Runtime.evaluate", expression=script, **params)
    assert "exceptionDetails" not in answer, answer
    return answer["result"].get("value")

  def press(self, key, text=""):
    """Presses a key."""
    codes = {"ArrowRight": 39, "ArrowLeft": 37, "End": 35, "Home": 36, " ": 32}
    named = {"key": key, "windowsVirtualKeyCode": codes[key]}
    self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **named)
    self.call("Input.dispatchKeyEvent", type="keyUp", **named)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  """One browser for all tests."""
  found = [path for path in map(shutil.which, NAMES) if path]
  if not found:
    pytest.skip(f"no browser on PATH: none of {', '.join(NAMES)}")
  browser = Browser(found[0], tmp_path_factory.mktemp("browser"))
  yield browser
  browser.close()
