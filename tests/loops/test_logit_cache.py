"""The cache of teacher logits: the student is the same with and without it, for any batch, cache size or kill."""

import shutil

import pytest
import torch

from engine.data.crops import KeyedViews, Views
from engine.data.transfer_set import TransferSet
from engine.loops import logit_cache as module
from engine.loops.logit_cache import LogitCache, cached_keys, check_logit_cache, repeated
from engine.runtime.errors import UserError
from engine.runtime.tensors import load_checkpoint
from tests.conftest import CPU, ROOT, outcome

LONG = "--epochs 2 --kd_steps 10 --ep_steps 20 --batch_size 16"


def student(folder):
    return load_checkpoint(folder / "student.pth")["state_dict"]


def log(folder):
    return (folder / "log.txt").read_text()


# views


@pytest.mark.parametrize("padding, flip", [(2, True), (1, False), (0, True), (0, False)])
def test_every_view_has_a_number(padding, flip):
    views = Views(padding, flip)
    image = torch.randint(1, 256, (1, 3, 5, 5), dtype=torch.uint8)
    number = torch.arange(views.count)
    shown = views.show(image.expand(views.count, -1, -1, -1), number)
    assert len({view.numpy().tobytes() for view in shown}) == views.count == (2 * padding + 1) ** 2 * (1 + flip)
    for view, n in zip(shown, number):
        corner, mirrored = divmod(int(n), 1 + flip)
        row, column = divmod(corner, 2 * padding + 1)
        whole = torch.nn.functional.pad(image.flip(3) if mirrored else image, [padding] * 4)
        assert torch.equal(view, whole[0, :, row : row + 5, column : column + 5])


