"""The embedded prior of stage generate: a class-conditional diffusion model of printed digits.

    python -m datafree.diffusion.glyphs --preview glyphs.png

It renders digits, trains the pixel U-Net of ``datafree.diffusion.pixel`` on them (v-prediction, classifier-free guidance;
see there for the papers) and writes its averaged weights as one small file. It plays the part that Stable Diffusion has in
DiffDFKD (Qi et al. 2025, arXiv 2504.00870): it knows what the classes look like in print, and has seen none of the
handwriting that the teacher was trained on. To resume, run the same command again.

Glyphs come from fonts (Pillow's embedded one and whatever TrueType fonts are installed) and from ``PEN``, polylines and
splines drawn for this project after typographic variants: the four open and closed, the seven with and without a bar, the
one with and without flag and foot. Slant, rotation, proportions, stroke width, blur and contrast are random.

Of the digits dataset only the documented format is used (UCI, "Optical Recognition of Handwritten Digits"): light strokes on
black, the glyph as high as the image, counts of 4 x 4 blocks of a 32 px bitmap, thus 8 px, enlarged to the size wanted as
``engine.data.splits`` enlarges them. Stroke widths and contrast were set to the mean and spread that the registry states.

The shipped file took 12 minutes of one shared CPU core, with 19 fonts (Pillow's and DejaVu). A resnet8 trained on rendered
glyphs recognised all of 500 samples at guidance 1, 2 and 3 and 10 or 20 DDIM steps; the mean distance between samples of a
class is 76 to 89 % of that between rendered glyphs, less at higher guidance and with fewer steps.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from datafree.diffusion.pixel import PatchUNet, PixelPrior
from engine.runtime.errors import UserError, run_command
from engine.runtime.files import atomic_path, load_checkpoint, load_tensors, save_checkpoint, save_tensors
from engine.runtime.flags import Parser, add_flags, flag, from_args

CLASS_NAMES = tuple("0123456789")
PRIOR = Path("checkpoints/priors/glyphs_digits_16.safetensors")
SYSTEM_FONTS = (
    "/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts",
    "/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts",
)  # fmt: skip

CANVAS = 128  # px that a glyph is drawn on; a glyph is BODY px high, so that slant and rotation keep it inside
BODY = 80
FITTED = 64  # px of the canvas that it is then stretched to
CELLS = 8  # px that this is reduced to, whatever the size wanted: the dataset's resolution
PEN_SHARE = 0.5

# Variants by class, each a list of strokes in percent of the body, x to the right and y down: "~" splines, "-" polylines.
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
    """One face: its name, and a mask a digit, mode L, cropped to the ink, the tallest about ``BODY`` px high."""

    name: str
    masks: tuple[Image.Image, ...]


def find_fonts(folders: Iterable[str | Path] | None = None) -> list[Font]:
    """The embedded font, then those below ``folders`` whose digits look like digits, sorted by file name.

    Args:
        folders: where to look for .ttf, .otf and .ttc files; None: where systems keep them, if they have any.
    Raises:
        UserError: a folder that was asked for is not there.
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
        except (OSError, ValueError):  # damaged, or of pictures in fixed sizes
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
    """Whether most digits are nearest to themselves in ``reference``: not so in fonts of symbols or of empty boxes.

    Fonts whose zero has a dot or a slash inside are left out as well: at so few pixels it is an eight.
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
    """Glyphs, classes in turn; image k depends on the seed, on k and on the fonts alone.

    Args:
        image_size: px; the glyphs have the detail of ``CELLS`` px whatever it is.
        fonts: what print is drawn with, at least one.
        pen_share: of the glyphs that are drawn from ``PEN`` in place of a font.
        bar: whether to show progress.
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
    """(2, 2): a random rotation after a slant after a change of proportions; columns are where x and y go."""
    turn, slant = math.radians(random.uniform(-12, 12)), random.uniform(-0.15, 0.25)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    return rotation @ np.array([[1, -slant], [0, 1]]) @ np.diag([random.uniform(0.75, 1.1), 1])


def _print(random: np.random.Generator, mask: Image.Image) -> Image.Image:
    """A digit of a font on the canvas, leaning, its strokes made a little thinner or thicker."""
    back = np.linalg.inv(_lean(random))  # Pillow wants the way from the canvas to the mask
    shift = np.array(mask.size) / 2 - back @ np.full(2, CANVAS / 2)
    rows = np.column_stack([back, shift]).ravel()
    ink = mask.transform((CANVAS, CANVAS), Image.Transform.AFFINE, tuple(rows), Image.Resampling.BILINEAR)
    change = random.choice([-3, 1, 3, 5])
    return ink.filter(ImageFilter.MinFilter(-change) if change < 0 else ImageFilter.MaxFilter(change))


