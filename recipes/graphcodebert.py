"""GraphCodeBERT: predict hidden words of a comment and its code, beside a graph of where the code's values come from.

Paper    Guo et al. 2020, "GraphCodeBERT: Pre-training Code Representations with Data Flow", arXiv:2009.08366
Follows  one stream of comment, code and nodes of the data flow (mmpre/data/code.py), which the graph enters through
         attention alone; a node has place 0 and the mean of its pieces' vectors as they are shown, hidden ones too; 15
         percent of the tokens as in BERT; by turns edges (which node's value comes from which) and links (which piece a
         node stands for): those of 20 percent of the nodes are hidden and asked for, beside as many non-pairs
Differs  pre-training code was never published, fine-tuning code was: there nodes see neither the special tokens nor
         themselves (here, as in the paper, both; special tokens see nodes too, as theirs do), a comment has 128 tokens
         at most, at least one node a row is asked about, tokens have places from 2 (here from 1, without a padding's),
         and nodes take the room that a short program leaves (here always `nodes` at most). Dot products are divided by
         the root of the width: from random weights the plain ones, `scaled=False`, saturate the sigmoid. Losses are
         means over tokens and over questions (theirs: a sum over questions). A batch has rows of all languages, where
         each of theirs has one: languages are sources of `data`, with whole weights in proportion to their number of
         functions to the power of 0.7, as in --data python@20=... java@21=... js@9=... of CodeSearchNet; Python, Java
         and JavaScript are read. Comments within the code are words beside the text, and a node is not asked about an
         edge to itself. In the flow, bodies of all loops are read twice, what was before an `if` with an `else` does
         not come out of it in Java and JavaScript, and JavaScript's `=` assigns. Weights start at random (theirs:
         CodeBERT's); warm-up, linear decay of the rate, decay of weights and clipping are choices; bytes unless a
         tokenizer is given (theirs: 50,265 byte-level pieces)
Expect   not run at paper scale; its claim, at equal steps and a first look: docs/claims/graphcodebert.md. That nodes
         help a search for code after fine-tuning is not among what it compares
Run      mmpre train graphcodebert --scale tiny --data "stdlib/train/*.tar" --tokenizer code.json
"""

from typing import Literal

from mmpre.claims import Against, Claim, Measure
from mmpre.encoder import bert_encoder
from mmpre.evaluation.pair_ranking import PairRanking
from mmpre.evaluation.reconstruction import Reconstruction
from mmpre.heads.pairs import PairScores
from mmpre.heads.vocabulary import Vocabulary
from mmpre.masking.pairs import Asked, AskPairs, ShufflePairs
from mmpre.masking.random import RandomTokens
from mmpre.masking.units import InTurn
from mmpre.modalities.code_graph import CodeGraph, CodeReader, graph_attend, same_words
from mmpre.network import Network
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.recipe import Recipe, Stage, Task
from mmpre.schedules import Linear
from mmpre.training.optim import AdamW
from mmpre.view import View

OTHERS = {"edge": None, "link": "code"}  # what a node is asked to be paired with: nodes, or pieces of code


def graphcodebert(
    data: tuple[str, ...] = (),  # shards to train on; each sample has a program, and perhaps a text about it
    valid: tuple[str, ...] = (),  # held-out shards
    tokenizer: str = "bytes",  # path of a tokenizer.json, or bytes
    width: int = 768,  # of the states
    depth: int = 12,  # layers
    heads: int = 12,  # of attention
    length: int = 512,  # tokens of comment and code at most, [CLS] and [SEP]s included
    comment: int = 128,  # of these, tokens of the comment at most
    nodes: int = 128,  # of the data flow at most
    flow: Literal["true", "shuffled", "none"] = "true",  # ablations: edges between nodes drawn at random; no nodes
    ask: Literal["both", "edge", "link", "none"] = "both",  # ablations: questions on edges or links alone; none
    hide: float = 0.15,  # chance of a token to be predicted
    share: float = 0.2,  # of the nodes, whose edges or links are asked for
    scaled: bool = True,  # divide dot products by the root of the width
    batch: int = 1_024,  # rows in a step
    micro_batches: int = 32,  # parts of a step; what the number of processes must divide
    steps: int = 200_000,  # updates
    warmup: int = 10_000,  # steps to the peak learning rate, which then falls linearly to 0
    lr: float = 2e-4,  # at its peak
    decay: float = 0.01,  # of weights, not of biases and LayerNorms
    dropout: float = 0.1,  # everywhere
    clip: float = 1.0,  # largest norm of the gradient
    valid_every: int = 5_000,  # steps
) -> Recipe:
    reader = CodeReader(
        tokenizer, max_length=length, max_nodes=0 if flow == "none" else nodes, comments=True, about=("txt",),
        max_comment=comment,
    )  # fmt: skip
    code, attend = CodeGraph(reader, width=width, dropout=dropout), graph_attend("code")
    encoder = bert_encoder(width, depth, heads, dropout=dropout, attention_dropout=dropout, eps=1e-5)
    net = Network({"code": code}, encoder, attend=attend)
    shuffle = [ShufflePairs()] if flow == "shuffled" else []

    def view(*fields: str, words: bool = True) -> View:
        cuts = [AskPairs(field=field, others=OTHERS[field], share=share) for field in fields]
        picks = {"word": RandomTokens(role="code", rate=hide)} if words else {}
        return View(
            cuts={"code": InTurn(cuts + shuffle)}, corruption={"word": reader.replacement()}, attend=attend,
            picks=picks | {field: Asked(role="code", field=field) for field in fields},
        )  # fmt: skip

    words = Predict("word", Vocabulary(code.table, eps=1e-5), name="mlm")
    pairs = {field: Predict(field, PairScores(field=field, scaled=scaled)) for field in OTHERS}
    asked = [] if flow == "none" else [field for field in OTHERS if ask in (field, "both")]
    tasks = [Task(field, view(field), OnePass(net, [words, pairs[field]])) for field in asked]
    alone = OnePass(net, [words])
    stage = Stage(
        tasks=tasks or [Task("mlm", view(), alone)], data=data, valid=valid, steps=steps, batch=batch,
        micro_batches=micro_batches, clip=clip, valid_every=valid_every,
        optimizer=AdamW(lr=lr, betas=(0.9, 0.999), weight_decay=decay, schedule=Linear(warmup=warmup, total=steps)),
    )  # fmt: skip
    equal = ("by equal names alone", same_words)
    return Recipe([stage], net, evaluations=[
        Reconstruction(alone, view(), rows=500, name="loss of hidden tokens"),
        *(PairRanking(task.objective, pairs[task.name], view(task.name, words=False), equal, name=task.name)
          for task in tasks),
    ])  # fmt: skip


scales = {
    "tiny": dict(
        width=128, depth=4, heads=4, length=184, comment=24, nodes=40, batch=16, micro_batches=1, steps=2_000,
        warmup=200, lr=1e-3, dropout=0.0, valid_every=500,
    ),
    "base": {},
}  # fmt: skip

claim = Claim(
    says="nodes of the data flow lower the loss of hidden tokens, and it is their edges that do",
    against={
        "no nodes": Against(numbers={"flow": "none"}, measure="loss of hidden tokens", less=True),
        "shuffled edges": Against(
            numbers={"flow": "shuffled"},
            measure=(Measure("loss of hidden tokens", less=True), Measure("edge: AUC"), Measure("link: AUC")),
        ),
    },
    quick=dict(width=64, depth=2, heads=2, steps=400, warmup=40, lr=3e-3),
)
