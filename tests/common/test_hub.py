"""hub.py, cache.py, pictures.py: parquet files as the hub has them become one array that all ranks share."""

import json
import os
import sys

import numpy as np
import psutil
import pytest
import torch

from common import cache, hub
from common.pictures import KINDS, MOVED_BY, Pictures, moved
from tests.common import hub_files
from tests.common.helpers import end_group, environment, python, refusal, start


def load(name, folder, kept):
    said = []
    return hub.arrays(name, KINDS[name], str(folder), str(kept), said.append).arrays, said


def in_frames(pixels):
    return np.pad(pixels, ((0, 0), (0, 0), (MOVED_BY, MOVED_BY), (MOVED_BY, MOVED_BY)))


@pytest.mark.parametrize("name", KINDS)
def test_what_was_written_is_read(tmp_path, name):
    content = hub_files.write(tmp_path / "data", name)
    arrays, said = load(name, tmp_path / "data", tmp_path / "kept")
    assert sorted(arrays) == ["test_labels", "test_pixels", "train_labels", "train_pixels"]
    for split, (pixels, labels) in content.items():
        wanted = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
        if split == "train" and KINDS[name].moved:
            wanted = in_frames(wanted)
        assert arrays[f"{split}_pixels"].dtype == np.uint8 and (arrays[f"{split}_pixels"] == wanted).all()
        assert arrays[f"{split}_labels"].tolist() == labels
    assert len(said) == 2 and "Decoded 200 train pictures" in said[0]


def test_it_is_decoded_once_until_the_files_change(tmp_path):
    hub_files.write(tmp_path / "data", "mnist")
    assert len(load("mnist", tmp_path / "data", tmp_path / "kept")[1]) == 2
    again, said = load("mnist", tmp_path / "data", tmp_path / "kept")
    assert said == [] and len(again["train_pixels"]) == 200
    hub_files.write(tmp_path / "data", "mnist", train=120)
    again, said = load("mnist", tmp_path / "data", tmp_path / "kept")
    assert len(said) == 2 and len(again["train_pixels"]) == 120
    assert not [file for file in (tmp_path / "kept").rglob("*") if file.name.endswith(".part") or ".parquet-" in file.name]


AT_ONCE = """
import sys
from common import hub
from common.pictures import KINDS
said = []
arrays = hub.arrays("mnist", KINDS["mnist"], sys.argv[1], sys.argv[2], said.append).arrays
print(len(said), int(arrays["train_pixels"].sum()))
"""


@pytest.mark.launch
def test_of_several_processes_one_decodes(tmp_path):
    content = hub_files.write(tmp_path / "data", "mnist", train=2000)
    words = [sys.executable, "-c", AT_ONCE, str(tmp_path / "data"), str(tmp_path / "kept")]
    children = [start(words) for _ in range(4)]
    try:
        told = sorted(child.communicate(timeout=60)[0] for child in children)
    finally:
        for child in children:
            end_group(child)
    total = int(content["train"][0].sum())
    assert told == [f"0 {total}\n"] * 3 + [f"2 {total}\n"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "mnist/test-00000-of-00001.parquet").unlink(), "there is no test-*.parquet in it"),
        (lambda folder: (folder / "mnist/train-00000-of-00001.parquet").write_bytes(b"PAR1?"), "cannot be read as parquet"),
        (lambda folder: hub_files.write(folder, "mnist", picture="img"), "the train part has no column image"),
    ],
)
def test_files_that_are_something_else(tmp_path, change, said):
    hub_files.write(tmp_path / "data", "mnist")
    change(tmp_path / "data")
    assert said in refusal(load, "mnist", tmp_path / "data", tmp_path / "kept")
    assert not [file for file in (tmp_path / "kept").glob("mnist-*") if file.is_dir()]


def test_pictures_of_another_size(tmp_path):
    hub_files.write(tmp_path / "data", "cifar10")
    (tmp_path / "data" / "plain_text").rename(tmp_path / "data" / "mnist")
    columns = {"picture": "image"}
    hub_files.COLUMNS["wide"], hub_files.FOLDERS["wide"] = ("image", "label", (30, 28)), "mnist"
    hub_files.CLASSES["wide"] = hub_files.CLASSES["mnist"]
    hub_files.write(tmp_path / "data", "wide", **columns)
    assert "train picture 0 has 28×30 pixels and class" in refusal(load, "mnist", tmp_path / "data", tmp_path / "kept")


def test_a_picture_that_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_files, "png", lambda pixels: {"bytes": b"no picture", "path": None})
    hub_files.write(tmp_path / "data", "mnist")
    assert "train picture 0 cannot be read (" in refusal(load, "mnist", tmp_path / "data", tmp_path / "kept")


def test_a_folder_that_cannot_be_written(tmp_path):
    hub_files.write(tmp_path / "data", "mnist")
    (tmp_path / "file").write_text("")
    assert "--cache_dir" in refusal(load, "mnist", tmp_path / "data", tmp_path / "file" / "below")


FROM_THE_HUB = """
from common import hub
from common.errors import UsageError
from common.pictures import KINDS
try:
    hub.arrays("mnist", KINDS["mnist"], None, "kept", print)
except UsageError as error:
    print(error)
"""


