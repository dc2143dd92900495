"""Renders printed digits, the training images of the prior ``glyphs_digits_16``.

    python -m datafree.diffusion.glyphs
    python -m datafree.diffusion.train_prior --dataset glyphs_digits --channels 48,96 --no_attention --no_flip \\
      --batch_size 16 --lr 2e-3 --images 192000 --output checkpoints/priors/glyphs_digits_16.safetensors

On the digits dataset this prior takes the role of Stable Diffusion in DiffDFKD (Qi et al. 2025, arXiv 2504.00870). It has
learned the classes from printed digits only. It has seen none of the handwriting that the teacher was trained on.

Half of the glyphs come from fonts: Pillow's embedded font and the TrueType fonts that are installed. The other half come
from ``PEN``: polylines and splines drawn for this project after typographic variants. The variants are an open and a closed
four, a seven with and without a bar, and a one with and without flag and foot. Slant, rotation, proportions, stroke width,
blur and contrast are random.

No image of the digits dataset is used, only its documented format (UCI, "Optical Recognition of Handwritten Digits").
Strokes are light on black, and the glyph is as high as the image. A 32 px bitmap is counted in blocks of 4 x 4 pixels, which
gives 8 px. The result is resized to ``image_size`` in the same way as in ``engine.data.splits``. Stroke widths and contrast
were tuned to the mean and standard deviation that the registry states for the dataset.

The shipped file took 12 minutes on one shared CPU core, with 19 fonts (Pillow's and DejaVu). It was trained before
``train_prior`` existed, with a cosine learning rate schedule. A resnet8 trained on rendered glyphs recognised all of 500
samples, at guidance scales 1, 2 and 3 and with 10 or 20 DDIM steps. The mean distance between samples of a class is 76 to 89
% of the distance between rendered glyphs. Higher guidance scales and fewer steps reduce it. With the commands above, all of
500 samples were recognised after only 70,400 training images (guidance scale 2, 10 and 20 steps).
"""

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from engine.runtime.errors import UserError, run_command
from engine.runtime.files import atomic_path
from engine.runtime.flags import Parser, add_flags, flag, from_args

CLASS_NAMES = tuple("0123456789")
SYSTEM_FONTS = (
    "/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts",
    "/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts",
)  # fmt: skip

CANVAS = 128  # side of the canvas in px, large enough for a glyph after slant and rotation
BODY = 80  # height of a glyph on the canvas in px
FITTED = 64  # side in px of the square to which the glyph is then scaled
CELLS = 8  # side in px to which this square is reduced: the dataset's resolution, for every ``image_size``
PEN_SHARE = 0.5  # share of the glyphs that are drawn from PEN

