"""The file of a state: every byte of content is checked, nothing is written by halves or unpickled."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from cases import message_of
from knapsack_rl import KnapsackAllocator
from knapsack_rl.state import HEADER, atomic_file, read_state, write_state

HEAD = {"format": "test", "numbers": [1, 2.5, None]}
ARRAYS = {
    "counts": np.arange(5, dtype=np.int64),
    "evidence": np.linspace(0, 1, 12, dtype=np.float32).reshape(4, 3),
    "nothing": np.zeros((0, 7)),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_state(tmp_path / "state.npz", HEAD, ARRAYS)
    return tmp_path / "state.npz"


def assert_same(found, header=HEAD, arrays=ARRAYS) -> None:
    assert found[0] == header
    assert found[1].keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[1][name].dtype == array.dtype
        assert found[1][name].shape == array.shape
        assert found[1][name].tobytes() == array.tobytes()


plain = st.sampled_from([np.float64, np.float32, np.int64, np.uint64, np.uint8, np.bool_])
shapes = arrays_of.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
names = st.text("abc._-é", min_size=1, max_size=8).filter(lambda name: name != HEADER)


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(
    arrays=st.dictionaries(names, plain.flatmap(lambda kind: arrays_of.arrays(kind, shapes)), max_size=4),
    header=st.dictionaries(st.text(max_size=5).filter(lambda key: key != "checksum"), st.integers() | st.text()),
)
def test_a_written_state_is_read_back(arrays, header, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("state") / "state.npz"
    write_state(path, header, arrays)
    assert_same(read_state(path), header, arrays)
    with np.load(path, allow_pickle=False) as archive:  # anyone with numpy can look inside
        assert {*archive.files} == {*arrays, HEADER}
    content = path.read_bytes()
    write_state(path, header, arrays)
    assert path.read_bytes() == content


def test_arrays_in_other_memory_orders(tmp_path: Path) -> None:
    square = np.arange(12.0).reshape(3, 4)
    for array in (np.asfortranarray(square), square[::-1, ::2], square.T, square.astype(">f8")):
        write_state(tmp_path / "state.npz", {}, {"a": array})
        np.testing.assert_array_equal(read_state(tmp_path / "state.npz")[1]["a"], array)


def test_every_flipped_byte_is_refused_or_holds_no_content(path: Path) -> None:
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        inside = set()
        for member in archive.infolist():
            start = member.header_offset + 30 + len(member.filename) + 20  # with the sizes of zip64
            assert whole[start : start + 6] == b"\x93NUMPY"
            inside |= set(range(start, start + member.file_size))
    harmless = []
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            found = read_state(path)
        except ValueError as error:
            assert "not a readable allocator state" in str(error)
        else:
            assert_same(found)
            harmless.append(position)
        assert path.read_bytes() == damaged
    assert not inside & {*harmless}
    assert len(harmless) < len(whole) / 4  # dates, permissions and the like


def test_every_truncation_and_extension_is_refused_or_holds_no_content(path: Path) -> None:
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a readable allocator state"):
            read_state(path)
    path.write_bytes(whole + b"junk")
    assert_same(read_state(path))


def rewritten(path: Path, change) -> None:
    """Write the archive anew with other members; every single one is whole."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members = change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "change",
    [
        lambda members: {name: content for name, content in members.items() if name != "counts.npy"},
        lambda members: members | {"more.npy": members["counts.npy"]},
        lambda members: members | {"counts.npy": npy(np.arange(5, dtype=np.int64)[::-1].copy())},
        lambda members: members | {"counts.npy": members["nothing.npy"], "nothing.npy": members["counts.npy"]},
        lambda members: members | {"header.npy": npy(np.frombuffer(b"[1]", np.uint8))},
        lambda members: members | {"header.npy": npy(np.frombuffer(b"[" * 100_000, np.uint8))},
        lambda members: members | {"counts.npy": npy(np.array([{}], dtype=object))},
        lambda members: members | {"counts.npy": members["counts.npy"] + b"more"},
        lambda members: members | {"counts.npy": b"\x93NUMPY\x09\x00"},
    ],
)
def test_whole_members_that_do_not_belong_together_are_refused(change, path: Path) -> None:
    rewritten(path, change)
    with pytest.raises(ValueError, match="not a readable allocator state"):
        read_state(path)


