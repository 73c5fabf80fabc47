"""The file of a state: every byte of content is checked, nothing is written by halves or unpickled."""

from __future__ import annotations

import copy
import errno
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import tracemalloc
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from cases import message_of
from knapsack_rl import KnapsackAllocator
from knapsack_rl import state as statefile
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
    allocator.observe(["a", "a", 7], [1.0, 0.0, 1.0], [30, 40, 50])
    allocator.save(tmp_path / "state.npz")
    header, arrays = read_state(tmp_path / "state.npz")
    before = allocator.state_dict()
    for name, array, message in (
        ("tracker.successes", np.array([np.nan, 1.0]), "finite numbers >= 0"),
        ("tracker.failures", np.array([-1.0, 1.0]), "finite numbers >= 0"),
        ("tracker.rollouts", np.array([-1, 1]), "finite numbers >= 0"),
        ("tracker.success_length_sum", np.array([np.inf, 1.0]), "finite numbers >= 0"),
        ("tracker.last_visit", np.array([99, 1]), "99 after its 1 batches"),
        ("tracker.visits", np.array([0, 1]), "1 <= visits must hold, row 0"),
        ("tracker.visits", np.array([1, 2]), "visits <= rollouts must hold, row 1"),
        ("tracker.visits", np.array([2**62, 2**62]), "visits <= rollouts"),  # their sum overflows
        ("tracker.rollouts", np.array([2**62, 1]), "rollouts <= 1099511627776 must hold, row 0"),
        ("tracker.newest_total", np.array([3, 1]), "1 <= newest_total <= rollouts must hold, row 0"),
        ("tracker.newest_total", np.array([2, 9]), "1 <= newest_total <= rollouts must hold, row 1"),
        ("tracker.newest_successes", np.array([3, 1]), "newest_successes <= newest_total must hold, row 0"),
        ("tracker.newest_successes", np.array([2, 1]), "newest_successes <= successes must hold, row 0"),
        ("tracker.newest_successes", np.array([1, 0]), "newest failures <= failures must hold, row 1"),
        ("tracker.failures", np.array([1.5, 0.0]), r"successes \+ failures <= rollouts must hold, row 0"),
        ("tracker.recent", np.array([2, 2], np.uint64), "recent has a bit per rollout must hold, row 1"),
        ("tracker.success_length_sum", np.array([40.0, 1e9]), "lengths of the outcome 'success' are impossible"),
        ("tracker.failure_length_squares", np.array([1.0, 0.0]), "lengths of the outcome 'failure' are impossible"),
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


def refusal_and_peak(call, *arguments) -> tuple[str, int]:
    """Return the message of the ``ValueError`` of a call, and the most memory that it took, in bytes."""
    tracemalloc.start()
    try:
        return message_of(ValueError, call, *arguments), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["bayes-filter", "empirical-bayes", "window", "beta"])
def test_settings_of_a_crafted_header_cost_no_memory(name: str, tmp_path: Path) -> None:
    """34,641 points would take 9.6 GB, for tables that grow with their square."""
    allocator = KnapsackAllocator(name)
    allocator.observe(["a", "a", 7], [1.0, 0.0, 1.0])
    allocator.save(tmp_path / "state.npz")
    header, arrays = read_state(tmp_path / "state.npz")
    for setting in header["settings"]:
        for number in (10**9, 34_641, -1, 10**300, "many", None, [3]):
            if setting in ("prior_successes", "prior_failures", "minimum", "discount") and number in (10**9, 34_641):
                continue  # sizes of nothing
            write_state(tmp_path / "bad.npz", header | {"settings": {**header["settings"], setting: number}}, arrays)
            try:
                _, peak = refusal_and_peak(KnapsackAllocator.load, tmp_path / "bad.npz")
            except AssertionError:  # loaded: a number that costs nothing
                assert setting in ("minimum", "prior_successes", "prior_failures")
            else:
                assert peak < 5e6, (setting, number)
    for key, number in (("min_rollouts", 10**9), ("max_rollouts", 0), ("batches_at_refit", 10**400)):
        write_state(tmp_path / "bad.npz", header | {key: number, "max_rollouts": max(number, 1)}, arrays)
        message, peak = refusal_and_peak(KnapsackAllocator.load, tmp_path / "bad.npz")
        assert "must be" in message or "rollouts" in message
        assert peak < 5e6
    write_state(tmp_path / "large.npz", header | {"max_rollouts": 10**15}, arrays)
    found = KnapsackAllocator.load(tmp_path / "large.npz").allocate(["a", 7], 20)
    assert found.counts.sum() == 20 and not found.degraded


def test_a_symbolic_link_is_followed_and_kept(tmp_path: Path) -> None:
    folder, other = tmp_path / "here", tmp_path / "there"
    folder.mkdir()
    other.mkdir()
    link, target = folder / "latest.npz", other / "state.npz"
    link.symlink_to(Path("..") / "there" / "state.npz")  # relative, and nothing is there yet
    for number in range(2):
        write_state(link, {"number": number}, ARRAYS)
        assert link.is_symlink() and not target.is_symlink()
        assert read_state(target)[0] == read_state(link)[0] == {"number": number}
    assert {*folder.iterdir(), *other.iterdir()} == {link, target}


