"""Promise 1: kills, full disks, damaged files and other processes don't change the bytes of the shards."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from itertools import pairwise

import conftest
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ENCODING, ROOT, children, ended, execute, fill, lives, on_ranks, refused, run, wait_until
from processes import OWN_START

from core.data.encode import Documents
from core.data.prepare import ShardWriter
from core.files import FileLocks

KILLS = int(os.environ.get("SOAK_KILLS", "4"))
DOCUMENTS = 90 * max(KILLS, 4)  # in each file of `large`: a run must last longer than the kills
SHARD_TOKENS = 2000
WORDS = ("Ana", "took", "the", "na\u00efve", "\u65e5\u672c\u8a9e", "\U0001f642\U0001f643", "don't", "\r\n", "1907")
SETTINGS = ("--encoding", "data/stories", "--shard-tokens", SHARD_TOKENS, "--val-tokens", 5000)
FAKE = """
import numpy as np
from core.data import tokenizer

class Panic(BaseException):
    pass

class Tokenizer:
    def __init__(self, encoding):
        self.encoding = encoding

    @classmethod
    def from_json_str(cls, _):
        return cls(tokenizer.load("data/stories"))

    def encode_batch_flat(self, texts, split_special_tokens):
        encoded = [self.encoding.encode_ordinary(text) for text in texts]
        for text, ids in zip(texts, encoded):
            if "lantern" in text:
                {fault}
        return np.array(sum(encoded, []), "<u4").tobytes(), np.cumsum([0, *map(len, encoded)]).astype("<u8").tobytes()
"""
FAULTS = {
    "another id": "ids[0] ^= 1",
    "an error": "raise RuntimeError('no such token')",
    "a panic": "raise Panic('index out of bounds')",
}
KILL = """
import os, runpy, signal, sys
import core.data.prepare

write_json = core.data.prepare.write_json

def kill(path, *args, **kwargs):
    if "{moment}" == "clear" or path.name == "manifest.json":
        os.kill(os.getpid(), signal.SIGKILL)
    write_json(path, *args)

core.data.prepare.{moment} = kill
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
LATE = """
import os, runpy, subprocess, sys
import core.data.prepare

method = getattr(core.data.prepare.Preparation, "{moment}")

def late(*args, **kwargs):
    if not os.environ.get("INNER"):
        subprocess.run([sys.executable, *sys.argv], env=os.environ | {"INNER": "1"}, check=True)
    return method(*args, **kwargs)

core.data.prepare.Preparation.{moment} = late
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
NO_LOCKS = """
import errno, fcntl, os, runpy, sys

