"""Networks by public names, offline: timm models that the tests build and save, and torchvision models, all untrained."""

import json

import pytest
import torch

from engine.networks import public
from engine.networks.build import own_weights, require_batch_norm, short_name, with_own_weights
from engine.runtime.errors import UserError
from models.classifier import Classifier
from registry import METHODS, MODELS
from tests.conftest import CPU, build_classifier, build_network, dataset_info, load_teacher

MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
NAMES = [f"digit {label}" for label in range(10)]
KINDS = {  # small networks of timm, with arguments that make them smaller
    "bn": ("test_resnet", {}),
    "gn": ("test_efficientnet_gn", {}),
    "vit": ("test_vit", {"img_size": 32, "patch_size": 8}),
}


def save_timm(folder, name, num_classes=10, **arguments):
    """Saves a timm network with random weights in timm's own format, and returns it."""
    import timm

    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=num_classes, **arguments)
    data = {"input_size": (3, 32, 32), "mean": tuple(MEAN), "std": tuple(STD)}
    timm.models.save_for_hf(
        network, folder, safe_serialization=True, data_config=data, model_config={"label_names": NAMES[:num_classes]}
    )
    return network.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("timm")
    return {kind: (root / kind, save_timm(root / kind, name, **extra)) for kind, (name, extra) in KINDS.items()}


