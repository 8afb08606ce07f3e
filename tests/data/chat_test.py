"""Conversations become rows in which only the answers are asked for."""

import json

import huggingface_harness as harness
import numpy as np
import pytest

from mdm_jax.core.errors import UserError
from mdm_jax.data import answers, chat, corpora, row_checks, splits
from mdm_jax.data import tokenizer as tokenizers
from mdm_jax.data.chat_template import ChatTemplate, TemplateError
from mdm_jax.data.config import (
  DataConfig,
  RowsConfig,
  StageConfig,
  TokenizerConfig,
)
from mdm_jax.data.segments import find
from mdm_jax.data.splits import Shares
from mdm_jax.data.stage_rows import make_held_out, make_rows
from mdm_jax.data.text_files import Document

BYTES = tokenizers.build(TokenizerConfig(kind="byte"), [])
END = BYTES.vocab.end
# What chat models write, with white space that only Jinja's options remove.
CHATML = """{{ bos_token }}
{%- for message in messages %}
    {% if message.role == 'tool' %}
        {{- raise_exception("no tools here") }}
    {% endif %}
<|im_start|>{{ message['role'] }}
{{ message['content'] | trim }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
MARKED = """{% for m in messages %}[{{ m.role }}]
{%- if m.role == 'assistant' %}
{% generation %}{{ m.content }}</s>{% endgeneration %}