def lockf(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

fcntl.lockf = lockf
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
LAUNCH = """
import multiprocessing, runpy, sys
multiprocessing.set_start_method(sys.argv[1])
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def documents(seed, count, words=120):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, words))) for _ in range(count)]


def write_parquet(path, texts, rows=20):
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = pa.array([text if isinstance(text, bytes) else text.encode() for text in texts], pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())})
    pq.write_table(table, path, row_group_size=rows)


def write_jsonl(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def command(source, out, workers=1, *settings):
    return ("--source", source, "--out", out, "--workers", workers, *(settings or SETTINGS))


def prepare(world, source, out, *settings, workers=1, check=True, **env):
    return run("fineweb.py", *command(source, out, workers, *settings), cwd=world, check=check, **env)


def started(world, source, out, *settings, workers=1, **env):
    """A run in its own process group, which is killed at the end if it still runs."""
    return conftest.started("fineweb.py", *command(source, out, workers, *settings), cwd=world, **env)


def recorded_shards(out):
    """Each train shard that has a record, with its modification time."""
    names = [path.stem for path in (out / "unfinished").glob("train_*.json")]
    return {out / f"{name}.npy": (out / f"{name}.npy").stat().st_mtime_ns for name in names}


def count_shards(out):
    """The number of train shards."""
    return len(list(out.glob("train_*.npy")))


def interrupt(world, source, out, *settings, shards=5, **env):
    """Kill a run after a few shards. Returns those that it recorded."""
    with started(world, source, out, *settings, **env) as process:
        assert wait_until(lambda: count_shards(out) > shards, process)
        os.killpg(process.pid, signal.SIGKILL)
    assert not (out / "manifest.json").exists()
    return recorded_shards(out)


def is_finished(out):
    return (out / "manifest.json").exists()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def same(folder, other):
    """Whether two folders have the same files with the same bytes; the assertion lists those that differ."""
    first, second = contents(folder), contents(other)
    assert sorted(first) == sorted(second)
    assert [name for name in first if first[name] != second[name]] == []
    return True


def texts_in(out):
    """The documents of all shards, in order."""
    shards = json.loads((out / "manifest.json").read_text())["shards"]
    ids = np.concatenate([np.load(out / shard["file"]) for shard in shards])
    ends = np.flatnonzero(ids == ENCODING.eot_token)
    return [ENCODING.decode(part[1:].tolist()) for part in np.split(ids, ends)[1:]]


@pytest.fixture(scope="module")
def large(world):
    """Three parquet files for about a hundred shards, more for many kills, and the output of an uninterrupted run."""
    folder = world / "preparation/large"
    for number in range(3):
        write_parquet(folder / f"part_{number}.parquet", documents(number, DOCUMENTS))
    prepare(world, folder / "*.parquet", folder / "out")
    return folder / "*.parquet", folder / "out"


@pytest.fixture(scope="module")
def small(world):
    """Three jsonl files for a few shards each, and the output of an uninterrupted run."""
    folder = world / "preparation/small"
    for number in range(3):
        write_jsonl(folder / f"part_{number}.jsonl", documents(number, 60))
    prepare(world, folder / "*.jsonl", folder / "out")
    return folder / "*.jsonl", folder / "out"


def array_task(task, count, low=0):
    names = {"ID": task, "MIN": low, "MAX": low + count - 1, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()}


@pytest.mark.parametrize("victim", ["all its processes", "the main process"])
def test_a_run_killed_again_and_again_writes_the_same_bytes(world, large, tmp_path, victim):
    (source, uninterrupted), out, rng = large, tmp_path / "out", random.Random(victim)
    step = 2 * len(list(uninterrupted.glob("*.npy"))) // (KILLS + 2)
    effective_kills, kept = 0, 0
    for kill in range(KILLS):
        before = recorded_shards(out)
        with started(world, source, out, workers=(1, 2, 5)[kill % 3]) as process:
            if kill % 3 == 2:
                time.sleep(rng.uniform(0.1, 0.45))
            else:
                wanted = count_shards(out) + rng.randint(1, step)
                wait_until(lambda wanted=wanted: count_shards(out) >= wanted, process)
                time.sleep(rng.uniform(0, 0.02))
            if process.poll() is not None:
                break
            workers = children(process.pid)
            if victim == "the main process":
                process.kill()
                wait_until(lambda workers=workers: not any(map(lives, workers)), seconds=5)
            else:
                os.killpg(process.pid, signal.SIGKILL)
        effective_kills += bool(workers)
        kept += len(before)
        assert is_finished(out) or before.items() <= recorded_shards(out).items()
    assert effective_kills >= KILLS // 2
    assert kept > 0
    prepare(world, source, out)
    assert same(out, uninterrupted)
    assert texts_in(out) == [text for number in range(3) for text in documents(number, DOCUMENTS)]


@pytest.mark.parametrize("moment", ["write_json", "clear"])
def test_a_run_killed_just_before_or_after_the_manifest_resumes(world, small, tmp_path, moment):
    source, uninterrupted = small
    arguments = ["-c", KILL.replace("{moment}", moment), ROOT / "fineweb.py", *command(source, tmp_path, 2)]
    assert execute([sys.executable, *map(str, arguments)], world, False, {}).returncode == -signal.SIGKILL
    assert is_finished(tmp_path) == (moment == "clear")
    assert list((tmp_path / "unfinished").glob("train_*.json"))
    log = prepare(world, source, tmp_path).stdout
    assert ("already finished" in log) == (moment == "clear")
    assert same(tmp_path, uninterrupted)


def test_incomplete_files_of_a_killed_process_are_removed(world, small, tmp_path):
    source, uninterrupted = small
    for name in (".manifest.json.4194304", ".tokenizer.json.4194304", ".train_000001.npy.0.unfinished"):
        (tmp_path / name).write_text("hal")
    prepare(world, source, tmp_path)
    assert same(tmp_path, uninterrupted)


def test_a_killed_worker_ends_the_run_and_the_same_command_resumes(world, large, tmp_path):
    source, uninterrupted = large
    with started(world, source, tmp_path, workers=2) as process:
        assert wait_until(lambda: count_shards(tmp_path) > 3, process)
        os.kill(children(process.pid)[0], signal.SIGKILL)
        message = refused(ended(process))
    assert "worker" in message
    before = recorded_shards(tmp_path)
    assert before
    prepare(world, source, tmp_path)
    assert same(tmp_path, uninterrupted)


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_writes_the_same_bytes(world, small, tmp_path, ranks):
    source, uninterrupted = small
    on_ranks(ranks, "fineweb.py", *command(source, tmp_path), cwd=world)
    assert same(tmp_path, uninterrupted)


def test_array_tasks_can_run_in_any_order_and_outnumber_the_files(world, small, tmp_path):
    source, uninterrupted = small
    for task in (4, 1, 3, 0, 2):
        prepare(world, source, tmp_path, **array_task(task, 5))
    assert same(tmp_path, uninterrupted)


def test_two_array_tasks_can_run_at_the_same_time(world, large, tmp_path):
    source, uninterrupted = large
    with (
        started(world, source, tmp_path, **array_task(1, 2)) as one,
        started(world, source, tmp_path, **array_task(0, 2)) as other,
    ):
        assert (one.wait(60), other.wait(60)) == (0, 0)
    assert same(tmp_path, uninterrupted)


def test_another_number_of_ranks_resumes_a_killed_run(world, large, tmp_path):
    source, uninterrupted = large
    before = interrupt(world, source, tmp_path, **array_task(1, 3))
    middle = len(list(uninterrupted.glob("train_*.npy"))) // 3
    assert min(before).stem > f"train_{middle:06}"
    for task in (1, 0):
        prepare(world, source, tmp_path, **array_task(task, 2))
    assert same(tmp_path, uninterrupted)


@pytest.mark.parametrize(("low", "count"), [(1, 3), (4, 1)])
def test_an_array_that_does_not_start_at_0_is_refused(world, small, tmp_path, low, count):
    message = refused(prepare(world, small[0], tmp_path, check=False, **array_task(low, count, low)))
    assert f"0-{count - 1}" in message


def test_an_array_with_gaps_is_refused(world, small, tmp_path):
    env = array_task(4, 3) | {"SLURM_ARRAY_TASK_MAX": "4"}
    assert "0-2" in refused(prepare(world, small[0], tmp_path, check=False, **env))


@pytest.mark.parametrize("option", [("--max-tokens", 9000), ("--overwrite",)])
def test_options_for_one_process_are_refused_with_several(world, small, tmp_path, option):
    env = {"RANK": "0", "WORLD_SIZE": "2"}
    message = refused(prepare(world, small[0], tmp_path, *SETTINGS, *option, check=False, **env))
    assert option[0] in message
    assert not list(tmp_path.iterdir())


def test_a_second_process_with_the_same_command_shares_the_work(world, large, tmp_path):
    source, uninterrupted = large
    with started(world, source, tmp_path) as first:
        assert wait_until(lambda: count_shards(tmp_path) > 3, first)
        first.send_signal(signal.SIGSTOP)
        log = prepare(world, source, tmp_path).stdout
        assert re.search(r"Other processes write \d+ of \d+ shards, e.g. train_.*rerun the same command", log)
        assert not is_finished(tmp_path)
        first.send_signal(signal.SIGCONT)
        assert ended(first).returncode == 0
    assert same(tmp_path, uninterrupted)


def test_a_process_waits_while_another_writes_validation(world, large, tmp_path):
    source, uninterrupted = large
    (tmp_path / ".lock").touch()
    locks = FileLocks(tmp_path)
    held = contextlib.ExitStack()
    held.enter_context(locks.exclusive())
    with started(world, source, tmp_path, **OWN_START) as process:
        assert process.stdout.readline() == f"waiting for another process that prepares {tmp_path}\n"
        held.close()
        assert ended(process).returncode == 0
    assert same(tmp_path, uninterrupted)


@pytest.mark.parametrize("option", [("--overwrite",), ("--max-tokens", 9000)])
def test_options_for_one_process_are_refused_while_another_runs(world, large, tmp_path, option):
    source, uninterrupted = large
    with started(world, source, tmp_path) as first:
        assert wait_until(lambda: count_shards(tmp_path) > 0, first)
        first.send_signal(signal.SIGSTOP)
        message = refused(prepare(world, source, tmp_path, *SETTINGS, *option, check=False))
        first.send_signal(signal.SIGCONT)
        assert ended(first).returncode == 0
    assert f"another process is writing {tmp_path}" in message
    assert same(tmp_path, uninterrupted)


@pytest.mark.parametrize("moment", ["__init__", "plan"])
def test_a_process_that_comes_after_another_has_finished_changes_nothing(world, small, tmp_path, moment):
    """The other one finishes after this one has read the settings, or has seen the validation shard."""
    source, uninterrupted = small
    script = LATE.replace("{moment}", moment)
    execute(
        [sys.executable, "-c", script, str(ROOT / "fineweb.py"), *map(str, command(source, tmp_path))], world, True, {}
    )
    assert same(tmp_path, uninterrupted)


def test_without_file_locks_each_process_writes_its_own_share(world, small, tmp_path):
    source, uninterrupted = small
    total = len(list(uninterrupted.glob("train_*.npy")))
    for task in (1, 0):
        arguments = ["-c", NO_LOCKS, ROOT / "fineweb.py", *command(source, tmp_path)]
        result = execute([sys.executable, *map(str, arguments)], world, True, array_task(task, 2))
        assert result.stdout.count("has no locks (No locks available)") == 1
        assert count_shards(tmp_path) == (total if task == 0 else total // 2)
    assert same(tmp_path, uninterrupted)


def test_a_refused_overwrite_changes_nothing(world, large, tmp_path):
    source, _ = large
    with started(world, source, tmp_path) as first:
        assert wait_until((tmp_path / "unfinished/settings.json").exists, first)
        first.send_signal(signal.SIGSTOP)
        settings = (tmp_path / "unfinished/settings.json").read_text()
        other = (*SETTINGS, "--shard-tokens", 3000, "--overwrite")
        refused(prepare(world, source, tmp_path, *other, check=False))
        assert (tmp_path / "unfinished/settings.json").read_text() == settings


def test_changed_settings_are_refused_with_both_values(world, large, tmp_path):
    source, _ = large
    other = (*SETTINGS[:2], "--shard-tokens", 3000, *SETTINGS[4:])
    before = interrupt(world, source, tmp_path)
    message = refused(prepare(world, source, tmp_path, *other, check=False))
    assert f"shard_tokens {SHARD_TOKENS}, but this command has 3000" in message
    assert recorded_shards(tmp_path) == before
    prepare(world, source, tmp_path, *other, "--overwrite")
    prepare(world, source, tmp_path / "new", *other)
    (tmp_path / "new").rename(tmp_path.with_name("new"))
    assert same(tmp_path, tmp_path.with_name("new"))


def test_overwrite_with_another_encoding_replaces_the_tokenizer(world, small, tmp_path):
    source, _ = small
    prepare(world, source, tmp_path / "out")
    prepare(world, source, tmp_path / "out", *SETTINGS, "--encoding", "gpt2", "--overwrite")
    prepare(world, source, tmp_path / "new", *SETTINGS, "--encoding", "gpt2")
    assert same(tmp_path / "out", tmp_path / "new")


def test_shards_of_a_source_that_has_changed_are_written_again(world, tmp_path):
    source, out = tmp_path / "*.parquet", tmp_path / "out"
    texts = documents(1, 360)
    write_parquet(tmp_path / "part.parquet", texts)
    interrupt(world, source, out)
    write_parquet(tmp_path / "part.parquet", ["Ana left", *texts[4:]])
    log = prepare(world, source, out).stdout
    assert "val_000000.npy is written again: its source files have changed" in log
    assert "train_000001.npy is written again: its source files have changed" in log
    prepare(world, source, tmp_path / "new")
    assert same(out, tmp_path / "new")


def test_a_source_that_has_lost_its_text_deletes_no_shard(world, tmp_path):
    source, out = tmp_path / "*.parquet", tmp_path / "out"
    texts = documents(1, 360)
    write_parquet(tmp_path / "part.parquet", texts)
    before = interrupt(world, source, out)
    write_parquet(tmp_path / "part.parquet", [""])
    assert "contains no document with text" in refused(prepare(world, source, out, check=False))
    assert before and recorded_shards(out) == before
    write_parquet(tmp_path / "part.parquet", texts)
    prepare(world, source, out)
    prepare(world, source, tmp_path / "new")
    assert same(out, tmp_path / "new")


def break_jsonl(line):
    def write(path):
        lines = path.read_bytes().splitlines(keepends=True)
        place = sum(map(len, lines[:30]))
        padding = b" " * (len(lines[30]) - len(line) - 1)  # of the same size, so that the plan stays
        path.write_bytes(b"".join([*lines[:30], line + padding + b"\n", *lines[31:]]))
        return f"byte {place}"

    return write


def break_text(path):
    texts = pq.read_table(path)["text"].to_pylist()
    write_parquet(path, [*texts[:30], b"caf\xe9 " * 9, *texts[31:]])
    return "row 30"


def break_page(path):
    place = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    with open(path, "r+b") as file:
        file.seek(place + 100)
        flipped = bytes(byte ^ 0xFF for byte in file.read(200))
        file.seek(place + 100)
        file.write(flipped)
    return "is damaged"


DAMAGE = {
    "not UTF-8.jsonl": break_jsonl(b'{"text": "caf\xe9"}'),
    "cut.jsonl": break_jsonl(b'{"text": "caf'),
    "not UTF-8.parquet": break_text,
    "flipped.parquet": break_page,
}


@pytest.fixture(params=DAMAGE)
def damaged(request, tmp_path):
    """A source of three files, the second damaged in its 31st document; that file, its intact bytes, and the place."""
    folder, kind = tmp_path / "source", request.param.rsplit(".", 1)[-1]
    for number in range(3):
        (write_parquet if kind == "parquet" else write_jsonl)(folder / f"part_{number}.{kind}", documents(number, 60))
    path = folder / f"part_1.{kind}"
    intact = path.read_bytes()
    return folder / f"*.{kind}", path, intact, DAMAGE[request.param](path)


def test_a_damaged_file_is_named_and_after_repair_only_its_shards_are_rewritten(world, damaged, tmp_path):
    source, path, intact, place = damaged
    message = refused(prepare(world, source, tmp_path / "out", check=False))
    assert str(path) in message
    assert place in message
    before = recorded_shards(tmp_path / "out")
    assert before
    size = path.stat().st_size
    path.write_bytes(intact)
    prepare(world, source, tmp_path / "out")
    prepare(world, source, tmp_path / "new")
    assert same(tmp_path / "out", tmp_path / "new")
    shards = json.loads((tmp_path / "out/manifest.json").read_text())["shards"]
    of_others = [shard["file"] for shard, following in pairwise(shards) if following["source_file"] == 0][1:]
    assert of_others
    if size == len(intact):
        assert all(
            (tmp_path / "out" / name).stat().st_mtime_ns == before[tmp_path / "out" / name] for name in of_others
        )


@pytest.mark.parametrize("damaged", [name for name in DAMAGE if name != "flipped.parquet"], indirect=True)
def test_skip_broken_skips_and_lists_invalid_documents(world, damaged, tmp_path):
    source, path, _, place = damaged
    prepare(world, source, tmp_path / "out", *SETTINGS, "--skip-broken")
    files = [documents(number, 60) for number in range(3)]
    del files[1][30]
    assert texts_in(tmp_path / "out") == [text for texts in files for text in texts]
    (invalid,) = json.loads((tmp_path / "out/manifest.json").read_text())["broken_documents"]
    assert invalid.startswith(f"{path.name}, ")
    assert place in invalid


def test_a_repaired_source_has_the_validation_share_of_a_new_run(world, tmp_path):
    source, path = tmp_path / "*.jsonl", tmp_path / "part_1.jsonl"
    write_jsonl(tmp_path / "part_0.jsonl", documents(0, 60))
    path.write_text("{invalid")
    settings = SETTINGS[:4]
    refused(prepare(world, source, tmp_path / "out", *settings, check=False))
    write_jsonl(path, documents(1, 300))
    prepare(world, source, tmp_path / "out", *settings)
    prepare(world, source, tmp_path / "new", *settings)
    assert same(tmp_path / "out", tmp_path / "new")


def test_both_encoders_write_the_same_bytes_for_any_text(world, tmp_path):
    pytest.importorskip("fastokens")
    repeated = [character * 100_000 for character in ("a", " ")]
    special = ["<|endoftext|>", "Ben said <|endoftext|> and left<|endoftext|>", "<|endoftext|>" * 1000]
    texts = [*documents(1, 30), *repeated, *special, *documents(2, 30)]
    write_parquet(tmp_path / "part.parquet", texts)
    for encoder in ("tiktoken", "fastokens"):
        prepare(world, tmp_path / "part.parquet", tmp_path / encoder, *SETTINGS, "--encoder", encoder)
    assert same(tmp_path / "fastokens", tmp_path / "tiktoken")
    assert texts_in(tmp_path / "fastokens") == texts


def test_a_full_disk_loses_no_complete_shard(world, large, disk):
    source, uninterrupted = large
    with started(world, source, disk / "out") as process:
        assert wait_until(lambda: count_shards(disk / "out") > 5, process)
        process.send_signal(signal.SIGSTOP)
        fill(disk / "ballast")
        os.truncate(disk / "ballast", (disk / "ballast").stat().st_size - 6144)
        before = recorded_shards(disk / "out")
        process.send_signal(signal.SIGCONT)
        message = refused(ended(process))
    assert "No space left on device" in message
    after = recorded_shards(disk / "out")
    assert before.items() <= after.items()
    (disk / "ballast").unlink()
    prepare(world, source, disk / "out")
    assert same(disk / "out", uninterrupted)


def test_no_shard_is_truncated_on_a_nearly_full_disk(disk):
    """A failed write leaves an incomplete file, which the next one replaces."""
    for tokens in range(1900, 2100, 5):
        fill(disk / "ballast")
        os.truncate(disk / "ballast", (disk / "ballast").stat().st_size - 4096)
        zeros = np.zeros(tokens, dtype=np.uint16)
        with contextlib.suppress(OSError):
            shard = ShardWriter(disk / "shard.npy", 0)
            shard.add(Documents(zeros, np.array([0, tokens]), np.zeros(1, int), np.zeros((1, 2), int)), 0, 1)
            shard.finish()
            assert np.load(disk / "shard.npy").shape == (tokens,)
        for path in disk.iterdir():
            path.unlink()


def test_shards_that_do_not_fit_are_refused_at_start(world, large, disk):
    source, uninterrupted = large
    fill(disk / "ballast")
    os.truncate(disk / "ballast", (disk / "ballast").stat().st_size - 120_000)
    message = refused(prepare(world, source, disk / "out", check=False))
    assert "GB free" in message
    assert not count_shards(disk / "out")
    (disk / "ballast").unlink()
    prepare(world, source, disk / "out")
    assert same(disk / "out", uninterrupted)


def test_a_disk_that_is_full_at_start_is_an_error_in_one_line(world, small, disk):
    fill(disk / "ballast")
    os.truncate(disk / "ballast", (disk / "ballast").stat().st_size - 16_384)
    assert "space" in refused(prepare(world, small[0], disk / "out", check=False))


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_any_start_method_of_processes_writes_the_same_bytes(world, small, tmp_path, method):
    source, uninterrupted = small
    arguments = ["-c", LAUNCH, method, ROOT / "fineweb.py", *command(source, tmp_path, 2)]
    execute([sys.executable, *map(str, arguments)], world, True, OWN_START)
    assert same(tmp_path, uninterrupted)


@pytest.fixture(scope="module")
def lanterns(world):
    """A source with the word on which a fake fastokens fails in each twelfth document, except in the first file."""
    folder = world / "preparation/lanterns"
    for number in range(3):
        texts = documents(number, 160, 60)
        if number:
            texts[5::12] = ["the lantern " + text for text in texts[5::12]]
        write_parquet(folder / f"part_{number}.parquet", texts)
    prepare(world, folder / "*.parquet", folder / "out", *SETTINGS, "--encoder", "tiktoken")
    return folder / "*.parquet", folder / "out"


def fake_fastokens(folder, fault):
    (folder / "fastokens").mkdir(parents=True)
    (folder / "fastokens/__init__.py").touch()
    (folder / "fastokens/_native.py").write_text(FAKE.replace("{fault}", FAULTS[fault]))
    return {"PYTHONPATH": f"{folder}:{ROOT}"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mismatch_of_fastokens_is_an_error_and_its_remedy_works(world, lanterns, tmp_path, fault):
    """The validation shard is written by then, so that the remedy has --overwrite."""
    source, reference = lanterns
    env = fake_fastokens(tmp_path / "fake", fault)
    message = refused(prepare(world, source, tmp_path / "out", workers=2, check=False, **env))
    place = {
        "another id": "gives other ids than tiktoken in the document that begins with",
        "an error": "fails (RuntimeError: no such token)",
        "a panic": "fails (Panic: index out of bounds)",
    }
    assert f"fastokens {place[fault]}" in message
    assert message.endswith("Use --encoder tiktoken --overwrite")
    prepare(world, source, tmp_path / "out", *SETTINGS, "--encoder", "tiktoken", "--overwrite", **env)
    assert same(tmp_path / "out", reference)


def test_the_remedy_for_a_mismatch_works_without_shards(world, tmp_path):
    source = tmp_path / "part.parquet"
    write_parquet(source, ["the lantern", *documents(1, 30)])
    env = fake_fastokens(tmp_path / "fake", "an error")
    message = refused(prepare(world, source, tmp_path / "out", check=False, **env))
    assert message.endswith("Use --encoder tiktoken --overwrite")
    prepare(world, source, tmp_path / "out", *SETTINGS, "--encoder", "tiktoken", "--overwrite")
    prepare(world, source, tmp_path / "new", *SETTINGS, "--encoder", "tiktoken")
    assert same(tmp_path / "out", tmp_path / "new")


def test_fastokens_that_is_missing_is_no_reason_to_start_again(world, small, tmp_path):
    """The import fails as for a library of another machine."""
    env = fake_fastokens(tmp_path / "fake", "an error")
    (tmp_path / "fake/fastokens/_native.py").write_text("raise ImportError('wrong ELF class')")
    message = refused(prepare(world, small[0], tmp_path / "out", *SETTINGS, check=False, **env))
    assert "fastokens can't be imported" in message
    assert "--overwrite" not in message


def test_the_files_of_an_unfinished_folder_keep_their_format(world, large, tmp_path):
    """An earlier version can have begun a folder."""
    interrupt(world, large[0], tmp_path)
    settings = json.loads((tmp_path / "unfinished/settings.json").read_text())
    assert settings["source"]["files"] == [f"part_{number}.parquet" for number in range(3)]
    record = json.loads((tmp_path / "unfinished/train_000001.json").read_text())
    assert list(record) == ["entry", "tokens", "empty", "invalid", "identity", "limited"]
    assert list(record["entry"]) == ["file", "split", "tokens", "documents", "bytes", "begin", "sha256", "source_file"]


def test_an_unfinished_folder_of_the_version_before_is_written_again(world, large, tmp_path):
    source, uninterrupted = large
    interrupt(world, source, tmp_path)
    settings = (tmp_path / "unfinished/settings.json").read_bytes()
    shutil.rmtree(tmp_path / "unfinished")
    (tmp_path / "unfinished/000001").mkdir(parents=True)
    (tmp_path / "unfinished/000001/part.json").write_text('{"shards": []}')
    (tmp_path / "unfinished/settings.json").write_bytes(settings)
    prepare(world, source, tmp_path)
    assert same(tmp_path, uninterrupted)


@pytest.mark.parametrize("name", ["train_000002", "val_000000"])
def test_a_shard_whose_record_was_cut_short_is_written_again(world, large, tmp_path, name):
    """As after a power failure."""
    source, uninterrupted = large
    for number, content in enumerate((b"", b"\xff", b"null", b"[]", b"[" * 100_000, b'{"tokens": 3}')):
        out = tmp_path / str(number)
        interrupt(world, source, out)
        (out / f"unfinished/{name}.json").write_bytes(content)
        prepare(world, source, out)
        assert same(out, uninterrupted)


@pytest.mark.parametrize("source", [None, "stories", []])
def test_a_manifest_of_another_program_is_not_overwritten(world, small, tmp_path, source):
    """Training needs no source in it."""
    shutil.copytree(small[1], tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest | {"source": source}))
    message = refused(prepare(world, small[0], tmp_path / "out", *SETTINGS, check=False))
    assert message.startswith(f"{tmp_path}/out was made with source {source}, but this command has ")


def test_a_shard_that_was_cut_short_is_written_again(world, large, tmp_path):
    source, uninterrupted = large
    interrupt(world, source, tmp_path)
    os.truncate(tmp_path / "train_000002.npy", 300)
    prepare(world, source, tmp_path)
    assert same(tmp_path, uninterrupted)
