"""MAE: predict the hidden three quarters of a picture's patches.

Paper    He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners", arXiv:2111.06377
Follows  the authors' code (facebookresearch/mae) and its PRETRAIN.md: sizes, decoder, normalised pixels, random crops,
         AdamW with half a cosine, learning rate by batch / 256; 800 epochs of ImageNet-1k, 312 steps each
Differs  the vectors of [CLS] and of hidden patches are not decayed (the authors' are, being stored as matrices); the
         learning rate rises from 1 / (warmup + 1) of its peak, not from 0; a share of the patches that is no whole
         number is rounded to the nearest, not to the next one up
Expect   not run at paper scale
Run      mmpre train mae --scale tiny --data "pictures/*.tar"
"""

from mmpre.encoder import vit_encoder
from mmpre.evaluation.reconstruction import Reconstruction
from mmpre.heads.pixels import Pixels
from mmpre.masking.drop import Drop
from mmpre.masking.exact import ExactShare
from mmpre.modalities.image_patches import ImagePatches, ImageReader, SinCos, random_crops
from mmpre.network import Network
from mmpre.objectives.autoencode import Autoencode
from mmpre.recipe import Recipe, Stage, Task
from mmpre.schedules import Cosine
from mmpre.training.optim import AdamW
from mmpre.view import View


def mae(
    data: tuple[str, ...] = (),  # shards to train on; each sample has a picture
    valid: tuple[str, ...] = (),  # held-out shards
    width: int = 768,  # of the encoder's states
    depth: int = 12,  # layers of the encoder
    heads: int = 12,  # of its attention
    decoder_width: int = 512,  # of the decoder's states
    decoder_depth: int = 8,  # layers of the decoder
    decoder_heads: int = 16,  # of its attention
    patch_px: int = 16,  # side of a patch
    side_px: int = 224,  # of the squares that are cut from pictures; 0 takes pictures whole, in their own proportions
    least: float = 0.2,  # smallest share of a picture's area in such a square
    max_patches: int = 1024,  # of a picture; larger ones are made smaller
    hide: float = 0.75,  # share of the patches to be predicted
    normalise: bool = True,  # predict pixels normalised within their patch; the paper's baseline does not
    batch: int = 4_096,  # pictures in a step
    micro_batches: int = 64,  # parts of a step; what the number of processes must divide
    steps: int = 249_600,  # updates
    warmup: int = 12_480,  # steps to the peak learning rate, which then falls by half a cosine to 0
    base_lr: float = 1.5e-4,  # the peak for a batch of 256; it grows with the batch
    decay: float = 0.05,  # of weights, not of biases and LayerNorms
    valid_every: int = 3_120,  # steps
) -> Recipe:
    crops = random_crops(side_px, least=least) if side_px else None
    image = ImagePatches(ImageReader(patch_px, crops, max_patches), width=width)
    net = Network({"image": image}, vit_encoder(width, depth, heads))
    objective = Autoencode(
        net, "patch", width=width, decoder=vit_encoder(decoder_width, decoder_depth, decoder_heads),
        decoder_width=decoder_width, places=SinCos(decoder_width, max_patches), name="pixels",
        head=Pixels(decoder_width, 3 * patch_px**2, image.features, normalise=normalise),
    )  # fmt: skip
    view = View(picks={"patch": ExactShare(role="image", share=hide)}, corruption=Drop())
    schedule = Cosine(warmup=warmup, total=steps)
    stage = Stage(
        tasks=[Task("mae", view, objective)], data=data, valid=valid, steps=steps, batch=batch,
        micro_batches=micro_batches, valid_every=valid_every,
        optimizer=AdamW(lr=base_lr * batch / 256, betas=(0.9, 0.95), weight_decay=decay, schedule=schedule),
    )  # fmt: skip
    return Recipe([stage], net, evaluations=[Reconstruction(objective, view)])


scales = {
    "tiny": dict(
        width=128, depth=4, heads=4, decoder_width=64, decoder_depth=2, decoder_heads=4, patch_px=8, side_px=96,
        batch=64, micro_batches=1, steps=1_500, warmup=100, base_lr=4e-3, valid_every=500,
    ),
    "base": {},
    "large": dict(width=1024, depth=24, heads=16),
    "huge": dict(width=1280, depth=32, heads=16, patch_px=14),
}  # fmt: skip
