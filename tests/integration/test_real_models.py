"""Real models through the whole path: a `Trainer` with `InfluenceCallback`, the file, a query.

The truth is autograd on one example at a time; `matrices` gives `.grad` the form that rows have in the file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.demos import boring_classes as demos
from lightning.pytorch.demos.lstm import LightningLSTM, SequenceSampler, SimpleLSTM
from lightning.pytorch.demos.transformer import LightningTransformer, Transformer, WikiText2
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from lightning_influence import InfluenceCallback, InfluenceModule
from lightning_influence.query import InfluenceQuery
from tests.integration.lifecycle_models import fit
from tests.plain_loop import decoded_rows

# A few examples rank noisily; torch says at construction that padding will not be skipped.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*rows (aged within the epoch|are coarse)"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor"),
]
TEXT = Path(__file__).read_text(encoding="utf8")
TOKENS = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
IGNORED = -100
Positions = Callable[[Any], int]  # over how many a batch's loss is a mean, where an example's is a sum


# --- the truth ------------------------------------------------------------------------------------


class Truth(NamedTuple):
    """Of each example alone: its loss [N] and, by layer, its gradient [N, o, i]."""

    losses: Tensor
    rows: dict[str, Tensor]

    @property
    def inner_products(self) -> Tensor:
        rows = torch.cat([rows.flatten(1) for rows in self.rows.values()], dim=1)
        return rows @ rows.T


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """The model's `.grad` by the layers of a file: [out, in], a bias as the last column, tied weights once."""
    found: dict[str, Tensor] = {}
    seen: set[nn.Parameter | None] = {None}
    for name, module in model.named_modules():
        own = module._parameters
        layers = [(name, own.get("weight"), own["bias"].grad if own.get("bias") is not None else None)]
        if isinstance(module, nn.MultiheadAttention):
            bias = own["in_proj_bias"].grad
            parts = zip(("in_proj", "q_proj", "k_proj", "v_proj"), (bias, *bias.chunk(3)), strict=True)
            layers = [(f"{name}.{part}", own[f"{part}_weight"], share) for part, share in parts]
        for layer, weight, column in layers:
            if weight not in seen:
                seen.add(weight)
                grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                is_transposed = type(module).__name__ == "Conv1D"  # of transformers
                matrix = grad.T if is_transposed else grad.reshape(len(grad), -1)
                found[layer] = matrix.clone() if column is None else torch.cat([matrix, column[:, None]], 1)
    return found


def alone(model: LightningModule, example: Any, positions: Positions) -> tuple[Tensor, dict[str, Tensor]]:
    """An example's loss, summed over its positions, and its gradient."""
    batch = default_collate([example])
    model.zero_grad()
    step = model.training_step(batch, 0)
    loss = (step["loss"] if isinstance(step, dict) else step) * positions(batch)
    loss.backward()
    return loss.detach(), matrices(model)


def truth_of(model: LightningModule, data: Dataset, positions: Positions = lambda batch: 1) -> Truth:
    losses, gradients = zip(*[alone(model, data[n], positions) for n in range(len(data))], strict=True)
    model.zero_grad()
    rows = {name: torch.stack([gradient[name] for gradient in gradients]) for name in gradients[0]}
    return Truth(torch.stack(losses), rows)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """But for float32 sums in another order."""
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()) + 1e-6)


def assert_whole_and_true(influence: InfluenceModule, truth: Truth) -> None:
    """All parameters are covered, and the file has each example's loss and gradient."""
    assert influence.coverage.uncovered == ()
    assert influence.coverage.share == 1.0
    assert sorted(influence.store.layers) == sorted(truth.rows)
    query = InfluenceQuery(influence.store)
    for name, rows in truth.rows.items():
        assert_near(decoded_rows(query, name), rows)
    losses = torch.tensor(influence.store.column("loss"))
    if losses.isfinite().any():  # known unless the loss was declared
        assert_near(losses, truth.losses)


# --- runs -----------------------------------------------------------------------------------------