def test_keys_are_a_function_of_the_seed_and_spread_over_all_views():
    views = KeyedViews(Views(1, True), 10)
    index = torch.arange(10).repeat(400, 1)
    keys = views.draw(index, 3)
    assert torch.equal(keys, views.draw(index, 3)) and not torch.equal(keys, views.draw(index, 4))
    assert torch.equal(keys // views.count, index) and len(views) == 180 == len(keys.unique())
    counts = torch.bincount(keys.flatten(), minlength=180)
    assert counts.min() > 5 and counts.max() < 50  # 22 on average


def test_a_few_views_are_an_image_s_own():
    whole, views = Views(2, True), KeyedViews(Views(2, True), 6, few=4, seed=1)
    images = torch.randint(0, 256, (6, 3, 5, 5), dtype=torch.uint8)
    keys = torch.arange(len(views))
    shown = views.show(images[keys // 4], keys)
    assert len(views) == 24 and torch.equal(shown, whole.show(images[keys // 4], views.chosen))
    assert torch.equal(views.chosen, KeyedViews(whole, 6, few=4, seed=1).chosen)
    assert not torch.equal(views.chosen, KeyedViews(whole, 6, few=4, seed=2).chosen) and len(views.chosen.unique()) > 12
    assert KeyedViews(whole, 6, few=50).few is None  # more than there are: all views


# the cache


def numbers(keys):
    return torch.stack([keys.float(), -keys.float()], 1)


def test_misses_come_in_full_blocks_and_once():
    blocks = []
    logit_cache = LogitCache(lambda keys: (blocks.append(keys), numbers(keys))[1], 100, 100, 4, CPU)
    keys = torch.tensor([[3, 9, 3, 7], [9, 50, 0, 99]])
    logit_cache.prepare(keys)
    assert [len(block) for block in blocks] == [4, 4] and set(torch.cat(blocks).tolist()) == {0, 3, 7, 9, 50, 99}
    for row in keys:
        assert torch.equal(logit_cache(row), numbers(row))
    logit_cache.prepare(keys)
    logit_cache.prepare(torch.tensor([[3, 9, 0, 1]]))
    assert (
        len(blocks) == 3 and 1 in blocks[2] and torch.equal(logit_cache(torch.tensor([1, 3])), numbers(torch.tensor([1, 3])))
    )
    assert (
        logit_cache.lookups == 20
        and logit_cache.misses == logit_cache.used == 7
        and "65.0 % of 20 teacher outputs came from the cache; 7 entries" in logit_cache.description
    )


def test_beyond_the_bound_it_keeps_what_it_has():
    asked = []
    logit_cache = LogitCache(lambda keys: (asked.extend(keys.tolist()), numbers(keys))[1], 1000, 5, 2, CPU)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        keys = torch.randint(1000, (3, 4), generator=generator)
        logit_cache.prepare(keys)
        for row in keys:
            assert torch.equal(logit_cache(row), numbers(row))
    assert logit_cache.used == 5 and len(logit_cache.logits) == 1 + 5 + module.STEPS * 2
    first, before = torch.tensor([sorted(asked[:4])]), len(asked)
    logit_cache.prepare(first)
    assert len(asked) == before  # the first entries are never evicted
    assert (logit_cache.row_of > 5).sum() == 0


def test_how_much_is_kept():
    views = KeyedViews(Views(1, True), 100)  # 1800 views
    assert cached_keys("no", views, 10**6, 40, CPU) == (0, "")
    rows, text = cached_keys("1", views, 10**6, 40, CPU)
    assert rows == 1800 and "room for 1800 of 1800 image views" in text
    assert cached_keys("1", views, 300, 40, CPU)[0] == 300
    rows, _ = cached_keys("1", views, 10**6, 4000, CPU)
    assert rows == (2**20 - 4 * 1800) // 4000
    assert cached_keys("0", views, 10**6, 40, CPU)[0] == 0
    rows, text = cached_keys("auto", views, 30, 40, CPU)
    assert rows == 0 and "only 1 % of the teacher's outputs would come from it" in text
    assert cached_keys("auto", views, 10**6, 40, CPU)[0] == 1800
    for wrong in ("yes", "-1", "1.5"):
        with pytest.raises(UserError, match=f"--logit_cache {wrong} found, auto, no, or a number of MiB wanted"):
            check_logit_cache(wrong)


def test_the_share_of_lookups_that_hit():
    drawn = torch.randint(5000, (7000,), generator=torch.Generator().manual_seed(0))
    assert repeated(7000, 5000) == pytest.approx(1 - len(drawn.unique()) / 7000, abs=0.01)


# batches


@pytest.mark.parametrize("limit", [0, 2**40])
def test_a_key_stands_for_the_image_that_came_with_it(limit, monkeypatch):
    """With images in memory or in shards. The keys of the next batches are announced before the batches are shown."""
    monkeypatch.setattr("engine.data.image_bank.memory_limit", lambda device: limit)
    transfer = TransferSet(9, 6, CPU)
    transfer.add(torch.randint(0, 256, (9, 3, 6, 6), dtype=torch.uint8), torch.arange(9))
    views, told = KeyedViews(Views(1, True), 9), []
    batches = transfer.keyed_batches(4, views, told.append, seed=5, steps=7, ahead=3)
    for images, labels, keys in batches:
        assert torch.equal(keys // views.count, labels) and torch.equal(images, transfer.images_of_keys(views, keys))
        assert torch.isin(keys, told[-1]).all() and images.is_contiguous(memory_format=torch.channels_last)
    assert [part.shape for part in told] == [(3, 4), (3, 4), (1, 4)]
    plain = [labels for (_, labels), _ in zip(transfer.batches(4, lambda x: x, seed=5), range(7))]
    assert torch.equal(torch.cat(told) // views.count, torch.stack(plain)), "the order is that of batches"


# runs


SAME = {
    "fast": "--epochs 4 --kd_steps 10 --ep_steps 20 --batch_size 16", "csd": "--feat 0", "kd": "--amp bf16", "fast --views 2": "",
    "diffdfkd": "--epochs 1 --kd_steps 40 --ep_steps 40", "noise": f"--images {ROOT / 'docs' / 'pictures'}",
}  # fmt: skip


@pytest.mark.parametrize("method", SAME)
def test_the_student_is_the_same_with_and_without(method, distill, tmp_path):
    """Up to 80 steps. Both runs pass batches of one shape to the teacher, whose logits depend on each image alone."""
    name, *views = method.split(" ", 1)
    flags = " ".join([SAME[method], *views])
    distill(name, tmp_path / "with", f"{flags} --logit_cache 1")
    distill(name, tmp_path / "without", f"{flags} --logit_cache no")
    assert "came from the cache" in log(tmp_path / "with") and "logit cache:" not in log(tmp_path / "without")
    found, expected = student(tmp_path / "with"), student(tmp_path / "without")
    for name in expected:
        assert torch.allclose(found[name].float(), expected[name].float(), rtol=1e-5, atol=1e-5), name


def test_a_killed_run_forgets_its_memo_and_ends_in_the_same_bits(distill, finished, tmp_path, interrupted):
    with interrupted("engine.loops.distill.save_checkpoint", 2):
        distill("fast", tmp_path / "run", f"{LONG} --logit_cache 1")
    shutil.copytree(tmp_path / "run", tmp_path / "without")
    distill("fast", tmp_path / "run", f"{LONG} --logit_cache 1")
    distill("fast", tmp_path / "without", f"{LONG} --logit_cache no")
    assert outcome(tmp_path / "run") == outcome(finished("fast", f"{LONG} --logit_cache 1")) == outcome(tmp_path / "without")


def test_a_small_memo_makes_the_same_student(distill, finished, tmp_path, monkeypatch):
    """The cache has room for 50 of some hundred entries; the teacher computes the others again."""
    whole = finished("fast", f"{LONG} --logit_cache 1")
    monkeypatch.setattr("engine.loops.stages.cached_keys", lambda *_: (50, "logit cache: 50 rows"))
    distill("fast", tmp_path, f"{LONG} --logit_cache 1")
    assert outcome(tmp_path) == outcome(whole) and "50 entries" in log(tmp_path)


def test_losses_of_feature_maps_keep_the_plain_way(distill, tmp_path):
    distill("csd", tmp_path, "--logit_cache 1 --epochs 1")
    assert "logit cache: none, because the student's loss needs more of the teacher than each image's own logits" in log(
        tmp_path
    )


def test_a_short_run_has_none(distill, tmp_path):
    distill("fast", tmp_path, "--epochs 1")
    assert "would come from it" in log(tmp_path) and "came from the cache" not in log(tmp_path)


REFUSED = {
    ("dafl", "--views 2"): "--views 2 found, but this run has no finite set of crops and flips",
    ("diffdfkd", "--views 2 --mix cutmix"): "--views 2 found, but this run has no finite set of crops and flips",
    ("fast", "--views 0"): "--views 0 found",
    ("fast", "--logit_cache many"): "--logit_cache many found, auto, no, or a number of MiB wanted",
}


@pytest.mark.parametrize("method, flags", REFUSED)
def test_what_is_refused(method, flags, distill, tmp_path):
    with pytest.raises(UserError, match=REFUSED[method, flags]):
        distill(method, tmp_path, flags)


def test_other_views_are_another_run(distill, copied):
    with pytest.raises(UserError, match="--views unset, now 3"):
        distill("fast", copied("fast"), "--views 3")
