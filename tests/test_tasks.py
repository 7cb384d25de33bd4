"""What is asked is what is computed; what the model is given is what the user gave."""

import pytest
import torch
import transformers as T
from dense_ekfac import CONTEXT, VOCABULARY, asked, close, corpus, gpt2, llama
from plain_tasks import Squares, Translation
from small_networks import Net, sequences
from torch import nn
from torch.nn import functional as F

from ekfac_fast import LanguageModelTask, fit, prepare_queries, score
from ekfac_fast.data.batches import Batches
from ekfac_fast.data.collate import collate
from ekfac_fast.data.examples import example
from ekfac_fast.errors import ArgumentError, DataError, ModelError, Notice
from ekfac_fast.stages.run import Run


class LogitDifference(LanguageModelTask):
    """A measurement of the user's own: logit of 5 less that of 9 at the last position."""

    def compute_measurement(self, batch, model):
        mask = batch["attention_mask"]
        logits = model(input_ids=batch["input_ids"], attention_mask=mask).logits
        rows, last = torch.arange(len(mask)), mask.sum(1) - 1
        return (logits[rows, last, 5] - logits[rows, last, 9]).sum()


def test_a_measurement_of_a_derived_task_is_the_one_that_is_taken(tmp_path):
    model, task = llama(torch.float64), LogitDifference()
    factors = fit(model, corpus(), out=tmp_path, task=task)
    own = prepare_queries(model, factors, asked(), rank=None, task=task)
    default = prepare_queries(model, factors, asked(), rank=None)
    assert not torch.allclose(own.layers[0].P, default.layers[0].P)
    with torch.no_grad():
        each = [
            task.compute_measurement(
                {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}, model
            )
            for ids, _ in own.examples
        ]
    close(own.measurements, torch.stack(each), 1e-6)


def test_measurements_are_every_querys_own(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    data = [(torch.randn(6), torch.randn(1) * i) for i in range(6)]
    task = Squares(["0", "2"])
    factors = fit(model, data, out=tmp_path, task=task)
    found = prepare_queries(model, factors, data[3:], task=task).measurements
    true = torch.stack([F.mse_loss(model(x), y, reduction="sum").detach() for x, y in data[3:]])
    close(found, true, 1e-6)


def test_queries_are_never_cut_and_measure_something(tmp_path):
    model = gpt2()
    factors = fit(model, corpus(), out=tmp_path)
    long = torch.randint(0, VOCABULARY, (CONTEXT + 8,))
    with pytest.raises(
        DataError, match=rf"example 0: {CONTEXT + 8} tokens, the model has {CONTEXT}"
    ):
        prepare_queries(model, factors, [{"input_ids": long}])
    silent = {"input_ids": [1, 2, 3], "labels": [-100, -100, -100]}
    with pytest.raises(DataError, match="query 1: no token of it is measured"):
        prepare_queries(model, factors, [*asked(1), silent])


def test_training_examples_without_targets_are_counted():
    ids = list(range(CONTEXT + 6))
    cut = {"input_ids": ids, "labels": [-100] * CONTEXT + ids[CONTEXT:]}
    told = f"of 4 examples 1 are longer than the model's {CONTEXT} .* 1 have nothing to predict"
    with pytest.warns(Notice, match=told):
        batches = Batches([*corpus(3), cut], gpt2())
    assert (batches.truncated, batches.without_targets) == (1, 1)


def test_positions_that_start_after_the_padding_index():
    torch.manual_seed(0)
    config = T.RobertaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=66, is_decoder=True, pad_token_id=1,
    )  # fmt: skip
    model = T.RobertaForCausalLM(config).double().eval()
    for p in model.parameters():
        p.data.normal_(0, 0.4)
    ids = torch.randint(3, 97, (9,))
    with torch.no_grad():
        own = model(input_ids=ids[None]).logits
        batch = collate([example([{"input_ids": ids}], 0)])
        close(LanguageModelTask().logits(batch, model), own, 1e-12)
        # Padded on the left, as a loader of the user's own may do it.
        left = {name: F.pad(x, (4, 0), value=0) for name, x in batch.items()}
        left["input_ids"][:, :4] = 1
        close(LanguageModelTask().logits(left, model)[:, 4:], own, 1e-12)
    assert Batches([{"input_ids": ids}], model).context == 64


def test_packed_documents_are_kept_apart(tmp_path):
    model = llama(torch.float64)
    a, b, c = (torch.randint(0, VOCABULARY, (n,)) for n in (9, 7, 5))
    positions = torch.cat([torch.arange(9), torch.arange(7)])
    ids = torch.cat([a, b])
    packed = {"input_ids": ids, "position_ids": positions}
    short = {"input_ids": c, "position_ids": torch.arange(5)}  # padding beside it
    factors = fit(model, corpus(), out=tmp_path / "f")
    prepared = prepare_queries(model, factors, asked(), rank=None)
    got = score(model, prepared, [packed, short], out=tmp_path / "p").matrix
    each = [{"input_ids": x} for x in (a, b, c)]
    apart = torch.tensor(score(model, prepared, each, out=tmp_path / "a").matrix[:])
    close(got, torch.stack([apart[:, 0] + apart[:, 1], apart[:, 2]], 1), 1e-6)


