"""A debug task for all tests: digits at 16 px, a resnet8 teacher with random weights, and runs of a few seconds."""

import os
from pathlib import Path

# torch.compile generates plain code here; otherwise it starts seven processes to find out which vector instructions work.
COMPILER = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_VEC_ISA_OK": "0"}
for name, value in ({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | COMPILER).items():
    os.environ.setdefault(name, value)

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from filelock import FileLock

from datafree.base import Task
from engine.data import datasets, readers
from engine.loops import stages
from engine.networks import build
from engine.runtime.errors import resolve
from engine.runtime.precision import Precision
from engine.runtime.tensors import load_checkpoint, weights_digest
from models.classifier import Classifier
from registry import DATASETS, MODELS
from tests import tiny_pipelines

dataset_info = functools.partial(datasets.dataset_info, DATASETS)
build_network, build_classifier, load_teacher = (
    functools.partial(function, MODELS) for function in (build.build_network, build.build_classifier, build.load_teacher)
)
ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
all_digits = readers.read_digits


@functools.cache
def few_digits(split: str) -> readers.RawSplit:
    """The digits, read once in each process. The test split has only every sixth digit, which is enough for a tiny run."""
    found = all_digits(None, split)
    return found._replace(images=found.images[::6], labels=found.labels[::6]) if split == "test" else found


readers.read_digits = lambda info, split: few_digits(split)
STREAMED_BYTES, stages.STREAMED_BYTES = (
    stages.STREAMED_BYTES,
    3 * 16**2 * 100,
)  # a streaming run stores its last 100 images, not 1000


def make_task(**changes) -> Task:
    """A task of ten classes at 16 px on the CPU, without augmentation; ``changes`` set fields of the task or its dataset."""
    about = {
        "name": "debug",
        "num_classes": 10,
        "image_size": 16,
        "mean": (0.3,) * 3,
        "std": (0.3,) * 3,
        "class_names": None,
        "flip": False,
        "crop_padding": 1,
        "data_root": "data",
        "reader": "",
    }
    names = {field.name for field in dataclasses.fields(datasets.DatasetInfo)}
    info = datasets.DatasetInfo(**about | {name: changes.pop(name) for name in names & changes.keys()})
    fields = dict(info=info, device=CPU, random_view=lambda images: images, precision=Precision("no", CPU))
    return Task(**fields | changes)


def make_classifier(network="resnet8", num_classes=10, image_size=16, mean=0.3, std=0.3) -> Classifier:
    """Wraps a network, or a new one of that name, as a classifier; ``mean`` and ``std`` hold for all three channels."""
    network = build_network(network, num_classes) if isinstance(network, str) else network
    return Classifier(network, num_classes, image_size, (mean,) * 3, (std,) * 3)


# Flags that shrink a run of each method to a few seconds, whatever flags its script has.
TINY = {
    "kd": "",
    "noise": "",
    "one_image": f"--image {ROOT / 'docs/pictures/natural_32.png'}",
    "dafl": "--kd_steps 1 --synthesis_batch_size 6 --nz 8",
    "zskt": "--kd_steps 1 --synthesis_batch_size 6 --nz 8",
    "dfad": "--kd_steps 1 --synthesis_batch_size 6 --nz 8",
    "dfq": "--kd_steps 1 --synthesis_batch_size 6 --nz 8",
    "fast": "--init_rounds 2 --g_steps 2 --synthesis_batch_size 6 --nz 8 --reset_l0_round 1",
    "nayer": "--init_rounds 2 --init_g_loops 2 --g_steps 2 --g_life 2 --synthesis_batch_size 3 --nz 8 --label_dim 16",
    "deepinv": "--g_steps 2 --synthesis_batch_size 6",
    "adi": "--g_steps 2 --synthesis_batch_size 6",
    "cmi": "--init_rounds 2 --init_g_steps 2 --g_steps 2 --synthesis_batch_size 6 --nz 8 "
    "--memory_size 15 --negatives 8 --head_dim 8",
    "csd": "--init_rounds 2 --init_g_steps 2 --init_batch_size 6 --g_steps 2 --synthesis_batch_size 6 --nz 8",
    "dda": "--init_rounds 2 --init_g_steps 2 --init_batch_size 6 --g_steps 2 --synthesis_batch_size 6 --nz 8 "
    "--fit_passes 2 --fit_batch_size 6 --num_inference_steps 4 --variants 2 --omega -1",
    "diffdfkd": "--images_per_class 1 --synthesis_batch_size 6 --diffusion_batch_size 3 --num_inference_steps 2 "
    "--lca_every 1",
}
TINY_TASK = "--dataset digits --teacher resnet8 --student resnet8 --epochs 2 --kd_steps 3 --ep_steps 3 --batch_size 8 --gpu -1 --amp no"


def script_commands(scripts: list[str], flags: str = "", **variables: str) -> dict[str, list[str]]:
    """{script: its arguments to python, then ``flags``}; bash runs each script with a function in place of python."""
    loop = r"""
        python() { printf '%s\0' "$@"; }
        export -f python
        for script in $SCRIPTS; do printf '%s\0' "$script"; bash "$script" "$@"; echo; done"""
    environment = os.environ | {"VENV": "none", "SCRIPTS": " ".join(scripts)} | variables
    words = ["bash", "-c", loop, "bash", *flags.split()]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    records = [line.split("\0")[:-1] for line in done.stdout.splitlines()]
    return {script: arguments for script, *arguments in records}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Keeps tests off the hub, even if huggingface_hub was imported before, because it reads the variable only once."""
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True)
def open_train_split(monkeypatch):
    """Lets a test read training images, even if a test before it ran a data-free command in the same process."""
    monkeypatch.setattr("engine.data.splits._train_split_forbidden", False)


@pytest.fixture(scope="session")
def common(tmp_path_factory):
    """common(name, make): a path that all pytest workers share; the first worker that needs it calls ``make(path)``."""
    worker = "PYTEST_XDIST_WORKER" in os.environ
    root = tmp_path_factory.getbasetemp().parent / "common" if worker else tmp_path_factory.mktemp("common")

    def call(name: str, make: Callable[[Path], None]) -> Path:
        path, done = root / name, root / f"{name}.done"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not done.exists():
                make(path)
                done.touch()
        return path

    return call


@pytest.fixture(scope="session")
def teacher_file(common):
    """Path of a checkpoint with random weights of a resnet8 for ten classes."""

    def make(path: Path) -> None:
        torch.manual_seed(0)
        torch.save({"state_dict": build_network("resnet8", 10).state_dict(), "arch": "resnet8"}, path)

    return common("digits_resnet8.pth", make)


@pytest.fixture(scope="session")
def miniature(common):
    """miniature("sdxl"): path of a random miniature of that model, made once; tests may read or copy it, not change it."""
    return lambda kind: str(common(f"{kind}.safetensors" if kind == "patch_prior" else kind, getattr(tiny_pipelines, kind)))


@pytest.fixture(scope="session")
def generative(miniature):
    """{kind: path} of a miniature of every kind of prior that stage generate can use."""
    return {kind: miniature(kind) for kind in tiny_pipelines.GENERATIVE}


@pytest.fixture
def command(monkeypatch, teacher_file):
    """Runs an entry point in this process: command("datafree_kd", "--method csd ..."), or with a list of arguments."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("engine.data.splits._train_split_forbidden", False)

    def call(module: str, arguments: str | list[str]) -> None:
        import importlib

        monkeypatch.setattr("sys.argv", [f"{module}.py", *(arguments.split() if isinstance(arguments, str) else arguments)])
        importlib.import_module(module).main()

    return call


def tiny_flags(method: str, teacher_file: Path, save_dir: Path, extra: str = "") -> str:
    """The flags of a tiny data-free run."""
    return f"--method {method} {TINY_TASK} --teacher_ckpt {teacher_file} {TINY[method]} --save_dir {save_dir} {extra}"


@pytest.fixture
def distill(command, teacher_file):
    """Does a tiny data-free run in this process: distill("csd", save_dir, "--seed 1")."""

    def call(method: str, save_dir: Path, extra: str = "") -> None:
        command("datafree_kd", tiny_flags(method, teacher_file, save_dir, extra))

    return call


@pytest.fixture(scope="session")
def finished(common, teacher_file):
    """finished("csd", flags): folder of a tiny run, made once; tests may read, compare or copy it, not change it."""
    folders: dict[tuple[str, str], Path] = {}

    def call(method: str, extra: str = "") -> Path:
        def make(folder: Path) -> None:
            import datafree_kd

            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(ROOT)
                patch.setattr("engine.data.splits._train_split_forbidden", False)
                patch.setattr("sys.argv", ["datafree_kd.py", *tiny_flags(method, teacher_file, folder, extra).split()])
                datafree_kd.main()

        if (method, extra) not in folders:
            flags = hashlib.sha256(extra.encode()).hexdigest()[:8] if extra else "plain"
            folders[method, extra] = common(f"{flags}/{method}", make)
        return folders[method, extra]

    return call


@pytest.fixture
def copied(finished, tmp_path):
    """copied("csd", flags): a copy of the folder of a finished tiny run, which a test may continue or change."""
    return lambda method, extra="": shutil.copytree(finished(method, extra), tmp_path / "copied")


@pytest.fixture
def forked(tmp_path):
    """forked(function): exit code, stdout and stderr of a fork that calls the function with all modules imported."""

    def call(function: Callable[[], None]) -> tuple[int, str, str]:
        files = [tmp_path / "forked.out", tmp_path / "forked.err"]
        sys.stdout.flush(), sys.stderr.flush()
        process = os.fork()
        if not process:
            try:
                for number, file in enumerate(files, 1):
                    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
                sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
                function()
                os._exit(0)
            except SystemExit as end:
                os._exit(end.code or 0)
            finally:
                os._exit(3)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        return code, *(file.read_text() for file in files)

    return call


@pytest.fixture
def interrupted(monkeypatch):
    """``with interrupted("module.function", n):`` stops the block, as Ctrl-C does, at the n-th call of that function."""

    @contextlib.contextmanager
    def within(place: str, call: int):
        original, calls = resolve(":".join(place.rsplit(".", 1))), itertools.count(1)

        def failing(*args, **kwargs):
            if next(calls) == call:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place, failing)
            yield

    return within


def outcome(folder: Path) -> tuple[dict[Path, bytes], str, str]:
    """The shards, student weights and metrics of a run, for a comparison with another run."""
    shards = {f.relative_to(folder): f.read_bytes() for f in sorted(folder.rglob("*.safetensors"))}
    student = weights_digest(load_checkpoint(folder / "student.pth")["state_dict"])
    return shards, student, (folder / "metrics.jsonl").read_text()
