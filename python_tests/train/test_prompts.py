"""Prompts: every bad line is named with its number and why; the cursor draws the same after a restart."""

import json
import time

import pytest

from opd_engine.train.cursor import PromptCursor
from opd_engine.train.examples.arithmetic import make_tokenizer
from opd_engine.train.prompts import Encoding, Prompt, content_of, encode_records, hold_out
from opd_engine.train.records import Keys, Skipped, read_records


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
    skipped = Skipped()
    assert [record.prompt for record in read_records(path, skipped=skipped)] == ["fine"]
    assert skipped.lines() == [f"1 prompt skipped, empty (first: {path}: row 2)"]
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


def test_empty_prompts_are_skipped_and_counted_and_a_byte_order_mark_is_none(tmp_path):
    path = written(tmp_path, b'\xef\xbb\xbf{"prompt": "1+1="}', {"prompt": "  "}, {"prompt": []}, {"prompt": None})
    skipped = Skipped()
    assert [record.prompt for record in read_records(path, skipped=skipped)] == ["1+1="]
    assert skipped.counts == {"skipped, empty": 3} and skipped.first["skipped, empty"].endswith("line 2")
    with pytest.raises(ValueError, match="wanted at least one record, got 1 empty ones"):
        read_records(written(tmp_path, {"prompt": ""}))
    listed = tmp_path / "list.json"
    listed.write_text('\ufeff [{"prompt": "1+1="}, {"prompt": "2+2="}]', encoding="utf-8")
    assert [record.line for record in read_records(listed)] == [1, 2]


def test_keys_are_the_files_own(tmp_path):
    chat = [{"role": "user", "content": "1+2", "name": "ann"}]
    path = written(tmp_path, {"question": "1+1=", "answer": 2}, {"conversation": chat, "teacher": ["b", "a"]})
    first, second = read_records(path, Keys("question", "conversation", "answer"))
    assert (first.prompt, first.label, second.prompt, second.teacher) == ("1+1=", "2", chat, ("b", "a"))
    for teacher in ([], ["a", "a"], ["a", 1]):
        with pytest.raises(ValueError, match="line 1: teacher: wanted a list of different names"):
            read_records(written(tmp_path, {"prompt": "x", "teacher": teacher}))


def test_prompts_that_are_too_long_are_refused_skipped_or_cut_to_their_ends(tmp_path):
    tokenizer = make_tokenizer()
    records = read_records(written(tmp_path, {"prompt": "1+1="}, {"prompt": "12+3="}))
    for overlong, texts in (("skip", ["1+1="]), ("truncate", ["1+1=", "2+3="])):
        skipped = Skipped()
        got = encode_records(records, tokenizer, ["a"], Encoding(4, overlong=overlong), skipped)
        assert [tokenizer.decode(prompt.token_ids) for prompt in got] == texts
        assert list(skipped.counts.values()) == [1] and "too long" in skipped.lines()[0]
    with pytest.raises(ValueError, match=r'line 2: prompt: .* got 5; data.overlong = "skip" or "truncate"'):
        encode_records(records, tokenizer, ["a"], 4)


TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m['content'] }}{% if not loop.last %}+{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{% if enable_thinking is defined and enable_thinking %}-{% endif %}={% endif %}"
)


def chats(tmp_path, *turns):
    lines = [{"prompt": [{"role": role, "content": content} for role, content in chat]} for chat in turns]
    return read_records(written(tmp_path, *lines))


def decoded(records, **options):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return [tokenizer.decode(p.token_ids) for p in encode_records(records, tokenizer, ["a"], Encoding(20, **options))]


def test_the_templates_arguments_the_system_prompt_and_the_order_of_mixed_records(tmp_path):
    records = chats(tmp_path, [("user", "1")], [("system", "9"), ("user", "2")])
    assert decoded(records) == ["1=", "9+2="]
    assert decoded(records, template={"enable_thinking": True}) == ["1-=", "9+2-="]
    assert decoded(records, system_prompt="7") == ["7+1=", "9+2="]
    texts = read_records(written(tmp_path, {"prompt": "3+3="}))
    assert decoded([records[1], *texts, records[0]]) == ["9+2=", "3+3=", "1="]
    for options, words in (
        ({"template": {"enable_thinkin": True}}, "chat_template_kwargs: .* reads no 'enable_thinkin'"),
        ({"template": {"messages": []}}, "'messages' is not one of the template's own"),
    ):
        with pytest.raises(ValueError, match=words):
            decoded(records, **options)
    for options in ({"template": {"enable_thinking": True}}, {"system_prompt": "7"}):
        with pytest.raises(ValueError, match=r"data.\w+: wanted prompts of messages"):
            decoded(texts, **options)


