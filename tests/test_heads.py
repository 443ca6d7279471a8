import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmpre.heads.cross_entropy import cross_entropy
from mmpre.heads.matching import Matching
from mmpre.heads.region import ClassScores, RegionClass, RegionClassKL, RegionFeature
from mmpre.heads.vocabulary import Vocabulary
from mmpre.tokens import Tokens

D, E, C, V, N = 8, 12, 6, 20, 7


@pytest.fixture
def tokens():
    g = torch.Generator().manual_seed(1)
    return Tokens.of_row(
        torch.full((N,), -1), ids=torch.randint(V, (N,), generator=g), soft=torch.randn(N, C, generator=g).softmax(1),
        features=torch.randn(N, E, generator=g).half(),
    )  # fmt: skip


@pytest.fixture
def states():
    return torch.randn(3, D, generator=torch.Generator().manual_seed(2))


INDEX = torch.tensor([1, 4, 6])


def test_mrc_kl_summed_over_classes_is_torchs_divergence(tokens, states):
    scores = ClassScores(D, C)
    loss_M = RegionClassKL(scores)(states, tokens, INDEX)
    whole = F.kl_div(scores(states).log_softmax(1), tokens["soft"][INDEX], reduction="batchmean")
    torch.testing.assert_close(loss_M.mean() * C, whole)
    sure = tokens.with_values(soft=scores(states).softmax(1).detach()[[0, 0, 0, 0, 1, 1, 2]])
    torch.testing.assert_close(RegionClassKL(scores)(states, sure, INDEX), torch.zeros(3), atol=1e-6, rtol=0)


def test_mrc_never_takes_the_background_as_target(tokens, states):
    scores = ClassScores(D, C)
    soft = torch.full((N, C), 0.01)
    soft[:, 0], soft[:, 3] = 0.9, 0.06
    loss_M, also = RegionClass(scores).measured(states, tokens.with_values(soft=soft), INDEX)
    torch.testing.assert_close(loss_M, -scores(states).log_softmax(1)[:, 3])
    assert torch.equal(also["accuracy"], (scores(states)[:, 1:].argmax(1) == 2).float())


def test_region_feature_shares_the_input_projection_and_averages_over_features(tokens, states):
    project = nn.Linear(E, D)
    head = RegionFeature(project)
    assert head.project.weight.data_ptr() == project.weight.data_ptr()
    assert [name for name, _ in head.named_parameters() if "project" not in name] == [
        "bias", "transform.dense.weight", "transform.dense.bias", "transform.norm.weight", "transform.norm.bias",
    ]  # fmt: skip
    nn.init.normal_(head.bias)
    predicted = head.transform(states) @ project.weight + head.bias
    expected = F.mse_loss(predicted, tokens["features"][INDEX].float())
    torch.testing.assert_close(head(states, tokens, INDEX).mean(), expected)
    head(states, tokens, INDEX).sum().backward()
    assert project.weight.grad.abs().sum() > 0 and project.bias.grad is None


def test_the_vocabulary_head_shares_the_table_and_counts_what_is_right(tokens, states):
    table = nn.Embedding(V, D)
    head = Vocabulary(table)
    assert head.table.weight.data_ptr() == table.weight.data_ptr()
    scores = head.transform(states) @ table.weight.T + head.bias
    expected = F.cross_entropy(scores, tokens["ids"][INDEX], reduction="none")
    torch.testing.assert_close(head(states, tokens, INDEX), expected)
    best = tokens["ids"].clone()
    best[INDEX] = scores.argmax(1)
    best[4] = scores[1].argmin()
    loss_M, also = head.measured(states, tokens.with_values(ids=best), INDEX)
    assert also["accuracy"].tolist() == [1, 0, 1]
    torch.testing.assert_close(loss_M, head(states, tokens.with_values(ids=best), INDEX))


def test_heads_take_no_picked_tokens_and_give_no_loss(tokens):
    none, no_states = INDEX[:0], torch.zeros(0, D, requires_grad=True)
    scores, table, project = ClassScores(D, C), nn.Embedding(V, D), nn.Linear(E, D)
    for head in (Vocabulary(table), RegionFeature(project), RegionClassKL(scores), RegionClass(scores)):
        loss_M = head(no_states, tokens, none)
        assert loss_M.shape == (0,)
        loss_M.sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in head.parameters())


def test_matching_is_berts_pooler_and_two_scores(states):
    head = Matching(D)
    expected = head.classify(torch.tanh(states @ head.pool.weight.T + head.pool.bias))
    torch.testing.assert_close(head(states), expected)
    assert expected.shape == (3, 2)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 3, 41])
def test_cross_entropy_by_rows_is_torchs_in_loss_and_gradient(kind, rows):
    g = torch.Generator().manual_seed(3)
    score_MV = (4 * torch.randn(rows, 50, generator=g)).to(kind)
    id_M, weight_M = torch.randint(50, (rows,), generator=g), torch.rand(rows, generator=g, dtype=torch.float64)
    ours_MV, theirs_MV = score_MV.clone().requires_grad_(), score_MV.double().requires_grad_()
    loss_M = cross_entropy(ours_MV, id_M)
    want_M = F.cross_entropy(theirs_MV, id_M, reduction="none")
    assert loss_M.dtype == (torch.float64 if kind == torch.float64 else torch.float32)
    (loss_M * weight_M).sum().backward()
    (want_M * weight_M).sum().backward()
    torch.testing.assert_close(loss_M.double(), want_M, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(ours_MV.grad.double(), theirs_MV.grad, atol=1e-6, rtol=2 * torch.finfo(kind).eps)
