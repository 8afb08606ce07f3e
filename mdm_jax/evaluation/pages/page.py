"""Renders the HTML pages from the Jinja templates in the folder `templates`."""

import functools
import math
from typing import Any

from mdm_jax.core import strict_json
from mdm_jax.core.progress import duration
from mdm_jax.sampling.trace import visible

Number = int | float


def render(template: str, **values: Any) -> str:
  """Returns a page as HTML; values are escaped.

  Args:
    template: file name of the template.
    **values: the variables that the template reads.
  """
  return _environment().get_template(template).render(values)


@functools.cache
def _environment():
  # Not at the top: most programs write no page, and this import takes a while.
  import jinja2
  import markupsafe

  is_text = lambda value: (
    isinstance(value, str) and not isinstance(value, markupsafe.Markup)
  )
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader(__package__),
    autoescape=True,
    trim_blocks=True,
    undefined=jinja2.StrictUndefined,
    finalize=lambda value: visible(value) if is_text(value) else value,
  )
  layout = {"ensure_ascii": False, "separators": (",", ":")}
  environment.policies["json.dumps_kwargs"] = layout
  environment.filters |= {"number": number, "duration": _duration}
  return environment


def number(value: Number | None, form: str = "") -> str:
  """Formats a number, by default with four digits; a dash if undefined."""
  if value is None or not math.isfinite(value):
    return "\u2013"
  return format(value, form or (",.0f" if abs(value) >= 1000 else ".4g"))


def _duration(seconds: Number | None) -> str:
  seconds = strict_json.number(seconds)
  return duration(seconds) if math.isfinite(seconds) else number(None)
