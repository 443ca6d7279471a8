"""Pairs made by rules from plain text and from WordNet's tree: what is wrong in them, and how far apart they stand."""

import json
from collections import Counter

import pytest

from mmpre.data_tools.sentence_pairs import OTHER, sentences, spoiled
from mmpre.data_tools.split import split_of
from mmpre.data_tools.wordnet import STEPS, Synset, _pairs


def test_sentences_are_plain_and_short_and_of_running_text():
    text = (
        'The law was good. In 1850 it was not. He said: "no." Who is there? So do we.\nThey have few\nfriends. It is.'
    )
    assert list(sentences(text)) == ["The law was good.", "They have few friends."]


def test_one_word_is_in_the_wrong_number_and_two_neighbours_are_exchanged():
    right = "This law was good for all people."
    wrong = spoiled(right)
    assert wrong["number"] == "This law were good for all people."  # a capital letter begins the sentence
    a, b = right.split(), wrong["order"].split()
    assert sorted(a) == sorted(b)
    places = [i for i, (one, other) in enumerate(zip(a, b, strict=True)) if one != other]
    assert len(places) == 2 and places[1] == places[0] + 1 and 0 < places[0] and places[1] < len(a) - 1
    assert spoiled(right) == wrong
    assert spoiled("Nobody knew.") == {}
    assert all(OTHER[OTHER[word]] == word for word in OTHER)


def tree(count, branches=3):
    """Nouns, each but the first below one before it."""

    keys, glosses = [f"n{i:08d}" for i in range(count)], [f'what is {i}; "an example"' for i in range(count)]
    above = [(("hypernym", keys[(i - 1) // branches]),) if i else () for i in range(count)]
    return [Synset(keys[i], "noun.x", (), glosses[i], above[i]) for i in range(count)]


def apart(left, right, branches=3):
    """Steps between two nouns of the tree, by climbing from the one with the higher number."""
    steps = 0
    while left != right:
        left, right, steps = min(left, right), (max(left, right) - 1) // branches, steps + 1
    return steps


def test_wordnets_pairs_are_of_one_split_with_the_steps_between_them():
    made = list(_pairs(tree(4_000)))
    assert {split for split, _ in made} == {"valid", "test"}
    steps = Counter()
    for split, sample in made:
        about = json.loads(sample["json"])
        left, right = (int(about[side].removeprefix("what is ")) for side in ("left", "right"))
        assert split_of(f"n{left:08d}") == split_of(f"n{right:08d}") == split
        assert about["steps"] == apart(left, right) > 0
        assert about["nearness"] == pytest.approx(1 / (1 + about["steps"]))
        steps[about["steps"]] += 1
    assert all(steps[n] > 10 for n in range(1, STEPS + 1)) and max(steps) > STEPS
    assert list(_pairs(tree(4_000))) == made
