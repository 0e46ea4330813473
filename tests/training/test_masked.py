"""Masked language models: which tokens are hidden, that gaps are learned, and that what was learned carries over."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from shared import shared

import bestiary
from bestiary import EncoderConfig, MaskedLanguageModel, SequenceClassifier, UsageError
from bestiary.data import Batches, ByteTokenizer, JsonTokenizer
from bestiary.data.glue import TASKS, Example, encode, load_glue
from bestiary.data.labelled import Labelled, LabelledBatches
from bestiary.data.special import SpecialIds, special_ids
from bestiary.evaluation import masked_score
from bestiary.training import MaskedBatches, TrainConfig, train
from bestiary.training.classify import fine_tune, train_classifier
from bestiary.training.masked import mask_tokens

IDS = SpecialIds(mask=256, first=257, separator=258, plain=256, vocab_size=259)
TEXT = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 100, np.uint8).astype(np.int64)


def model(layout: str = "bidirectional{mixer=gla}", **options) -> MaskedLanguageModel:
    torch.manual_seed(1)
    return MaskedLanguageModel(EncoderConfig(layout, 32, vocab_size=IDS.vocab_size, max_length=48, **options))


def tokens() -> torch.Tensor:
    return torch.randint(1, 256, (500, 100))


@pytest.mark.parametrize("rate", [0.15, 0.3])
def test_of_the_chosen_tokens_eight_in_ten_are_masked_one_is_random_and_one_stays(rate: float) -> None:
    before = tokens()
    inputs, targets = mask_tokens(before, IDS, seed=1, step=2, rate=rate)
    chosen = targets >= 0
    count = chosen.sum().item()
    assert count / before.numel() == pytest.approx(rate, abs=0.01)
    assert torch.equal(targets[chosen], before[chosen]) and torch.equal(inputs[~chosen], before[~chosen])
    masked, kept = (inputs == IDS.mask) & chosen, (inputs == before) & chosen
    assert masked.sum().item() / count == pytest.approx(0.8, abs=0.02)
    assert kept.sum().item() / count == pytest.approx(0.1 + 0.1 / 256, abs=0.015)
    other = inputs[chosen & ~masked & ~kept]
    assert other.min() >= 0 and other.max() < 256 and len(other.unique()) > 200


def test_the_other_rule_masks_all_of_them() -> None:
    before = tokens()
    inputs, targets = mask_tokens(before, IDS, seed=1, step=2, rule="mask")
    assert torch.equal(inputs == IDS.mask, targets >= 0)


def test_special_ids_and_those_to_keep_are_never_chosen() -> None:
    before = torch.tensor([[257, 10, 0, 258, 10, 256]]).expand(200, -1)
    inputs, targets = mask_tokens(before, IDS, seed=0, step=0, rate=1.0, keep=(0,))
    assert (targets >= 0)[0].tolist() == [False, True, False, False, True, False]
    assert torch.equal(inputs[:, 2], before[:, 2])


def test_masking_is_a_function_of_seed_and_step_alone() -> None:
    before = tokens()
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first = mask_tokens(before, IDS, seed=3, step=7)
    again = mask_tokens(before, IDS, seed=3, step=7)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    for seed, step in ((3, 8), (4, 7), (7, 3)):
        assert not torch.equal(mask_tokens(before, IDS, seed=seed, step=step)[1], first[1])
    assert torch.equal(torch.get_rng_state(), state[0]) and np.random.get_state()[1].tolist() == state[1]  # noqa: NPY002
    batches = MaskedBatches(Batches(TEXT, 4, 16, seed=3), IDS)
    later = batches.global_batch(9)
    assert all(torch.equal(a, b) for a, b in zip(later, batches.global_batch(9)))
    whole = torch.where(later[1] >= 0, later[1], later[0])
    assert torch.equal(whole, batches.windows.global_batch(9)[0])


def test_wrong_rates_and_rules_are_told_at_once() -> None:
    windows = Batches(TEXT, 4, 16)
    with pytest.raises(UsageError, match=r"rate must be in \(0, 1\]"):
        MaskedBatches(windows, IDS, rate=0.0)
    with pytest.raises(UsageError, match="bert, mask"):
        MaskedBatches(windows, IDS, rule="bart")


def test_special_ids_are_the_tokenizers_own_or_follow_its_vocabulary() -> None:
    assert special_ids(ByteTokenizer()) == IDS
    words = {"[CLS]": 0, "[SEP]": 1, "a": 2, "b": 3}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    assert special_ids(JsonTokenizer(core)) == SpecialIds(mask=4, first=0, separator=1, plain=4, vocab_size=5)


@pytest.mark.parametrize("layout", ["bidirectional{mixer=gru}", "bidirectional{mixer=mamba, channel=none}"])
def test_a_tiny_model_learns_to_fill_gaps(layout: str) -> None:
    trained = model(layout)
    before = masked_score(trained, TEXT[:960], IDS, time=48)
    batches = MaskedBatches(Batches(TEXT, 8, 48), IDS)
    result = train(trained, batches, TrainConfig(steps=100, lr=1e-2))
    after = masked_score(trained, TEXT[:960], IDS, time=48)
    assert before.loss > 5 and before.accuracy < 0.2 and before.tokens == after.tokens
    assert result.losses[0] > 5 and result.losses[-1] < 1 and after.loss < 0.5 and after.accuracy > 0.9


def test_the_score_is_the_naive_one_whatever_the_batches() -> None:
    scored, text = model().double(), TEXT[:101]
    found = masked_score(scored, text, IDS, time=25, batch_size=4)
    inputs, targets = mask_tokens(
        torch.from_numpy(text[:100]).reshape(4, 25), IDS, seed=0, step=0, rate=0.15, rule="mask"
    )
    logits = scored.eval()(inputs)[targets >= 0]
    wanted = targets[targets >= 0]
    assert found.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, wanted).item(), rel=1e-6)
    assert found.accuracy == (logits.argmax(1) == wanted).double().mean().item() and found.tokens == len(wanted)
    short = masked_score(scored, text[:31], IDS, time=25, rate=1.0)
    assert short.tokens == 30  # the filling of the last row does not count
    with pytest.raises(UsageError, match="none of 1 tokens"):
        masked_score(scored, text[:1], IDS, time=25)


def test_a_masked_run_that_stopped_is_a_run_that_never_did(tmp_path: Path) -> None:
    config, batches = TrainConfig(steps=8, save_every=0, accumulation=2), MaskedBatches(Batches(TEXT, 4, 16), IDS)
    straight, first, last = (model(dropout=0.2) for _ in range(3))
    torch.manual_seed(5)
    train(straight, batches, config)
    torch.manual_seed(5)
    train(first, batches, config, folder=tmp_path, until=3)
    train(last, batches, config, folder=tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), last.parameters()))
    assert isinstance(bestiary.load(tmp_path)[0], MaskedLanguageModel)


def test_accumulation_changes_no_gradient_of_a_masked_batch_or_of_rows_of_unequal_length() -> None:
    rows = tuple(torch.randint(256, (n,)) for n in (3, 9, 1, 7, 5, 2, 8, 4))
    labelled = Labelled(rows, torch.arange(8) % 3, tuple(torch.zeros_like(row) for row in rows))
    for batches, classes in ((MaskedBatches(Batches(TEXT, 8, 16), IDS), None), (LabelledBatches(labelled, 8), 3)):
        found = []
        for parts in (1, 2, 4):
            trained = model(token_types=2).double()
            if classes:
                torch.manual_seed(2)
                trained = SequenceClassifier.from_pretrained(trained, n_classes=classes)
            train(trained, batches, TrainConfig(steps=2, accumulation=parts, clip=0))
            found.append([parameter.detach() for parameter in trained.parameters()])
        for other in found[1:]:
            for a, b in zip(found[0], other):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


def test_a_module_of_ones_own_trains_but_has_no_folder(tmp_path: Path) -> None:
    class Line(torch.nn.Linear):
        def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, None]:
            return torch.nn.functional.cross_entropy(self(inputs), targets), None

    torch.manual_seed(0)
    x = torch.randn(64, 2)
    batches = LabelledBatches(Labelled(x, (x[:, 0] > x[:, 1]).long()), 16)
    result = train(Line(2, 2), batches, TrainConfig(steps=60, lr=0.1))
    assert result.losses[-1] < 0.3 and result.tokens == 60 * 16
    with pytest.raises(UsageError, match="Line cannot be saved"):
        train(Line(2, 2), batches, TrainConfig(steps=1), folder=tmp_path)


def test_a_classifier_learns_what_can_be_told_apart() -> None:
    rng = torch.Generator().manual_seed(0)
    rows = tuple(torch.randint(97, 123, (int(n),), generator=rng) for n in torch.randint(3, 40, (160,), generator=rng))
    labels = torch.arange(160) % 2
    rows = tuple(
        torch.cat([row, torch.tensor([65 + int(label)])]) for row, label in zip(rows, labels)
    )  # A or B at the end
    data, test = Labelled(rows[:128], labels[:128]), Labelled(rows[128:], labels[128:])
    trained = SequenceClassifier.from_pretrained(model())
    result = train_classifier(trained, data, test, TrainConfig(steps=60, lr=5e-3), batch_size=16)
    assert result.evaluations[-1]["accuracy"] == 1.0 and result.evaluations[-1]["matthews"] == 1.0


def test_rows_of_a_task_are_first_text_separator_and_are_cut_to_fit() -> None:
    examples = [Example("ab", None, 1), Example("abcdef", "xy", 0)]
    single, pair = encode(examples, ByteTokenizer(), IDS, 8).inputs
    assert single.tolist() == [257, 97, 98, 258]
    assert pair.tolist() == [257, 97, 98, 99, 258, 120, 121, 258]
    assert encode(examples, ByteTokenizer(), IDS, 8).kinds[1].tolist() == [0] * 5 + [1] * 3
    with pytest.raises(UsageError, match="max_length must be at least 5"):
        encode(examples, ByteTokenizer(), IDS, 4)


def glue(folder: Path) -> Path:
    """A task in SST-2's format that the last word decides."""
    place = folder / "SST-2"
    place.mkdir(parents=True)
    lines = [
        f"a {noun} that is {word} \t{label}"
        for noun in ("film", "book", "tale", "play")
        for word, label in (("good", 1), ('"bad', 0))
    ]
    for name, part in (("train", lines * 6), ("dev", lines)):
        (place / f"{name}.tsv").write_text("sentence\tlabel\n" + "\n".join(part) + "\n", encoding="utf-8")
    return folder


