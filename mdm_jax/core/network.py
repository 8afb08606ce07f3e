"""Whether a server can be reached, before a library retries for minutes."""

import socket
import threading
import urllib.parse
import urllib.request


def reaches(url: str, seconds: float = 3.0) -> bool:
  """Returns whether a server, or the proxy to it, accepts connections."""
  at = urllib.parse.urlsplit(url)
  if not urllib.request.proxy_bypass(at.hostname or ""):
    at = urllib.parse.urlsplit(
      urllib.request.getproxies().get(at.scheme) or url
    )
  port = at.port or {"http": 80}.get(at.scheme, 443)
  reached = threading.Event()

  def connect() -> None:
    try:
      socket.create_connection((at.hostname, port), seconds).close()
      reached.set()
    except OSError:
      pass

  # DNS look-ups have no timeout, so the thread may have to be abandoned.
  thread = threading.Thread(target=connect, daemon=True)
  thread.start()
  return reached.wait(seconds)