def _pen(random: np.random.Generator, digit: int) -> Image.Image:
    """A digit of ``PEN`` on the canvas: its points moved by a smooth random field, then leaning, in one stroke width."""
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
    """A Catmull-Rom spline through (N, 2) points, ``steps`` a piece; closed without a kink where the ends meet."""
    closed = np.array_equal(points[0], points[-1])
    before, after = (points[-2], points[1]) if closed else (2 * points[0] - points[1], 2 * points[-1] - points[-2])
    a, b, c, d = (np.vstack([before, points, after])[k : len(points) - 1 + k, None] for k in range(4))
    t = np.arange(steps)[:, None] / steps
    pieces = b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return np.vstack([pieces.reshape(-1, 2), points[-1:]])


def _reduced(random: np.random.Generator, ink: Image.Image) -> np.ndarray:
    """The ink scaled to about the height of the image, blurred and reduced: (CELLS, CELLS) float64 in [0, 255]."""
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
    """What to render, what to train, where to keep it."""

    output: str | None = flag(
        None,
        "the prior's weights; unset, in the current directory: checkpoints/priors/glyphs_digits_<image_size>.safetensors",
    )
    fonts: tuple[str, ...] | None = flag(
        None, "folders of TrueType fonts, comma-separated; unset: the system's; Pillow's own is always among them"
    )
    preview: str | None = flag(None, "PNG file of rendered (left) and generated glyphs (right) to write at the end")
    redo: bool = flag(False, "forget what was trained before")
    image_size: int = flag(16, "px")
    images: int = flag(20000, "glyphs to render and train on")
    rounds: int = flag(60, "rounds of training; a stopped run goes on after the last whole one")
    steps: int = flag(200, "steps a round")
    batch_size: int = flag(16, "glyphs a step")
    lr: float = flag(2e-3, "AdamW learning rate at its highest")
    patch: int = flag(2, "px a side of the blocks that the network sees as one")
    channels: tuple[int, ...] = flag((48, 96), "width of each level of the network")
    seed: int = flag(0, "of glyphs and training")
    device: str = flag("cpu", "where to train, as torch names it")


def train_prior(flags: GlyphFlags, fonts: list[Font]) -> PixelPrior:
    """Renders, trains and writes ``flags.output``; goes on where it was stopped.

    Raises:
        UserError: the output or an unfinished training was made with other flags, or training diverged.
    """
    output = Path(flags.output)
    unfinished = output.with_name(f"{output.stem}.unfinished.pth")
    settings = {k: v for k, v in dataclasses.asdict(flags).items() if k not in ("output", "fonts", "preview", "redo")}
    settings = json.loads(json.dumps(settings | {"fonts": [font.name for font in fonts]}))
    prior = PixelPrior(
        len(CLASS_NAMES), flags.image_size, patch=flags.patch, channels=flags.channels, attention=False,
        fit_rounds=flags.rounds, fit_steps=flags.steps, fit_batch_size=flags.batch_size, fit_lr=flags.lr,
        strength=1.0, num_inference_steps=20, guidance_scale=2.0, seed=flags.seed, device=flags.device,
    )  # fmt: skip
    if flags.redo:
        if output.exists():
            load_patch_prior(output)  # raises: it is something else, which stays
        output.unlink(missing_ok=True)
        unfinished.unlink(missing_ok=True)
    if output.exists():
        network, about = load_patch_prior(output)
        _check_settings(output, about.get("settings", {}), settings)
        prior.ema.load_state_dict(network.state_dict())
        print(f"trained before: {output}; --redo trains again")
        return prior
    start = 0
    if unfinished.exists():
        state = load_checkpoint(unfinished, "unfinished training")
        _check_settings(unfinished, state["settings"], settings)
        prior.load_state_dict(state["prior"])
        start = state["round"]
    images, labels = render(flags.images, flags.image_size, fonts, flags.seed, bar=True)
    bar = tqdm(total=flags.rounds * flags.steps, desc="train glyph prior", unit="step", initial=start * flags.steps)
    for round in range(start, flags.rounds):
        torch.manual_seed((flags.seed << 20) + round)  # resumed or not, a round has its own numbers
        figures = prior.fit(images, labels)
        save_checkpoint(unfinished, {"settings": settings, "round": round + 1, "prior": prior.state_dict()})
        bar.set_postfix({"loss": f"{float(figures['loss']):.4f}"}, refresh=False)
        bar.update(flags.steps)
    bar.close()
    about = {
        "name": "glyphs", "num_classes": len(CLASS_NAMES), "class_names": CLASS_NAMES, "image_size": flags.image_size,
        "patch": flags.patch, "channels": flags.channels, "attention": False, "settings": settings,
    }  # fmt: skip
    weights = {name: tensor.half() for name, tensor in prior.ema.state_dict().items()}
    save_tensors(output, weights, {name: json.dumps(value) for name, value in about.items()})
    unfinished.unlink()
    return prior