def at_rest(model: Any) -> Any:
    """No dropout and no learning rate, so that all rows belong to the weights that there are."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):  # attention, recurrent nets
            module.dropout = 0.0
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
    return model


def captured(folder: Path, model: LightningModule, data: Any = None, **options: Any) -> InfluenceModule:
    """One epoch of training with capture; a dataset is shuffled into batches of 4, the last one smaller."""
    path = folder / "influence.h5"
    if isinstance(data, Dataset):
        data = DataLoader(data, batch_size=4, shuffle=True)
    options = {"codec": "pairs-float32", "on_error": "raise"} | options
    fit(folder, model, data, InfluenceCallback(path, **options), max_epochs=1)
    return InfluenceModule.attach(model, path)


def collated(data: Dataset, n: int | None = None) -> Any:
    """The first examples as one batch; all without a number."""
    return default_collate([data[k] for k in range(len(data) if n is None else n)])


# --- Hugging Face ---------------------------------------------------------------------------------


class CausalLM(LightningModule):
    """A language model of transformers. As their own trainer does, it may be told the number of tokens."""

    def __init__(self, model: nn.Module, learning_rate: float = 0.0, *, is_counted: bool = False) -> None:
        super().__init__()
        self.model, self.learning_rate, self.is_counted = model, learning_rate, is_counted

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        number = {"num_items_in_batch": torch.tensor(predicted(batch))} if self.is_counted else {}
        return self.model(**batch, **number).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def gpt2() -> nn.Module:
    """Its output layer is its embedding; its positions are embedded once for the whole batch."""
    transformers = pytest.importorskip("transformers")
    sizes = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**TOKENS, **sizes, **no_dropout))


def llama() -> nn.Module:
    """Its normalization is a class of its own; two heads share one key."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TOKENS, **sizes, **heads))


class Passages(Dataset):
    """Passages of this file, character by character; of 12 positions, up to 8 at the end are padding."""

    def __init__(self, n: int = 10, *, is_padded: bool = True) -> None:
        self.n, self.is_padded = n, is_padded

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        is_text = torch.arange(12) < (12 - 5 * index % 9 if self.is_padded else 12)
        tokens = torch.tensor([ord(c) % 64 for c in TEXT[200 * index :][:12]]) * is_text
        labels = tokens.masked_fill(~is_text, IGNORED)
        return {"input_ids": tokens, "attention_mask": is_text.long(), "labels": labels}


