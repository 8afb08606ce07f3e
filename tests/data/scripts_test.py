"""Text in every script and of every shape goes through the whole recipe."""

import importlib.util
import json
import random
import re

import command_harness
import prepare_harness
import pytest
import scripts_harness
from paths import ROOT

from mdm_jax import config as config_lib
from mdm_jax.core.errors import UserError
from mdm_jax.data import coverage, segments, words
from mdm_jax.data.config import StageConfig
from mdm_jax.data.prepared import prepare

KINDS = ["chinese", "hindi", "arabic", "thai", "names", "python", "one_line"]
WITHOUT_SENTENCES = ["thai", "names", "one_line"]


def _recipe(name, corpus, cache, **data):
  path = ROOT / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(name, path)
  spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
  config = module.get_config("quick")
  config.data.update(corpus=corpus, cache_dir=str(cache), **data)
  return config_lib.from_config_dict(config)


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp(request.param)
  corpus = scripts_harness.write(request.param, folder)
  return request.param, prepare(
    _recipe("quickstart", corpus, folder / "cache").rows
  )


# MARK: the recipe, unchanged


def test_found_B2_every_shape_of_text_gives_all_stages_rows(made):
  kind, data = made
  for rows in data.stages:
    assert len(rows) >= 8
  for i, stage in enumerate(("stage_1", "stage_2")):
    counts = data.manifest["rows"][stage]
    none = counts["documents"] if kind in WITHOUT_SENTENCES else 0
    assert counts["without_sentences"] == none
    for text in counts["examples"]:
      assert 10 <= words.count(text) <= 100
      assert text.count("\n") >= i or kind == "names"
  assert data.manifest["text"]["unread"] == 0


def test_pieces_are_the_text_as_it_is(made):
  kind, _ = made
  texts = scripts_harness.documents(kind)
  for unit, limits in (("sentences", (10, 50)), ("pairs", (15, 100))):
    stage = StageConfig(
      unit=unit, min_words=limits[0], max_words=limits[1], length=128
    )
    found = segments.find(texts, stage)
    for u in found.units:
      for start, part in zip(u.starts, u.parts, strict=True):
        assert texts[u.document][start : start + len(part)] == part
        assert part == part.strip() and part
    if kind in WITHOUT_SENTENCES:
      read = sum(len(part) for u in found.units for part in u.parts)
      assert read > 0.95 * found.characters


def test_pieces_of_a_list_are_whole_lines():
  names = scripts_harness.names(random.Random(0), 40)
  stage = StageConfig(unit="sentences", min_words=10, max_words=50)
  found = segments.units([names], stage)
  lines = names.split("\n")
  assert [u.parts[0] for u in found] == [
    "\n".join(lines[i : i + 5]) for i in range(0, 40, 5)
  ]
  pairs = segments.units([names], StageConfig(unit="pairs", min_words=15))
  assert pairs[0].parts == ("\n".join(lines[:4]), "\n".join(lines[4:8]))
  alone = segments.units([names], StageConfig(unit="sentences"))
  assert [u.parts[0] for u in alone] == lines


def test_a_part_of_a_line_ends_at_a_space_if_one_is_near():
  thai = scripts_harness.thai(random.Random(0), 6)
  stage = StageConfig(unit="sentences", min_words=10, max_words=70)
  for unit in segments.units([thai], stage):
    start, end = unit.starts[0], unit.starts[0] + len(unit.parts[0])
    assert start == 0 or thai[start - 1].isspace()
    assert end == len(thai) or thai[end].isspace()


def test_three_megabytes_on_one_line_take_no_longer_than_their_length(tmp_path):
  text = scripts_harness.one_line(random.Random(0), 3_000_000)
  stage = StageConfig(unit="sentences", min_words=10, max_words=50)
  found = segments.find([text, "gattaca" * 40_000], stage)
  assert found.without_sentences == 2
  assert len(found.units) > 50_000 and not found.too_long


# MARK: lines


def test_lines_are_units_within_the_limits():
  text = " One two\n\nthree\r\nfour. Five six seven\n"
  find = lambda **limits: segments.find(
    [text], StageConfig(unit="lines", **limits)
  )
  assert [u.parts for u in find().units] == [
    ("One two",),
    ("three",),
    ("four. Five six seven",),
  ]
  some = find(min_words=2, max_words=3)
  assert [u.parts for u in some.units] == [("One two",)]
  assert (some.too_short, some.too_long) == (1, 1)
  assert some.without_sentences == 0 and some.units[0].starts == (1,)


def test_a_stage_trains_on_lines(tmp_path):
  corpus = scripts_harness.write("names", tmp_path)
  raw = {
    "data": {"corpus": corpus, "cache_dir": str(tmp_path), "batch_size": 4},
    "tokenizer": {"kind": "char"},
    "stages": [{"unit": "lines", "length": 32, "easiest": 0.5}],
  }
  data = prepare(config_lib.from_dict(raw).rows)
  counts = data.manifest["rows"]["stage_1"]
  assert counts["units_found"] > 4000 and not counts["units_too_short"]
  told = coverage.unread_text(data.manifest["text"])
  assert re.fullmatch(r"no stage reads .* characters \(5\d\.\d%\)", told)


# MARK: languages


def test_sentences_end_in_each_script():
  for kind in ("chinese", "hindi", "arabic"):
    text = getattr(scripts_harness, kind)(random.Random(0), 20)
    assert len(segments.sentences(text)) == 20


@pytest.mark.parametrize("code, near", [("english", "en"), ("zh-hant", "zh")])
def test_an_unknown_language_is_refused(code, near):
  with pytest.raises(UserError, match=f"data.language='{code}'.*'{near}'"):
    config_lib.from_dict({"data": {"language": code}})


