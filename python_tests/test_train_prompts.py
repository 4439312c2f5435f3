"""Prompts: every bad line is named with its number and why; the cursor draws the same after a restart."""

import json

import pytest

from opd_engine.train.arithmetic import make_tokenizer
from opd_engine.train.prompts import Prompt, PromptCursor, encode_records, hold_out, read_records


def written(tmp_path, *lines, name="prompts.jsonl"):
    path = tmp_path / name
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def test_jsonl_keeps_prompt_label_and_teacher_and_skips_empty_lines(tmp_path):
    path = written(tmp_path, {"prompt": "1+1=", "label": 2, "teacher": "a", "other": []}, b"", {"prompt": "2-1="})
    first, second = read_records(path)
    assert (first.prompt, first.label, first.teacher) == ("1+1=", "2", "a")
    assert (second.prompt, second.label, second.teacher) == ("2-1=", None, None)
    assert second.where.endswith("line 3")


def test_parquet_reads_the_same_records(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "prompts.parquet"
    chat = [[{"role": "user", "content": "hello"}], [{"role": "user", "content": "bye"}]]
    parquet.write_table(pyarrow.table({"prompt": chat, "label": ["x", None], "data_source": ["s", "s"]}), path)
    first, second = read_records(path)
    assert first.prompt == chat[0] and first.label == "x" and second.label is None
    parquet.write_table(pyarrow.table({"prompt": ["fine", ""]}), path)
    with pytest.raises(ValueError, match=r"row 2: prompt: wanted at least one character"):
        read_records(path)
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match="not a parquet file"):
        read_records(path)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"prompt": "x"', "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'["x"]', "wanted an object"),
        (b'{"promt": "x"}', "wanted a `prompt`, got the keys 'promt'"),
        (b'{"prompt": ""}', "at least one character"),
        (b'{"prompt": 3}', "wanted text or messages, got int"),
        (b'{"prompt": [{"role": "user"}]}', "wanted messages with `role` and `content`"),
        (b'{"prompt": "x", "label": [1]}', "label: wanted text or a number"),
        (b'{"prompt": "x", "teacher": 1}', "teacher: wanted a name"),
    ],
)
def test_an_unreadable_line_is_named_with_its_number_and_why(tmp_path, line, why):
    path = written(tmp_path, {"prompt": "good"}, line)
    with pytest.raises(ValueError) as error:
        read_records(path)
    assert "line 2" in str(error.value) and why in str(error.value) and "prompts.jsonl" in str(error.value)


def test_a_missing_or_empty_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"prompts: wanted a JSONL or parquet file, got .*nowhere"):
        read_records(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="empty file"):
        read_records(written(tmp_path, b"\n\n"))


def test_teachers_are_matched_by_name_and_the_only_one_is_the_default(tmp_path):
    tokenizer = make_tokenizer()
    records = read_records(written(tmp_path, {"prompt": "12+3="}, {"prompt": "4-1=", "teacher": "b"}))
    assert [p.teacher for p in encode_records(records[:1], tokenizer, ["only"], 9)] == ["only"]
    with pytest.raises(ValueError, match=r"line 1: teacher: wanted one of a, b, got none"):
        encode_records(records, tokenizer, ["a", "b"], 9)
    with pytest.raises(ValueError, match=r"line 2: teacher: wanted one of add, bb, got 'b'"):
        encode_records(records[1:], tokenizer, ["add", "bb"], 9)
    with pytest.raises(ValueError, match=r"line 1: prompt: wanted 1 to data.max_prompt_tokens = 4 tokens, got 5"):
        encode_records(records[:1], tokenizer, ["only"], 4)


def test_messages_need_a_chat_template_and_get_it(tmp_path):
    tokenizer = make_tokenizer()
    records = read_records(written(tmp_path, {"prompt": [{"role": "user", "content": "1+2"}]}))
    with pytest.raises(
        ValueError, match=r"line 1: prompt: got messages, and the student's tokenizer has no chat template"
    ):
        encode_records(records, tokenizer, ["a"], 9)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    (prompt,) = encode_records(records, tokenizer, ["a"], 9)
    assert tokenizer.decode(prompt.token_ids) == "1+2="


def numbered(count, teachers=("a",)):
    return [Prompt((index,), teachers[index % len(teachers)], "t") for index in range(count)]


def test_every_epoch_gives_each_prompt_once_in_its_own_order():
    cursor = PromptCursor(numbered(10), "proportional", seed=3)
    epochs = [[p.token_ids[0] for p in cursor.draw(10)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_equal_mixing_gives_each_teacher_its_share_whatever_the_pools_hold():
    prompts = [*numbered(3, ["a"]), Prompt((9,), "b", "t")]
    cursor = PromptCursor(prompts, "equal", seed=0)
    drawn = [p.teacher for p in cursor.draw(9)]
    assert drawn.count("a") == 5 and drawn.count("b") == 4


@pytest.mark.parametrize("mixing", ["proportional", "equal"])
def test_a_restored_cursor_draws_what_the_undisturbed_one_does(mixing):
    prompts = numbered(7, ["a", "b"])
    undisturbed = PromptCursor(prompts, mixing, seed=5)
    for _ in range(4):
        undisturbed.draw(5)
    state = json.loads(json.dumps(undisturbed.state()))
    restarted = PromptCursor(prompts, mixing, seed=5)
    restarted.restore(state)
    assert [restarted.draw(5) for _ in range(4)] == [undisturbed.draw(5) for _ in range(4)]
    fresh = PromptCursor(prompts, mixing, seed=5)
    assert [fresh.draw(5) for _ in range(4)] != [undisturbed.draw(5) for _ in range(4)]


def test_held_out_prompts_are_not_trained_on_and_something_is_left():
    train, held = hold_out(numbered(20), 0.25, seed=1)
    assert len(held) == 5 and not set(train) & set(held) and len(train) + len(held) == 20
    assert hold_out(numbered(4), 0.0, seed=1)[1] == []
    assert [len(part) for part in hold_out(numbered(2), 0.9, seed=1)] == [1, 1]
