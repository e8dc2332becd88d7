"""Builds the masked autoencoders (arXiv 2111.06377) that pretrain_mae.py trains.

Their feed-forward layers are SwiGLU or mixtures of activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pictures import MEAN, STD
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from megatron_moa import MixedFeedForward, MixtureConfig


@dataclass(frozen=True)
class Shape:
    """The sizes of a masked autoencoder.

    Crops have pixels x pixels, patches are square. ``encoder`` and ``decoder`` are width, layers and heads of these
    transformers.
    """

    pixels: int
    patch: int
    encoder: tuple[int, int, int]
    decoder: tuple[int, int, int]

    @property
    def patches(self) -> int:
        """Patches of a crop."""
        return (self.pixels // self.patch) ** 2


class SwiGLU(nn.Module):
    """Computes the baseline's feed-forward layer, fc2(silu(y) * z) with [y z] = fc1(x).

    x and the output are [..., d]; there are no biases.
    """

    def __init__(self, width: int, ffn_width: int, init_std: float) -> None:
        super().__init__()
        # Not drawn by torch first: as in a mixture, fc1 and then fc2 take the first numbers of the generator.
        self.fc1 = nn.utils.skip_init(nn.Linear, width, 2 * ffn_width, bias=False)
        self.fc2 = nn.utils.skip_init(nn.Linear, ffn_width, width, bias=False)
        for linear in (self.fc1, self.fc2):
            nn.init.normal_(linear.weight, std=init_std)

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(y) * z)


def build_model(shape: Shape, mixture: MixtureConfig | None, seed: int) -> ViTMAEForPreTraining:
    """Transformers' masked autoencoder with our feed-forward layers; SwiGLU's without a mixture.

    It takes pixels [b, 3, s, s] and noise [b, patches], and sees the quarter of the patches that have the least noise.
    All arms of a seed start from the same weights, but for gates and coefficients.
    """
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    config = ViTMAEConfig(
        image_size=shape.pixels,
        patch_size=shape.patch,
        mask_ratio=0.75,
        norm_pix_loss=True,
        **dict(zip(names, shape.encoder, strict=True)),
        **dict(zip([f"decoder_{name}" for name in names], shape.decoder, strict=True)),
    )
    std = config.initializer_range
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViTMAEForPreTraining(config)
        # Built from a config, transformers' 5.24 leaves positions and tokens at 0: no patch would know where it is.
        embeddings, decoder = model.vit.embeddings, model.decoder
        for positions in (embeddings.position_embeddings, decoder.decoder_pos_embed):
            positions.data = sine_positions(shape.pixels // shape.patch, positions.shape[-1])
        for token in (embeddings.cls_token, decoder.mask_token):
            nn.init.normal_(token, std=std)
        for index, layer in enumerate([*model.vit.layers, *decoder.decoder_layers]):
            torch.manual_seed(1000 * seed + index)  # a mixture's gates are drawn too, after fc1 and fc2
            width = layer.mlp.fc1.in_features
            ffn_width = int(8 * width / 3)
            if mixture is None:
                layer.mlp = SwiGLU(width, ffn_width, std)
            else:
                layer.mlp = MixedFeedForward(width, ffn_width, mixture=mixture, bias=False, init_std=std)
    return model


def sine_positions(grid: int, width: int) -> Tensor:
    """Returns the fixed position embeddings [1, 1 + grid², width] (MAE, section 3).

    A class token's zeros come first, then sines and cosines of x and y.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64).outer(frequencies)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, width / 2]
    x, y = waves.repeat(grid, 1), waves.repeat_interleave(grid, 0)
    return F.pad(torch.cat([x, y], dim=1), (0, 0, 1, 0)).float().unsqueeze(0)


@torch.no_grad()
def reconstruct(model: ViTMAEForPreTraining, pixels: Tensor, noise: Tensor) -> Tensor:
    """Returns pictures [3 b, 3, s, s] in [0, 1] of what the model sees and predicts.

    They are each crop, its seen patches, and these with the predicted ones beside them. Crops of at most 64 pixels a
    side are enlarged.
    """
    result = model(pixels, noise=noise)
    patches, hidden = model.patchify(pixels), result.mask.unsqueeze(-1)
    # A prediction has the scale of a normalised patch: it takes the hidden patch's own mean and variance to be seen.
    predicted = result.logits * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
    rows = torch.stack([patches, patches * (1 - hidden), torch.where(hidden.bool(), predicted, patches)], dim=1)
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    pictures = (model.unpatchify(rows.flatten(0, 1)) * std + mean).clamp(0, 1)
    return F.interpolate(pictures, scale_factor=max(1, 128 // pixels.shape[-1]))  # tiny ones are enlarged
