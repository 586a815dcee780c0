"""The head at masked positions only: the same loss and gradients as the whole model, and the same checkpoint."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForMaskedLM, RobertaConfig, RobertaForMaskedLM

from trainer.head import on_masked_positions

TINY = {
    "vocab_size": 500,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 130,
}
TINY_OF = {
    "distilbert": {"vocab_size": 500, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "modernbert": {
        **TINY,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
}
KNOWN = ["bert", "camembert", "distilbert", "electra", "modernbert", "mpnet", "roberta", "xlm-roberta"]
OTHER = ["albert", "deberta-v2"]


def make(model_type, seed=0):
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[model_type](**TINY_OF.get(model_type, TINY))
    return AutoModelForMaskedLM.from_config(config).eval()


@pytest.fixture
def batch():
    """Three rows of 64 tokens, of which 9 or fewer are masked: (input_ids, positions, labels there, labels of all)."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 500, (3, 64), generator=generator)
    positions = torch.stack([torch.randperm(64, generator=generator)[:9].sort().values for _ in range(3)])
    labels = torch.randint(5, 500, (3, 9), generator=generator)
    labels[1, 7:] = -100  # two slots that no position fills
    everywhere = torch.full((3, 64), -100).scatter(1, positions, labels)
    return ids, positions.where(labels >= 0, 0), labels, everywhere


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("model_type", KNOWN + OTHER)
def test_loss_gradients_and_logits_are_those_of_the_plain_model(model_type, batch):
    ids, positions, labels, everywhere = batch
    plain, ours = make(model_type), on_masked_positions(make(model_type))
    expected = plain(input_ids=ids, labels=everywhere)
    expected.loss.backward()
    output = ours(input_ids=ids, masked_positions=positions, labels=labels)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-6, atol=0)
    wanted = torch.stack([logits[chosen] for logits, chosen in zip(expected.logits, positions, strict=True)])
    torch.testing.assert_close(output.logits, wanted, rtol=0, atol=1e-6)
    wanted, found = gradients(plain), gradients(ours)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model_type", KNOWN)
def test_nothing_of_the_size_of_all_positions_is_projected(model_type, batch):
    ids, positions, labels, _ = batch
    model = on_masked_positions(make(model_type))
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[:-1]))
    model(input_ids=ids, masked_positions=positions, labels=labels)
    assert rows == [(3, 9)]


@pytest.mark.parametrize("model_type", ["bert", "camembert", "roberta", "xlm-roberta"])
def test_the_last_layer_asks_at_masked_positions_only_and_reads_all(model_type, batch):
    ids, positions, labels, _ = batch
    model = on_masked_positions(make(model_type))
    last = model.base_model.encoder.layer[-1]
    seen = {}
    for name, module in (("query", last.attention.self.query), ("key", last.attention.self.key), ("ffn", last.output)):
        module.register_forward_hook(lambda _, inputs, __, name=name: seen.update({name: inputs[0].shape[:-1]}))
    model(input_ids=ids, masked_positions=positions, labels=labels)
    assert seen == {"query": (3, 9), "key": (3, 64), "ffn": (3, 9)}


def test_with_an_attention_mask_the_layers_are_the_models_own(batch):
    ids, positions, labels, everywhere = batch
    attention_mask = torch.ones_like(ids)
    attention_mask[:, 60:] = 0
    plain, ours = make("roberta"), on_masked_positions(make("roberta"))
    expected = plain(input_ids=ids, attention_mask=attention_mask, labels=everywhere).loss
    found = ours(input_ids=ids, attention_mask=attention_mask, masked_positions=positions, labels=labels).loss
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_an_architecture_that_is_not_known_says_that_it_projects_all_positions(caplog):
    on_masked_positions(make("albert"))
    assert "AlbertForMaskedLM" in caplog.text
    assert "all positions" in caplog.text


def test_a_loss_over_parts_of_a_batch_is_divided_by_the_labels_of_the_whole(batch):
    ids, positions, labels, _ = batch
    model = on_masked_positions(make("roberta"))
    whole = model(input_ids=ids, masked_positions=positions, labels=labels).loss
    parts = [
        model(
            input_ids=ids[row],
            masked_positions=positions[row],
            labels=labels[row],
            num_items_in_batch=(labels >= 0).sum(),
        ).loss
        for row in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-6, atol=0)


def test_rows_without_a_masked_position_have_a_loss_of_zero_and_not_nan(batch):
    ids, positions, labels, _ = batch
    model = on_masked_positions(make("roberta"))
    loss = model(input_ids=ids, masked_positions=positions * 0, labels=torch.full_like(labels, -100)).loss
    assert loss.item() == 0


def test_without_positions_the_forward_is_the_models_own(batch):
    ids, _, _, everywhere = batch
    plain, ours = make("roberta"), on_masked_positions(make("roberta"))
    expected, output = (model(input_ids=ids, labels=everywhere) for model in (plain, ours))
    torch.testing.assert_close(output.loss, expected.loss, rtol=0, atol=0)
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=0)


def test_what_it_saves_is_a_plain_checkpoint_with_the_same_loss(batch, tmp_path):
    ids, positions, labels, everywhere = batch
    ours = on_masked_positions(make("roberta"))
    ours.save_pretrained(tmp_path)
    assert RobertaConfig.from_pretrained(tmp_path).architectures == ["RobertaForMaskedLM"]
    saved = RobertaForMaskedLM.from_pretrained(tmp_path).eval()
    assert type(saved) is RobertaForMaskedLM
    torch.testing.assert_close(
        saved(input_ids=ids, labels=everywhere).loss,
        ours(input_ids=ids, masked_positions=positions, labels=labels).loss,
        rtol=1e-6,
        atol=0,
    )


def test_logits_of_bfloat16_give_a_loss_in_float32(batch):
    ids, positions, labels, _ = batch
    model = on_masked_positions(make("roberta").to(torch.bfloat16))
    assert model(input_ids=ids, masked_positions=positions, labels=labels).loss.dtype == torch.float32
