"""Image files: how images of odd shapes are read, and which files count as images."""

from dataclasses import replace

import numpy as np
from PIL import Image

from engine.data.pictures import class_files, decode_image, image_files
from engine.data.readers import read_class_folders
from tests.conftest import dataset_info
from tests.data.trees import fails, load, write_folders, write_image, write_npz


def test_a_long_thin_file_takes_little_memory(tmp_path):
    import resource

    path = tmp_path / "thin.png"
    Image.fromarray(np.arange(100_000, dtype=np.uint32).astype(np.uint8).reshape(-1, 1)).save(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert decode_image(path, 224).shape == (224, 224, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_of_a_long_file_the_middle_is_kept(tmp_path):
    picture = np.zeros((10, 1000, 3), np.uint8)
    picture[:, 490:510] = 255
    Image.fromarray(picture).save(tmp_path / "a.png")
    assert (decode_image(tmp_path / "a.png", 10) == 255).all()
    Image.fromarray(picture.transpose(1, 0, 2)).save(tmp_path / "b.png")
    assert (decode_image(tmp_path / "b.png", 10) == 255).all()


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path):
    Image.new("1", (9000, 9000)).save(tmp_path / "a.png")
    with fails("a.png has 9000 x 9000 pixels, at most 67108864 wanted"):
        decode_image(tmp_path / "a.png", 32)


def test_sixteen_bits_keep_their_contrast(tmp_path):
    levels = np.linspace(0, 65535, 256).astype(np.uint16).repeat(256).reshape(256, 256)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(levels).save(tmp_path / name)
        assert decode_image(tmp_path / name, 256)[:, 0, 0].tolist() == list(range(256))
    Image.fromarray(levels.astype(np.int32) * 100).save(tmp_path / "b.tiff")
    Image.fromarray(levels.astype(np.float32)).save(tmp_path / "c.tiff")
    for name, kind in (("b.tiff", "int32"), ("c.tiff", "float32")):
        with fails(f"{name} has {kind} pixels, 8 or 16 bits wanted"):
            decode_image(tmp_path / name, 32)


def test_images_that_are_not_square_are_told_of(tmp_path, capsys):
    write_npz(tmp_path, "wide", (6, 8, 12, 3))
    load(dataset_info("wide", tmp_path))
    line = "wide test: images are not square (one has 12 x 8 px); each is resized to 8 px on its shorter side"
    assert line in capsys.readouterr().out
    write_npz(tmp_path, "square")
    load(dataset_info("square", tmp_path))
    assert "not square" not in capsys.readouterr().out
    write_folders(tmp_path, ["a", "b"])
    load(dataset_info("folder", tmp_path))
    assert "not square" not in capsys.readouterr().out
    write_image(tmp_path / "test" / "b" / "wide.jpg", (0, 0, 0), (40, 20))
    load(dataset_info("folder", tmp_path))
    assert (
        f"{dataset_info('folder', tmp_path).name} test: images are not square (one has 40 x 20 px)"
        in capsys.readouterr().out
    )


def test_one_list_of_suffixes(tmp_path):
    for name in ("a.PNG", "b.tiff", "c.gif", "deep/d.webp", ".hidden.png", "e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert [file.removeprefix(f"{tmp_path}/") for file in image_files(tmp_path)] == [
        "a.PNG",
        "b.tiff",
        "c.gif",
        "deep/d.webp",
    ]


def test_class_folders_by_number_and_by_name(tmp_path):
    for name in ("ship", "cat"):
        write_image(tmp_path / name / "a.png", (1, 2, 3), (8, 8))
    assert class_files(tmp_path, ("cat", "dog", "ship"))[1].tolist() == [0, 2]
    assert class_files(tmp_path)[1].tolist() == [0, 1]
    with fails("a folder 'ship', which is not a class; class numbers or names wanted: cat, dog"):
        class_files(tmp_path, ("cat", "dog"))
    for name in ("7", "8"):
        write_image(tmp_path / "named" / name / "a.png", (1, 2, 3), (8, 8))
    assert class_files(tmp_path / "named", ("7", "8", "9"))[1].tolist() == [7, 8]
    info = replace(dataset_info("digits"), data_root=str(tmp_path), source="named", class_names=("7", "8", "9"))
    assert read_class_folders(info, "test").labels.tolist() == [0, 1]
    (tmp_path / "named" / "8").rename(tmp_path / "named" / "dog")
    with fails("has 2 class folders for 10 classes whose names are not known; name the folders by the numbers"):
        read_class_folders(replace(info, class_names=None), "test")
    (tmp_path / "numbers" / "99999999999999999999").mkdir(parents=True)
    with fails("a class number below 2"):
        class_files(tmp_path / "numbers")