{% else %}{{ m.content | tojson }}{% endif %}
{% endfor %}"""
SPECIAL = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
TALK = [
  {"role": "system", "content": " Be <brief>. "},
  {"role": "user", "content": "One?"},
  {"role": "assistant", "content": "Two."},
  {"role": "user", "content": "Three?"},
  {"role": "assistant", "content": "4"},
]


def rows_of(texts, length=64, **config):
  stage = StageConfig(unit="conversations", length=length)
  found = find(texts, stage)
  return make_rows(found, None, stage, BYTES, DataConfig(**config))[:2]


def read(folder, *lines, **config):
  (folder / "a.jsonl").write_text("".join(f"{line}\n" for line in lines))
  data = DataConfig(corpus=f"chat:{folder}", **config)
  return [d.text for d in corpora.load_and_count(data.corpus, data)[0]]


def line(**fields):
  return json.dumps(fields)


# MARK: documents


def test_a_prompt_and_its_completion_are_verbatim(tmp_path):
  (text,) = read(tmp_path, line(prompt="2+3= ", completion=" 5"))
  assert answers.parts(text) == ("2+3= ", " 5\x03")
  rows, _ = rows_of([text])
  ids, asked = rows.tokens[0], rows.answer[0]
  assert BYTES.decode(ids[~asked & (rows.segments[0] > 0)]) == "2+3= "
  assert ids[asked].tolist() == [*b" 5", END]


def test_every_answer_is_asked_and_ended_and_nothing_else(tmp_path):
  (text,) = read(tmp_path, line(messages=TALK))
  assert answers.parts(text) == (
    "system\n Be <brief>. \n\nuser\nOne?\n\nassistant\n",
    "Two.\x03",
    "user\nThree?\n\nassistant\n",
    "4\x03",
  )
  rows, counts = rows_of([text], 128)
  assert rows.tokens[0][rows.answer[0]].tolist() == [*b"Two.", END, *b"4", END]
  assert counts["answer_tokens"] == 7 and counts["most_asked"] == 7
  assert counts["characters_read"] == counts["characters"]


def test_conversations_are_packed_a_segment_each():
  texts = [answers.exchange("a" * n, "b" * n) for n in (1, 2, 3)]
  rows, counts = rows_of(texts, 10)
  assert len(rows) == 2 and counts["most_segments"] == 2
  # By enumeration: n letters and an end are asked in each.
  assert rows.answer.sum() == counts["answer_tokens"] == 2 + 3 + 4
  for row in range(2):
    for segment in range(1, rows.segments[row].max() + 1):
      ids = rows.tokens[row][rows.segments[row] == segment]
      n = len(ids) // 2
      assert ids.tolist() == [*b"a" * n, *b"b" * n, END]


def test_the_last_answer_is_filled_up_with_ends():
  two = answers.exchange("p", "x") + answers.exchange("q", "yz")
  texts = [two, answers.exchange("p", "12345")]
  rows, counts = rows_of(texts, 15, answer_length=5, answer_fill="all")
  # The first answer is followed by a prompt, so it can't be filled up.
  by_text = [rows.tokens[i][rows.answer[i]].tolist() for i in range(len(rows))]
  assert [*b"x", END, *b"yz", END, END, END] in by_text
  assert [*b"12345", END] in by_text and counts["answers_too_long"] == 1


def test_random_lengths_are_between_an_answers_own_and_the_most():
  texts = [answers.exchange(f"{i}=", "x" * (i % 3)) for i in range(300)]
  make = lambda: rows_of(texts, 12, answer_length=6, answer_fill="random")[0]
  rows = make()
  np.testing.assert_array_equal(rows.tokens, make().tokens)
  found = {}
  for row, _, first, past, _ in answers.last_answers(rows):
    ids = rows.tokens[row, first:past].tolist()
    found.setdefault(ids.index(END), set()).add(len(ids))
  assert found == {n: {*range(n + 1, 7)} for n in range(3)}


def test_what_is_longer_than_a_row_is_left_out_and_counted():
  texts = [answers.exchange("p" * 20, "a"), answers.exchange("p", "a")]
  rows, counts = rows_of(texts, 8)
  assert len(rows) == 1 and counts["texts_too_long"] == 1
  assert counts["characters_read"] < counts["characters"]
  config = RowsConfig(
    data=DataConfig(),
    stages=(StageConfig(unit="conversations", length=8),),
  )
  held, counts = make_held_out(texts, config, BYTES, asked="answers")
  assert len(held) == 1 and counts["texts_too_long"] == 1
  assert held.texts[:, 2].tolist() == [1]  # the document that is left


def test_a_document_is_never_divided_between_splits():
  documents = [
    Document(str(i), answers.exchange("p" * 900, "a" * 900)) for i in range(3)
  ]
  shares = Shares(0.1, 0.1, splits.HELD_OUT)
  texts = {d.text for d in documents}
  split = splits.Split("ends", shares)(documents)
  assert [d.text for d in split[splits.TRAIN]] == [d.text for d in documents]
  assert texts == {d.text for d in split[splits.TRAIN]}


# MARK: chat templates


def test_a_template_writes_what_transformers_writes():
  """These are transformers 5.24's own results, for the same templates."""
  template = ChatTemplate(CHATML, SPECIAL)
  assert template.render(TALK[1:3]) == (
    "<s><|im_start|>user\nOne?<|im_end|>\n"
    "<|im_start|>assistant\nTwo.<|im_end|>\n"
  )
  assert template.render(TALK[1:2], prompt=True) == (
    "<s><|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
  )
  assert ChatTemplate(MARKED, {}).render(TALK[:3]) == (
    '[system]" Be <brief>. "[user]"One?"[assistant]Two.</s>\n'
  )


def test_answers_are_found_by_what_each_adds():
  text = ChatTemplate(CHATML, SPECIAL).document(TALK)
  assert answers.parts(text)[1::2] == (
    "Two.<|im_end|>\n\x17",
    "4<|im_end|>\n\x17",
  )
  assert answers.plain(text) == ChatTemplate(CHATML, SPECIAL).render(TALK)


def test_answers_are_what_the_template_marks():
  text = ChatTemplate(MARKED, {}).document(TALK)
  assert answers.parts(text)[1::2] == ("Two.</s>\x17", "4</s>\x17")
  assert text.endswith("\x17")


@pytest.mark.parametrize(
  "source, words",
  [
    (CHATML, "no tools here"),
    ("{{ messages[0].content.nothing() }}", "the chat template fails"),
    ("{{ messages | length }}{{ messages[-1].content }}", "message 3"),
    ("{{ ''.__class__.__mro__ }}", "the chat template fails"),
  ],
)
def test_what_a_template_refuses_is_said(source, words):
  messages = [{"role": "tool", "content": "x"}, *TALK[1:3]]
  if source != CHATML:
    messages = TALK[:3]
  with pytest.raises(TemplateError, match=words):
    ChatTemplate(source, SPECIAL).document(messages)


