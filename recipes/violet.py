"""VIOLET: one encoder over a clip's frames and its caption's words, which predicts what is hidden of both.

Paper    Fu et al. 2021, "VIOLET: End-to-End Video-Language Transformers with Masked Visual-token Modeling",
         arXiv:2111.12681
Follows  the authors' code (tsujuifu/pytorch_violet): Video Swin that keeps every frame, places and times, blockwise or
         attended masking of each row, hidden patches black before the Swin, codes of each frame at a quarter of its
         size (tiny: at half), captions among those of three others by scores over 0.05, AdamW with a constant learning
         rate
Differs  weights start at random (theirs: Video Swin of Kinetics, BERT); codes by our own visual_tokens (theirs: the
         encoder of DALL-E); all sources mixed (theirs: one after the other within an epoch); eight processes are taken
         for granted in `batch`; 15 percent of a row's own tokens are drawn where attention says (theirs: of a row
         padded to 32 words); the target of a hidden patch is its own code (theirs, in blocks: its left neighbour's, by
         an index that forgets [CLS]); clips of fewer frames stay short (theirs: frames are repeated); bytes unless a
         tokenizer is given (theirs: 30,522 word pieces)
Expect   not run at paper scale; its claim, a first look: docs/claims/violet.md
Run      mmpre train visual_tokens --scale tiny --codes 256 --clip 4 --side-px 32 --framing whole --data moving/train
           --out codes
         mmpre data derive moving/train --by codes --out train-codes       (and moving/valid into valid-codes)
         mmpre data tokenizer moving/train --out words.json
         mmpre train violet --scale tiny --data moving/train --sidecar train-codes --tokenizer words.json
           --valid moving/valid --valid-sidecar valid-codes
"""

from typing import Literal

from torch import nn

from mmpre.claims import Against, Claim
from mmpre.data.codes import WithCodes
from mmpre.data.video import Evenly, Video
from mmpre.encoder import bert_encoder
from mmpre.evaluation.hidden import HiddenTokens
from mmpre.evaluation.hidden_words import HiddenWords
from mmpre.evaluation.retrieval import PairRetrieval
from mmpre.heads.pixels import Pixels
from mmpre.heads.vocabulary import Vocabulary
from mmpre.masking.corrupt import HideAll
from mmpre.masking.grid import Blocks
from mmpre.masking.random import RandomTokens
from mmpre.modalities.text import Text, TextReader
from mmpre.modalities.video import Padded, VideoReader
from mmpre.modalities.video_swin import VideoSwin
from mmpre.network import Network
from mmpre.objectives.among import Among
from mmpre.objectives.attended import Attended
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.recipe import Recipe, Stage, Task
from mmpre.schedules import Constant
from mmpre.training.optim import AdamW
from mmpre.view import View