def test_a_file_keeps_its_mode_and_a_new_one_follows_the_umask(path: Path) -> None:
    for mode in (0o600, 0o640, 0o664):
        path.chmod(mode)
        write_state(path, HEAD, ARRAYS)
        assert stat.S_IMODE(path.stat().st_mode) == mode
    for mask in (0o077, 0o002):
        before = os.umask(mask)
        try:
            write_state(path.with_name(f"new-{mask}"), HEAD, ARRAYS)
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.with_name(f"new-{mask}").stat().st_mode) == 0o666 & ~mask


def test_something_other_than_a_file_is_left_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(FileExistsError, match="is not a file"):
            write_state(place, HEAD, ARRAYS)
    assert [each.name for each in tmp_path.iterdir()] == ["pipe"]


def test_leftovers_of_killed_saves_are_removed_and_others_stay(path: Path) -> None:
    """A process is killed in the middle of a save; another one is in the middle of its own and keeps its file."""
    code = (
        "import os, sys, time\nfrom knapsack_rl.state import atomic_file\n"
        "with atomic_file(sys.argv[1]) as file:\n"
        "    file.write(b'half'), file.flush(), print('writing', flush=True)\n"
        "    sys.stdin.readline()"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
    own = path.with_name(f".{path.name}.backup.tmp")
    own.write_text("mine")
    writers[0].kill()
    writers[0].communicate()
    assert len([*path.parent.glob(".*.tmp")]) == 3
    write_state(path, HEAD, ARRAYS)
    left = {*path.parent.glob(".*.tmp")}
    assert own in left and len(left) == 2
    writers[1].communicate("go on\n")
    assert writers[1].returncode == 0
    assert path.read_bytes() == b"half"
    assert {*path.parent.glob(".*.tmp")} == {own}


def test_without_locks_nothing_is_removed(path: Path, monkeypatch) -> None:
    """Windows has none, and some network file systems: another process may be writing."""
    stale = path.with_name(f".{path.name}.12-34.tmp")
    stale.write_text("half")
    for broken in (None, SimpleNamespace(flock=refuse, LOCK_EX=2, LOCK_NB=4)):
        monkeypatch.setattr("knapsack_rl.state.fcntl", broken)
        write_state(path, HEAD, ARRAYS)
        assert stale.exists()
    monkeypatch.undo()
    write_state(path, HEAD, ARRAYS)
    assert not stale.exists()


def refuse(*_: object) -> None:
    raise OSError(errno.ENOLCK, "no locks available")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_during_a_save_leaves_no_lock_held(tmp_path: Path, monkeypatch) -> None:
    """A thread saves while another forks: the child uses and saves its copy, and the parent's file is whole."""
    allocator = KnapsackAllocator()
    allocator.observe(["a", "a", 7], [1.0, 0.0, 1.0])
    writing, go_on = threading.Event(), threading.Event()

    def slow(*arguments: object, real=statefile._write_array) -> None:
        writing.set()
        go_on.wait(60)
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(statefile, "_write_array", slow)
    saving = threading.Thread(target=allocator.save, args=(tmp_path / "parent.npz",))
    saving.start()
    assert writing.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that waits for ever
        code = 1
        try:
            go_on.set()
            copied = copy.deepcopy(allocator)
            for each in (allocator, copied):
                each.allocate(["a", 7], 8)
                each.observe(["a"], [1.0])
            allocator.save(tmp_path / "child.npz")
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    go_on.set()
    saving.join()
    assert os.waitstatus_to_exitcode(status) == 0
    for name, visits in (("parent.npz", [1, 1]), ("child.npz", [2, 1])):
        assert KnapsackAllocator.load(tmp_path / name).tracker.records().visits.tolist() == visits
    assert {each.name for each in tmp_path.iterdir()} == {"parent.npz", "child.npz"}


READ_ONLY = """
import os, sys
written = []
def hook(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.append(arguments[0])
sys.addaudithook(hook)
import knapsack_rl as kr
allocator = kr.KnapsackAllocator()
allocator.observe(["a"] * 4 + ["b"] * 4, [1, 0, 0, 0, 1, 1, 1, 1], [9] * 8)
assert allocator.allocate(["a", "b"], 16).counts.sum() == 16
kr.group_advantages([0, 0], [0.0, 1.0]), kr.allocate([0.5, 0.1], 16)
assert not allocator.failures and not written, written
try:
    allocator.save("state.npz")
except OSError:
    allocator.save(sys.argv[1])
    assert kr.KnapsackAllocator.load(sys.argv[1]).allocate(["a", "b"], 16).counts.sum() == 16
else:
    raise AssertionError("the folder is writable")
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which not even root can write")
def test_a_read_only_environment_works(tmp_path: Path) -> None:
    """Neither home, caches, the working folder nor the folder of the package is writable; nothing tries to write."""
    places = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TMPDIR"), "/proc")
    environment = os.environ | places | {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", READ_ONLY, tmp_path / "state.npz"]
    subprocess.run(command, check=True, cwd="/proc", env=environment, timeout=120)
    assert [each.name for each in tmp_path.iterdir()] == ["state.npz"]