def hugging_face_folder(folder):
  harness.tokenizer().save(str(folder / "tokenizer.json"))
  (folder / "config.json").write_text('{"eos_token_id": 256}')
  names = {"eos_token": {"content": "<end>"}}
  (folder / "tokenizer_config.json").write_text(json.dumps(names))
  (folder / "chat_template.jinja").write_text(
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
  )
  return folder


def test_the_tokenizers_template_is_used_with_its_special_ids(tmp_path):
  model = hugging_face_folder(tmp_path)
  path = str(model / "tokenizer.json")
  tokens = TokenizerConfig(kind="huggingface", path=path)
  data = chat.settle(DataConfig(corpus="chat:x"), tokens, "")
  assert data.chat_template == str(model)
  assert chat.settle(DataConfig(), tokens, "") == DataConfig()
  (model / "rows").mkdir()
  (text,) = read(
    model / "rows", line(messages=TALK[1:3]), chat_template=str(model)
  )
  (found,) = answers.encode([answers.parts(text)], tokenizers.build(tokens, []))
  ids, asked = found.ids.tolist(), found.answer
  assert ids.count(256) == 2 and ids[-1] == 256 and asked[-1]
  assert not asked[: ids.index(256) + 1].any()


# MARK: mistakes


@pytest.mark.parametrize(
  "wrong, words",
  [
    ("{", "not valid JSON"),
    ("[1]", "not an object"),
    (line(prompt="a"), 'no "completion", but "prompt"'),
    (line(prompt="a", completion=""), "nothing to predict"),
    (line(prompt="a", completion=3), '"completion" is not a string'),
    (line(prompt="a\x02", completion="b"), "control character"),
    (line(messages=[]), "not a list of messages"),
    (line(messages=[{"role": "user"}]), 'message 1 has no "content"'),
    (line(messages=TALK[:2]), "it has no answer"),
    (
      line(messages=[{"role": "assistant", "content": ""}]),
      "message 1 is an empty answer",
    ),
  ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, wrong, words):
  good = line(prompt="a", completion="b")
  with pytest.raises(UserError) as error:
    read(tmp_path, good, wrong, good)
  message = str(error.value)
  assert f"{tmp_path}/a.jsonl, line 2: " in message and words in message
  assert "\n" not in message
  assert len(read(tmp_path, good, wrong, on_bad_record="skip")) == 1


def test_a_message_may_not_forge_a_special_token(tmp_path):
  model = hugging_face_folder(tmp_path)
  (tmp_path / "rows").mkdir()
  talk = [{"role": "user", "content": "x <end> y"}, TALK[2]]
  with pytest.raises(UserError, match="<end>, a special token"):
    read(tmp_path / "rows", line(messages=talk), chat_template=str(model))


@pytest.mark.parametrize(
  "corpus, unit, words",
  [
    ("chat:x", "paragraphs", "without its answers"),
    ("python_docs", "conversations", "have no answers"),
  ],
)
def test_the_corpus_and_the_unit_must_fit(corpus, unit, words):
  config = RowsConfig(
    data=DataConfig(corpus=corpus), stages=(StageConfig(unit=unit),)
  )
  with pytest.raises(UserError, match=words):
    row_checks.check_units(config)


def test_limits_of_other_units_have_no_effect():
  stage = StageConfig(unit="conversations", min_words=3)
  with pytest.raises(UserError, match="min_words=3 has no effect"):
    stage.check("stages[0]")


def test_last_answers_are_found_in_packed_rows():
  two = answers.exchange("p", "x") + answers.exchange("q", "yz")
  rows, _ = rows_of([two, answers.exchange("ab", "c")], 16)
  found = {}
  for row, start, first, past, end in answers.last_answers(rows):
    ids = rows.tokens[row]
    found[bytes(x for x in ids[start:first] if x < 256)] = (
      ids[first:past].tolist(),
      end - past,
    )
  assert found == {b"pxq": ([*b"yz", END], 0), b"ab": ([*b"c", END], 0)}
  assert np.asarray(rows.answer).sum() == 2 + 3 + 2
