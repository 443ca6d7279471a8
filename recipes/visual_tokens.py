"""Visual tokens: a codebook for patches of pictures, or tubelets of video, learned by restoring them from their codes.

Paper    van den Oord et al. 2017, "Neural Discrete Representation Learning" (VQ-VAE), arXiv:1711.00937
Follows  its losses, and ViT-VQGAN (Yu et al. 2021, arXiv:2110.04627) in shape: a transformer before and one after
         the codebook, 8,192 codes of 32 values and length 1, patches of 8 pixels, AdamW, half a cosine
Differs  squared error of pixels alone restores them, without perceptual and adversarial losses; codes that nothing
         uses are put beside used ones
Expect   not run at paper scale; tiny on OpenMoji: held-out pixels restored with an error of 0.32 where each patch's own
         mean leaves 0.96. As many k-means centres of the patches leave 0.23: at this size they are the better codes
Run      mmpre train visual_tokens --scale tiny --data "pictures/*.tar"
         then codes for `WithCodes`: mmpre data derive SHARDS --out codes --by runs/visual_tokens
"""

from typing import Literal

from mmpre.codes import Codebook, Coder
from mmpre.data.video import Evenly, Segments, Video
from mmpre.encoder import vit_encoder
from mmpre.evaluation.codes import CodebookUse
from mmpre.evaluation.reconstruction import Reconstruction
from mmpre.heads.pixels import Pixels
from mmpre.masking.everything import Everything
from mmpre.modalities import image_patches, video
from mmpre.network import Network
from mmpre.objectives.quantize import Quantize
from mmpre.recipe import Recipe, Stage, Task
from mmpre.schedules import Cosine
from mmpre.training.optim import AdamW
from mmpre.view import View


def visual_tokens(
    data: tuple[str, ...] = (),  # shards to train on; each sample has a picture, or a clip
    valid: tuple[str, ...] = (),  # held-out shards
    clip: int = 0,  # frames of a clip that are read; 0 reads pictures
    tubelet: int = 1,  # frames of a clip that share a code
    width: int = 768,  # of the states, before the codebook and after it
    depth: int = 12,  # layers before the codebook
    decoder_depth: int = 12,  # layers after it
    heads: int = 12,  # of attention
    codes: int = 8_192,  # in the codebook
    values: int = 32,  # of a code
    commit: float = 0.25,  # weight of what pulls states to their codes
    patch_px: int = 8,  # side of a patch
    side_px: int = 256,  # of the squares that are cut, at random in training
    framing: Literal["middle", "whole"] = "middle",  # of a clip that is coded: its middle, or all of it in a square
    least: float = 0.5,  # smallest share of a picture's area in a square of training
    batch: int = 256,  # pictures or clips in a step
    micro_batches: int = 8,  # parts of a step; what the number of processes must divide
    steps: int = 500_000,  # updates
    warmup: int = 10_000,  # steps to the peak learning rate, which then falls by half a cosine to 0
    lr: float = 1e-4,  # the peak
    decay: float = 1e-4,  # of weights, not of biases and LayerNorms
    valid_every: int = 5_000,  # steps
) -> Recipe:
    most = (side_px // patch_px) ** 2
    if clip:
        role, size, kind = "video", 3 * patch_px**2 * tubelet, video

        def reader(sampling: Evenly | Segments, transform: object) -> video.VideoReader:
            return video.VideoReader(Video(sampling=sampling, side_px=2 * side_px), patch_px, tubelet, transform, most)

        plain = reader(Evenly(clip), video.middle(side_px) if framing == "middle" else video.Padded(side_px))
        training = reader(Segments(clip), video.random_crops(side_px, least=least))
        modality = video.VideoTubelets(plain, width=width)
    else:
        role, size, kind = "image", 3 * patch_px**2, image_patches
        plain = image_patches.ImageReader(patch_px, image_patches.middle(side_px), most)
        training = image_patches.ImageReader(patch_px, image_patches.random_crops(side_px, least=least), most)
        modality = image_patches.ImagePatches(plain, width=width)
    net = Network({role: modality}, vit_encoder(width, depth, heads))
    coder = Coder(net, Codebook(codes, values), width=width)
    objective = Quantize(
        coder, "all", decoder=vit_encoder(width, decoder_depth, heads), decoder_width=width, commit=commit,
        places=kind.SinCos(width, max(most, clip)), head=Pixels(width, size, modality.features, normalise=False),
    )  # fmt: skip
    # codes are made of whole pictures as `plain` reads them, in which nothing is random
    view, held_out = (View(readers={role: one}, picks={"all": Everything(role=role)}) for one in (training, plain))
    stage = Stage(
        tasks=[Task("codes", view, objective, held_out=held_out)], data=data, valid=valid, steps=steps, batch=batch,
        micro_batches=micro_batches, valid_every=valid_every, clip=1.0,
        optimizer=AdamW(lr=lr, betas=(0.9, 0.99), weight_decay=decay, schedule=Cosine(warmup=warmup, total=steps)),
    )  # fmt: skip
    error = Reconstruction(objective, held_out, name="loss (pixels restored from codes, and the codes' own)")
    return Recipe([stage], coder, evaluations=[error, CodebookUse(coder, held_out)])


scales = {
    "tiny": dict(
        width=96, depth=2, decoder_depth=2, heads=3, codes=512, values=16, side_px=96, batch=32, micro_batches=1,
        steps=800, warmup=50, lr=2e-3, valid_every=400,
    ),
    "base": {},
}  # fmt: skip
