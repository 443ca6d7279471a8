"""Text networks as transformers' ElectraForMaskedLM (a generator as wide as its tables), with a tokenizer."""

from mmpre.recipes.exports.bert import BertLike

exporter = BertLike("electra")
