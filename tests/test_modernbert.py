import pytest
import torch
from parity_text import losses_of, padded, some_batch, some_samples, vary, word_tokenizer
from transformers import ModernBertConfig, ModernBertForMaskedLM

from mmpre.draw import Draw
from mmpre.recipes.modernbert import modernbert, scales

DRAW = Draw.micro_batch(0, 0, 0, 0)
SMALL = dict(
    width=32, depth=4, heads=4, hidden=40, length=16, reach=2, batch=8, growth=0, micro_batches=1, steps=10, warmup=1,
    dropout=0.0,
)  # fmt: skip


@pytest.fixture
def tokenizer(tmp_path):
    word_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path)


def a_config(recipe, numbers):
    table = recipe.network.modalities["text"].table
    return ModernBertConfig(
        vocab_size=table.num_embeddings, hidden_size=numbers["width"], num_hidden_layers=numbers["depth"],
        num_attention_heads=numbers["heads"], intermediate_size=numbers["hidden"],
        local_attention=2 * numbers.get("reach", 64), pad_token_id=0,
        rope_parameters={kind: {"rope_theta": 10_000.0, "rope_type": "default"}
                         for kind in ("full_attention", "sliding_attention")},
    )  # fmt: skip


@pytest.mark.parametrize(("scale", "millions"), [("base", 149), ("large", 395)])
def test_scales_have_the_papers_parameters_and_as_many_as_transformers(scale, millions, tmp_path):
    word_tokenizer(50_368).save(str(tmp_path / "tokenizer.json"))
    with torch.device("meta"):
        recipe = modernbert(tokenizer=str(tmp_path), **scales[scale])
        sizes = dict(width=768, depth=22, heads=12, hidden=1_152) | scales[scale]
        theirs = ModernBertForMaskedLM(a_config(recipe, sizes))
    count = sum(p.numel() for p in recipe.module().parameters())
    assert count == sum(p.numel() for p in theirs.parameters())
    assert sum(p.numel() for p in recipe.network.parameters()) // 1_000_000 in (millions, millions - 1)


def test_loss_and_gradients_are_those_of_transformers(tokenizer):
    torch.manual_seed(0)
    recipe = modernbert(tokenizer=tokenizer, **SMALL)
    module, task = recipe.module(), recipe.stages[0].tasks[0]
    vary(module)
    theirs = ModernBertForMaskedLM(a_config(recipe, SMALL)).eval()
    text, head = recipe.network.modalities["text"], task.objective.readouts[0].head
    model = theirs.model
    pairs = [(text.table, model.embeddings.tok_embeddings), (text.norm, model.embeddings.norm),
             (recipe.network.encoder.norm, model.final_norm), (head.transform.dense, theirs.head.dense),
             (head.transform.norm, theirs.head.norm)]  # fmt: skip
    for number, (block, layer) in enumerate(zip(recipe.network.encoder.blocks, model.layers, strict=True)):
        attention, gated = block.sublayers
        pairs += [(attention.sublayer.qkv, layer.attn.Wqkv), (attention.sublayer.out, layer.attn.Wo),
                  (gated.norm, layer.mlp_norm), (gated.sublayer.up, layer.mlp.Wi),
                  (gated.sublayer.down, layer.mlp.Wo)]  # fmt: skip
        pairs += [(attention.norm, layer.attn_norm)] if number else []
    for ours, other in pairs:
        other.weight.data.copy_(ours.weight)
    theirs.decoder.bias.data.copy_(head.bias)

    batch = some_batch(task.view, task.objective.readers, some_samples(9))
    loss = task.objective(batch, DRAW).total(batch.counts)
    ids_Bn, valid_Bn = padded(batch)
    replaced = batch.replaced["text"]
    seen_N = torch.where(replaced, text.reader.vocabulary.mask, batch.seen["text"]["ids"])
    label_N = torch.full_like(seen_N, -100)
    label_N[batch.picked["word"].clean_M] = batch.clean["text"]["ids"][batch.picked["word"].clean_M]
    (seen_Bn, label_Bn) = (torch.full(ids_Bn.shape, fill) for fill in (0, -100))
    seen_Bn[valid_Bn], label_Bn[valid_Bn] = seen_N.long(), label_N.long()
    want = theirs(input_ids=seen_Bn, attention_mask=valid_Bn.long(), labels=label_Bn).loss
    torch.testing.assert_close(loss, want)
    loss.backward()
    want.backward()
    for ours, other in pairs:
        torch.testing.assert_close(ours.weight.grad, other.weight.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(head.bias.grad, theirs.decoder.bias.grad, atol=1e-5, rtol=1e-4)


def test_the_papers_batches_grow_and_its_learning_rate_stays():
    stage = modernbert(tokenizer="bytes", width=32, depth=1, heads=2, hidden=16).stages[0]
    assert stage.batch_at(0)[1] == 768 and stage.batch_at(18_165)[1] == 4_608
    assert 1_024 * stage.batch_at(18_165)[0] == pytest.approx(50e9, rel=1e-3)
    assert 1_024 * stage.batch_at(2_760)[0] == pytest.approx(3e9, rel=0.01)
    assert 1_024 * stage.batch_at(stage.steps)[0] == pytest.approx(1.719e12, rel=1e-3)
    factor = stage.optimizer.schedule.factor
    assert factor(0) < 0.001 and factor(2_760) == factor(stage.steps - 1) == 1
    # the decay is of weights alone, and by the schedule
    optimizer = stage.optimizer.build(stage.tasks[0].objective.named_parameters())
    decays = [group["weight_decay"] * group["peak_lr"] for group in optimizer.param_groups]
    assert decays == [pytest.approx(1e-5), 0.0]


def test_it_learns_and_held_out_rows_hide_half_as_much(tokenizer):
    torch.manual_seed(0)
    recipe = modernbert(tokenizer=tokenizer, **SMALL)
    task, samples = recipe.stages[0].tasks[0], some_samples(8, most=8)
    many = some_samples(400)
    shares = [
        batch.counts["picked:word"] / int((batch.clean["text"].special_N < 0).sum())
        for batch in (some_batch(view, task.objective.readers, many) for view in (task.view, task.held_out))
    ]
    assert shares == [pytest.approx(0.3, abs=0.03), pytest.approx(0.2, abs=0.03)]
    losses = losses_of(recipe, samples, 80)
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
