"""Generators that turn noise into images in [0, 1]. The field uses two widths; both work at several image sizes."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from engine.runtime.errors import UserError

LARGE = (256, 128, 64)  # channels of the large generator


class UpsampleConv2d(nn.Conv2d):
    """Nearest-neighbour upsampling x2 and a 3x3 convolution, in one step: (B, C, h, w) -> (B, C', 2h, 2w).

    The two operations together equal a transposed convolution. Its 4x4 kernel is the 3x3 kernel summed over 2x2 windows. The
    transposed convolution needs 4 multiplications instead of 9. The stored weights are those of the 3x3 convolution.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        padded = F.pad(self.weight, (1, 1, 1, 1))
        tall = padded[:, :, :-1] + padded[:, :, 1:]
        kernel = (tall[..., :-1] + tall[..., 1:]).flip(2, 3).transpose(0, 1)
        return F.conv_transpose2d(inputs, kernel, stride=2, padding=1)


class Generator(nn.Module):
    """Linear layer and BN, then [upsample x2, 3x3 conv, BN, LeakyReLU 0.2] per doubling, then 3x3 conv and sigmoid.

    The small generator has 128 channels, and 64 in its last block. The large one (streaming methods) has 256, 128 and 64.
    Images of up to 32 px need two doublings. Larger images need one more for each doubling of the size: three at 64 px, five
    at 224 px (from 7 x 7).

    Args:
        nz: length of the noise vectors.
        image_size: H = W of the images in px, a multiple of 2 ** (number of doublings).
        channels: channels of the first map and of each block's output; if there are more blocks, the first number is
            repeated.
    Raises:
        UserError: the image size is no such multiple.
    """

    def __init__(self, nz: int = 256, image_size: int = 32, channels: tuple[int, ...] = (128, 128, 64)):
        super().__init__()
        doublings = max(2, math.ceil(math.log2(image_size / 8)))
        if image_size % 2**doublings:
            raise UserError(f"--image_size {image_size} found, a multiple of {2**doublings} px wanted by the generator")
        start = image_size // 2**doublings
        widths = [channels[0]] * (doublings + 1 - len(channels)) + list(channels)
        self.nz, self.start = nz, start
        self.project = nn.Linear(nz, widths[0] * start**2)
        layers: list[nn.Module] = [nn.BatchNorm2d(widths[0])]
        for before, after in zip(widths, widths[1:]):
            layers += [UpsampleConv2d(before, after), nn.BatchNorm2d(after), nn.LeakyReLU(0.2, inplace=True)]
        layers += [nn.Conv2d(widths[-1], 3, 3, padding=1), nn.Sigmoid()]
        self.blocks = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """z (B, nz) -> images (B, 3, H, W) in [0, 1]."""
        return self.blocks(self.project(z).view(len(z), -1, self.start, self.start))


def reset(network: nn.Module) -> nn.Module:
    """Draws new weights in place, as usual in the field: N(0, .02), BN weights N(1, .02), biases 0; returns the network."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network