def predicted(batch: dict[str, Tensor]) -> int:
    """How many tokens are predicted: every one but the first, and no padding."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


MODELS = pytest.mark.parametrize("make", [gpt2, llama])


@MODELS
@pytest.mark.parametrize("is_counted", [True, False])
@pytest.mark.parametrize("is_padded", [True, False])
def test_rows_of_language_models_are_the_gradients_of_single_passages(
    tmp_path: Path, make: Callable[[], nn.Module], is_counted: bool, is_padded: bool
) -> None:
    model, data = CausalLM(make(), is_counted=is_counted), Passages(is_padded=is_padded)
    assert_whole_and_true(captured(tmp_path, model, data), truth_of(model, data, predicted))


@MODELS
def test_scores_of_training_passages_for_one_another_are_symmetric(
    tmp_path: Path, make: Callable[[], nn.Module]
) -> None:
    model, data = CausalLM(make()), Passages()
    influence = captured(tmp_path, model, data)
    scores = {name: influence.scores(collated(data), curvature=name) for name in ("identity", "ekfac")}
    assert_near(scores["identity"], truth_of(model, data, predicted).inner_products)
    for each in scores.values():
        assert_near(each, each.T)
        nearest = (each / each.diagonal().sqrt()).argmax(dim=1)
        assert torch.equal(nearest, torch.arange(len(data)))


@MODELS
@pytest.mark.parametrize("codec", ["auto", "eigen"])
def test_a_language_model_that_trains_answers_queries(
    tmp_path: Path, make: Callable[[], nn.Module], codec: Any
) -> None:
    data = Passages(16)
    influence = captured(tmp_path, CausalLM(make(), 0.01), data, codec=codec)
    assert influence.coverage.share == 1.0
    scores = influence.scores(collated(data, 3))
    assert scores.isfinite().all()
    assert torch.equal(scores, influence.scores(collated(data, 3)))
    assert all(each in scores[each].topk(4).indices for each in range(3))


# --- torch's transformers -------------------------------------------------------------------------


BODIES: dict[str, Callable[[bool], nn.Module]] = {
    "encoder": lambda first: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 9, 0.0, batch_first=first), 2),
    "decoder": lambda first: nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=first),
    "both": lambda first: nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=first, norm_first=True),
    "attention": lambda first: nn.MultiheadAttention(8, 2, kdim=5, vdim=3, batch_first=first),
}


class Tagger(LightningModule):
    """Labels each of an example's tokens [t], of which 0 is padding; inside, positions may come first."""

    def __init__(self, kind: str, *, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.batch_first = kind, batch_first
        self.embedding, self.head = nn.Embedding(9, 8, padding_idx=0), nn.Linear(8, 9)
        self.body = BODIES[kind](batch_first)

    def encoded(self, x: Tensor, padding: Tensor) -> Tensor:
        """The decoders attend to themselves causally, and to the first three positions."""
        if self.kind == "encoder":
            return self.body(x, src_key_padding_mask=padding)
        if self.kind == "attention":  # to the padding as well, whose embedding is not trained
            return self.body(x, x[..., :5], x[..., :3])[0]
        start, future = x[:, :3] if self.batch_first else x[:3], torch.ones(2 * padding.shape[1:]).triu(1).bool()
        masks = {"tgt_mask": future, "tgt_key_padding_mask": padding, "memory_key_padding_mask": padding[:, :3]}
        if self.kind == "decoder":
            return self.body(x, start, **masks)
        return self.body(start, x, src_key_padding_mask=padding[:, :3], **masks)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        tokens, targets = batch
        x = self.embedding(tokens if self.batch_first else tokens.T)
        logits = self.head(self.encoded(x, tokens == 0))
        logits = logits if self.batch_first else logits.transpose(0, 1)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def tagged(length: int, n: int = 10) -> TensorDataset:
    """Tokens of which up to length - 1 at the end are padding, and targets."""
    is_text = torch.arange(length) < 1 + torch.arange(n)[:, None] % length
    tokens = torch.randint(1, 9, (n, length), generator=torch.Generator().manual_seed(1))
    return TensorDataset(tokens * is_text, (8 - tokens).masked_fill(~is_text, IGNORED))


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("length", [6, 4])  # 4 is the batch's size, so that shapes do not tell which is which
def test_rows_of_a_transformer_are_the_gradients_of_single_sequences(
    tmp_path: Path, kind: str, batch_first: bool, length: int
) -> None:
    model, data = at_rest(Tagger(kind, batch_first=batch_first)), tagged(length)
    influence = captured(tmp_path, model, data)
    truth = truth_of(model, data, lambda batch: int((batch[1] != IGNORED).sum()))
    assert_whole_and_true(influence, truth)
    assert_near(influence.scores(collated(data), curvature="identity"), truth.inner_products)


# --- Lightning's demos ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("demo", "measurement"),
    [(demos.BoringModel, None), (demos.ManualOptimBoringModel, lambda model, batch: model(batch)[:, 0])],
)
def test_the_boring_demos_are_captured_as_they_are(tmp_path: Path, demo: Any, measurement: Any) -> None:
    influence = captured(tmp_path, demo())
    assert influence.coverage.share == 1.0
    assert influence.scores(torch.randn(2, 32), measurement=measurement).isfinite().all()


@pytest.mark.parametrize(("demo", "loss"), [(demos.BoringModel, "auto"), (demos.DemoModel, "sum")])
def test_rows_of_the_small_demos_are_their_own_gradients(tmp_path: Path, demo: Any, loss: str) -> None:
    model, data = at_rest(demo()), demos.RandomDataset(32, 10)
    assert_whole_and_true(captured(tmp_path, model, data, loss=loss), truth_of(model, data))


