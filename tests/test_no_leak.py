"""What a corruption hides cannot be told from what the encoder makes of the rest.

For each corruption: the hidden content is changed, and the states of a small network stay the same to the bit.
"""

import pytest
import torch
from masking import row
from parity_text import WORDS, some_samples, word_tokenizer
from pictures import noise
from pictures import sample as picture

from mmpre.attention import Full
from mmpre.batch import Row, pack
from mmpre.data.sample import Sample
from mmpre.encoder import bert_encoder
from mmpre.masking.corrupt import HideAll
from mmpre.masking.drop import Collapse, Drop, Insert
from mmpre.masking.exact import ExactShare
from mmpre.masking.fill import Noise, Shares, Zero
from mmpre.masking.grid import Blocks
from mmpre.masking.on_device import hide
from mmpre.masking.protocol import untouched
from mmpre.masking.units import WholeUnits
from mmpre.modalities.image_patches import ImagePatches, ImageReader
from mmpre.modalities.regions import RegionReader, Regions
from mmpre.modalities.text import Text, TextReader
from mmpre.network import Network

WIDTH = 32


def some_net(role):
    torch.manual_seed(0)
    text = Text(TextReader(word_tokenizer(), max_length=40), width=WIDTH, dropout=0.0)
    modality = {
        "text": text,
        "image": ImagePatches(ImageReader(4), width=WIDTH),
        "region": Regions(RegionReader(features=16), width=WIDTH, types=text.types, dropout=0.0),
    }[role]
    torch.nn.init.normal_(modality.mask_D if hasattr(modality, "mask_D") else text.table.weight)
    return Network({role: modality}, bert_encoder(WIDTH, 2, 2, dropout=0.0, attention_dropout=0.0)).eval()


def read(net, role):
    members = {"image": picture(noise(20, 24)), "region": some_samples(20)[7], "text": some_samples(1, most=30)[0]}
    return net.readers[role].tokenize(members[role], row(0))


@torch.no_grad()
def states(net, role, clean, made):
    one = Row(key="a", clean={role: clean}, seen={role: made.tokens}, replaced={role: made.replaced_N}, picked={})
    return net(pack([one], Full().plan))


def other(values, index_M, role):
    """The same values but for those of some tokens."""
    g = torch.Generator().manual_seed(1)
    changed = values.clone()
    if role == "text":
        changed[index_M] = 5 + (changed[index_M] - 5 + torch.randint(1, len(WORDS), index_M.shape, generator=g)) % 60
    elif role == "image":
        changed[index_M] = 255 - changed[index_M]
    else:
        changed[index_M] = torch.randn(changed[index_M].shape, generator=g).to(changed.dtype)
    return changed


def replacing(net):
    return net.readers["text"].replacement(mask=0.5, random=0.3)


@pytest.mark.parametrize(
    "role, field, mask, corruption",
    [
        ("text", "ids", ExactShare(role="text", share=0.4), HideAll()),
        ("text", "ids", ExactShare(role="text", share=0.4), replacing),
        ("text", "ids", ExactShare(role="text", share=0.4), Drop()),
        ("text", "ids", WholeUnits(role="text", share=0.4), Collapse("word")),
        ("text", "ids", ExactShare(role="text", share=0.4), Collapse()),
        ("text", "ids", ExactShare(role="text", share=0.4), Shares([(0.8, HideAll())])),
        ("image", "patch", Blocks(role="image"), Zero("patch")),
        ("image", "patch", Blocks(role="image"), HideAll()),
        ("image", "patch", Blocks(role="image"), Drop()),
        ("region", "features", ExactShare(role="region", share=0.5), HideAll()),
        ("region", "features", ExactShare(role="region", share=0.5), Noise("features")),
        (
            "region",
            "features",
            ExactShare(role="region", share=0.9),
            Shares([(0.5, Zero("features")), (0.3, HideAll())]),
        ),
    ],
)
def test_hidden_content_cannot_be_told_from_the_states(role, field, mask, corruption):
    net = some_net(role)
    clean = read(net, role)
    corruption = corruption(net) if corruption is replacing else corruption
    index_M, draw = mask(clean, row(3)), row(3).child("corrupt")
    made = corruption(clean, index_M, draw)
    if made.index_map is None:  # what 80/10/10 and shares keep is not hidden
        shown_M = made.tokens[field][index_M].eq(clean[field][index_M]).flatten(1 if clean[field].ndim > 1 else 0)
        shown_M = shown_M.all(1) if shown_M.ndim > 1 else shown_M
        index_M = index_M[~shown_M | made.replaced_N[index_M]]
    assert len(index_M) >= 2
    changed = clean.with_values(**{field: other(clean[field], index_M, role)})
    again = corruption(changed, mask(changed, row(3)), draw)
    assert torch.equal(states(net, role, clean, made), states(net, role, changed, again))
    plain, moved = states(net, role, clean, untouched(clean)), states(net, role, changed, untouched(changed))
    assert (plain - moved).abs().max() > 1e-3, "the change shows where nothing is hidden"


def test_a_collapsed_unit_does_not_tell_its_length():
    net = some_net("text")
    reader = net.readers["text"]

    def shown(ids, hidden):
        tokens = reader.tokenize(text_of(ids), row(0))
        return states(net, "text", tokens, Collapse()(tokens, torch.tensor(hidden), row(0)))

    two, three = shown([1, 2, 3, 4], [2, 3]), shown([1, 2, 3, 9, 4], [2, 3, 4])
    assert torch.equal(two, three)
    assert not torch.equal(two, shown([1, 2, 3, 5], [2, 3]))


def test_an_inserted_token_does_not_show_what_it_stands_before():
    net = some_net("text")
    text, index_M = net.modalities["text"], torch.tensor([2])
    embedded = []
    for ids in ([1, 2, 3], [1, 9, 3]):
        made = Insert()(text.reader.tokenize(text_of(ids), row(0)), index_M, row(0))
        embedded.append(text.embed(text.features(made.tokens), made.tokens, made.replaced_N))
    assert torch.equal(embedded[0][2], embedded[1][2])
    assert not torch.equal(embedded[0][3], embedded[1][3])


def test_a_batch_masked_again_shows_nothing_of_what_is_hidden():
    net = some_net("text")
    first = read(net, "text")
    index_M = ExactShare(role="text", share=0.4)(first, row(0))
    second = first.with_values(ids=other(first["ids"], index_M, "text"))
    made = []
    for clean in (first, second):
        whole = untouched(clean)
        one = Row(key="a", clean={"text": clean}, seen={"text": clean}, replaced={"text": whole.replaced_N}, picked={})
        made.append(hide(pack([one], Full().plan), "again", "text", index_M, HideAll(), row(0)))
    with torch.no_grad():
        assert torch.equal(*(net(batch) for batch in made))


def text_of(ids):
    return Sample("a", "shard", "digest", {"txt": " ".join(f"w{i}" for i in ids).encode()})