def test_without_a_network_one_line_says_what_to_do(tmp_path):
    env = environment(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    status, out, err = python(FROM_THE_HUB, cwd=tmp_path, env=env)
    assert status == 0 and out.count("\n") == 2, (out, err)
    said = out.splitlines()[1]
    assert said.startswith("--job mnist: ylecun/mnist cannot be fetched (") and said.endswith("then here --data_dir DIR")


# ----------------------------------------------------------------------------------------------------------- batches


def some(name="cifar10", n=64, seed=0):
    pixels, labels = hub_files.pictures(name, n, 3)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    pixels = torch.from_numpy(pixels.copy() if seed is None else in_frames(pixels))
    return Pictures(KINDS[name], pixels, torch.tensor(labels, dtype=torch.uint8), seed, torch.float64)


def test_a_batch_is_normalised():
    data = some("mnist", seed=None)
    x, y = data.__getitems__(torch.tensor([3, 1]))
    wanted = (data.pixels[[3, 1]].double() / 255 - 0.1307) / 0.3081
    assert x.dtype == torch.float64 and torch.allclose(x, wanted, atol=1e-12) and y.tolist() == data.labels[[3, 1]].tolist()
    one, label = data[3]
    assert torch.equal(one, x[0]) and label == y[0]


def test_moved_pictures_are_cut_out_of_a_black_frame():
    random = np.random.default_rng(0)
    frames = in_frames(random.integers(1, 256, (20, 3, 32, 32), dtype=np.uint8))
    down, right = (torch.from_numpy(random.integers(0, 9, 20)) for _ in range(2))
    flipped = torch.from_numpy(random.integers(0, 2, 20).astype(bool))
    chosen = torch.from_numpy(random.permutation(20))
    begins = (torch.arange(20) * 3 * 40 * 40 + down * 40 + right)[chosen]
    for got, index in zip(moved(torch.from_numpy(frames), begins, flipped[chosen]), chosen.tolist(), strict=True):
        wanted = frames[index, :, down[index] : down[index] + 32, right[index] : right[index] + 32]
        assert (got.numpy() == (wanted[:, :, ::-1] if flipped[index] else wanted)).all()


def test_a_picture_moves_by_seed_epoch_and_index_alone():
    data, order = some(), torch.randperm(64)
    data.set_epoch(5)
    whole, _ = data.__getitems__(torch.arange(64))
    shuffled, _ = data.__getitems__(order)
    assert torch.equal(shuffled, whole[order])
    again = some()
    again.set_epoch(5)
    assert torch.equal(again.__getitems__(torch.tensor([7]))[0][0], whole[7])
    again.set_epoch(6)
    assert not torch.equal(again.__getitems__(torch.arange(64))[0], whole)
    other = some(seed=1)
    other.set_epoch(5)
    assert not torch.equal(other.__getitems__(torch.arange(64))[0], whole)
    still = some(seed=None)
    still.set_epoch(5)
    assert torch.equal(still.__getitems__(torch.arange(64))[0], some(seed=None).__getitems__(torch.arange(64))[0])


MAP = """
import sys
from pathlib import Path
from common import cache
arrays = cache.kept(Path(sys.argv[1]), None).arrays
print(sum(int(a.sum()) for a in arrays.values()), flush=True)
sys.stdin.read()
"""


@pytest.mark.only_on("linux")
def test_processes_share_one_copy_in_memory(tmp_path):
    size = 40 << 20
    made = tmp_path / "kept" / "ones"
    cache.kept(made, lambda part: cache.write(part, {"pixels": np.ones(size, np.uint8)}))
    children = [start([sys.executable, "-c", MAP, str(made)], stdin=-1) for _ in range(4)]
    try:
        assert [child.stdout.readline() for child in children] == [f"{size}\n"] * 4
        maps = [m for child in children for m in psutil.Process(child.pid).memory_maps() if m.path.endswith("pixels.npy")]
    finally:
        for child in children:
            end_group(child)
    assert len(maps) == 4 and all(m.rss >= size for m in maps)
    assert sum(m.pss for m in maps) < 1.1 * size


def test_an_unfinished_array_is_not_taken_for_one(tmp_path):
    def fails(part):
        cache.write(part, {"a": np.zeros(3, np.uint8)})
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        cache.kept(tmp_path / "kept" / "x", fails)
    assert [file.name for file in (tmp_path / "kept").iterdir()] in ([], ["x.lock"])
    kept = cache.kept(tmp_path / "kept" / "x", lambda part: cache.write(part, {"a": np.arange(3, dtype=np.uint8)}))
    assert kept.arrays["a"].tolist() == [0, 1, 2]


def test_the_kept_arrays_name_tells_of_their_files(tmp_path):
    file = tmp_path / "a"
    file.write_text("one")
    first = cache.key("text", [file])
    assert cache.key("text", [file]) == first and cache.key("mnist", [file]) != first
    os.utime(file, (1, 1))
    assert cache.key("text", [file]) != first
    assert json.dumps(first)
