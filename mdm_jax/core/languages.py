"""Language codes (ISO 639-1) that a config may give for its text.

The sentence splitter, sentencex, has rules for many of them; for the others it
uses those of a related language, or of English.
"""

from mdm_jax.core.errors import UserError, nearest

CODES = frozenset(
  "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch"
  " co cr cs cu cv cy da de dv dz ee el en eo es et eu fa ff fi fj fo fr fy ga"
  " gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja"
  " jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv"
  " mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no nr nv ny oc oj om or"
  " os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr"
  " ss st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi"
  " vo wa wo xh yi yo za zh zu".split()
)


def check(path: str, code: str) -> None:
  """Raises UserError, with the nearest code, if a field's code is unknown."""
  if code in CODES:
    return
  short = code.lower()[:2]
  hint = f"did you mean {short!r}?" if short in CODES else nearest(code, CODES)
  raise UserError(f"{path}={code!r} is not an ISO 639-1 language code; {hint}")
