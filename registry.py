"""Tables of all networks, datasets, methods and recipes by name. Outside its own files, a method is named only here.

Values ``"module:attribute"`` are imported when they are chosen, so that ``--help`` imports neither networks nor diffusers.
"""

METHODS = {
    "kd": "datafree.kd:KD",  # control on the real training images
    "noise": "datafree.noise:Noise",  # control on noise or unrelated images
    "one_image": "datafree.one_image:OneImage",  # control on crops of one picture
    "dafl": "datafree.dafl:DAFL",
    "zskt": "datafree.zskt:ZSKT",
    "dfad": "datafree.dfad:DFAD",
    "dfq": "datafree.dfq:DFQ",
    "fast": "datafree.fast:Fast",
    "nayer": "datafree.nayer:NAYER",
    "deepinv": "datafree.deepinv:DeepInversion",
    "adi": "datafree.adi:ADI",
    "cmi": "datafree.cmi:CMI",
    "csd": "datafree.csd:CSD",
    "dda": "datafree.dda:DDA",
    "diffdfkd": "datafree.diffdfkd:DiffDFKD",
}

# Flags of the student's training that --recipe sets. "published" sets none; "fast" is for high accuracy in short runs.
RECIPES = {
    "published": {},
    "fast": {
        "batch_size": 128, "optimizer": "muon", "lr_schedule": "one_cycle", "lr": 0.2, "lr_min": 0.0, "warmup_epochs": 0,
        "momentum": 0.9, "weight_decay": 5e-4,
    },
}  # fmt: skip

# Factories are called as factory(num_classes=...). Names without a suffix are the networks that papers use for CIFAR.
MODELS = {
    "wrn16_1": "models.wrn:wrn16_1",
    "wrn16_2": "models.wrn:wrn16_2",
    "wrn40_1": "models.wrn:wrn40_1",
    "wrn40_2": "models.wrn:wrn40_2",
    "resnet18": "models.resnet:resnet18",
    "resnet34": "models.resnet:resnet34",
    "resnet50": "models.resnet:resnet50",
    "resnet8": "models.resnet_cifar:resnet8",
    "resnet20": "models.resnet_cifar:resnet20",
    "resnet32": "models.resnet_cifar:resnet32",
    "resnet56": "models.resnet_cifar:resnet56",
    "resnet110": "models.resnet_cifar:resnet110",
    "resnet8x4": "models.resnet_cifar:resnet8x4",
    "resnet32x4": "models.resnet_cifar:resnet32x4",
    "resnet20_he": "models.resnet_cifar:resnet20_he",
    "resnet32_he": "models.resnet_cifar:resnet32_he",
    "resnet44_he": "models.resnet_cifar:resnet44_he",
    "resnet56_he": "models.resnet_cifar:resnet56_he",
    "resnet110_he": "models.resnet_cifar:resnet110_he",
    "vgg8": "models.vgg:vgg8",
    "vgg11": "models.vgg:vgg11",
    "vgg13": "models.vgg:vgg13",
    "mobilenetv2": "models.imagenet:mobilenet_v2",
    "shufflenetv2": "models.shufflenetv2:shufflenetv2",
    "resnet18_imagenet": "models.imagenet:resnet18",
    "resnet34_imagenet": "models.imagenet:resnet34",
    "resnet50_imagenet": "models.imagenet:resnet50",
    "mobilenet_v2_imagenet": "models.imagenet:mobilenet_v2",
    "vgg11_bn_imagenet": "models.imagenet:vgg11_bn",
    "efficientnet_b0_imagenet": "models.imagenet:efficientnet_b0",
    "convnext_tiny_imagenet": "models.imagenet:convnext_tiny",
    "vit_b_16_imagenet": "models.imagenet:vit_b_16",
}

