"""Promise 7: preparing text survives kills, full disks, damaged files and other processes: the bytes are the same."""

import contextlib
import json
import os
import random
import signal
import sys
import time

import conftest
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ENCODING, ROOT, children, ended, execute, fill, lives, on_ranks, refused, run, wait_until

from core.data.prepare import write_shard

KILLS = int(os.environ.get("SOAK_KILLS", "4"))
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
    def from_file(cls, path):
        return cls(tokenizer.load(path.removesuffix("/tokenizer.json")))

    def encode_batch_flat(self, texts, split_special_tokens):
        parts = [self.encoding.encode_ordinary(text) for text in texts]
        for text, part in zip(texts, parts):
            if "lantern" in text:
                {fault}
        return np.array(sum(parts, []), "<u4").tobytes(), np.cumsum([0, *map(len, parts)]).astype("<u8").tobytes()
"""
FAULTS = {
    "another id": "part[0] ^= 1",
    "an error": "raise RuntimeError('no such token')",
    "a panic": "raise Panic('index out of bounds')",
}
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
    """A run in a process group of its own, which is killed at the end should it still live."""
    return conftest.started("fineweb.py", *command(source, out, workers, *settings), cwd=world, **env)


def recorded(out):
    """Each shard that a part.json lists, with the time it was written."""
    paths = []
    for part in (out / "unfinished").glob("*/part.json"):
        with contextlib.suppress(FileNotFoundError):
            paths += [part.parent / shard["file"] for shard in json.loads(part.read_text())["shards"]]
    return {path: path.stat().st_mtime_ns for path in paths}


def begun(out):
    """How many shards lie in the unfinished parts."""
    return len(list((out / "unfinished").glob("*/*.npy")))


def interrupt(world, source, out, *settings, shards=5, **env):
    """Kill a run when it has written a few shards; those that are recorded."""
    with started(world, source, out, *settings, **env) as process:
        assert wait_until(lambda: begun(out) > shards, process)
        os.killpg(process.pid, signal.SIGKILL)
    assert not (out / "manifest.json").exists()
    return recorded(out)


def joined(out):
    """Whether a run came to the joining of its parts."""
    return (out / "val_000000.npy").exists()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def same(folder, other):
    """Whether two folders hold the same files with the same bytes; says which differ."""
    ours, theirs = contents(folder), contents(other)
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []
    return True


def texts_in(out):
    """The documents of all shards, in order."""
    shards = json.loads((out / "manifest.json").read_text())["shards"]
    ids = np.concatenate([np.load(out / shard["file"]) for shard in shards])
    ends = np.flatnonzero(ids == ENCODING.eot_token)
    return [ENCODING.decode(part[1:].tolist()) for part in np.split(ids, ends)[1:]]


@pytest.fixture(scope="module")
def large(world):
    """Three parquet files of some hundred shards, and what an undisturbed run makes of them."""
    folder = world / "preparation/large"
    for number in range(3):
        write_parquet(folder / f"part_{number}.parquet", documents(number, 360))
    prepare(world, folder / "*.parquet", folder / "out")
    return folder / "*.parquet", folder / "out"


@pytest.fixture(scope="module")
def small(world):
    """Three jsonl files of a few shards each, and what an undisturbed run makes of them."""
    folder = world / "preparation/small"
    for number in range(3):
        write_jsonl(folder / f"part_{number}.jsonl", documents(number, 60))
    prepare(world, folder / "*.jsonl", folder / "out")
    return folder / "*.jsonl", folder / "out"


def array_task(task, count, low=0):
    names = {"ID": task, "MIN": low, "MAX": low + count - 1, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()}


@pytest.mark.parametrize("victim", ["all its processes", "the main process"])
def test_killed_again_and_again_it_ends_as_if_undisturbed(world, large, tmp_path, victim):
    (source, undisturbed), out, rng = large, tmp_path / "out", random.Random(victim)
    step = 2 * len(list(undisturbed.glob("*.npy"))) // (KILLS + 2)
    landed, kept = 0, 0
    for kill in range(KILLS):
        before = recorded(out)
        with started(world, source, out, workers=(1, 2, 5)[kill % 3]) as process:
            if kill % 3 == 2:
                time.sleep(rng.uniform(0.1, 0.45))
            else:
                wanted = begun(out) + rng.randint(1, step)
                wait_until(lambda wanted=wanted: begun(out) >= wanted, process)
                time.sleep(rng.uniform(0, 0.02))
            if process.poll() is not None:
                break
            workers = children(process.pid)
            if victim == "the main process":
                process.kill()
                wait_until(lambda workers=workers: not any(map(lives, workers)), seconds=5)
            else:
                os.killpg(process.pid, signal.SIGKILL)
        landed += bool(workers)
        kept += len(before)
        assert joined(out) or before.items() <= recorded(out).items()
    assert landed >= KILLS // 2
    assert kept > 0
    prepare(world, source, out)
    assert same(out, undisturbed)
    assert texts_in(out) == [text for number in range(3) for text in documents(number, 360)]


def test_killed_while_the_parts_are_joined_it_ends_as_if_undisturbed(world, large, tmp_path):
    source, undisturbed = large
    for attempt in range(5):
        out = tmp_path / str(attempt)
        with started(world, source, out, workers=2) as process:
            assert wait_until(lambda out=out: joined(out), process)
            process.kill()
        if (out / "unfinished").exists():
            break
    assert list((out / "unfinished").iterdir())
    prepare(world, source, out)
    assert same(out, undisturbed)


def test_half_written_files_of_a_killed_process_are_removed(world, small, tmp_path):
    source, undisturbed = small
    for name in (".manifest.json.4194304", ".tokenizer.json.4194304", ".train_000000.npy.unfinished"):
        (tmp_path / name).write_text("hal")
    prepare(world, source, tmp_path)
    assert same(tmp_path, undisturbed)


def test_a_killed_worker_ends_the_run_and_the_same_command_goes_on(world, large, tmp_path):
    source, undisturbed = large
    with started(world, source, tmp_path, workers=2) as process:
        assert wait_until(lambda: begun(tmp_path) > 3, process)
        os.kill(children(process.pid)[0], signal.SIGKILL)
        message = refused(ended(process))
    assert "worker" in message
    before = recorded(tmp_path)
    assert before
    prepare(world, source, tmp_path)
    assert same(tmp_path, undisturbed)


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_writes_the_same_bytes(world, small, tmp_path, ranks):
    source, undisturbed = small
    on_ranks(ranks, "fineweb.py", *command(source, tmp_path), cwd=world)
    assert same(tmp_path, undisturbed)


def test_the_tasks_of_an_array_more_than_files_may_run_one_after_another_in_any_order(world, small, tmp_path):
    source, undisturbed = small
    for task in (4, 1, 3, 0, 2):
        prepare(world, source, tmp_path, **array_task(task, 5))
    assert same(tmp_path, undisturbed)


def test_two_tasks_of_an_array_may_run_at_once(world, large, tmp_path):
    source, undisturbed = large
    with (
        started(world, source, tmp_path, **array_task(1, 2)) as one,
        started(world, source, tmp_path, **array_task(0, 2)) as other,
    ):
        assert (one.wait(60), other.wait(60)) == (0, 0)
    assert same(tmp_path, undisturbed)


def test_another_number_of_ranks_goes_on_where_one_was_killed(world, large, tmp_path):
    source, undisturbed = large
    before = interrupt(world, source, tmp_path, **array_task(1, 3))
    assert {path.parent.name for path in before} == {"000001"}
    for task in (1, 0):
        prepare(world, source, tmp_path, **array_task(task, 2))
    assert same(tmp_path, undisturbed)


@pytest.mark.parametrize(("low", "count"), [(1, 3), (4, 1)])
def test_an_array_that_does_not_begin_at_0_is_refused(world, small, tmp_path, low, count):
    message = refused(prepare(world, small[0], tmp_path, check=False, **array_task(low, count, low)))
    assert f"0-{count - 1}" in message


def test_an_array_with_gaps_is_refused(world, small, tmp_path):
    env = array_task(4, 3) | {"SLURM_ARRAY_TASK_MAX": "4"}
    assert "0-2" in refused(prepare(world, small[0], tmp_path, check=False, **env))


@pytest.mark.parametrize("option", [("--max-tokens", 9000), ("--overwrite",)])
def test_what_only_one_process_can_do_is_refused_with_several(world, small, tmp_path, option):
    env = {"RANK": "0", "WORLD_SIZE": "2"}
    message = refused(prepare(world, small[0], tmp_path, *SETTINGS, *option, check=False, **env))
    assert option[0] in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [(), ("--overwrite",)])
def test_a_second_process_on_a_folder_is_refused_while_the_first_lives(world, large, tmp_path, option):
    source, undisturbed = large
    with started(world, source, tmp_path) as first:
        assert wait_until(lambda: begun(tmp_path) > 0, first)
        first.send_signal(signal.SIGSTOP)
        message = refused(prepare(world, source, tmp_path, *SETTINGS, *option, check=False))
        first.send_signal(signal.SIGCONT)
        assert ended(first).returncode == 0
    assert str(tmp_path) in message
    assert same(tmp_path, undisturbed)


def test_an_overwrite_refused_before_the_first_shard_changes_nothing(world, large, tmp_path):
    source, _ = large
    with started(world, source, tmp_path) as first:
        assert wait_until((tmp_path / "tokenizer_config.json").exists, first)
        first.send_signal(signal.SIGSTOP)
        settings = (tmp_path / "unfinished/settings.json").read_text()
        other = (*SETTINGS, "--shard-tokens", 3000, "--overwrite")
        refused(prepare(world, source, tmp_path, *other, check=False))
        assert (tmp_path / "unfinished/settings.json").read_text() == settings


def test_settings_changed_midway_are_refused_with_both_values(world, large, tmp_path):
    source, _ = large
    other = (*SETTINGS[:2], "--shard-tokens", 3000, *SETTINGS[4:])
    before = interrupt(world, source, tmp_path)
    message = refused(prepare(world, source, tmp_path, *other, check=False))
    assert f"shard_tokens {SHARD_TOKENS}, now it is 3000" in message
    assert recorded(tmp_path) == before
    prepare(world, source, tmp_path, *other, "--overwrite")
    prepare(world, source, tmp_path / "fresh", *other)
    (tmp_path / "fresh").rename(tmp_path.with_name("fresh"))
    assert same(tmp_path, tmp_path.with_name("fresh"))


def test_a_source_changed_midway_is_refused_with_both_contents(world, tmp_path):
    source, out = tmp_path / "*.parquet", tmp_path / "out"
    texts = documents(1, 360)
    write_parquet(tmp_path / "part.parquet", texts)
    interrupt(world, source, out)
    write_parquet(tmp_path / "part.parquet", [*texts[:3], "Ana left", *texts[4:]])
    part = json.loads((out / "unfinished/000000/part.json").read_text())
    message = refused(prepare(world, source, out, check=False))
    assert "part.parquet has changed" in message
    assert part["source"]["fingerprint"] in message
    assert f"'bytes': {(tmp_path / 'part.parquet').stat().st_size}" in message
    prepare(world, source, out, *SETTINGS, "--overwrite")
    prepare(world, source, tmp_path / "fresh")
    assert same(out, tmp_path / "fresh")


def break_jsonl(line):
    def write(path):
        lines = path.read_bytes().splitlines(keepends=True)
        place = sum(map(len, lines[:30]))
        path.write_bytes(b"".join([*lines[:30], line + b"\n", *lines[31:]]))
        return f"byte {place}"

    return write


def break_text(path):
    texts = pq.read_table(path)["text"].to_pylist()
    write_parquet(path, [*texts[:30], b"caf\xe9 " * 9, *texts[31:]])
    return "row group 1, row 10"


def break_page(path):
    place = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    with open(path, "r+b") as file:
        file.seek(place + 100)
        flipped = bytes(byte ^ 0xFF for byte in file.read(200))
        file.seek(place + 100)
        file.write(flipped)
    return "row group 1"


DAMAGE = {
    "no UTF-8.jsonl": break_jsonl(b'{"text": "caf\xe9"}'),
    "cut.jsonl": break_jsonl(b'{"text": "caf'),
    "no UTF-8.parquet": break_text,
    "flipped.parquet": break_page,
}


@pytest.fixture(params=DAMAGE)
def damaged(request, tmp_path):
    """A source of three files whose second is damaged in its 31st document, that file as it should be, the place."""
    folder, kind = tmp_path / "source", request.param.rsplit(".", 1)[-1]
    for number in range(3):
        (write_parquet if kind == "parquet" else write_jsonl)(folder / f"part_{number}.{kind}", documents(number, 60))
    path = folder / f"part_1.{kind}"
    whole = path.read_bytes()
    return folder / f"*.{kind}", path, whole, DAMAGE[request.param](path)


def test_a_damaged_file_is_named_and_mended_costs_only_itself(world, damaged, tmp_path):
    source, path, whole, place = damaged
    message = refused(prepare(world, source, tmp_path / "out", check=False))
    assert str(path) in message
    assert place in message
    before = recorded(tmp_path / "out")
    assert {shard.parent.name for shard in before} == {"000000"}
    path.write_bytes(whole)
    prepare(world, source, tmp_path / "out")
    prepare(world, source, tmp_path / "fresh")
    assert same(tmp_path / "out", tmp_path / "fresh")
    kept = sorted(shard.stat().st_mtime_ns for shard in (tmp_path / "out").glob("*.npy"))[: len(before)]
    assert kept == sorted(before.values())


@pytest.mark.parametrize("damaged", [name for name in DAMAGE if name != "flipped.parquet"], indirect=True)
def test_broken_documents_may_be_left_out_and_are_listed(world, damaged, tmp_path):
    source, path, _, place = damaged
    prepare(world, source, tmp_path / "out", *SETTINGS, "--skip-broken")
    files = [documents(number, 60) for number in range(3)]
    del files[1][30]
    assert texts_in(tmp_path / "out") == [text for texts in files for text in texts]
    (broken,) = json.loads((tmp_path / "out/manifest.json").read_text())["broken_documents"]
    assert broken.startswith(f"{path.name}, ")
    assert place in broken


def test_the_validation_share_of_a_mended_source_is_that_of_a_fresh_run(world, tmp_path):
    source, path = tmp_path / "*.jsonl", tmp_path / "part_1.jsonl"
    write_jsonl(tmp_path / "part_0.jsonl", documents(0, 60))
    path.write_text("{broken")
    settings = SETTINGS[:4]
    refused(prepare(world, source, tmp_path / "out", *settings, check=False))
    write_jsonl(path, documents(1, 300))
    prepare(world, source, tmp_path / "out", *settings)
    prepare(world, source, tmp_path / "fresh", *settings)
    assert same(tmp_path / "out", tmp_path / "fresh")


def test_both_encoders_write_the_same_bytes_of_any_text(world, tmp_path):
    pytest.importorskip("fastokens")
    repeated = [character * 100_000 for character in ("a", " ")]
    special = ["<|endoftext|>", "Ben said <|endoftext|> and left<|endoftext|>", "<|endoftext|>" * 1000]
    texts = [*documents(1, 30), *repeated, *special, *documents(2, 30)]
    write_parquet(tmp_path / "part.parquet", texts)
    for encoder in ("tiktoken", "fastokens"):
        prepare(world, tmp_path / "part.parquet", tmp_path / encoder, *SETTINGS, "--encoder", encoder)
    assert same(tmp_path / "fastokens", tmp_path / "tiktoken")
    assert texts_in(tmp_path / "fastokens") == texts


def test_a_disk_that_fills_up_costs_no_shard_that_was_whole(world, large, disk):
    source, undisturbed = large
    with started(world, source, disk / "out") as process:
        assert wait_until(lambda: begun(disk / "out") > 5, process)
        process.send_signal(signal.SIGSTOP)
        fill(disk / "ballast")
        os.truncate(disk / "ballast", (disk / "ballast").stat().st_size - 6144)
        before = recorded(disk / "out")
        process.send_signal(signal.SIGCONT)
        message = refused(ended(process))
    assert "space" in message
    after = recorded(disk / "out")
    assert before.items() <= after.items()
    (disk / "ballast").unlink()
    prepare(world, source, disk / "out")
    assert same(disk / "out", undisturbed)


def test_no_shard_is_written_short_whatever_room_is_left(disk):
    for tokens in range(1900, 2100, 5):
        fill(disk / "ballast")
        os.truncate(disk / "ballast", (disk / "ballast").stat().st_size - 4096)
        with contextlib.suppress(OSError):
            write_shard(disk / "shard.npy", np.zeros(tokens, dtype=np.uint16))
            assert (disk / "shard.npy").stat().st_size == 128 + 2 * tokens
        (disk / "ballast").unlink()
        (disk / "shard.npy").unlink(missing_ok=True)


def test_shards_that_cannot_fit_are_refused_before_the_start(world, large, disk):
    source, undisturbed = large
    fill(disk / "ballast")
    os.truncate(disk / "ballast", (disk / "ballast").stat().st_size - 120_000)
    message = refused(prepare(world, source, disk / "out", check=False))
    assert "GB free" in message
    assert not begun(disk / "out")
    (disk / "ballast").unlink()
    prepare(world, source, disk / "out")
    assert same(disk / "out", undisturbed)


def test_a_disk_full_from_the_start_ends_in_a_sentence(world, small, disk):
    fill(disk / "ballast")
    os.truncate(disk / "ballast", (disk / "ballast").stat().st_size - 16_384)
    assert "space" in refused(prepare(world, small[0], disk / "out", check=False))


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_any_start_method_of_processes_writes_the_same_bytes(world, small, tmp_path, method):
    source, undisturbed = small
    arguments = ["-c", LAUNCH, method, ROOT / "fineweb.py", *command(source, tmp_path, 2)]
    execute([sys.executable, *map(str, arguments)], world, True, {})
    assert same(tmp_path, undisturbed)


@pytest.fixture(scope="module")
def lanterns(world):
    """A source in which every twelfth document of the later files holds the word that a fake fastokens errs in."""
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
def test_where_fastokens_differs_tiktoken_makes_all_of_it(world, lanterns, tmp_path, fault):
    source, reference = lanterns
    env = fake_fastokens(tmp_path / "fake", fault)
    result = prepare(world, source, tmp_path / "out", workers=2, **env)
    assert "FASTOKENS DIFFERS" in result.stdout
    assert same(tmp_path / "out", reference)


def test_what_fastokens_made_elsewhere_is_made_again_once_it_differs(world, lanterns, tmp_path):
    source, reference = lanterns
    env = fake_fastokens(tmp_path / "fake", "another id")
    results = [prepare(world, source, tmp_path / "out", **env, **array_task(task, 2)) for task in (0, 1, 0)]
    assert ["FASTOKENS DIFFERS" in result.stdout for result in results].count(True) == 1
    assert same(tmp_path / "out", reference)


def test_that_fastokens_differs_is_remembered_over_a_kill(world, lanterns, tmp_path):
    source, reference = lanterns
    env = fake_fastokens(tmp_path / "fake", "another id")
    out = tmp_path / "out"
    with started(world, source, out, **env) as process:
        assert wait_until(lambda: (out / "unfinished/fastokens-differs").exists() and begun(out) > 2, process)
        process.kill()
        process.wait()
    assert "FASTOKENS DIFFERS" not in prepare(world, source, out, **env).stdout
    assert same(out, reference)


def test_parts_of_a_process_that_lives_are_left_to_it_when_fastokens_differs(world, tmp_path):
    source, out = tmp_path / "source/*.parquet", tmp_path / "out"
    write_parquet(tmp_path / "source/part_0.parquet", documents(0, 360))
    write_parquet(tmp_path / "source/part_1.parquet", ["the lantern", *documents(1, 30)])
    prepare(world, source, tmp_path / "reference", *SETTINGS, "--encoder", "tiktoken")
    env = fake_fastokens(tmp_path / "fake", "an error")
    with started(world, source, out, **env, **array_task(0, 2)) as first:
        assert wait_until(lambda: begun(out) > 5, first)
        first.send_signal(signal.SIGSTOP)
        before = recorded(out)
        assert "FASTOKENS DIFFERS" in prepare(world, source, out, **env, **array_task(1, 2)).stdout
        assert before.items() <= recorded(out).items()
        first.send_signal(signal.SIGCONT)
        result = ended(first)
    assert result.returncode == 0, result.stderr
    prepare(world, source, out, **env, **array_task(0, 2))
    assert same(out, tmp_path / "reference")
