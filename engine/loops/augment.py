"""Stage augment: V variants of every bank image, then the cosine between each variant and its source.

Of several processes the main one trains an augmenter that learns from the bank; process r draws batches r, r + W, ... of a
shard, which the main one writes.
"""

from pathlib import Path

import torch
from torch import Tensor

from engine.data.bank import to_uint8
from engine.data.pictures import variants_grid
from engine.loops.evaluate import check_finite
from engine.runtime.errors import UserError
from engine.runtime.files import load_checkpoint, load_tensors, save_checkpoint, save_tensors
from engine.runtime.processes import Processes
from engine.runtime.run import Run, progress
from engine.runtime.seeding import position_seed, seed_position
from engine.runtime.stage_record import Stages

SHARD = 512  # variants a shard: what a kill can cost


def fit_augmenter(run: Run, augmenter, images: Tensor, labels: Tensor, seed: int) -> None:
    """Trains an augmenter that learns from the bank; a checkpoint a round, so that a restart repeats an unbroken run."""
    file = run.path / "prior.pth"
    start = 0
    if file.exists():
        saved = load_checkpoint(file, "diffusion checkpoint")
        start = saved["round"]
        augmenter.load_state_dict(saved["augmenter"])
    run.rewind("augment", start)
    bar = progress(augmenter.fit_rounds, "train the prior", "round", start)
    for round in range(start, augmenter.fit_rounds):
        seed_position(seed, "fit", round)
        figures = {name: float(value) for name, value in augmenter.fit(images, labels).items()}
        check_finite(figures, f"round {round} of training the diffusion prior", "lower --fit_lr and run again")
        run.metrics("augment", round, figures)
        save_checkpoint(file, {"round": round + 1, "augmenter": augmenter.state_dict()})
        bar.set_postfix({name: f"{value:.3g}" for name, value in figures.items()}, refresh=False)
        bar.update()
    bar.close()


def augment(
    run: Run | None,
    stages: Stages | None,
    sources: dict,
    store,
    make_augmenter,
    device,
    *,
    variants: int,
    batch_size: int,
    seed: int,
    processes: Processes = Processes(),
) -> None:
    """Fills ``store`` with ``variants`` variants of every source image.

    Position p = k * N + i of the store is variant k of source i; its seed is a function of (seed, i, k) alone. Shards are
    ``SHARD`` positions; the work goes on after the last whole one.

    Args:
        run, stages, store: the main process's, ``store`` an image bank for the variants; None in the others.
        sources: images (N, 3, H, W) uint8 and labels (N,).
        make_augmenter: builds the augmenter; called only if something is left to do.
    """
    images, labels = sources["images"], sources["labels"]
    if not len(images):
        raise UserError("the image bank is empty: there is nothing to vary; make images with --stages synthesize first")
    total = variants * len(images)
    shards = -(-total // SHARD)
    start = None
    if processes.main:
        stages.begin("augment")
        present = set(store.rounds("augment"))
        start = next((s for s in range(shards) if s not in present), shards)
    start = processes.broadcast(start)
    if start < shards:
        augmenter = make_augmenter()
        if augmenter.fit_rounds:
            if processes.main:
                fit_augmenter(run, augmenter, images, labels, seed)
            state = processes.broadcast(augmenter.state_dict() if processes.main else None)
            if not processes.main:
                augmenter.load_state_dict(state)
        bar = progress(total, "augment", "img", start * SHARD)
        for shard in range(start, shards):
            positions = torch.arange(shard * SHARD, min((shard + 1) * SHARD, total))
            parts = positions.split(batch_size)
            made = {}
            for number in range(processes.rank, len(parts), processes.count):
                part = parts[number]
                source_index = part % len(images)
                seeds = [position_seed(seed, "variant", int(p % len(images)), int(p // len(images))) for p in part]
                source = images[source_index].to(device).float().div_(255)
                varied = augmenter.augment(source, labels[source_index].to(device), seeds)
                if not bool(torch.isfinite(varied).all()):
                    raise UserError(f"the diffusion model made NaN pixels in shard {shard}; give --diffusion_dtype fp32")
                made[number] = to_uint8(varied).cpu()
                bar.update(len(part))
            made = {number: part for found in processes.gather(made) for number, part in found.items()}
            if processes.main:
                source_index, varied = positions % len(images), torch.cat([made[number] for number in sorted(made)])
                store.append("augment", shard, varied, labels[source_index], source_index=source_index)
                stages.update("augment", variants=int(positions[-1]) + 1)
                bar.update(int(positions[-1]) + 1 - bar.n)
        bar.close()
    if not processes.main:
        return
    stages.update("augment", done=True, variants=total)
    run.log(f"augment: {total} variants of {len(images)} images in {store.path} ({stages.seconds()['augment']:.0f} s)")


def filter_variants(
    run: Run, folder: Path, sources, variants, *, omega: float | None, name: str, score, keep_mask
) -> tuple[Tensor, float]:
    """The keep mask (N * V,) of the variants and the omega behind it; logged, drawn, and stored with the cosines.

    Cosines are computed once an embedding, in this run or in the one that made the variants, so that omega can change
    without generating or embedding again.

    Args:
        folder: of the variants.
        sources: images (N, 3, H, W), labels; variants: images (N * V, 3, H, W), labels, source_index.
        omega: None takes the calibrated one.
        name: of the embedding; the file is ``filter_<name>.safetensors``.
        score: (show) -> cosines (N * V,), calibrated omega; called when none are stored, calls show(images) as it goes.
        keep_mask: (cosines, omega) -> bool (N * V,).
    """
    file = run.path / f"filter_{name}.safetensors"
    stored = next((load_tensors(f) for f in (file, folder.parent / file.name) if f.exists()), None)
    if stored is None or len(stored["cosine"]) != len(variants["labels"]):
        with progress(len(sources["labels"]) + len(variants["labels"]), "embed", "img", delay=3) as bar:
            cosine, calibrated = score(bar.update)
    else:
        cosine, calibrated = stored["cosine"], stored["calibrated_omega"].item()
    omega = calibrated if omega is None else omega
    keep = keep_mask(cosine, omega)
    save_tensors(
        file, {"cosine": cosine, "keep": keep, "calibrated_omega": torch.tensor([calibrated])}, {"omega": repr(omega)}
    )
    low, middle, high = torch.quantile(cosine[:1_000_000].float(), torch.tensor([0.1, 0.5, 0.9])).tolist()
    run.log(
        f"filter: {int(keep.sum())} of {len(keep)} variants kept at omega {omega:.3f} ({name} embedding; "
        f"cosine 10/50/90 %: {low:.3f} {middle:.3f} {high:.3f})"
    )
    run.board.add_histogram("filter/cosine", cosine)
    run.board.add_scalar("filter/keep_rate", keep.float().mean())
    total = len(sources["labels"])
    shown = torch.arange(0, total, max(1, total // 16))[:16]
    of_shown = torch.arange(min(4, len(keep) // total))[:, None] * total + shown
    picture = variants_grid(sources["images"][shown], variants["images"][of_shown], cosine[of_shown], keep[of_shown])
    run.picture("variants", picture)
    return keep, round(omega, 4)
