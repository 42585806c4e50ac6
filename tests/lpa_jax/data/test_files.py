"""Image files: decoding, list files, reading ahead, and one clear line for every bad file."""

import os
import threading
import unicodedata
import warnings

import numpy as np
import PIL.Image
import pytest

from lpa_jax import data, files, metrics, models
from lpa_jax.data import image_files, list_files
from tests.helpers.toy import assert_batches_equal


def _picture(width, height, seed=0):
    """Smooth colours, so that JPEG and interpolation stay close to what is expected."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin(3 * x + seed), np.cos(4 * y - seed), np.sin(2 * x + 3 * y)]
    return np.uint8(127 + 120 * np.stack(waves, axis=-1))


def _save(path, width=16, height=12, seed=0, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(_picture(width, height, seed)).convert(mode).save(path, **options)


@pytest.fixture
def tree(tmp_path):
    """Five images of three classes and the list that names them."""
    root = tmp_path / "images"
    names = ["train/a/1.jpg", "train/a/2.png", "train/b b/3.png", "train/b b/4.jpg", "val/5.png"]
    for seed, name in enumerate(names):
        _save(root / name, seed=seed)
    rows = zip(names, (0, 0, 1, 1, 2), strict=True)
    (tmp_path / "train.txt").write_text("".join(f"{name} {label}\n" for name, label in rows))
    return tmp_path


def _read(tree, **options):
    return data.read_list(tree / "train.txt", tree / "images", **{"image_size": 8} | options)


def _rewrite(tree, line, row):
    path = tree / "train.txt"
    rows = path.read_text().splitlines()
    rows[line - 1] = row
    path.write_text("\n".join(rows))


def _one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# Decoding


def test_stretch_keeps_the_whole_image_and_crop_its_centre(tmp_path):
    path = tmp_path / "wide.png"
    _save(path, width=64, height=32)
    picture = PIL.Image.fromarray(_picture(64, 32))
    bilinear = PIL.Image.Resampling.BILINEAR
    np.testing.assert_array_equal(
        image_files.decode(str(path), 16, "stretch"), np.asarray(picture.resize((16, 16), bilinear))
    )
    # 28 of the 32 rows, that is 7/8, and as many columns about the centre
    centre = picture.crop((18, 2, 46, 30)).resize((14, 14), bilinear)
    cropped = image_files.decode(str(path), 14, "crop").astype(int)
    # but for the border, which sees pixels beyond it here
    assert np.abs(cropped - np.asarray(centre))[1:-1, 1:-1].max() <= 1
    assert cropped.shape == (14, 14, 3)


def test_jpeg_and_png_of_a_picture_agree(tmp_path):
    _save(tmp_path / "a.png", 40, 40)
    _save(tmp_path / "a.jpg", 40, 40, quality=95)
    png, jpeg = (
        image_files.decode(str(tmp_path / f"a.{end}"), 10, "stretch").astype(int)
        for end in ("png", "jpg")
    )
    assert np.abs(png - jpeg).mean() < 2


@pytest.mark.parametrize(
    ("mode", "options"),
    [*((mode, {}) for mode in ("L", "P", "RGBA", "LA", "1", "CMYK")),
     ("P", {"transparency": bytes(range(256))})],
)  # fmt: skip
def test_every_8_bit_mode_becomes_rgb_without_a_warning(tmp_path, mode, options):
    path = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    _save(path, 8, 8, mode=mode, **options)
    expected = PIL.Image.fromarray(_picture(8, 8)).convert(mode).convert("RGB")
    decoded = image_files.decode(str(path), 8, "stretch")
    np.testing.assert_array_equal(decoded, np.asarray(expected))


def _truncated(path):
    _save(path, 64, 64)
    path.write_bytes(path.read_bytes()[:-200])


def _blank(mode, *size, **options):
    return lambda path: PIL.Image.new(mode, size).save(path, **options)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_bytes(b""), "cannot identify"),
        (lambda path: path.write_text("<html>404</html>"), "cannot identify"),
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "Is a directory"),
        (_truncated, "truncated"),
        (_blank("I;16", 4, 4), "must have 8 bits a channel"),
        (_blank("1", 2**14, 2**13), "16384x8192 pixels, must be at most 67108864"),
        (_blank("1", 2**14, 2**14), "decompression bomb"),
        (_blank("RGB", 4, 4, format="EPS"), "cannot identify"),
    ],
)
def test_an_image_that_cannot_be_decoded_is_named(tmp_path, make, reason):
    path = tmp_path / "broken.png"
    make(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        with pytest.raises(ValueError, match=r"broken\.png': cannot be decoded") as error:
            image_files.decode(str(path), 8)
    assert reason in _one_line(error)


# List files


def test_a_list_gives_its_images_labels_and_counts_in_order(tree):
    files = _read(tree)
    assert len(files) == 5
    assert files.num_classes == 3
    np.testing.assert_array_equal(files.labels, [0, 0, 1, 1, 2])
    np.testing.assert_array_equal(files.counts, [2, 2, 1])
    assert files.nbytes == 5 * 8 * 8 * 3
    for index, name in enumerate(files.paths):
        example = files[index]
        assert example["label"] == files.labels[index]
        assert example["image"].dtype == np.uint8
        np.testing.assert_array_equal(
            example["image"], image_files.decode(str(tree / "images" / name), 8)
        )


def test_many_medium_and_few_classes_follow_the_published_thresholds(tmp_path):
    sizes = (101, 100, 20, 19)
    _save(tmp_path / "x.png")
    rows = []
    for label, size in enumerate(sizes):
        for i in range(size):
            (tmp_path / f"{label}_{i}.png").symlink_to("x.png")
            rows.append(f"{label}_{i}.png {label}")
    (tmp_path / "train.txt").write_text("\n".join(rows))
    groups = metrics.shot_groups(data.read_list(tmp_path / "train.txt", tmp_path).counts)
    assert {name: np.flatnonzero(members).tolist() for name, members in groups.items()} == {
        "many": [0],
        "medium": [1, 2],
        "few": [3],
    }


def test_windows_line_ends_blank_lines_tabs_and_spaces_in_names_are_read(tree):
    text = (tree / "train.txt").read_text().replace("\n", "\r\n")
    (tree / "train.txt").write_bytes(text.replace("1.jpg 0", "1.jpg\t0").encode() + b"\r\n \r\n")
    files = _read(tree)
    assert files.paths[2] == "train/b b/3.png"
    assert files.labels.tolist() == [0, 0, 1, 1, 2]


def test_a_subset_keeps_images_labels_and_lines_together(tree):
    files = _read(tree).subset([3, 0])
    assert files.paths == ("train/b b/4.jpg", "train/a/1.jpg")
    assert files.labels.tolist() == [1, 0]
    (tree / "images/train/a/1.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train\.txt, line 1: image .*1\.jpg': cannot be dec"):
        files[1]


def test_files_in_memory_and_read_as_asked_give_the_same_batches(tree):
    files = _read(tree)
    toy = data.in_memory(files)
    assert isinstance(toy, data.Dataset)
    kinds = {
        "batches": lambda source: data.batches(source, 3, 4),
        "balanced": lambda source: data.batches(source, 3, 4, class_balanced=True),
        "evaluation": lambda source: data.evaluation_batches(source, 4),
        "domains": lambda source: data.domain_batches([source, source.subset([0, 4])], 3, 2),
    }
    for name, kind in kinds.items():
        for step in (0, 1):
            assert_batches_equal(kind(files)[step], kind(toy)[step], name)
    streamed = data.grain_batches(files, 3, 4)[5]
    np.testing.assert_array_equal(streamed["image"], data.batches(toy, 3, 4)[5]["image"])


def test_files_beyond_the_limit_are_not_read_into_memory(tree):
    huge = _read(tree, image_size=30_000)  # 12.6 GiB
    with pytest.raises(ValueError, match=r"'train': 5 images of shape .* exceed 8 GiB") as error:
        data.in_memory(huge)
    _one_line(error)


@pytest.mark.parametrize(
    ("line", "row", "message"),
    [
        (2, "train/a/2.png", "line 2: must be `path label`"),
        (2, "7", "line 2: must be `path label`, got '7'"),
        (3, "train/b b/3.png x", "line 3: label must be a whole number, got 'x'"),
        (3, "train/b b/3.png 1.0", "line 3: label must be a whole number, got '1.0'"),
        (3, "train/b b/3.png -1", "line 3: label must be a whole number, got '-1'"),
        (3, "train/b b/3.png 3", "line 3: label '3' must be in 0..2"),
        (3, "train/b b/3.png ٣", "label must be a whole number, got '٣'"),
        (3, "train/b b/3.png 99999999999999", "must be in 0..2"),
        (4, "train/a/1.jpg 1", "line 4: image 'train/a/1.jpg' is in line 1 already"),
        (5, "val/5.png 1", "class 2 has no image (1 of 3 classes have none)"),
        (4, "train/b b/9.jpg 1", "line 4: image 'train/b b/9.jpg': no such file in"),
        (4, "train/c/4.jpg 1", "(1 of 5 files are missing)"),
        (4, "train/b b 1", "line 4: image 'train/b b': no such file"),
        (4, "train/a/1.jpg/x 1", "no such file"),
        (1, "../images/train/a/1.jpg 0", "line 1: image '../images/train/a/1.jpg': must be a p"),
        (1, "train/../train/a/1.jpg 0", "must be a path within"),
        (1, "/etc/passwd 0", "line 1: image '/etc/passwd': must be a path within"),
        (4, "./train//a/1.jpg 1", "line 4: image 'train/a/1.jpg' is in line 1 already"),
        (1, "..\\images\\1.jpg 0", "image '..\\\\images\\\\1.jpg': no such file"),
        (1, "train/a/\0.jpg 0", "must be a path within"),
    ],
)
def test_a_bad_line_is_named(tree, line, row, message):
    _rewrite(tree, line, row)
    with pytest.raises(ValueError, match=r"train\.txt") as error:
        _read(tree, num_classes=3, all_classes=True)
    assert message in _one_line(error)


@pytest.mark.parametrize(
    "written",
    [
        "./train/a/1.jpg",
        "train//a/./1.jpg",
        "train\\a\\1.jpg",
        ".\\train\\a\\1.jpg",
        "{root}/train/a/1.jpg",
    ],
)
def test_paths_are_read_however_programs_write_them(tree, written):
    _rewrite(tree, 1, written.format(root=tree / "images") + " 0")
    assert _read(tree).paths[0] == "train/a/1.jpg"


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("in_list", ["NFC", "NFD"])
def test_names_are_found_in_either_unicode_form(tree, on_disk, in_list):
    name = "Zoë/é.png"
    _save(tree / "images" / unicodedata.normalize(on_disk, name))
    _rewrite(tree, 1, unicodedata.normalize(in_list, name) + " 0")
    assert _read(tree).paths[0] == unicodedata.normalize(on_disk, name)


def test_a_byte_order_mark_and_old_line_ends_are_no_part_of_a_path(tree):
    text = (tree / "train.txt").read_text()
    for ends in ("\r\n", "\r"):
        (tree / "train.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", ends).encode())
        assert _read(tree).paths[0] == "train/a/1.jpg" and len(_read(tree)) == 5


def test_names_that_are_not_utf8_are_refused_at_the_start(tree):
    name = os.fsdecode(b"train/a/\xe9.png")
    try:
        _save(tree / "images" / name)
    except OSError:
        pytest.skip("this file system allows UTF-8 alone")
    with pytest.raises(ValueError, match=r"must have a name in UTF-8") as error:
        data.open_image_files("s", tree / "images", [name], [0], 1)
    assert _one_line(error).isascii()


def test_files_that_never_end_are_refused_by_their_size(tree, monkeypatch):
    monkeypatch.setattr(files.read_bytes, "__defaults__", (2**20,))
    with pytest.raises(ValueError, match=r"file '/dev/zero' must have at most 1048576 bytes"):
        data.read_list("/dev/zero", tree / "images")
    with pytest.raises(ValueError, match=r"path must be an index file"):
        data.load_indices("/dev/zero", [0, 1])
    with pytest.raises(ValueError, match=r"file '/dev/zero' must have at most 1048576 bytes"):
        models.pretrained.read("/dev/zero")


@pytest.mark.parametrize("label", [5, 2_000_000_000])
def test_a_label_beyond_the_number_of_images_leaves_a_class_without_one(tree, label):
    _rewrite(tree, 3, f"train/b b/3.png {label}")
    with pytest.raises(ValueError, match=r"train\.txt, line 3: label") as error:
        _read(tree, all_classes=True)
    assert f"'{label}' must be in 0..4, as every class must have one of the 5 images" in _one_line(
        error
    )


def test_a_label_that_no_table_of_counts_could_hold_is_refused(tree):
    _rewrite(tree, 3, "train/b b/3.png 2000000000")
    with pytest.raises(ValueError, match=r"line 3: label '2000000000' must be in 0\.\.16777215$"):
        _read(tree)


def test_all_missing_files_are_counted_before_any_is_read(tree):
    for name in ("a/2.png", "b b/4.jpg"):
        (tree / "images/train" / name).unlink()
    (tree / "images/train/a/1.jpg").write_bytes(b"not read")
    with pytest.raises(ValueError, match=r"line 2: .*2 of 5 files are missing") as error:
        _read(tree)
    _one_line(error)


@pytest.mark.parametrize("linked", ["train/a/1.jpg", "train/a"])
def test_a_link_out_of_the_root_is_refused(tree, linked):
    outside = tree / "outside"
    place = tree / "images" / linked
    place.rename(outside)
    place.symlink_to(outside)
    with pytest.raises(ValueError, match=r"line 1: .*leads through a link out of") as error:
        _read(tree)
    _one_line(error)


def test_links_within_the_root_and_a_linked_root_are_followed(tree):
    (tree / "images/train/a/2.png").unlink()
    (tree / "images/train/a/2.png").symlink_to("../../val/5.png")
    (tree / "images/train/b b").rename(tree / "images/moved")
    (tree / "images/train/b b").symlink_to("../moved")
    (tree / "link").symlink_to("images")
    files = data.read_list(tree / "train.txt", tree / "link", image_size=8)
    np.testing.assert_array_equal(files[1]["image"], files[4]["image"])
    assert files[2]["image"].shape == (8, 8, 3)


def test_a_dangling_link_is_a_missing_file(tree):
    (tree / "images/val/5.png").unlink()
    (tree / "images/val/5.png").symlink_to("nothing.png")
    with pytest.raises(ValueError, match=r"line 5: image 'val/5\.png': no such file"):
        _read(tree)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: data.read_list(t / "no.txt", t), r"list file '.*no\.txt': cannot be read"),
        (lambda t: data.read_list(t / "images/val/5.png", t), r"5\.png': must be text in UTF-8"),
        (lambda t: data.read_list(t / "empty.txt", t), r"empty\.txt: names no image"),
        (lambda t: data.read_list(t / "train.txt", t / "no"), "root must be a folder, got '.*no'"),
        (lambda t: _read(t, image_size=0), "image_size must be a whole number >= 1, got 0"),
        (lambda t: _read(t, fit="pad"), "fit must be one of crop, stretch, got 'pad'"),
        (lambda t: _read(t, num_classes=0), "num_classes must be a whole number >= 1, got 0"),
        (lambda t: _read(t).subset([5]), r"indices must be in 0\.\.4, got 5 at position 0"),
        (lambda t: data.open_image_files("x", t, ["a", "b"], [0], 1),
         "labels must be one for each of 2 paths, got 1"),
        (lambda t: data.open_published("CIFAR_LT", "train", t),
         "dataset must be one of ImageNet_LT, Places_LT, iNaturalist18, got 'CIFAR_LT'"),
        (lambda t: data.open_published("Places_LT", "dev", t),
         "split of Places_LT must be one of train, validation, test, got 'dev'"),
        (lambda t: data.open_published("Places_LT", "train", None),
         r"data_dir must be the folder that holds Places_LT_train\.txt, got None"),
        (lambda t: data.read_ahead(data.batches(_read(t), 0, 2), ahead=0),
         "ahead must be a whole number >= 1, got 0"),
    ],
)  # fmt: skip
def test_bad_arguments_get_one_line(tree, call, message):
    (tree / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match=message) as error:
        call(tree)
    _one_line(error)


def test_published_sets_are_found_by_the_names_of_their_lists(tree, monkeypatch):
    monkeypatch.setitem(
        list_files.PUBLISHED, "Places_LT", list_files.PUBLISHED["Places_LT"]._replace(num_classes=3)
    )
    (tree / "train.txt").rename(tree / "Places_LT_train.txt")
    (tree / "Places_LT_test.txt").write_text("val/5.png 2\n")  # a test list may lack classes
    train = data.open_published("Places_LT", "train", tree, image_root=tree / "images")
    test = data.open_published("Places_LT", "test", tree, image_root=tree / "images")
    assert (train.num_classes, len(train), train.image_shape) == (3, 5, (224, 224, 3))
    assert (test.num_classes, test.labels.tolist(), test.name) == (3, [2], "Places_LT")


# Reading ahead


class _Counting:
    """A source that notes which examples were read, and by which thread."""

    def __init__(self, size=6):
        self.read = []
        self.threads = set()
        self._size = size

    def __len__(self):
        return self._size

    def __getitem__(self, index):
        self.read.append(index)
        self.threads.add(threading.current_thread())
        return {"image": np.full((2, 2, 1), index, np.uint8), "label": index % 3}


def test_reading_ahead_changes_no_batch_in_any_order_of_asking():
    plain = data.batches(_Counting(), 1, 4)
    ahead = data.read_ahead(data.batches(_Counting(), 1, 4), ahead=2)
    assert ahead.steps_per_epoch == plain.steps_per_epoch
    for step in (0, 1, 2, 9, 10, 4, 4, 5, 0):
        for key, values in plain[step].items():
            np.testing.assert_array_equal(ahead[step][key], values)


def test_the_next_batches_are_read_by_other_threads_while_one_is_used():
    source = _Counting()
    ahead = data.read_ahead(data.batches(source, 1, 4), ahead=3)
    ahead[0]
    waiting = threading.Event()
    for _ in range(200):
        if len(source.read) >= 12:
            break
        waiting.wait(0.02)
    assert len(source.read) >= 12  # two batches more than were asked for
    assert threading.current_thread() not in source.threads


def test_evaluation_may_be_read_ahead_again_and_again():
    plain = data.evaluation_batches(_Counting(5), 2)
    ahead = data.read_ahead(data.evaluation_batches(_Counting(5), 2))
    assert len(ahead) == 3
    for _ in range(2):
        for number in range(3):
            np.testing.assert_array_equal(ahead[number]["mask"], plain[number]["mask"])
            np.testing.assert_array_equal(ahead[number]["image"], plain[number]["image"])
    with pytest.raises(IndexError, match="number must be below 3, got 3"):
        ahead[3]


def test_a_bad_image_stops_reading_ahead_with_its_own_message(tree):
    files = _read(tree)
    (tree / "images/val/5.png").write_bytes(b"GIF89a")
    ahead = data.read_ahead(data.batches(files, 0, 5))
    with pytest.raises(ValueError, match=r"train\.txt, line 5: image .*5\.png': cannot be deco"):
        ahead[0]


@pytest.mark.parametrize("side", [64, 67])  # an odd side is rounded up
def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(side, tmp_path, monkeypatch):
    ramp = np.linspace(0, 255, side, dtype=np.uint8)
    PIL.Image.fromarray(np.add.outer(ramp // 2, ramp // 2)).save(tmp_path / "a.jpg", quality=95)
    whole = image_files.decode(str(tmp_path / "a.jpg"), 8).astype(int)
    monkeypatch.setattr(image_files, "_MAX_PIXELS", 300)  # 1/4 of a side
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 300)
    reduced = image_files.decode(str(tmp_path / "a.jpg"), 8).astype(int)
    assert np.abs(reduced - whole).max() <= 4
    monkeypatch.setattr(image_files, "_MAX_JPEG_PIXELS", 4000)
    with pytest.raises(ValueError, match=f"{side}x{side} pixels, must be at most"):
        image_files.decode(str(tmp_path / "a.jpg"), 8)


def test_images_of_16_bits_among_others_are_named(tmp_path):
    for number, kind in enumerate((np.uint8, np.uint16)):
        PIL.Image.fromarray(np.zeros((8 + number, 9), kind)).save(tmp_path / f"{number}.png")
    (tmp_path / "all.txt").write_text("0.png 0\n1.png 1\n")
    files = data.read_list(tmp_path / "all.txt", tmp_path, image_size=4)
    with pytest.raises(ValueError, match=r"1 of 2 images are damaged: .*line 2: .*8 bits"):
        data.in_memory(files)


def test_damaged_images_are_counted_and_the_first_ten_named(tmp_path):
    for number in range(14):
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / f"{number:02d}.png")
        if number > 1:
            (tmp_path / f"{number:02d}.png").write_bytes(b"cut")
    names = sorted(path.name for path in tmp_path.iterdir())
    files = image_files.open_image_files("set", tmp_path, names, [0] * 14, 1, image_size=8)
    with pytest.raises(ValueError, match=r"set: 12 of 14 images are damaged: .*02\.png") as error:
        data.in_memory(files)
    assert "11.png" in str(error.value) and "12.png" not in str(error.value)
    assert list(files.damaged()) == list(range(2, 14))