def violet(
    data: tuple[str, ...] = (),  # shards to train on; each sample has a clip, or a picture, and a caption
    valid: tuple[str, ...] = (),  # held-out shards
    sidecar: str = "",  # folder of the training shards' codes; "" where the shards hold them
    valid_sidecar: str = "",  # the same for the held-out shards
    tokenizer: str = "bytes",  # path of a tokenizer.json, or bytes
    channels: int = 96,  # of the Swin's lowest level, twice as many in each one above; states are as wide as the last
    depths: tuple[int, ...] = (2, 2, 18, 2),  # blocks of its levels; a patch is 4 pixels wide, times 2 for each above
    swin_heads: tuple[int, ...] = (3, 6, 12, 24),  # of their attention
    window: tuple[int, int, int] = (8, 7, 7),  # of its attention: frames, rows, columns
    drop_path: float = 0.2,  # chance of its last block to be left out of a clip
    depth: int = 12,  # layers over frames and words
    heads: int = 12,  # of their attention
    frames: int = 4,  # of a clip at most, evenly spaced
    side_px: int = 224,  # of the square that a frame is put into
    times: int = 6,  # rows of the table of times, so that more frames can be fine-tuned on
    places: int = 197,  # rows of the table of places in a frame, that of its [CLS] included
    ordered: bool = True,  # ablation: frames one by one through the Swin, and their mean in place of each
    length: int = 32,  # tokens of a caption at most, [CLS] and [SEP] included
    positions: int = 512,  # rows of the table of positions in a caption
    predict: Literal["codes", "pixels"] = "codes",  # of hidden patches: their codes, or what they show
    codes: int = 8_192,  # that a patch may have
    hide: float = 0.15,  # chance of a word to be predicted
    attended: float = 0.5,  # chance of a row to have hidden what is attended to
    blocks: bool = True,  # in other rows hidden patches lie in blocks; ablation: by themselves, with the chance `hide`
    mvm: float = 1.0,  # weight of predicting hidden patches; 0 leaves it out, but hides them all the same
    options: int = 4,  # captions that a clip's own is found among
    temperature: float = 0.05,  # of their scores
    batch: int = 96,  # rows in a step
    micro_batches: int = 8,  # parts of a step; what the number of processes must divide, and captions come from
    steps: int = 290_000,  # updates: 5 epochs of 5.5 million clips and pictures
    lr: float = 2e-5,  # all the time
    decay: float = 1e-3,  # of everything
    dropout: float = 0.1,  # everywhere but in the Swin
    valid_every: int = 5_000,  # steps
    pool: int = 100,  # clips among which one is looked for when it is evaluated
    words: tuple[str, ...] = ("left", "right", "up", "down"),  # that are hidden when it is evaluated
) -> Recipe:
    merged = 2 ** (len(depths) - 1)
    width, patch_px = channels * merged, 4 * merged
    grid = side_px // patch_px
    frame = Video(sampling=Evenly(frames), side_px=side_px)
    reader = VideoReader(frame, patch_px, 1, Padded(side_px), max_patches=grid**2, cls_each=True)
    video = VideoSwin(
        reader, grid=grid, channels=channels, depths=depths, heads=swin_heads, window=window, drop_path=drop_path,
        times=times, places=places, ordered=ordered,
    )  # fmt: skip
    text = Text(TextReader(tokenizer, max_length=length), width=width, positions=positions, dropout=dropout)
    encoder = bert_encoder(width, depth, heads, dropout=dropout, attention_dropout=dropout)
    net = Network({"video": video, "text": text}, encoder)

    def head(outputs: int) -> list[nn.Module]:
        hidden = nn.Linear(width, 2 * width)
        return [nn.Dropout(dropout), hidden, nn.ReLU(), *([nn.Linear(2 * width, outputs)] if outputs else [])]

    vtm = Among("video", "text", "text", nn.Sequential(*head(1)), options=options, temperature=temperature)
    mlm = Predict("word", Vocabulary(text.table), name="mlm")
    if predict == "codes":
        table = nn.Embedding(codes, 2 * width)
        nn.init.normal_(table.weight, std=0.02)
        told = Vocabulary(table, field="code", transform=nn.Sequential(*head(0)))
    else:
        shown = dict(normalise=False, absolute=True, transform=nn.Sequential(*head(0)))
        told = Pixels(2 * width, 3 * patch_px**2, video.features, **shown)
    visual = Predict("patch", told, name="mvm", weight=mvm)
    hiding = {"word": HideAll(), "patch": HideAll()}
    objective = OnePass(net, [mlm, visual] if mvm else [mlm], again=[vtm])
    if attended:
        objective = Attended(objective, hiding, share=hide, rows=attended)
    coded = {"video": WithCodes(reader, codes)} if mvm and predict == "codes" else {}
    alone = RandomTokens(role="video", rate=hide, at_least_one=False)
    patches = {"patch": Blocks(role="video") if blocks else alone}
    words_too = {"word": RandomTokens(role="text", rate=hide, at_least_one=False), **patches}
    view = View(readers=coded, picks=words_too, corruption=hiding)
    stage = Stage(
        tasks=[Task("violet", view, objective)], data=data, sidecar=sidecar or None, valid=valid,
        valid_sidecar=valid_sidecar or None, steps=steps, batch=batch, micro_batches=micro_batches,
        optimizer=AdamW(lr=lr, betas=(0.9, 0.98), weight_decay=decay, decay_vectors=True, schedule=Constant()),
        valid_every=valid_every,
    )  # fmt: skip
    retrieval = PairRetrieval(None, net.readers, item="video", rows=pool, between=lambda batch: vtm.between(net, batch))
    evaluations = [retrieval, HiddenWords(net, mlm.head, net.readers, words)]
    if coded:
        hidden = View(readers=coded, picks=patches, corruption=HideAll())
        evaluations.append(HiddenTokens(net, visual.head, hidden, name="hidden patches' codes"))
    return Recipe([stage], net, evaluations=evaluations)


scales = {
    "tiny": dict(
        channels=24, depths=(1, 2, 1), swin_heads=(1, 2, 4), window=(8, 4, 4), drop_path=0.0, depth=3, heads=4,
        side_px=64, length=24, codes=256, batch=16, micro_batches=1, steps=3_000, lr=1e-3, dropout=0.0, valid_every=500,
    ),
    "base": {},
}  # fmt: skip

MOTION = "hidden words"
claim = Claim(
    says="hidden words of motion are better known where clips' codes are predicted too, and where frames have an order",
    against={
        "no codes": Against(numbers={"mvm": 0.0}, measure=MOTION),
        "pixels": Against(numbers={"predict": "pixels"}, measure=MOTION),
        "random masks": Against(numbers={"attended": 0.0, "blocks": False}, measure=MOTION),
        "mean frame": Against(numbers={"ordered": False}, measure=MOTION),
    },
    quick=dict(channels=16, depth=2, steps=300, pool=20),
)