# Location, size and normalization of real data. reader: function that opens a split; describe: function that reads from the
# disk what a row leaves open; source: torchvision class, or folder in the data root; crop_padding: pixels, relative to
# "size".
DATASETS = {
    "digits": {  # 1797 images included in scikit-learn: a small dataset for first trials
        "reader": "engine.data.readers:read_digits", "num_classes": 10, "class_names": "engine.data.datasets:DIGITS",
        "size": 16, "flip": False, "crop_padding": 1,
        "mean": (0.305, 0.305, 0.305), "std": (0.319, 0.319, 0.319),
    },
    "mnist": {  # 28 px resized to 32
        "reader": "engine.data.readers:read_torchvision", "source": "MNIST",
        "num_classes": 10, "class_names": "engine.data.datasets:DIGITS",
        "size": 32, "flip": False, "crop_padding": 2,
        "mean": (0.1307, 0.1307, 0.1307), "std": (0.3081, 0.3081, 0.3081),
    },
    "svhn": {
        "reader": "engine.data.readers:read_torchvision", "source": "SVHN",
        "num_classes": 10, "class_names": "engine.data.datasets:DIGITS",
        "size": 32, "flip": False, "crop_padding": 4,
        "mean": (0.4377, 0.4438, 0.4728), "std": (0.1980, 0.2010, 0.1970),
    },
    "cifar10": {
        "reader": "engine.data.readers:read_torchvision", "source": "CIFAR10",
        "num_classes": 10, "class_names": "engine.data.datasets:CIFAR10",
        "prompt": "A realistic photo of {label}",
        "size": 32, "flip": True, "crop_padding": 4,
        "mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010),
    },
    "cifar100": {
        "reader": "engine.data.readers:read_torchvision", "source": "CIFAR100",
        "num_classes": 100, "class_names": "engine.data.datasets:CIFAR100",
        "prompt": "A realistic photo of {label}",
        "size": 32, "flip": True, "crop_padding": 4,
        "mean": (0.5071, 0.4867, 0.4408), "std": (0.2675, 0.2565, 0.2761),
    },
    "tiny_imagenet": {
        "reader": "engine.data.readers:read_tiny_imagenet", "source": "tiny-imagenet-200",
        "num_classes": 200, "class_names": "engine.data.datasets:tiny_imagenet",
        "prompt": "A realistic photo of {label}",
        "size": 64, "flip": True, "crop_padding": 8,
        "mean": (0.4802, 0.4481, 0.3975), "std": (0.2770, 0.2691, 0.2821),
    },
    "imagenet": {  # resized to 256 and cropped to 224, as in torchvision's evaluation
        "reader": "engine.data.readers:read_folders", "source": "imagenet",
        "num_classes": 1000, "class_names": "engine.data.datasets:imagenet",
        "size": 224, "flip": True, "crop_padding": 28, "crop_fraction": 0.875,
        "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
    },
    "domainnet": {  # with --domain, or as domainnet_sketch; ten: label numbers of the subset's classes 0..9
        "reader": "engine.data.readers:read_domainnet", "describe": "engine.data.readers:describe_domainnet", "source": "domainnet",
        "num_classes": 345,
        "domains": ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"),
        "ten": {
            "airplane": 1, "clock": 73, "axe": 11, "basketball": 19, "bicycle": 29,
            "bird": 31, "strawberry": 290, "flower": 121, "pizza": 225, "bracelet": 39,
        },
        "prompt": "an image of {label}",
        "size": 224, "flip": True, "crop_padding": 28,
        "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
    },
    "folder": {  # image folders DATA_ROOT/train/<class>/* and DATA_ROOT/test/<class>/* or DATA_ROOT/val/<class>/*
        "reader": "engine.data.readers:read_folders", "describe": "engine.data.readers:describe_folders", "source": ".",
        "size": 64, "flip": True, "crop_padding": 8,
        "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
    },
}  # fmt: skip

# Test accuracies in % (best epoch) that the papers report for these teacher-student pairs, in this order. A key may contain
# flags that a run must have (NAYER: --epochs 300, in the paper 320 with warm-up; its accuracies are quoted from memory, and
# only that of wrn40_2 -> wrn16_2 is confirmed). Methods whose paper's table was not available are missing.
PAIRS = (
    ("resnet34", "resnet18"),
    ("vgg11", "resnet18"),
    ("wrn40_2", "wrn16_1"),
    ("wrn40_2", "wrn40_1"),
    ("wrn40_2", "wrn16_2"),
)
PUBLISHED = {
    "cifar10": {
        "dafl": (92.22, 81.10, 65.71, 81.33, 81.55),
        "zskt": (93.32, 89.46, 83.74, 86.07, 89.66),
        "adi --g_steps 2000": (93.26, 90.36, 83.04, 86.85, 89.72),
        "dfq": (94.61, 90.84, 86.14, 91.69, 92.01),
        "cmi": (94.84, 91.13, 90.01, 92.78, 92.52),
        "fast --g_steps 2": (92.62, 84.67, 88.36, 89.56, 89.68),
        "fast --g_steps 5": (93.63, 89.94, 88.90, 92.04, 91.96),
        "fast --g_steps 10": (94.05, 90.53, 89.29, 92.51, 92.45),
        "nayer --epochs 300": (95.21, 92.37, 91.94, 94.07, 94.15),
    },
    "cifar100": {
        "dafl": (74.47, 54.16, 20.88, 42.83, 43.70),
        "zskt": (67.74, 54.31, 36.66, 53.60, 54.59),
        "adi --g_steps 2000": (61.32, 54.13, 53.77, 61.33, 61.34),
        "dfq": (77.01, 66.21, 51.27, 54.43, 64.79),
        "cmi": (77.04, 70.56, 57.91, 68.88, 68.75),
        "fast --g_steps 2": (69.76, 62.83, 41.77, 53.15, 57.08),
        "fast --g_steps 5": (72.82, 65.28, 52.90, 61.80, 63.83),
        "fast --g_steps 10": (74.34, 67.44, 54.02, 63.91, 65.12),
        "nayer --epochs 300": (77.54, 71.75, 62.23, 71.80, 71.72),
        "diffdfkd --oh 0.0 --bn 0.0 --adv 0.0 --lca_every 0": (76.58, 70.83, 56.29, 65.01, 66.89),
    },
}
