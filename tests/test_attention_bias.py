import pytest
import torch
from attends import some_batch
from transformers import LlamaConfig, T5Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.t5.modeling_t5 import T5Attention

from mmpre.attention import Full
from mmpre.attention.bias import ALiBi, RelativeKey, Rotary, T5Buckets, slopes, turned
from mmpre.attention.by_tokens import Positions
from mmpre.layout import Layout


def distances(n):
    return (torch.arange(n)[None] - torch.arange(n)[:, None])[None]


def test_alibis_slopes_are_the_published_ones_for_any_number_of_heads():
    assert slopes(4) == [2**-2, 2**-4, 2**-6, 2**-8]
    assert slopes(8) == [2.0**-h for h in range(1, 9)]
    assert slopes(12) == pytest.approx([2.0**-h for h in range(1, 9)] + [0.70711, 0.35355, 0.17678, 0.08839], abs=1e-5)
    assert slopes(1) == [2**-8]
    for heads in range(1, 40):
        assert len(set(slopes(heads))) == heads


def test_alibi_is_symmetric_falls_with_distance_and_is_not_learned():
    bias = ALiBi(4)
    added_HTT = bias.added(*[torch.zeros(1, 4, 9, 8)] * 2, distances(9))[0]
    assert torch.equal(added_HTT, added_HTT.mT)
    assert not added_HTT.diagonal(dim1=1, dim2=2).any()
    assert added_HTT[:, 2, 7].tolist() == [-5 * s for s in slopes(4)]
    assert not list(bias.parameters()) and not bias.state_dict()


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize("buckets, longest", [(32, 128), (8, 20)])
def test_t5_buckets_are_transformers(both_ways, buckets, longest):
    config = T5Config(
        d_model=16, d_kv=8, num_heads=2, relative_attention_num_buckets=buckets,
        relative_attention_max_distance=longest, is_decoder=not both_ways,
    )  # fmt: skip
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    ours = T5Buckets(2, buckets=buckets, longest=longest, both_ways=both_ways, table=theirs.relative_attention_bias)
    away = torch.arange(-300, 301)
    want = theirs._relative_position_bucket(away, both_ways, buckets, longest)
    assert torch.equal(ours.bucket(away), want)
    assert set(want.tolist()) == set(range(buckets)) - ({buckets // 2} if both_ways else set())
    assert torch.equal(ours.added(*[torch.zeros(1, 2, 40, 8)] * 2, distances(40)), theirs.compute_bias(40, 40))


def test_relative_keys_beyond_the_limits_count_as_these():
    bias = RelativeKey(8, left=2, right=1)
    q_gHnK = torch.randn(1, 3, 6, 8)
    added_gHnn = bias.added(q_gHnK, q_gHnK, distances(6))
    for i in range(6):
        for j in range(6):
            vector = bias.table.weight[{-2: 0, -1: 1, 0: 2, 1: 3}[max(-2, min(1, j - i))]]
            torch.testing.assert_close(added_gHnn[0, :, i, j], q_gHnK[0, :, i] @ vector / 8**0.5)


def test_rotary_embeddings_are_llamas_and_turn_with_the_distance_alone():
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    )
    x_NHK = torch.randn(20, 4, 8)
    place_1N = torch.randint(0, 300, (1, 20))
    cos, sin = LlamaRotaryEmbedding(config)(x_NHK, place_1N)
    want_1HNK, _ = apply_rotary_pos_emb(x_NHK.transpose(0, 1)[None], x_NHK.transpose(0, 1)[None], cos, sin)
    rotary = Rotary(8, theta=500.0)
    torch.testing.assert_close(rotary(x_NHK, place_1N[0]), want_1HNK[0].transpose(0, 1), atol=5e-5, rtol=1e-5)
    q, k = torch.randn(2, 1, 1, 8)
    products = [rotary(q, torch.tensor([a])).flatten() @ rotary(k, torch.tensor([a + 3])).flatten() for a in (0, 5, 90)]
    torch.testing.assert_close(torch.stack(products), products[0].expand(3), atol=1e-5, rtol=1e-5)


def test_positions_are_places_in_the_row_or_come_from_a_field():
    layout = Layout({"text": torch.tensor([2, 0, 3])})
    assert Full().plan(layout).position_N.tolist() == [0, 1, 0, 1, 2]
    batch = some_batch(Positions({"text": "place"}, Full()), [(3, 1)])
    assert batch.plan.position_N.tolist() == [*batch.seen["text"]["place"].tolist(), 3]


def test_refused_numbers_are_named():
    with pytest.raises(ValueError, match=r"at least 4 buckets .* got 2 buckets, longest 128"):
        T5Buckets(2, buckets=2)
    with pytest.raises(ValueError, match="left and right must be at least 0, got -1 and 8"):
        RelativeKey(8, left=-1)
    with pytest.raises(ValueError, match="heads of an even width, got 7"):
        Rotary(7)


def test_turning_has_the_gradient_that_autograd_finds():
    rotary, g = Rotary(8), torch.Generator().manual_seed(0)
    x_NHK = torch.randn(5, 3, 16, dtype=torch.float64, generator=g).requires_grad_()
    angles = rotary.angles(torch.tensor([0, 3, 1, 70, 2]), torch.float64)
    half_NHK = x_NHK[..., 4:12]  # as queries are that lie beside keys and values
    assert torch.autograd.gradcheck(lambda x: turned(x[..., 4:12], *angles), x_NHK)
    back_NHK = turned(turned(half_NHK, *angles), angles[0], -angles[1])
    torch.testing.assert_close(back_NHK, half_NHK)