def test_an_assistants_turn_at_the_end_is_refused_or_continued_and_a_turn_the_template_refuses_is_named(tmp_path):
    records = chats(tmp_path, [("user", "1")], [("user", "2"), ("assistant", "4")])
    with pytest.raises(ValueError, match=r"line 2: messages: .* data.continue_assistant = true"):
        decoded(records)
    assert decoded(records, continue_assistant=True) == ["1=", "2+4"]
    with pytest.raises(ValueError, match=r"line 2: messages: the chat template does not take them: no tools here"):
        decoded(chats(tmp_path, [("user", "1")], [("user", "2"), ("tool", "4")]))


def test_a_tokenizer_that_makes_no_token_is_named_as_that(tmp_path):
    class Mute:
        chat_template = None

        def __call__(self, texts, **options):
            return {"input_ids": [[] for _ in texts]}

    records = read_records(written(tmp_path, {"prompt": "12+3="}))
    with pytest.raises(ValueError, match=r"line 1: prompt: the student's tokenizer makes no token of '12\+3='"):
        encode_records(records, Mute(), ["a"], 9)


def test_several_teachers_of_a_record_need_a_mixture(tmp_path):
    tokenizer, names = make_tokenizer(), ["a", "b", "c"]
    given = ["b", ["c", "a"], "all", None]
    records = read_records(written(tmp_path, *({"prompt": "1+1=", "teacher": teacher} for teacher in given)))
    mixed = encode_records(records, tokenizer, names, Encoding(9, mixture="arithmetic"))
    assert [prompt.teacher for prompt in mixed] == ["b", ("a", "c"), ("a", "b", "c"), ("a", "b", "c")]
    assert [prompt.task for prompt in mixed] == ["b", "a+c", "all", "all"]
    for place, words in (
        (1, "line 2: teacher: wanted one for opd.mixture"),
        (2, "line 3"),
        (3, "line 4: teacher: wanted"),
    ):
        with pytest.raises(ValueError, match=words):
            encode_records(records[place:], tokenizer, names, 9)
    assert encode_records(records[2:3], tokenizer, ["a"], 9)[0].teacher == "a"


def test_each_teacher_keeps_its_share_of_held_out_prompts_and_duplicates_stay_together():
    prompts = [Prompt((i,), "big", "big") for i in range(40)] + [Prompt((100 + i,), "small", "small") for i in range(4)]
    prompts += prompts[:40] + [Prompt((i,), "small", "small") for i in range(40, 44)] + [Prompt((200,), "one", "one")]
    train, held = hold_out(prompts, 0.1, seed=3)
    assert len(train) + len(held) == len(prompts)
    assert not {p.token_ids for p in train} & {p.token_ids for p in held}
    counts = {name: len({p.token_ids for p in held if p.teacher == name}) for name in ("big", "small", "one")}
    assert counts == {"big": 4, "small": 1, "one": 0}
    assert hold_out(prompts, 0.1, seed=3)[1] == held != hold_out(prompts, 0.1, seed=4)[1]


def test_content_tells_prompts_from_others():
    same = content_of(numbered(3))
    assert same == content_of(numbered(3))
    others = [numbered(2), numbered(3, ["b"]), numbered(3)[::-1], [*numbered(2), Prompt((2,), "a", "t", "4")]]
    others.append([Prompt((0, 1), "a", "t"), Prompt((2,), "a", "t")])
    assert len({same, *map(content_of, others)}) == 6


@pytest.mark.slow
def test_a_hundred_thousand_prompts_are_read_in_seconds_and_kept_in_four_bytes_a_token(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    lines = [{"prompt": [{"role": "user", "content": f"{i}+{i}"}]} for i in range(50_000)]
    lines += [{"prompt": f"{i}="} for i in range(50_000)]
    path = written(tmp_path, *lines)
    began, told = time.process_time(), []
    prompts = encode_records(read_records(path), tokenizer, ["a"], Encoding(64), None, told.append)
    hold_out(prompts, 0.05, 0)
    assert time.process_time() - began < 10.0
    assert len(prompts) == told[-1] == 100_000
    assert len(prompts[-1]._ids) == 4 * len(prompts[-1].token_ids)