def _check_settings(file: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in now.items():
        if before.get(name) != value:
            found = f"{file} was made with --{name} {before.get(name)}, now {value}"
            raise UserError(f"{found}; give another --output, or --redo")


def load_patch_prior(path: Path) -> tuple[PatchUNet, dict[str, Any]]:
    """A class-conditional pixel prior from one safetensors file.

    The file's tensors are those of ``PatchUNet.state_dict()``; its metadata hold, as JSON, ``num_classes``, ``image_size``,
    ``patch``, ``channels``, ``attention``, ``class_names`` and ``name``.

    Returns:
        The network in float32, eval mode and without gradients to its weights, on the CPU: (x_t, t, labels) -> v with
        images in [-1, 1] and ``num_classes`` as the null label; and the metadata as Python values.
    Raises:
        UserError: the file is missing, truncated or something else.
    """
    path = Path(path)
    tensors = load_tensors(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    try:
        about = {name: json.loads(value) for name, value in metadata.items()}
        sizes = [about["num_classes"], about["image_size"], about["patch"], *about["channels"]]
        if not all(type(size) is int and 0 < size <= 4096 for size in sizes) or len(about["channels"]) > 8:
            raise ValueError(f"sizes {sizes} are out of range")
        if len(about["class_names"]) != about["num_classes"]:
            raise ValueError(f"{len(about['class_names'])} names for {about['num_classes']} classes")
        about["channels"], about["class_names"] = tuple(about["channels"]), tuple(map(str, about["class_names"]))
        with torch.device("meta"):  # no memory before the shapes are known to fit
            network = PatchUNet(*(about[key] for key in ("num_classes", "image_size", "patch", "channels", "attention")))
        if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise ValueError(f"NaN or infinite weights in {bad[0]}")
        network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    except (KeyError, ValueError, TypeError, RuntimeError, UserError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is no pixel prior as python -m datafree.diffusion.glyphs writes it ({reason})") from None
    return network.requires_grad_(False).eval(), about


def picture(prior: PixelPrior, image_size: int, fonts: list[Font], seed: int, columns: int = 10) -> Image.Image:
    """A row a class: ``columns`` rendered glyphs, a grey column, ``columns`` that the prior made of noise."""
    rows = len(CLASS_NAMES)
    rendered, labels = render(rows * columns, image_size, fonts, seed + 1)
    noise = [(seed << 32) + k for k in range(len(labels))]
    generated = prior.augment(torch.zeros(rendered.shape), labels, noise).cpu().mul(255).round().byte()

    def tiles(images: Tensor) -> Tensor:
        """Class c of images c, c + C, c + 2 C, ... fills row c: (rows * size, columns * size) uint8."""
        size = image_size + 1
        images = F.pad(images[:, 0], (0, 1, 0, 1), value=64).view(columns, rows, size, size)
        return images.permute(1, 2, 0, 3).reshape(rows * size, columns * size)

    left, right = tiles(rendered), tiles(generated)
    sheet = torch.cat([left, torch.full((len(left), 4), 128, dtype=torch.uint8), right], 1)
    return Image.fromarray(sheet.repeat_interleave(3, 0).repeat_interleave(3, 1).numpy())


def main() -> None:
    """Command line of this module: render, train, write."""
    parser = Parser(
        prog="python -m datafree.diffusion.glyphs",
        description="Trains the embedded prior of printed digits (stage generate) and writes its weights.",
        epilog="To resume, run the same command again.",
    )
    add_flags(parser, GlyphFlags, GlyphFlags.__doc__.rstrip("."))
    flags = from_args(GlyphFlags, parser.parse_args())
    output = flags.output or PRIOR.with_name(f"glyphs_digits_{flags.image_size}.safetensors")
    flags = dataclasses.replace(flags, output=str(output))
    fonts = find_fonts(flags.fonts)
    print(f"{len(fonts)} fonts: {', '.join(font.name for font in fonts)}")
    prior = train_prior(flags, fonts)
    print(f"{output}: {os.path.getsize(output) / 2**20:.2f} MiB")
    if flags.preview:
        with atomic_path(Path(flags.preview)) as temporary:
            picture(prior, flags.image_size, fonts, flags.seed).save(temporary, format="PNG")
        print(f"{flags.preview}: rendered left, generated right")


if __name__ == "__main__":
    run_command(main)
