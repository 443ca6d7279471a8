"""Small samples of captions, regions with labels, and questions, for tests."""

import json

import safetensors.torch
import torch
from parity_text import WORDS

from mmpre.data.sample import Sample


def some_pictures(count, *, regions=None, features=16, objects=7, attributes=5, answers=6, asked=True):
    """Captions of 2 to 12 words, 1 to 6 regions unless told, and a question for every other picture."""
    g = torch.Generator().manual_seed(1)

    def words():
        count = int(torch.randint(2, 13, (), generator=g))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=g))

    made = []
    for i in range(count):
        some = regions or int(torch.randint(1, 7, (), generator=g))
        low, size = (torch.rand(some, 2, generator=g) * 0.4 + 0.1 for _ in range(2))
        tensors = {
            "features": torch.randn(some, features, generator=g).half(),
            "boxes": torch.cat([low, low + size, size, size.prod(1, keepdim=True)], 1),
            "object": torch.randint(objects, (some,), generator=g),
            "object_confidence": torch.rand(some, generator=g),
            "attribute": torch.randint(attributes, (some,), generator=g),
            "attribute_confidence": torch.rand(some, generator=g),
        }
        members = {"txt": words().encode(), "regions.safetensors": safetensors.torch.save(tensors)}
        if asked and i % 2:
            answer = json.dumps(int(torch.randint(answers, (), generator=g))).encode()
            members |= {"question.txt": words().encode(), "answer.json": answer}
        made.append(Sample(f"{i:03d}", "shard", "digest", members))
    return made


def changed(sample, **tensors):
    members = dict(sample.members)
    members["regions.safetensors"] = safetensors.torch.save(tensors_of(sample) | tensors)
    return Sample(sample.key, sample.shard, sample.digest, members)


def tensors_of(sample):
    return safetensors.torch.load(sample.members["regions.safetensors"])
