"""Text networks as transformers' RobertaForMaskedLM, where the tokenizer has RoBERTa's padding, with a tokenizer."""

from mmpre.recipes.exports.bert import BertLike

exporter = BertLike("roberta")