@pytest.mark.parametrize("kind", [T.OPTForCausalLM, T.RobertaForCausalLM, T.GptOssForCausalLM])
def test_documents_that_a_model_does_not_keep_apart_are_refused(kind):
    """It takes `position_ids`, and attends to what lies before all the same."""
    config = kind.config_class(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, ffn_dim=32, word_embed_proj_dim=16, is_decoder=True,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, head_dim=8,
        layer_types=["full_attention"],
    )  # fmt: skip
    model, ids = kind(config).eval(), torch.arange(3, 12)
    first = 2 if kind is T.RobertaForCausalLM else 0
    positions = torch.cat([torch.arange(5), torch.arange(4)]) + first
    Run(model, [{"input_ids": ids, "position_ids": torch.arange(9) + first}], {})
    with pytest.raises(ModelError, match="does not keep the documents of a sequence apart"):
        Run(model, [{"input_ids": ids, "position_ids": positions}], {})


def test_no_document_predicts_the_next_ones_first_token():
    positions = [2, 3, 4, 2, 3]
    one = example([{"input_ids": [5, 6, 7, 8, 9], "position_ids": positions}], 0)
    assert one.labels.tolist() == [5, 6, 7, -100, 9]
    assert one.packed


def test_fields_that_the_model_does_not_take_are_refused():
    record = {"input_ids": [1, 2, 3], "segments": [0, 0, 1], "text": "abc", "length": 3}
    with pytest.raises(DataError, match="example 0: the model takes no 'segments'"):
        Batches([record], llama())
    assert len(Batches([{**record, "segments": "a b"}], llama()).lengths) == 1
    with pytest.raises(DataError, match=r"position_ids must be integers \[T\]"):
        Batches([{"input_ids": [1, 2], "position_ids": [[0, 1]]}], llama())


def test_an_encoder_and_a_decoder_keep_their_own_lengths(tmp_path):
    torch.manual_seed(0)
    config = T.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = T.T5ForConditionalGeneration(config).eval()

    def record(source, target):
        return {
            "input_ids": torch.randint(3, 97, (source,)),
            "attention_mask": torch.ones(source, dtype=torch.int64),
            "labels": torch.randint(3, 97, (target,)),
        }

    data = [record(4, 9), record(7, 3), record(5, 8)]
    task = Translation([f"decoder.block.0.layer.2.DenseReluDense.{x}" for x in ("wi", "wo")])
    factors = fit(model, data, out=tmp_path, task=task)
    found = prepare_queries(model, factors, data, task=task).measurements
    with torch.no_grad():
        each = [task.compute_train_loss({k: v[None] for k, v in r.items()}, model) for r in data]
    close(found, torch.stack(each), 1e-5)
    with pytest.raises(DataError, match="LanguageModelTask needs examples"):
        fit(model, data, out=tmp_path / "lm", layers="*.wi")


def test_bidirectional_models_are_refused_as_causal_ones(tmp_path):
    config = T.BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    with pytest.raises(ModelError, match="bidirectional, not causal"):
        fit(T.BertForMaskedLM(config), sequences(9, 8), out=tmp_path, layers="*.output.dense")


def test_virtual_tokens_before_a_text(tmp_path):
    class Prompted(T.LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, **_):
            x = self.get_input_embeddings()(input_ids)
            x = torch.cat([x.new_ones(len(x), 3, x.shape[-1]) / 9, x], 1)
            mask = torch.cat([attention_mask.new_ones(len(x), 3), attention_mask], 1)
            return super().forward(inputs_embeds=x, attention_mask=mask, use_cache=False)

    model = Prompted(llama().config).double().eval()
    data = corpus(4)
    factors = fit(model, data, out=tmp_path / "f")
    assert factors.tokens == sum(3 + len(x["input_ids"]) for x in data)
    prepared = prepare_queries(model, factors, asked(), rank=None)
    scores = score(model, prepared, data, out=tmp_path / "s", per_token=True)
    for q in range(3):
        for detail in scores.details(q):
            assert len(detail.per_token) == len(data[detail.index]["input_ids"])
            close(torch.tensor(detail.per_token.sum()), torch.tensor(detail.score), 1e-6)


def test_seeds_are_the_tasks_own(tmp_path):
    model = Net(lambda net, x: net.b(torch.tanh(net.a(x))))
    with pytest.raises(ArgumentError, match="seed is 1, but the task has a seed of its own, 5"):
        fit(model, sequences(5, 4), out=tmp_path, seed=1, task=LanguageModelTask(5), layers=["a"])
    with pytest.raises(ArgumentError, match=r"seed is 18446744073709551616, expected"):
        fit(model, sequences(5, 4), out=tmp_path, seed=2**64, layers=["a"])