def test_a_missing_checksum_is_refused(path: Path) -> None:
    header = npy(np.frombuffer(json.dumps(HEAD).encode(), np.uint8))
    rewritten(path, lambda members: members | {"header.npy": header})
    with pytest.raises(ValueError, match="its checksum is missing"):
        read_state(path)


def test_a_compression_bomb_is_refused_unopened(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header.npy", npy(np.zeros(10**7, np.uint8)))
    assert path.stat().st_size < 10**5
    with pytest.raises(ValueError, match="compressed"):
        read_state(path)


def test_two_members_of_one_name_are_refused(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("counts.npy", npy(np.zeros(5, np.int64)))
    with pytest.raises(ValueError, match="same name"):
        read_state(path)


def test_a_reserved_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an array is named 'header'"):
        write_state(tmp_path / "state.npz", {}, {HEADER: np.zeros(1)})
    assert not list(tmp_path.iterdir())


def test_file_and_folder_are_synced_in_order(tmp_path: Path, monkeypatch) -> None:
    done = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        done.append("folder" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "file")
        real_fsync(descriptor)

    def rename(self, target) -> Path:
        done.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    with atomic_file(tmp_path / "file") as file:
        file.write(b"content")
    assert done == ["file", "rename", "folder"]
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_whole_file_of_impossible_numbers_changes_nothing(tmp_path: Path) -> None:
    allocator = KnapsackAllocator()
    allocator.observe(["a", "a", 7], [1.0, 0.0, 1.0])
    allocator.save(tmp_path / "state.npz")
    header, arrays = read_state(tmp_path / "state.npz")
    before = allocator.state_dict()
    for name, array, message in (
        ("tracker.successes", np.array([np.nan, 1.0]), "finite numbers >= 0"),
        ("tracker.failures", np.array([-1.0, 1.0]), "finite numbers >= 0"),
        ("tracker.rollouts", np.array([-1, 1]), "finite numbers >= 0"),
        ("tracker.success_length_sum", np.array([np.inf, 1.0]), "finite numbers >= 0"),
        ("tracker.last_visit", np.array([99, 1]), "99 after its 1 batches"),
        ("tracker.evidence", np.full((2, 57), np.nan, np.float32), "evidence .*finite"),
        ("tracker.prompt_ids", np.frombuffer(b"\xff\xfe", np.uint8), "prompt ids"),
        ("tracker.prompt_ids", np.frombuffer(b"[" * 100_000, np.uint8), "prompt ids"),
        ("estimator.prior", np.full(57, np.nan), "prior"),
    ):
        changed = arrays | {name: array}
        write_state(tmp_path / "bad.npz", header, changed)
        for found in (
            message_of(ValueError, KnapsackAllocator.load, tmp_path / "bad.npz"),
            message_of(ValueError, allocator.load_state_dict, {"header": header, "arrays": changed}),
        ):
            assert re.search(message, found), (name, found)
        after = allocator.state_dict()
        assert json.dumps(after["header"]) == json.dumps(before["header"]), name
        for key, column in before["arrays"].items():
            assert column.tobytes() == after["arrays"][key].tobytes(), (name, key)


def test_size_is_linear_in_prompts(tmp_path: Path) -> None:
    sizes = []
    for prompts in (1000, 2000, 3000):
        allocator = KnapsackAllocator()
        ids = [f"prompt-{k:05d}" for k in range(prompts)]
        allocator.observe(ids, np.arange(prompts) % 2)
        allocator.save(tmp_path / "state.npz")
        sizes.append((tmp_path / "state.npz").stat().st_size)
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], abs=64)  # digits of the counters
    assert (sizes[2] - sizes[1]) / 1000 < 400  # bytes per prompt: 57 x 4 of evidence, 13 x 8 of counts, the id