@pytest.mark.parametrize(
    ("demo", "data", "advice"),
    [
        (demos.DemoModel, lambda: DataLoader(demos.RandomDataset(32, 8)), 'loss="sum"'),  # a sum of outputs
        (demos.BoringModel, demos.BoringDataModuleNoLen, "index_fn"),  # an iterable without indices
    ],
)
def test_a_demo_that_cannot_be_captured_trains_on_after_one_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, demo: Any, data: Any, advice: str
) -> None:
    callback = InfluenceCallback(tmp_path / "influence.h5")
    trainer = fit(tmp_path, demo(), data(), callback, limit_train_batches=5)
    assert trainer.global_step == 10
    (message,) = [str(each.message) for each in recwarn if "InfluenceCallback" in str(each.message)]
    assert advice in message


@pytest.fixture
def wiki_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WikiText2:
    """The text demos' data, where they look for it, of this file's characters instead of a download."""
    lines = [" ".join(line) for line in TEXT.splitlines() if line][:40]
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data", "wikitext-2.txt").write_text("\n".join(lines), encoding="utf8")
    monkeypatch.setattr(WikiText2, "download", staticmethod(lambda destination: None))
    return WikiText2()


def test_the_transformer_demo_is_captured_as_it_is(tmp_path: Path, wiki_text: WikiText2) -> None:
    loader = DataLoader(Subset(wiki_text, range(6)))  # the demo's own, but shorter
    influence = captured(tmp_path, LightningTransformer(wiki_text.vocab_size), loader, codec="auto")
    assert influence.coverage.share == 1.0
    assert influence.scores(collated(wiki_text, 3)).isfinite().all()


def test_rows_of_the_transformer_demo_are_its_own_gradients(tmp_path: Path, wiki_text: WikiText2) -> None:
    torch.manual_seed(0)
    model, data = LightningTransformer(wiki_text.vocab_size), Subset(wiki_text, range(6))
    model.model = Transformer(wiki_text.vocab_size, 16, 2, 24, 1)  # instead of 200 units and two layers
    influence = captured(tmp_path, at_rest(model), data)
    assert_whole_and_true(influence, truth_of(model, data, lambda batch: batch[1].numel()))


def small_lstm(vocabulary: int) -> LightningLSTM:
    """The demo at rest, with 16 units instead of 512."""
    torch.manual_seed(0)
    model = LightningLSTM(vocabulary)
    model.model = SimpleLSTM(vocabulary, 16, 16, 2)
    return at_rest(model)


def test_the_lstm_demo_is_covered_but_for_its_recurrence(tmp_path: Path, wiki_text: WikiText2) -> None:
    with pytest.warns(UserWarning, match=r"not attributed: model\.rnn \(LSTM, "):
        influence = captured(tmp_path, LightningLSTM(wiki_text.vocab_size), codec="auto")
    (rnn,) = influence.coverage.uncovered
    assert (rnn.name, rnn.covered) == ("model.rnn", 0)
    assert "nn.Linear" in rnn.reason
    assert sorted(influence.store.layers) == ["model.decoder", "model.encoder"]


def test_rows_of_the_lstm_demo_are_the_gradients_of_single_sequences(tmp_path: Path, wiki_text: WikiText2) -> None:
    model = small_lstm(wiki_text.vocab_size)
    query = InfluenceQuery(captured(tmp_path, model).store)
    model.log = lambda *args, **kwargs: None
    rows = {name: decoded_rows(query, name) for name in query.store.layers}
    for sequence in range(20):  # the demo's sampler reads 20 pieces of the text side by side
        model.hidden = None  # which goes from one piece to the next
        for batch in SequenceSampler(wiki_text, batch_size=20):
            example = batch[sequence]
            _, gradient = alone(model, wiki_text[example], lambda batch: batch[1].numel())
            for name in rows:
                assert_near(rows[name][example], gradient[name])


def test_the_lstm_demo_answers_the_same_question_the_same_way(tmp_path: Path, wiki_text: WikiText2) -> None:
    model = small_lstm(wiki_text.vocab_size)
    influence = captured(tmp_path, model)
    scores = influence.scores(collated(wiki_text, 3))
    assert model.hidden is None  # the query left nothing behind
    influence.scores(collated(wiki_text, 2))  # nor does the question before
    assert torch.equal(influence.scores(collated(wiki_text, 3)).nan_to_num(), scores.nan_to_num())