def test_names_of_a_timm_folder_that_are_too_few_are_not_known(tmp_path):
    save_timm(tmp_path, "test_resnet")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"label_names": NAMES[:3]}))
    assert public.configuration(f"local-dir:{tmp_path}")["class_names"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_timm_folder_is_a_teacher_as_its_configuration_says(folders, kind):
    folder, network = folders[kind]
    spec = f"local-dir:{folder}"
    own = own_weights(spec, "digits", None)
    assert own == {"num_classes": 10, "image_size": 32, "class_names": NAMES, "mean": MEAN, "std": STD}
    info = dataset_info("digits").adapted_to_model(spec, own)
    assert (info.image_size, info.class_names, info.crop_padding) == (32, tuple(NAMES), 2)
    teacher = load_teacher(spec, info, CPU, None)
    assert str(teacher.normalization) == "mean 0.1,0.2,0.3 (from the model), std 0.4,0.5,0.6 (from the model)"
    assert load_teacher(spec, info, CPU, None, std=(1.0, 1.0, 1.0)).normalization.std_from == "flag"
    images = torch.rand(2, 3, 32, 32)
    out = teacher(images, return_features=True)
    normalized = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(out.logits, network(normalized), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network.get_classifier()(out.features), out.logits, rtol=1e-4, atol=1e-4)
    assert (out.feature_map is None) == (kind == "vit")
    assert dataset_info("digits").adapted_to_model(spec, own, keep_size=True).image_size == 16


@pytest.mark.parametrize("kind", KINDS)
def test_only_batch_norm_has_statistics_to_match(folders, kind):
    info = dataset_info("digits", image_size=32)
    teacher = load_teacher(f"local-dir:{folders[kind][0]}", info, CPU, None)
    config = type("Config", (), {"bn": 1.0})()
    if kind == "bn":
        return require_batch_norm(teacher, config, METHODS)
    with pytest.raises(UserError, match="has no BatchNorm layer.*--bn 0, or a method that works without: ") as caught:
        require_batch_norm(teacher, config, METHODS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_has_the_architecture_and_random_weights(folders, kind):
    folder, network = folders[kind]
    student = build_classifier(f"local-dir:{folder}", dataset_info("digits", image_size=24), CPU)
    assert student.normalization.mean_from == "dataset" and student(torch.rand(2, 3, 24, 24)).shape == (2, 10)
    heads = [net.get_classifier().weight for net in (student.network, network)]
    assert heads[0].shape == heads[1].shape and not torch.equal(*heads)


def test_own_weights_take_a_new_head(folders):
    folder, network = folders["bn"]
    fresh = with_own_weights(MODELS, f"local-dir:{folder}", 7)
    assert fresh.get_classifier().out_features == 7 and torch.equal(fresh.conv1[0].weight, network.conv1[0].weight)


def test_random_networks_by_their_names():
    for spec in ("timm:test_vit", "timm:test_convnext", "torchvision:mobilenet_v3_small", "torchvision:squeezenet1_1"):
        assert build_network(spec, 5, 32)(torch.rand(2, 3, 32, 32)).shape == (2, 5), spec
    assert build_network("timm:test_resnet(drop_rate=0.5)", 5).drop_rate == 0.5
    with torch.device("meta"):
        assert build_network("torchvision:vit_b_16", 5, 64).image_size == 64
        assert build_network("torchvision:maxvit_t", 5, 224).classifier[-1].out_features == 5


def test_what_torchvision_says_of_its_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found = public.configuration("torchvision:resnet18")
    assert found["num_classes"] == 1000 and found["class_names"][:2] == ["tench", "goldfish"] and found["image_size"] == 224
    assert found["mean"] == [0.485, 0.456, 0.406] == public.configuration("torchvision:resnet50.IMAGENET1K_V2")["mean"]
    network = build_network("torchvision:mobilenet_v3_small", 1000)
    file = tmp_path / "hub" / "checkpoints" / "mobilenet_v3_small-047dcff4.pth"
    file.parent.mkdir(parents=True)
    torch.save(network.state_dict(), file)
    assert own_weights("torchvision:mobilenet_v3_small", "imagenet", None)["num_classes"] == 1000
    loaded = with_own_weights(MODELS, "torchvision:mobilenet_v3_small", 10)
    assert torch.equal(loaded.features[0][0].weight, network.features[0][0].weight)
    assert loaded.classifier[-1].out_features == 10


def test_a_network_with_its_own_weights_is_built_at_the_size_of_the_weights(monkeypatch, tmp_path):
    """The position embedding of a ViT has the size of its images."""
    config = {"library_name": "torchvision", "architecture": "vit_b_16", "num_classes": 10, "mean": MEAN, "std": STD}
    (tmp_path / "config.json").write_text(json.dumps(config | {"input_size": [3, 64, 64]}))
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(public, "load_weights", lambda *_, **__: None)
    monkeypatch.setattr(public, "fetch_torchvision", lambda *_: None)
    for spec, size in ((f"local-dir:{tmp_path}", 64), ("torchvision:vit_b_16.IMAGENET1K_SWAG_E2E_V1", 384)):
        built = []
        public.load_public(spec, {}, 10, lambda *wanted: built.append(wanted) or torch.nn.Linear(1, 1))
        assert built == [(10, size)]


def test_what_timm_says_of_its_weights():
    found = public.configuration("timm:resnet18.a1_in1k")
    assert found["num_classes"] == 1000 and found["image_size"] == 224 and found["mean"] == [0.485, 0.456, 0.406]
    assert found["class_names"][:2] == ["tench", "goldfish"]


@pytest.mark.parametrize(
    "spec, message",
    [
        (
            "timm:resnet18.a1_in1k",
            "weights of timm:resnet18.a1_in1k cannot be .*hf download timm/resnet18.a1_in1k .*local-dir:",
        ),
        ("timm:resnet1k", "timm has no network 'resnet1k'; did you mean"),
        ("timm:resnet18.none", "timm has no weights 'none' of resnet18; it has .*a1_in1k"),
        (
            "hf-hub:nobody/nothing",
            "config.json of hf-hub:nobody/nothing cannot be downloaded.*hf download nobody/nothing config.json",
        ),
        ("torchvision:resnet19", "unknown network of torchvision 'resnet19'; did you mean"),
        ("torchvision:resnet18.none", "torchvision has no such weights; it has IMAGENET1K_V1"),
        (
            "torchvision:resnet18",
            "resnet18-f37072fd.pth cannot be downloaded .*put it into .*checkpoints under the same name",
        ),
        ("local-dir:{tmp}/none", "config.json does not exist; give a folder with config.json and model.safetensors"),
        ("local-dir:{tmp}/other", "has no 'architecture'; give a folder in timm's layout, or one that engine.export wrote"),
        (
            "local-dir:{tmp}/code",
            "has the architecture os:getcwd, which is not in registry.MODELS, and code that only a folder names is never run",
        ),
        ("local-dir:{tmp}/wide", "needs images of 3 x 32 x 64, three channels and square images wanted"),
        ("local-dir:{tmp}/flat", "needs images of 3 x 32, three channels and square images wanted"),
        ("local-dir:{tmp}/mean", "configuration of .*mean does not have the expected contents: mean is 0.5, a list wanted"),
    ],
)
def test_what_cannot_be_had_is_one_line(spec, message, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *a: (_ for _ in ()).throw(OSError("no route to host")))
    own = {"library_name": public.OWN, "num_classes": 10, "input_size": [3, 32, 32], "mean": MEAN, "std": STD}
    configs = {"other": {"model_type": "bert"}, "code": own | {"architecture": "os:getcwd"}}
    configs["wide"] = own | {"architecture": "resnet8", "input_size": [3, 32, 64]}
    configs["flat"] = {"architecture": "test_resnet", "pretrained_cfg": {"input_size": [3, 32]}}
    configs["mean"] = {"architecture": "test_resnet", "pretrained_cfg": {"mean": 0.5}}
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    spec = spec.format(tmp=tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        own_weights(spec, "digits", None)
        with_own_weights(MODELS, spec)
    assert "\n" not in str(caught.value)


def test_classes_in_another_order_are_told(folders):
    info = dataset_info("digits")
    config = {"num_classes": 10, "image_size": 32, "class_names": list(reversed(info.class_names))}
    with pytest.raises(
        UserError, match="class 0 is '9' in m and '0' in digits: both have the same classes in another order"
    ):
        info.adapted_to_model("m", config)
    with pytest.raises(UserError, match="m has 9 classes, digits has 10; .*train_scratch.py --model m --pretrained"):
        info.adapted_to_model("m", config | {"num_classes": 9})


def test_a_trained_file_goes_before_public_weights_of_a_network_but_not_of_a_folder(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = folders["bn"][0]
    assert own_weights("timm:resnet18", "imagenet", None) and not own_weights("timm:resnet18", "imagenet", "a.pth")
    for stem in ("imagenet_timm_resnet18", "digits_bn"):
        (tmp_path / "checkpoints/pretrained").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"checkpoints/pretrained/{stem}.pth").touch()
    assert own_weights("timm:resnet18", "imagenet", None) is None and own_weights(f"local-dir:{folder}", "digits", None)


def test_names_of_files():
    assert short_name("timm:resnet18.a1_in1k") == "timm_resnet18_a1_in1k" and short_name("hf-hub:a/b-c") == "a_b-c"
    assert short_name("local-dir:x/my net/") == "my_net"


def test_channels_last_is_no_feature_map():
    network = build_network(
        "timm:swin_tiny_patch4_window7_224(depths=(1, 1, 1, 1), embed_dim=24, num_heads=(1, 1, 1, 1))", 10
    )
    classifier = Classifier(network, 10, 224, (0.5,) * 3, (0.5,) * 3)
    assert classifier.feature_map_shape is None and classifier.feature_dim == 192


def test_runs_with_a_public_teacher_and_student(command, folders, tmp_path):
    """Fine-tunes a timm teacher on the data, then does data-free runs with a timm student: a BN teacher, and a ViT."""
    folder, run = folders["bn"][0], tmp_path / "scratch"
    common = "--dataset digits --gpu -1 --image_size 32"
    flags = f"--model local-dir:{folder} {common} --epochs 1 --batch_size 64 --save_dir {run} --output {tmp_path / 'a.pth'}"
    command("train_scratch", f"{flags} --pretrained")
    log = (run / "log.txt").read_text()
    assert f"starting from local-dir:{folder}" in log and "mean 0.1,0.2,0.3 (from the model)" in log
    tiny = "--epochs 1 --kd_steps 2 --ep_steps 2 --batch_size 8 --synthesis_batch_size 6 --gpu -1 --dataset digits"
    for kind, method in (("bn", "deepinv --g_steps 2"), ("vit", "dafl --nz 8")):
        path = tmp_path / kind
        command(
            "datafree_kd",
            f"--method {method} {tiny} --teacher local-dir:{folders[kind][0]} --student timm:test_convnext --save_dir {path}",
        )
        result = json.loads((path / "result.json").read_text())
        assert "32 px" in result["dataset_identity"] and result["settings"]["teacher_mean"] == MEAN
        student = torch.load(path / "student.pth", weights_only=True)
        assert student["class_names"] == NAMES and student["image_size"] == 32
