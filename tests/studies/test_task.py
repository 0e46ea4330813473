"""One's own task: a split that stays, batches that are functions of a step, and scores that mean what they say."""

import json
import math
from pathlib import Path

import pytest
import torch

from bestiary import LanguageModel, ModelConfig
from bestiary.data import ByteTokenizer
from bestiary.errors import UsageError
from bestiary.studies.task import IGNORED, Example, TaskBatches, encode, pad, read_task, score
from bestiary.training import TrainConfig, train

TOKENIZER = ByteTokenizer()


def write(path: Path, examples: list[tuple[str, str]]) -> Path:
    lines = [json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) for prompt, answer in examples]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def pairs(n: int, first: int = 0) -> list[tuple[str, str]]:
    return [(f"{i}+1=", str(i + 1)) for i in range(first, first + n)]


def test_every_example_stands_on_one_side_in_the_order_of_the_file(tmp_path: Path) -> None:
    train, held_out = read_task(write(tmp_path / "t.jsonl", pairs(2000)))
    assert sorted(train + held_out, key=lambda e: int(e.answer)) == [Example(*pair) for pair in pairs(2000)]
    assert [int(e.answer) for e in train] == sorted(int(e.answer) for e in train)
    assert 160 < len(held_out) < 240  # a tenth, within three standard errors
    some = read_task(tmp_path / "t.jsonl", held_out=0.5)[1]
    assert set(held_out) < set(some) and 930 < len(some) < 1070


def test_the_split_stays_when_lines_are_added_anywhere(tmp_path: Path) -> None:
    before = read_task(write(tmp_path / "a.jsonl", pairs(300)))
    after = read_task(write(tmp_path / "b.jsonl", [*pairs(100, 5000), *pairs(300)[::-1], *pairs(100, 9000)]))
    for old, new in zip(before, after):
        assert set(old) < set(new)


def test_a_prompt_never_stands_on_both_sides(tmp_path: Path) -> None:
    twice = [(prompt, word) for prompt, _ in pairs(200) for word in ("yes", "no")]
    train, held_out = read_task(write(tmp_path / "t.jsonl", twice))
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}
    assert len(train) + len(held_out) == 400


def test_blank_lines_do_not_count_and_other_fields_are_passed_over(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": p, "answer": a, "id": 3}) for p, a in pairs(100)]
    (tmp_path / "t.jsonl").write_text("\n\n".join(lines) + "\n  \n", encoding="utf-8")
    assert sum(map(len, read_task(tmp_path / "t.jsonl"))) == 100


def test_any_character_that_json_may_hold_stays_within_its_line(tmp_path: Path) -> None:
    strange = [(f"{i}: a\u2028b\u0085c\u000cé🙂=", "x\u2029\ny") for i in range(100)]
    train, held_out = read_task(write(tmp_path / "t.jsonl", strange))
    assert {(e.prompt, e.answer) for e in train + held_out} == set(strange)


@pytest.mark.parametrize(
    "line",
    [
        "prompt, answer",
        '{"prompt": "a", "answer": "b"',
        '{"prompt": "a"}',
        '{"prompt": "", "answer": "b"}',
        '{"prompt": "a", "answer": ""}',
        '{"prompt": "a", "answer": 3}',
        '{"prompt": null, "answer": "b"}',
        '["a", "b"]',
        "7",
        '{"prompt": "\\ud800", "answer": "b"}',
        '{"prompt": "a", "answer": "\\udfff"}',
    ],
)
def test_a_wrong_line_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "t.jsonl", pairs(100))
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[:41], "", line, *lines[41:]]), encoding="utf-8")
    with pytest.raises(UsageError, match=r"t\.jsonl, line 43: wanted"):
        read_task(path)


def test_a_missing_file_and_a_side_without_examples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the task"):
        read_task(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é", "answer": "b"}'.encode("latin-1"))
    with pytest.raises(UsageError, match="cannot read the task"):
        read_task(tmp_path / "latin.jsonl")
    with pytest.raises(UsageError, match="0 held out"):
        read_task(write(tmp_path / "t.jsonl", [("a", "b")] * 50))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="0 examples to train on and 0 held out"):
        read_task(tmp_path / "empty.jsonl")


EXAMPLES = [Example("2+2=", "4"), Example("capital of Peru? ", "Lima"), Example("é", "ü!")]


