"""Encoders: padding changes nothing, the three forms of a block, the heads, and what is saved is what is loaded."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import bestiary
from bestiary import (
    ClassifierConfig,
    EncoderConfig,
    ImageClassifier,
    ImageConfig,
    MaskedLanguageModel,
    SequenceClassifier,
    UsageError,
)
from bestiary.cli import main
from bestiary.data import ByteTokenizer
from bestiary.hub import native
from bestiary.models.encoder import Encoder, patches

LAYOUTS = [
    "encoder_attention*2",
    "bidirectional{mixer=mamba, channel=none} bidirectional{mixer=hyena, channel=monarch_mlp}",
    "gla rwkv4 encoder_attention",  # causal ones among them, and a channel mixer that looks back
] + (["m2{l_max=20}*2"] if "m2" in bestiary.mixers.names() else [])
TOKENS = torch.randint(40, (3, 12), generator=torch.Generator().manual_seed(1))
LENGTHS = torch.tensor([12, 5, 1])


def config(layout: str = LAYOUTS[0], **options) -> EncoderConfig:
    return EncoderConfig(layout, 32, vocab_size=40, max_length=20, **options)


def masked_model(layout: str = LAYOUTS[0], **options) -> MaskedLanguageModel:
    torch.manual_seed(0)
    return wake(MaskedLanguageModel(config(layout, **options)))


def wake(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float64; matrices that start at zero would hide what flows through them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and not parameter.any():
                parameter.normal_(std=0.2)
    return model.double().eval()


@pytest.mark.parametrize("block", ["pre", "post", "m2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_changes_nothing_whatever_it_holds(layout: str, block: str) -> None:
    layout = layout.replace("channel=none", "channel=swiglu") if block == "m2" else layout
    model = masked_model(layout, block=block, token_types=2)
    kinds = torch.randint(2, TOKENS.shape)
    padded, more = TOKENS.clone(), F.pad(TOKENS, (0, 7), value=3)
    for row, length in enumerate(LENGTHS.tolist()):
        padded[row, length:] = -1  # an id that does not exist
    with torch.no_grad():
        hidden = model.encoder(padded, lengths=LENGTHS, token_types=kinds)
        longer = model.encoder(more, lengths=LENGTHS, token_types=F.pad(kinds, (0, 7)))
        for row, length in enumerate(LENGTHS.tolist()):
            alone = model.encoder(TOKENS[row : row + 1, :length], token_types=kinds[row : row + 1, :length])
            for found in (hidden, longer):
                torch.testing.assert_close(found[row : row + 1, :length], alone, rtol=1e-9, atol=1e-10)
                assert not found[row, length:].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_documents_are_what_they_are_alone(layout: str) -> None:
    model, bounds = masked_model(layout), torch.tensor([0, 5, 5, 12])
    with torch.no_grad():
        packed = model(TOKENS[:1], cu_seqlens=bounds)
        for start, end in ((0, 5), (5, 12)):
            torch.testing.assert_close(packed[:, start:end], model(TOKENS[:1, start:end]), rtol=1e-9, atol=1e-10)
    with pytest.raises(UsageError, match="cu_seqlens must rise"):
        model(TOKENS[:1], cu_seqlens=torch.tensor([0, 5]))


def test_nan_in_the_padding_of_vectors_reaches_neither_outputs_nor_gradients() -> None:
    model = wake(SequenceClassifier(ClassifierConfig(LAYOUTS[1], 32, features=3, max_length=12)))
    x = torch.randn(3, 12, 3, dtype=torch.float64)
    expected = model(x, lengths=LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        x[row, length:] = float("nan")
    assert torch.equal(model(x, lengths=LENGTHS), expected)
    model.loss(x, torch.tensor([0, 1, 1]), lengths=LENGTHS)[0].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("block", ["pre", "post", "m2"])
def test_the_three_forms_of_a_block(block: str) -> None:
    encoder = masked_model("encoder_attention", block=block).encoder
    e = encoder.embedding(TOKENS) + encoder.positions(torch.arange(12))
    part = encoder.blocks[0]
    mixer, mlp = (lambda x: part.mixer(x)[0]), (lambda x: part.channel(x)[0])
    if block == "pre":
        h = e + mixer(part.norm(e))
        expected = encoder.norm(h + mlp(part.channel_norm(h)))
    elif block == "post":
        e = encoder.embedding_norm(e)
        h = part.norm(e + mixer(e))
        expected = part.channel_norm(h + mlp(h))
    else:
        h = mixer(encoder.embedding_norm(e))
        expected = part.channel_norm(h + mlp(h))
    torch.testing.assert_close(encoder(TOKENS), expected, rtol=1e-10, atol=1e-12)


def test_positions_tell_order_and_token_types_tell_texts() -> None:
    x = TOKENS[:1].expand(2, -1).clone()
    x[1, 0], x[1, 1] = TOKENS[0, 1], TOKENS[0, 0]
    unordered = wake(MaskedLanguageModel(dataclasses.replace(config(), max_length=0)))
    torch.testing.assert_close(unordered(x)[0, 2:], unordered(x)[1, 2:])  # attention alone sees a set
    model = masked_model(token_types=2)
    assert not torch.allclose(model(x)[0, 2:], model(x)[1, 2:])
    kinds = torch.zeros_like(TOKENS)
    torch.testing.assert_close(model(TOKENS, token_types=kinds), model(TOKENS))
    assert not torch.allclose(model(TOKENS, token_types=kinds + 1), model(TOKENS))


def test_the_masked_loss_is_the_naive_cross_entropy_at_masked_places() -> None:
    model = masked_model()
    torch.nn.init.normal_(model.decoder.bias)
    targets = torch.where(torch.rand(TOKENS.shape) < 0.3, TOKENS, -100)
    targets[0, 0] = 7
    loss, state = model.loss(TOKENS, targets, lengths=LENGTHS.clamp(min=12))
    expected = F.cross_entropy(model(TOKENS).flatten(0, 1), targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    assert isinstance(state, bestiary.state.Empty)
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad(loss, list(model.parameters()))
    for name, a, b in zip(names, found, torch.autograd.grad(expected, list(model.parameters()))):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12, msg=name)


def test_the_decoder_is_tied_and_a_new_model_knows_nothing() -> None:
    torch.manual_seed(0)
    model = MaskedLanguageModel(EncoderConfig("encoder_attention*2", 64))
    assert model.decoder.weight is model.encoder.embedding.weight and model.config.vocab_size == 256
    tokens = torch.randint(256, (4, 32))
    assert model.loss(tokens, tokens)[0].item() == pytest.approx(torch.tensor(256.0).log().item(), abs=0.2)


@pytest.mark.parametrize("pool", ["mean", "first", "last"])
def test_pooling_reads_real_steps_alone(pool: str) -> None:
    torch.manual_seed(0)
    base = dataclasses.asdict(config(LAYOUTS[2]))
    model = wake(SequenceClassifier(ClassifierConfig(**base, n_classes=3, pool=pool)))
    hidden = model.encoder(TOKENS, lengths=LENGTHS)
    rows = [hidden[row, :length] for row, length in enumerate(LENGTHS.tolist())]
    expected = torch.stack([{"mean": h.mean(0), "first": h[0], "last": h[-1]}[pool] for h in rows])
    torch.testing.assert_close(model(TOKENS, lengths=LENGTHS), model.head(expected))
    labels = torch.tensor([2, -1, 0])  # a row without a class counts for nothing
    loss, _ = model.loss(TOKENS, labels, lengths=LENGTHS)
    torch.testing.assert_close(loss, F.cross_entropy(model.head(expected), labels, ignore_index=-1))


def test_patches_are_squares_row_by_row() -> None:
    image = torch.arange(2 * 4 * 6.0).reshape(1, 2, 4, 6)
    found = patches(image, 2)
    assert found.shape == (1, 6, 8)
    for number, (row, column) in enumerate([(0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4)]):
        assert torch.equal(found[0, number], image[0, :, row : row + 2, column : column + 2].flatten())


def test_images_of_one_channel_need_none() -> None:
    model = wake(ImageClassifier(ImageConfig("encoder_attention", 32, height=8, width=4, patch=2)))
    images = torch.randn(2, 8, 4, dtype=torch.float64)
    assert torch.equal(model(images), model(images[:, None])) and model(images).shape == (2, 10)
    assert model.config.features == 4 and model.config.max_length == 8
    with pytest.raises(UsageError, match=r"\(batch, 1, 8, 4\), not \(2, 4, 8\)"):
        model(images.transpose(1, 2))


def test_dropout_acts_in_training_alone() -> None:
    model = masked_model(dropout=0.5)
    assert torch.equal(model(TOKENS), model(TOKENS))
    model.train()
    assert not torch.equal(model(TOKENS), model(TOKENS))


def test_a_classifier_begins_with_the_pretrained_encoder() -> None:
    pretrained = masked_model(LAYOUTS[1], token_types=2, norm="rms")
    model = SequenceClassifier.from_pretrained(pretrained, n_classes=3, pool="first", dropout=0.1).eval()
    assert torch.equal(model.encoder(TOKENS), pretrained.encoder(TOKENS))
    assert model(TOKENS).shape == (3, 3) and model.config.dropout == 0.1 and model.config.norm == "rms"
    assert all(a is not b for a, b in zip(model.encoder.parameters(), pretrained.encoder.parameters()))


MODELS = [
    lambda: MaskedLanguageModel(config(LAYOUTS[1], block="post", token_types=2)),
    lambda: SequenceClassifier(ClassifierConfig(LAYOUTS[0], 32, features=3, n_classes=4, pool="last")),
    lambda: ImageClassifier(ImageConfig(LAYOUTS[2], 32, height=8, width=8, patch=4, channels=2, dropout=0.1)),
]


@pytest.mark.parametrize("make", MODELS, ids=["masked", "sequences", "images"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_survives_saving_as_what_it_is(make, dtype: torch.dtype, tmp_path) -> None:
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    bestiary.save(model, ByteTokenizer(), tmp_path / "m")
    loaded, tokenizer = bestiary.load(tmp_path / "m")
    assert type(loaded) is type(model) and loaded.config == model.config and tokenizer is not None
    for (name, a), (other, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b)
    x: Tensor = TOKENS
    if model.config.features is not None:
        x = torch.randn((2, 2, 8, 8) if isinstance(model, ImageClassifier) else (2, 6, 3))
    assert torch.equal(loaded.eval()(x), model(x))


def test_files_from_before_there_were_kinds_hold_language_models(tmp_path) -> None:
    model = bestiary.LanguageModel(bestiary.ModelConfig("gla", 32))
    bestiary.save(model, None, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    text = path.read_text()
    assert '"model": "language_model"' in text
    path.write_text(text.replace('  "model": "language_model",\n', ""))
    assert isinstance(bestiary.load(tmp_path / "m")[0], bestiary.LanguageModel)
    path.write_text(text.replace('"language_model"', '"oracle"'))
    with pytest.raises(bestiary.BestiaryError, match="kind of model 'oracle'"):
        bestiary.load(tmp_path / "m")
    with pytest.raises(UsageError, match="Linear cannot be saved"):
        native.kind_of(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 40}, "d_model must be a positive multiple of 32"),
        ({"norm": "batch"}, "norm 'batch'"),
        ({"block": "m2", "layout": "mamba"}, "wants a channel mixer"),
        ({"vocab_size": 9, "features": 2}, "not both"),
        ({"features": 2, "token_types": 2}, "token_types"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"layout": "mambo"}, "mamba"),
        ({"max_length": -1}, "max_length must be at least 0"),
    ],
)
def test_a_wrong_configuration_is_one_clear_error(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EncoderConfig(**options)


def test_wrong_inputs_are_one_clear_error() -> None:
    model = masked_model()
    with pytest.raises(UsageError, match=r"0\.\.39, got 0\.\.40"):
        model(torch.tensor([[0, 40]]))
    with pytest.raises(UsageError, match="21 steps, the model positions for 20"):
        model(torch.zeros(1, 21, dtype=torch.int64))
    with pytest.raises(UsageError, match="knows no token types"):
        model(TOKENS, token_types=torch.zeros_like(TOKENS))
    with pytest.raises(UsageError, match="lengths must lie in"):
        model(TOKENS, lengths=torch.tensor([13, 1, 1]))
    with pytest.raises(UsageError, match="token ids"):
        model.encoder(torch.randn(1, 4, 3))
    with pytest.raises(UsageError, match="reads tokens"):
        MaskedLanguageModel(EncoderConfig(features=2))
    with pytest.raises(UsageError, match="pool 'max'"):
        ClassifierConfig(pool="max")
    with pytest.raises(UsageError, match="width must be a positive multiple of patch=3, not 8"):
        ImageConfig(height=9, width=8, patch=3)
    with pytest.raises(UsageError, match=r"\(batch, time, 2\)"):
        Encoder(EncoderConfig(features=2))(torch.randn(1, 4, 3))


@pytest.mark.parametrize(
    ("d_model", "max_length", "millions"),
    [
        (768, 128, 80.27),
        (768, 2048, 81.97),
        (768, 8192, 87.43),
        (768, 32768, 109.25),
        (960, 128, 115.6),
        (1536, 128, 259.1),
        (1792, 128, 341.04),
    ],
)
def test_m2_bert_has_the_published_number_of_parameters(d_model: int, max_length: int, millions: float) -> None:
    if "m2" not in bestiary.mixers.names():
        pytest.skip("there is no m2 yet")
    layout = f"m2{{l_max={max_length}, channel=m2_mlp}}*12"
    shape = EncoderConfig(
        layout, d_model, vocab_size=30528, max_length=max_length, token_types=2, norm_eps=1e-12, block="m2"
    )
    with torch.device("meta"):
        model = MaskedLanguageModel(shape)
    features = 12 * 2 * 5 * max_length  # the released files keep what the filters' networks read as parameters, too
    digits = len(str(millions).partition(".")[2])
    assert round((model.n_parameters() + features) / 1e6, digits) == millions


def test_verbs_of_language_models_refuse_other_kinds(tmp_path, capsys) -> None:
    bestiary.save(masked_model().float(), ByteTokenizer(), tmp_path / "m")
    (tmp_path / "text.txt").write_text("some text")
    folder = str(tmp_path / "m")
    for command in (["generate", folder], ["info", folder], ["eval", folder, str(tmp_path / "text.txt")]):
        assert main(command) == 2
        assert "holds a MaskedLanguageModel: give a language model here" in capsys.readouterr().err