def test_the_language_decides_where_sentences_end():
  text = "Es kostet Zeit usw. Das ist Nr. Drei."
  found = {code: segments.sentences(text, code) for code in ("en", "de")}
  assert len(found["en"]) == 2
  assert len(found["de"]) == 1


def test_other_languages_have_no_reading_ease():
  texts = ["The cat sat here.", "Administrative jurisprudence prevailed here."]
  units = [segments.Unit(i, (text,)) for i, text in enumerate(texts)]
  found = segments.unit_words(units)
  rarity = segments.rarity(found.frequency(), 2)
  ease = segments.signals(units, found, rarity, "de")[1]
  assert (ease != ease).all()
  assert segments.difficulty(units, "de").tolist() == [0.5, 0.5]
  assert segments.difficulty(units)[0] < segments.difficulty(units)[1]


# MARK: what is left out


def _mixed():
  """Chinese documents that each end in four English sentences."""
  choose = random.Random(1)
  parts = scripts_harness.chinese, scripts_harness.english
  return ["\n\n".join(part(choose) for part in parts) for _ in range(12)]


def test_found_A11_no_script_of_a_text_is_passed_over():
  stage = StageConfig(unit="sentences", min_words=10, max_words=50)
  found = segments.find(_mixed(), stage)
  chinese = [u for u in found.units if "。" in u.parts[0]]
  assert len(chinese) == 12 * 60
  assert len(found.units) - len(chinese) == 12 * 4
  assert found.too_short == found.too_long == found.without_sentences == 0


def test_found_B1_a_stage_without_rows_says_what_keeps_the_text(tmp_path):
  for i, text in enumerate(_mixed()):
    (tmp_path / f"{i}.txt").write_text(text)
  limits = {"min_words": 60, "max_words": 70}
  raw = {
    "data": {"corpus": f"text:{tmp_path}/*.txt", "cache_dir": str(tmp_path)},
    "tokenizer": {"kind": "byte"},
    "stages": [{"unit": "sentences", **limits}],
  }
  why = (
    r"stages\[0\] has no rows: of \d+ sentences \d+ have fewer than 60 words"
    r" \(stages\[0\].min_words=0 keeps them\)"
  )
  with pytest.raises(UserError, match=why):
    prepare(config_lib.from_dict(raw).rows)
  raw["data"]["prepared"] = str(tmp_path / "prepared")
  for _ in range(2):  # when it is made, and when it is there
    with pytest.raises(UserError, match=why) as error:
      prepare_harness.fill(config_lib.from_dict(raw))
    assert error.value.code == 2


def test_lines_as_documents_have_no_pairs_and_a_line_says_so(tmp_path):
  names = "".join(f"Priya {c}. Zhang\n" for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
  (tmp_path / "names.txt").write_text(names)
  corpus = f"text:{tmp_path}/*.txt"
  raw = {
    "data": {"corpus": corpus, "cache_dir": str(tmp_path), "document": "line"},
    "tokenizer": {"kind": "byte"},
    "stages": [{"unit": "pairs"}],
  }
  why = r"none of \d+ documents has two sentences.*unit=sentences or lines"
  with pytest.raises(UserError, match=why):
    prepare(config_lib.from_dict(raw).rows)
  raw["stages"] = [{"unit": "lines", "length": 16}]
  assert len(prepare(config_lib.from_dict(raw).rows).stages[0])


def test_what_no_stage_reads_is_counted_the_same_in_blocks(tmp_path):
  for i, text in enumerate(_mixed()):
    (tmp_path / f"{i}.txt").write_text(text)
  raw = {
    "data": {"corpus": f"text:{tmp_path}/*.txt", "cache_dir": str(tmp_path)},
    "tokenizer": {"kind": "char"},
    "stages": [
      {"unit": "sentences", "min_words": 24, "length": 64},
      {"unit": "pairs", "min_words": 36, "max_words": 60, "length": 128},
    ],
  }
  raw["data"]["batch_size"] = 1
  here = prepare(config_lib.from_dict(raw).rows).manifest
  raw["data"] |= {"prepared": str(tmp_path / "blocks"), "block_megabytes": 0.02}
  blocks = prepare_harness.fill(config_lib.from_dict(raw))
  assert 0 < here["text"]["unread"] < here["text"]["characters"] / 2
  assert blocks["text"] == here["text"]
  for stage in ("stage_1", "stage_2"):
    for name, value in blocks["rows"][stage].items():
      if name.startswith(("units", "char", "documents", "without", "texts")):
        assert value == here["rows"][stage][name], name
  assert here["rows"]["stage_1"]["units_too_short"] > 0


# MARK: end to end


def _samples_of(kind, tmp_path):
  corpus = scripts_harness.write(kind, tmp_path, line=3_000_000)
  env = command_harness.environment(tmp_path / "cache")
  done = command_harness.call(
    tmp_path,
    env,
    command_harness.QUICK,
    f"--config.data.corpus={corpus}",
    f"--workdir={tmp_path / 'run'}",
  )
  assert done.returncode == 0, done.stderr
  results = json.loads((tmp_path / "run" / "results.json").read_text())
  return "".join(results["samples"]), done.stdout


_OWN = {
  "chinese": r"[\u4e00-\u9fff]",
  "hindi": r"[\u0900-\u097f]",
  "arabic": r"[\u0600-\u06ff]",
  "thai": r"[\u0e00-\u0e7f]",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_ends_with_samples_in_every_script(kind, tmp_path):
  text, said = _samples_of(kind, tmp_path)
  # Of code, 36 updates have learnt the spaces that lines begin with.
  own = _OWN.get(kind, r"\s" if kind == "python" else "[a-zA-Z]")
  assert len(re.findall(own, text)) > 50
  assert ("have no sentences" in said) == (kind in WITHOUT_SENTENCES)