def test_batches_are_a_function_of_seed_and_step() -> None:
    first, again = (TaskBatches(EXAMPLES, TOKENIZER, batch_size=8, seed=5) for _ in range(2))
    later = first.global_batch(7)
    first.global_batch(3)
    assert all(torch.equal(a, b) for a, b in zip(again.global_batch(7), later))
    assert not torch.equal(first.global_batch(6)[0], later[0])
    assert not torch.equal(TaskBatches(EXAMPLES, TOKENIZER, batch_size=8, seed=6).global_batch(7)[0], later[0])


def test_every_row_is_an_example_and_only_answer_and_end_are_targets() -> None:
    batches = TaskBatches(EXAMPLES, TOKENIZER, batch_size=16)
    assert batches.time == len(b"capital of Peru? Lima")
    seen = set()
    for step in range(4):
        inputs, targets = batches.global_batch(step)
        assert inputs.shape == targets.shape == (16, batches.time)
        for row, wanted in zip(inputs.tolist(), targets.tolist()):
            begin = next(i for i, target in enumerate(wanted) if target != IGNORED)
            answer = bytes(target for target in wanted if target != IGNORED)
            prompt = bytes(row[: begin + 1])
            assert Example(prompt.decode(), answer[:-1].decode()) in EXAMPLES and answer[-1] == TOKENIZER.eos_id
            assert row[begin + 1 : begin + len(answer)] == list(answer[:-1])  # each target is the next input
            assert set(row[begin + len(answer) :]) <= {0}
            assert set(wanted[:begin] + wanted[begin + len(answer) :]) <= {IGNORED}
            seen.add(prompt)
    assert len(seen) == len(EXAMPLES)


def test_an_example_that_does_not_fit_says_what_to_raise() -> None:
    assert TaskBatches(EXAMPLES, TOKENIZER, batch_size=1, longest=22).time == 21
    with pytest.raises(UsageError, match="22 tokens, more than 21: raise --sequence-length"):
        TaskBatches(EXAMPLES, TOKENIZER, batch_size=1, longest=21)


def test_padding_changes_no_loss() -> None:
    model = LanguageModel(ModelConfig("gru mamba", 32)).double()
    rows = [encode(example, TOKENIZER) for example in EXAMPLES]
    together, _ = model.loss(*pad(rows, 40))
    alone = [(model.loss(*pad([row], len(row[0]) - 1))[0], len(row[0]) - row[1]) for row in rows]
    torch.testing.assert_close(together, sum(loss * n for loss, n in alone) / sum(n for _, n in alone))


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_answer_nats_are_those_of_each_byte_of_the_answer_and_its_end(batch_size: int) -> None:
    model = LanguageModel(ModelConfig("gru linear_attention", 32, embedding_std=0.5))
    nats = 0.0
    for example in EXAMPLES:
        text = example.prompt.encode()
        for byte in [*example.answer.encode(), 0]:
            logits, _ = model(torch.tensor([list(text)]))
            nats -= logits[0, -1].double().log_softmax(0)[byte].item()
            text += bytes([byte])
    found = score(model, EXAMPLES, TOKENIZER, batch_size=batch_size)
    assert found["answer_nats"] == pytest.approx(nats / 3, rel=1e-5)
    answer_bytes = len("4") + len("Lima") + len("ü!".encode())
    assert found["bpb"] == pytest.approx(nats / math.log(2) / answer_bytes, rel=1e-5)
    assert found["exact_match"] == 0 and found["held_out"] == 3
    json.dumps(found)  # it becomes a record


def test_a_task_that_was_learnt_is_matched_exactly_and_its_near_misses_are_not() -> None:
    learnt = [Example(f"{letter}?", letter.upper() * (i % 3 + 1)) for i, letter in enumerate("abcdefgh")]
    model = LanguageModel(ModelConfig("gru", 32))
    batches = TaskBatches(learnt, TOKENIZER, batch_size=32)
    train(model, batches, TrainConfig(steps=250, lr=1e-2, weight_decay=0.0))
    found = score(model, learnt, TOKENIZER, batch_size=3)
    assert found["exact_match"] == 1 and found["answer_nats"] < 0.1
    longer = [Example(e.prompt, e.answer + "!") for e in learnt]  # right, but it ends too soon
    shorter = [Example(e.prompt, e.answer[:-1]) for e in learnt if len(e.answer) > 1]  # right, but it goes on
    assert score(model, longer, TOKENIZER)["exact_match"] == score(model, shorter, TOKENIZER)["exact_match"] == 0
    mixed = [*learnt, *longer]
    assert score(model, mixed, TOKENIZER, batch_size=5)["exact_match"] == 0.5
