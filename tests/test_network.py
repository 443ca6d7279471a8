import pytest
import torch
from torch import nn

from mmpre.attention import Causal, Full
from mmpre.batch import Row, pack
from mmpre.encoder import bert_encoder
from mmpre.network import Network
from mmpre.tokens import Tokens


class Numbers(nn.Module):
    """Ids below 50; a replaced one becomes a vector of its own. `scale` shows which role embedded a token."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.reader = f"reader {scale}"
        self.scale = scale
        self.table = nn.Embedding(50, 32)
        self.hidden_D = nn.Parameter(torch.randn(32))

    def features(self, tokens):
        return self.table(tokens["ids"])

    def embed(self, f_NE, tokens, replaced_N):
        return self.scale * torch.where(replaced_N[:, None], self.hidden_D, f_NE)


def tokens(ids):
    return Tokens.of_row(torch.full((len(ids),), -1), ids=torch.tensor(ids, dtype=torch.int64))


def row(key, *, replaced=(), seen=None, **roles):
    clean = {role: tokens(ids) for role, ids in roles.items()}
    seen = {role: tokens(ids) for role, ids in (seen or roles).items()}
    flags = {role: torch.tensor([id in replaced for id in one["ids"].tolist()]).bool() for role, one in seen.items()}
    return Row(key=key, clean=clean, seen=seen, replaced=flags, picked={})


def some_network():
    torch.manual_seed(0)
    encoder = bert_encoder(32, 2, 4, dropout=0.0, attention_dropout=0.0)
    return Network({"text": Numbers(), "image": Numbers(-1.0)}, encoder)


def some_batch(who=None, **more):
    rows = [
        row("a", text=[1, 2, 3], image=[10, 11], **more),
        row("b", text=[4], image=[12], **more),
        row("c", text=[5, 6], image=[], **more),
    ]
    return pack(rows, (who or Full()).plan)


def test_each_place_gets_the_vector_of_its_own_token_and_role():
    net, batch = some_network(), some_batch(replaced=(2, 12))
    text, image = net.modalities["text"], net.modalities["image"]
    want = [
        text.table.weight[4], -image.hidden_D, text.table.weight[5], text.table.weight[6],
        text.table.weight[1], text.hidden_D, text.table.weight[3], -image.table.weight[10], -image.table.weight[11],
    ]  # fmt: skip
    assert torch.equal(net.embed(batch), torch.stack(want))
    clean = net.embed(batch, clean=True)
    assert torch.equal(clean[1], -image.table.weight[12])
    assert torch.equal(clean[5], text.table.weight[2])


def test_clean_tokens_that_do_not_fit_the_layout_are_refused():
    shorter = row("a", text=[1, 2, 3], seen={"text": [1, 3]})
    net, batch = some_network(), pack([shorter], Full().plan)
    assert net.embed(batch).shape == (2, 32)
    with pytest.raises(ValueError, match=r"Network\.embed: the clean rows of role 'text' have other lengths"):
        net.embed(batch, clean=True)


def test_a_batch_may_hold_some_of_the_roles_and_no_others():
    net = some_network()
    only = pack([row("a", image=[1, 2]), row("b", image=[3])], Full().plan)
    assert net(only).shape == (3, 32)
    other = pack([row("a", sound=[1, 2])], Full().plan)
    with pytest.raises(KeyError, match="no modality for role 'sound'; it has text, image"):
        net(other)
    with pytest.raises(ValueError, match="at least one modality"):
        Network({}, net.encoder)


def test_forward_is_embed_then_encode_with_the_batchs_plan_places_and_layers():
    net = some_network().eval()
    at = torch.tensor([8, 0])
    states = {}
    for who in (Full(), Causal()):
        batch = some_batch(who)
        x_ND = net.embed(batch)
        whole = net(batch)
        states[type(who)] = whole
        torch.testing.assert_close(net(batch, at), whole[at])
        assert torch.equal(net.encode(x_ND, batch.layout, batch.plan), whole)
        read = net(batch, at=at, read=[0, 1])
        assert torch.equal(read.layer[0], x_ND)
        torch.testing.assert_close(read.last, whole[at])
        assert torch.equal(net.encode(x_ND, batch.layout, batch.plan, read=[1]).layer[1], read.layer[1])
    assert not torch.allclose(states[Full], states[Causal])


def test_what_a_replaced_token_was_changes_nothing():
    net = some_network().eval()
    one, other = (
        pack([row("a", text=[1, hidden, 3], image=[10], replaced=(20, 30)), row("b", text=[7], image=[8])], Full().plan)
        for hidden in (20, 30)
    )
    assert torch.equal(net(one), net(other))
    assert not torch.equal(net.embed(one, clean=True), net.embed(other, clean=True))


def test_a_row_among_others_equals_the_row_alone():
    net = some_network().eval()
    alone = pack([row("b", text=[4], image=[12])], Full().plan)
    torch.testing.assert_close(net(alone), net(some_batch())[:2])


def test_readers_are_named_by_role_and_roles_may_share_a_modality():
    assert some_network().readers == {"text": "reader 1.0", "image": "reader -1.0"}
    shared = Numbers()
    net = Network({"query": shared, "code": shared}, bert_encoder(32, 1, 4))
    assert net.modalities["query"] is net.modalities["code"]
    assert sum(p.numel() for p in net.parameters()) == 51 * 32 + 12 * 32**2 + 13 * 32
    net(pack([row("a", query=[1], code=[2, 3])], Full().plan)).sum().backward()
    assert shared.table.weight.grad[[1, 2, 3]].any(1).all()


def test_gradients_reach_every_weight_of_both_modalities():
    net = some_network()
    (net(some_batch(replaced=(2, 12))) * torch.randn(32)).sum().backward()
    untouched = [name for name, weight in net.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert untouched == []