def test_fine_tuning_carries_weights_over_and_learns_the_task(tmp_path: Path) -> None:
    pretrained = model(token_types=2)
    before = [parameter.clone() for parameter in pretrained.parameters()]
    config = TrainConfig(steps=40, lr=5e-3, save_every=0)
    options = {"batch_size": 16, "folder": tmp_path / "run"}
    found = fine_tune(pretrained, ByteTokenizer(), IDS, "SST-2", glue(tmp_path), config, **options)
    assert found.score == found.measures["accuracy"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, pretrained.parameters()))  # a copy was tuned
    loaded, tokenizer = bestiary.load(tmp_path / "run")
    assert isinstance(loaded, SequenceClassifier) and isinstance(tokenizer, ByteTokenizer)
    untrained = fine_tune(
        pretrained, ByteTokenizer(), IDS, "SST-2", tmp_path, dataclasses.replace(config, steps=0), examples=3
    )
    for a, b in zip(untrained.model.encoder.parameters(), pretrained.encoder.parameters()):
        assert torch.equal(a, b)


def test_files_that_are_not_the_tasks_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown task 'MNLI'"):
        load_glue(tmp_path, "MNLI")
    with pytest.raises(UsageError, match=r"lacks train\.tsv"):
        load_glue(tmp_path, "RTE")
    path = glue(tmp_path) / "SST-2" / "dev.tsv"
    path.write_text("sentence\tlabel\ngood\t7\n")
    with pytest.raises(bestiary.BestiaryError, match=r"dev\.tsv, line 2: no label among 0, 1"):
        load_glue(tmp_path, "SST-2")


@pytest.mark.parametrize(
    ("task", "train_size", "dev_size"), [("SST-2", 67_349, 872), ("CoLA", 8_551, 1_043), ("RTE", 2_490, 277)]
)
def test_glues_own_files_are_read_whole(task: str, train_size: int, dev_size: int) -> None:
    parts = load_glue(shared("eval/glue"), task)
    assert [len(part) for part in parts] == [train_size, dev_size]
    for part in parts:
        assert {example.label for example in part} == {0, 1} and all(example.text for example in part)
        assert all((example.second is not None) == (task == "RTE") for example in part)
    assert TASKS[task].metric == ("matthews" if task == "CoLA" else "accuracy")