# Variants of each class. A variant is a list of strokes: "~" is a spline, "-" a polyline. Coordinates are in percent of the
# body; x points right and y points down.
PEN = {
    0: (
        ["~ 50 0 18 16 8 50 18 84 50 100 82 84 92 50 82 16 50 0"],
        ["~ 50 0 28 16 22 50 28 84 50 100 72 84 78 50 72 16 50 0"],
    ),
    1: (
        ["- 50 0 50 100"],
        ["- 28 24 55 0 55 100"],
        ["- 28 24 55 0 55 100", "- 25 100 85 100"],
        ["~ 25 30 45 18 58 0", "- 58 0 58 100"],
    ),
    2: (
        ["~ 12 26 25 6 50 0 76 7 86 28 74 53 45 76 12 100", "- 12 100 90 100"],
        ["~ 12 22 32 3 62 2 84 22 72 52 42 82 18 97 8 86 22 76 48 86 70 97 94 90"],
        ["~ 14 24 30 4 60 0 84 16 80 42 50 70 10 100", "~ 10 100 34 92 62 100 92 92"],
    ),
    3: (
        ["~ 12 16 28 2 54 0 80 10 80 32 62 45 38 47", "~ 38 47 68 50 88 68 82 90 52 100 24 96 10 82"],
        ["- 12 0 84 0 42 40", "~ 42 40 74 46 90 68 78 92 46 100 20 95 8 82"],
        ["~ 14 10 45 0 78 12 72 36 44 47 80 58 84 86 48 100 12 90"],
    ),
    4: (
        ["- 68 100 68 0 6 68 94 68"],
        ["- 26 0 10 56 94 56", "- 70 18 70 100"],
        ["- 34 0 8 60 92 60", "- 78 0 66 100"],
        ["- 20 0 20 52 84 52", "- 78 0 78 100"],
    ),
    5: (
        ["- 84 0 24 0 18 44", "~ 18 44 44 34 74 42 90 66 78 92 46 100 22 96 8 84"],
        ["- 84 4 28 4", "~ 28 4 20 42 50 38 82 50 88 74 68 96 36 100 10 90"],
        ["~ 88 4 60 6 30 4 20 24 26 42 58 48 84 62 84 86 54 100 14 92"],
    ),
    6: (
        ["~ 80 8 56 0 30 16 12 46 12 76 28 96 54 100 80 92 90 70 78 50 52 42 26 52 12 74"],
        ["~ 64 0 34 26 14 58 12 80 30 98 60 100 84 88 86 66 66 52 38 54 16 70"],
        ["~ 72 2 40 14 20 44 16 74 34 98 64 96 80 76 66 56 40 60 22 78"],
    ),
    7: (
        ["- 8 0 92 0 38 100"],
        ["- 8 0 92 0 42 100", "- 30 50 86 50"],
        ["- 8 2 90 2", "~ 90 2 66 34 50 66 44 100"],
        ["- 10 18 10 0 92 0 40 100"],
    ),
    8: (
        ["~ 50 46 22 38 16 20 28 4 50 0 72 4 84 20 78 38 50 46", "~ 50 46 18 56 8 76 24 95 50 100 76 95 92 76 82 56 50 46"],
        ["~ 84 14 60 0 26 4 16 22 40 42 74 60 88 80 70 98 34 100 12 82 24 60 60 44 82 28 84 14"],
    ),
    9: (
        ["~ 86 28 74 6 48 0 22 8 12 30 24 50 50 58 74 50 86 28", "- 86 6 84 40 74 100"],
        ["~ 88 28 74 50 48 58 22 50 10 30 20 8 46 0 72 4 88 24 88 54 70 84 44 100 20 92"],
        ["~ 84 30 66 50 36 52 16 34 24 8 56 0 80 12 84 30 80 66 70 100"],
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Font:
    """A font: its name and one mask per digit (PIL mode L), cropped to the ink; the tallest is about ``BODY`` px high."""

    name: str
    masks: tuple[Image.Image, ...]


def find_fonts(folders: Iterable[str | Path] | None = None) -> list[Font]:
    """Pillow's embedded font, then the fonts below ``folders`` whose digits look like digits, sorted by file name.

    Args:
        folders: folders that are searched for .ttf, .otf and .ttc files; None: the usual font folders of the system.
    Raises:
        UserError: one of ``folders`` does not exist.
    """
    embedded = _font("embedded", ImageFont.load_default(BODY * 4 / 3))
    for folder in folders or ():
        if not Path(folder).is_dir():
            raise UserError(f"--fonts {folder}: no such folder; leave --fonts out to use the fonts of this system")
    roots = [Path(folder).expanduser() for folder in (SYSTEM_FONTS if folders is None else folders)]
    files = {file.name: file for root in roots for file in root.rglob("*.[tToO][tT][fFcC]")}
    fonts = [embedded]
    for name in sorted(files):
        try:
            font = _font(Path(name).stem, ImageFont.truetype(str(files[name]), round(BODY * 4 / 3)))
        except (OSError, ValueError):  # a damaged file, or a bitmap font of fixed sizes
            continue
        if font and _resembles(font, embedded):
            fonts.append(font)
    return fonts


def _font(name: str, face: ImageFont.FreeTypeFont) -> Font | None:
    masks = []
    for digit in CLASS_NAMES:
        image = Image.new("L", (4 * BODY, 4 * BODY))
        ImageDraw.Draw(image).text((2 * BODY, 2 * BODY), digit, fill=255, font=face, anchor="mm")
        masks.append(image.crop(image.getbbox()) if image.getbbox() else None)
    return Font(name, tuple(masks)) if all(masks) else None


def _resembles(font: Font, reference: Font) -> bool:
    """Whether the font's glyphs for 0 to 9 look like digits.

    At least 6 of the 10 must be nearest to the same digit of ``reference``. Fonts of symbols or of empty boxes fail. A font
    whose zero has a dot or a slash inside fails, too: at 8 px such a zero looks like an eight.
    """
    zero = font.masks[0]
    if zero.getpixel((zero.width // 2, zero.height // 2)) > 127:
        return False

    def small(masks: tuple[Image.Image, ...]) -> np.ndarray:
        pixels = np.stack([np.asarray(mask.resize((16, 24), Image.Resampling.BOX), np.float64).ravel() for mask in masks])
        pixels -= pixels.mean(1, keepdims=True)
        return pixels / np.linalg.norm(pixels, axis=1, keepdims=True).clip(1e-9)

    nearest = (small(font.masks) @ small(reference.masks).T).argmax(1)
    return int((nearest == np.arange(len(CLASS_NAMES))).sum()) >= 6


def render(
    count: int, image_size: int, fonts: list[Font], seed: int = 0, pen_share: float = PEN_SHARE, bar: bool = False
) -> tuple[Tensor, Tensor]:
    """Renders glyphs with the labels 0, 1, ..., 9, 0, ... in turn.

    Image k depends only on the seed, k, the fonts and ``pen_share``.

    Args:
        image_size: side of the images in px. Glyphs have the detail of ``CELLS`` px at every size.
        fonts: at least one font.
        pen_share: share of the glyphs that are drawn from ``PEN`` instead of a font.
        bar: whether to show a progress bar.
    Returns:
        images (count, 3, image_size, image_size) uint8, white on black with equal channels, and labels (count,) int64.
    """
    labels = torch.arange(count) % len(CLASS_NAMES)
    cells = torch.empty(count, 1, CELLS, CELLS)
    for k in tqdm(range(count), "render", unit="img", disable=None if bar else True, leave=False):
        random = np.random.default_rng((seed, k))
        digit = int(labels[k])
        pen = random.random() < pen_share
        ink = _pen(random, digit) if pen else _print(random, fonts[random.integers(len(fonts))].masks[digit])
        cells[k, 0] = torch.from_numpy(_reduced(random, ink))
    images = F.interpolate(cells, (image_size, image_size), mode="bilinear", antialias=True)
    return images.round().clamp(0, 255).byte().expand(-1, 3, -1, -1).contiguous(), labels


def _lean(random: np.random.Generator) -> np.ndarray:
    """Random matrix (2, 2) that changes the proportions, then slants, then rotates; it multiplies column vectors (x, y)."""
    turn, slant = math.radians(random.uniform(-12, 12)), random.uniform(-0.15, 0.25)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    return rotation @ np.array([[1, -slant], [0, 1]]) @ np.diag([random.uniform(0.75, 1.1), 1])


def _print(random: np.random.Generator, mask: Image.Image) -> Image.Image:
    """Draws a font's digit on the canvas with a random ``_lean`` and slightly thinner or thicker strokes."""
    back = np.linalg.inv(_lean(random))  # Pillow takes the map from the canvas to the mask
    shift = np.array(mask.size) / 2 - back @ np.full(2, CANVAS / 2)
    rows = np.column_stack([back, shift]).ravel()
    ink = mask.transform((CANVAS, CANVAS), Image.Transform.AFFINE, tuple(rows), Image.Resampling.BILINEAR)
    change = random.choice([-3, 1, 3, 5])
    return ink.filter(ImageFilter.MinFilter(-change) if change < 0 else ImageFilter.MaxFilter(change))


def _pen(random: np.random.Generator, digit: int) -> Image.Image:
    """Draws a variant of ``PEN`` on the canvas: a smooth random field moves its points, then a random ``_lean``."""
    variants = PEN[digit]
    lean = _lean(random) @ np.diag([random.uniform(0.6, 0.9), 1])
    width = BODY * random.uniform(0.10, 0.21)
    waves, phase = random.uniform(-4, 4, (2, 2)), random.uniform(0, 2 * math.pi, 2)
    sway = random.uniform(0, 0.05)
    ink = Image.new("L", (CANVAS, CANVAS))
    draw = ImageDraw.Draw(ink)
    for stroke in variants[random.integers(len(variants))]:
        points = np.array(stroke[1:].split(), np.float64).reshape(-1, 2) / 100
        points = _spline(points) if stroke[0] == "~" else points
        points = points + sway * np.sin(points @ waves + phase)
        points = (points - 0.5) @ lean.T * BODY + CANVAS / 2
        draw.line([tuple(p) for p in points], 255, round(width))
        for x, y in points:  # round joints and ends
            draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), 255)
    return ink


def _spline(points: np.ndarray, steps: int = 8) -> np.ndarray:
    """Catmull-Rom spline through points (N, 2), ``steps`` points per segment; smooth at the joint if the ends coincide."""
    closed = np.array_equal(points[0], points[-1])
    before, after = (points[-2], points[1]) if closed else (2 * points[0] - points[1], 2 * points[-1] - points[-2])
    a, b, c, d = (np.vstack([before, points, after])[k : len(points) - 1 + k, None] for k in range(4))
    t = np.arange(steps)[:, None] / steps
    pieces = b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return np.vstack([pieces.reshape(-1, 2), points[-1:]])


def _reduced(random: np.random.Generator, ink: Image.Image) -> np.ndarray:
    """The glyph scaled to about the height of the image, blurred and reduced: (CELLS, CELLS) float64 in [0, 255]."""
    glyph = ink.crop(ink.getbbox())
    scale = FITTED * random.uniform(0.9, 1) / max(glyph.size)
    size = [max(1, round(side * scale)) for side in glyph.size]
    room = [FITTED - side for side in size]
    at = tuple(round(free * np.clip(random.normal(0.5, 0.12), 0, 1)) for free in room)
    image = Image.new("L", (FITTED, FITTED))
    image.paste(glyph.resize(size, Image.Resampling.BILINEAR), at)
    image = image.filter(ImageFilter.GaussianBlur(random.uniform(0, 2.5)))
    pixels = np.asarray(image.reduce(FITTED // CELLS), np.float64)
    return (pixels * random.uniform(0.95, 1.4) * 255 / pixels.max()).clip(0, 255)


@dataclass(frozen=True)
class GlyphFlags:
    """Dataset to render."""

    output: str = flag("data/glyphs_digits.npz", "npz file to write, with x_train, y_train, x_test, y_test and classes")
    fonts: tuple[str, ...] | None = flag(
        None, "comma-separated folders of TrueType fonts; unset: the system's font folders; Pillow's own font is always used"
    )
    image_size: int = flag(16, "side of the images in px", least=1, most=4096)
    images: int = flag(20000, "number of training glyphs", least=10)
    test_images: int = flag(1000, "number of test glyphs", least=1)
    seed: int = flag(0, "random seed; a glyph depends only on the seed, its number and the fonts", least=0)


def write_dataset(flags: GlyphFlags, fonts: list[Font]) -> None:
    """Renders both splits and writes them atomically as one npz file; test glyphs are numbered after the training glyphs."""
    if Path(flags.output).exists():
        raise UserError(f"--output {flags.output} exists already; give another name, or move that file away")
    images, labels = render(flags.images + flags.test_images, flags.image_size, fonts, flags.seed, bar=True)
    images, labels = images.permute(0, 2, 3, 1).numpy(), labels.numpy()
    arrays = {"classes": np.array(CLASS_NAMES)}
    for split, part in (("train", slice(flags.images)), ("test", slice(flags.images, None))):
        arrays |= {f"x_{split}": images[part], f"y_{split}": labels[part]}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    with atomic_path(Path(flags.output)) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def main() -> None:
    """Runs the command line ``python -m datafree.diffusion.glyphs``."""
    parser = Parser(
        prog="python -m datafree.diffusion.glyphs",
        description="Renders printed digits as a dataset, from which a prior for stage generate can be trained.",
        epilog="To train the prior: python -m datafree.diffusion.train_prior --dataset glyphs_digits",
    )
    add_flags(parser, GlyphFlags, GlyphFlags.__doc__.rstrip("."))
    flags = from_args(GlyphFlags, parser.parse_args())
    fonts = find_fonts(flags.fonts)
    print(f"{len(fonts)} fonts: {', '.join(font.name for font in fonts)}")
    write_dataset(flags, fonts)
    print(f"{flags.output}: {flags.images} training images, {flags.test_images} test images")


if __name__ == "__main__":
    run_command(main)
