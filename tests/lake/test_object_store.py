"""A lake on s3://: the same bits as on disk, whole units only, few requests, and one line for whatever goes wrong."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import polars as pl
import pytest
from lakebed.lake import Lake, Unit
from lakebed.lake.collect import collect, plan_collection
from lakebed.lake.compact import compact, plan_compaction
from lakebed.lake.errors import (
    CorruptFile,
    InputMismatch,
    LakeExists,
    LakeNotFound,
    NoBucket,
    NoCredentials,
    StorageRefused,
    StoreUnreachable,
)
from lakebed.lake.object_store import S3Store
from lakebed.lake.storage import Storage
from lakebed.lake.verify import verify

WEIGHTS = {"a/b.w": np.arange(96, dtype=np.float32).reshape(8, 4, 3), "ü~": np.ones((8, 3), np.float32)}


@pytest.fixture
def remote(bucket) -> Lake:
    with Lake.create(f"{bucket}/deep/x.lake") as made:
        yield made


def test_a_lake_holds_what_it_holds_on_disk(remote, lake, write_unit, tmp_path) -> None:
    for where in (remote, lake):
        for first in (0, 8, 16):
            write_unit(where, range(first, first + 8), WEIGHTS)
    here, there = lake.receipts.all(), remote.receipts.all()
    assert [of.content_hash for of in here] == [of.content_hash for of in there]
    chunks = [[of for of in unit.files if of.path.startswith("tensors/")] for unit in here]
    assert chunks == [[of for of in unit.files if of.path.startswith("tensors/")] for unit in there]
    query = "SELECT * FROM training_steps ORDER BY step"
    assert remote.sql(query).fetchall() == lake.sql(query).fetchall()
    query = "SELECT parameter, step, sum(list_sum(values)) FROM gradients GROUP BY ALL ORDER BY ALL"
    assert remote.sql(query).fetchall() == lake.sql(query).fetchall()
    kept = [where.table("training_steps").filter(pl.col("step") > 20).collect() for where in (remote, lake)]
    assert kept[0].sort("step").equals(kept[1].sort("step").select(kept[0].columns))
    with Lake.open(remote.uri) as again:
        assert again.tensor("gradients", "a/b.w").read([9, 1]).tobytes() == WEIGHTS["a/b.w"][[1, 1]].tobytes()
        assert again.tensor("gradients", "ü~").steps.tolist() == list(range(24))
        assert verify(again).ok
    with pytest.raises(LakeExists):
        Lake.create(remote.uri)


def test_plain_zarr_reads_the_arrays(remote, write_unit) -> None:
    import zarr
    from lakebed.lake.axis import publish

    write_unit(remote, range(8), WEIGHTS)
    publish(remote)
    group = zarr.open_group(f"{remote.uri}/tensors/ref/gradients", mode="r")
    assert group["a%2Fb.w"][:].tobytes() == WEIGHTS["a/b.w"].tobytes()
    assert group["step"][:].tolist() == list(range(8))


def test_compaction_and_garbage(remote, write_unit, s3) -> None:
    for first in range(0, 96, 8):
        write_unit(remote, range(first, first + 8), WEIGHTS)
    query = "SELECT step, loss FROM training_steps ORDER BY step"
    before = remote.sql(query).fetchall()
    assert all(done.committed for done in compact(remote, plan_compaction(remote)))
    with Lake.open(remote.uri) as again:
        garbage = plan_collection(again, older_than=-60)
        assert {of.kind for of in garbage} == {"superseded"}
        assert len(garbage) == 24
        with s3.counted(remote.uri) as asked:
            assert plan_collection(again, older_than=3600) == []
        assert len([1 for kind, _ in asked if kind in ("HEAD", "DELETE")]) <= 1
        collect(again, garbage)
        assert again.sql(query).fetchall() == before
        assert verify(again).ok
        assert verify(again).unreferenced_files == 0


def test_a_reader_during_compaction_keeps_its_rows_and_is_told_once_they_are_gone(remote, write_unit) -> None:
    for first in range(0, 32, 8):
        write_unit(remote, range(first, first + 8), WEIGHTS)
    query = "SELECT sum(step) FROM training_steps"
    with Lake.open(remote.uri) as reader, Lake.open(remote.uri) as late:
        with reader.pinned(), late.pinned():
            list(compact(remote, plan_compaction(remote)))
            assert reader.sql(query).fetchall() == [(496,)]
            collect(remote, plan_collection(remote, older_than=-60))
            # Its files are in memory; those of one who had not read them yet are gone.
            assert reader.sql(query).fetchall() == [(496,)]
            with pytest.raises(
                CorruptFile, match=r"was compacted, and `lakebed gc` removed it .*: ask again"
            ):
                late.sql(query).fetchall()
        assert late.sql(query).fetchall() == [(496,)]


# -- two writers, and writers that stop ------------------------------------------------------------------------------


def test_of_two_writers_the_first_receipt_counts_and_the_other_leaves_nothing(remote) -> None:
    writers = []
    for loss in (1.0, 2.0):
        other = Lake.open(remote.uri)
        writer = other.unit(Unit("trace", "ref", "same", (1,)))
        writer.tensor_rows("gradients", [1], 1).write("w", np.full((1, 3), loss, np.float32))
        writer.rows("training_steps", [{"step": 1, "loss": loss}])
        writers.append(writer)
    receipts = [writer.commit() for writer in writers]
    assert receipts[0] == receipts[1]
    assert [writer.committed for writer in writers] == [True, False]
    assert remote.sql("SELECT loss FROM training_steps").fetchall() == [(1.0,)]
    assert remote.tensor("gradients", "w").read(1).tolist() == [1.0] * 3
    assert verify(remote).ok
    assert verify(remote).unreferenced_files == 0
    with pytest.raises(InputMismatch), remote.unit(Unit("trace", "ref", "same", (1,), inputs={"x": 1})):
        pass


def test_threads_that_race_for_rows_get_rows_of_their_own(remote) -> None:
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(Lake.open(remote.uri).claim_rows("r", "weights", 8, 8)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(0, 48, 8))


@pytest.mark.parametrize(("code", "made"), [("NotImplemented", True), ("ConditionalRequestConflict", False)])
def test_a_store_without_conditional_puts_and_one_that_is_busy(remote, monkeypatch, code, made) -> None:
    """Without them a look decides; after a conflict the same is asked again, and another writer's object counts."""
    from botocore.exceptions import ClientError
    from s3fs import S3FileSystem

    pipe, refused = S3FileSystem._pipe_file, []

    async def refuse(self, path, data, mode="overwrite", **options):
        if mode == "create" and (code == "NotImplemented" or not refused):
            refused.append(path)
            if not made:
                await pipe(self, path, b"theirs")
            cause = ClientError({"Error": {"Code": code, "Message": "no"}}, "PutObject")
            raise OSError(5, "no") from cause
        return await pipe(self, path, data, mode=mode, **options)

    monkeypatch.setattr(S3FileSystem, "_pipe_file", refuse)
    storage = Storage(remote.uri)
    assert storage.create("x", b"mine") is made
    assert storage.read("x") == (b"mine" if made else b"theirs")
    assert storage.create("x", b"again") is False
    assert refused


def test_an_upload_that_stops_anywhere_leaves_nothing_visible_and_a_rerun_completes(
    remote, write_unit, monkeypatch
) -> None:
    """Each put of a unit fails once, before or after its object came to stand: chunks, the table, the receipt."""
    write, create = S3Store.write, S3Store.create
    puts: list[str] = []

    def counting(function, stop, late):
        def put(self, key, data):
            puts.append(key)
            if len(puts) == stop + 1:
                if late:
                    function(self, key, data)
                raise StoreUnreachable("gone")
            return function(self, key, data)

        return put

    steps, stop = 0, 0
    while True:
        for late in (False, True):
            puts.clear()
            with monkeypatch.context() as patch:
                patch.setattr(S3Store, "write", counting(write, stop, late))
                patch.setattr(S3Store, "create", counting(create, stop, late))
                try:
                    write_unit(remote, range(steps, steps + 8), WEIGHTS)
                except StoreUnreachable:
                    stopped = True
                else:
                    stopped = False
            remote.refresh()
            committed = [of.steps[0] for of in remote.receipts.all()]
            # Only the answer to the receipt was lost: the unit is whole.
            receipt_stands = late and "extractions" in puts[-1]
            assert (steps in committed) is (not stopped or receipt_stands)
            named = {entry.path for of in remote.receipts.all() for entry in of.files}
            keys = {key for key, _ in remote.storage.listing("tensors") if "/c/" in key}
            keys |= {key for key, _ in remote.storage.listing("tables/training_steps")}
            assert keys == named
            if stopped and not receipt_stands:
                write_unit(remote, range(steps, steps + 8), WEIGHTS)
            steps += 8
        if not stopped:
            break
        stop += 1
    assert stop >= 4
    assert verify(remote).ok
    read = Lake.open(remote.uri).tensor("gradients", "a/b.w").read()
    assert read.tobytes() == np.concatenate([WEIGHTS["a/b.w"]] * (steps // 8)).tobytes()


def test_a_killed_writer_leaves_nothing_visible(remote, write_unit) -> None:
    script = """
        import os, signal, sys
        import numpy as np
        from lakebed.lake import Lake, Unit
        with Lake.open(sys.argv[1]).unit(Unit("trace", "ref", "trace-00000000", tuple(range(8)))) as writer:
            block = writer.tensor_rows("gradients", range(8), 8)
            block.write("a/b.w", np.zeros((8, 4, 3), np.float32))
            [upload.result() for upload in writer._uploads]
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), remote.uri], check=False, timeout=60
    )
    assert done.returncode < 0
    assert remote.runs() == []
    assert verify(remote).unreferenced_files == 1
    write_unit(remote, range(8), WEIGHTS)
    assert remote.tensor("gradients", "a/b.w").read().tobytes() == WEIGHTS["a/b.w"].tobytes()
    assert verify(remote).ok


def test_a_large_object_whose_parts_stop_half_way_is_not_there(remote, monkeypatch) -> None:
    from s3fs import S3FileSystem

    call, parts = S3FileSystem._call_s3, []

    async def stop(self, method, *arguments, **options):
        if method == "upload_part":
            parts.append(options["PartNumber"])
            if len(parts) == 2:
                raise ConnectionResetError("reset")
        return await call(self, method, *arguments, **options)

    monkeypatch.setattr(S3FileSystem, "_call_s3", stop)
    with pytest.raises(StoreUnreachable, match=r"cannot reach http.*everything finished so far is kept"):
        remote.storage.write("tensors/large", bytes(100 << 20))
    assert len(parts) == 2
    assert not remote.storage.exists("tensors/large")


# -- requests --------------------------------------------------------------------------------------------------------


def test_a_query_asks_for_the_files_and_row_groups_it_needs(remote, s3) -> None:
    rng = np.random.default_rng(0)
    steps = np.arange(1 << 20)
    with remote.unit(Unit("trace", "ref", "long", (1,))) as writer:
        writer.rows("training_steps", {"step": steps, "loss": rng.standard_normal(len(steps))})
    with remote.unit(Unit("trace", "other", "short", (1,))) as writer:
        writer.rows("training_steps", {"step": steps[:10], "loss": rng.standard_normal(10)})
    (long,) = remote.table_files("training_steps", "ref")
    with Lake.open(remote.uri) as lake:
        lake.refresh()
        with s3.counted(remote.uri) as asked:
            assert lake.sql("SELECT count(*) FROM training_steps WHERE run = 'other'").fetchall() == [(10,)]
        assert not [path for kind, path in asked if kind == "GET" and long.path in path.replace("%3D", "=")]
        with s3.counted(remote.uri) as asked:
            lake.sql("SELECT min(step), max(step), count(*) FROM training_steps WHERE step < 1000").fetchall()
        assert len([kind for kind, _ in asked if kind == "GET"]) <= 3
        fetched = sum(len(data) for data in lake.session.files._kept.values())
        assert fetched < long.bytes / 2, (fetched, long.bytes)
        with s3.counted(remote.uri) as asked:
            lake.sql("SELECT min(step), max(step), count(*) FROM training_steps WHERE step < 1000").fetchall()
        assert {kind for kind, _ in asked} == {"LIST"}
    assert "HEAD" not in {kind for kind, _ in asked}


def test_a_chunk_is_one_request(remote, write_unit, s3) -> None:
    for first in range(0, 64, 8):
        write_unit(remote, range(first, first + 8), WEIGHTS)
    with Lake.open(remote.uri) as lake:
        lake.refresh()
        with s3.counted(remote.uri) as asked:
            rows = lake.sql(
                "SELECT sum(list_sum(values)) FROM gradients WHERE parameter = 'a/b.w' AND step IN (3, 60)"
            )
            assert rows.fetchall() == [(float(WEIGHTS["a/b.w"][[3, 4]].sum()),)]
        assert [kind for kind, _ in asked].count("GET") == 3  # zarr.json and two chunks
        with s3.counted(remote.uri) as asked:
            lake.tensor("gradients", "a/b.w").read()
        chunks = [path for kind, path in asked if kind == "GET"]
        assert len(set(chunks)) == 8
        assert sorted(chunks) == sorted(set(chunks))


@pytest.mark.parametrize("units", [40])
def test_compaction_spares_requests(remote, write_unit, s3, units) -> None:
    for step in range(units):
        with remote.unit(Unit("trace", "ref", f"trace-{step:08d}", (step,))) as writer:
            writer.rows("training_steps", [{"step": step, "loss": step / 3}])
    query, counts, rows = "SELECT sum(loss) FROM training_steps", [], []
    for _ in range(2):
        with Lake.open(remote.uri) as lake, s3.counted(remote.uri) as asked:
            rows += lake.sql(query).fetchall()
        counts.append(len(asked))
        list(compact(remote, plan_compaction(remote)))
        collect(remote, plan_collection(remote, older_than=-60))
    assert rows[0] == pytest.approx(rows[1])
    # Marker, runs, receipts of the run; then each receipt and each file, or one of both and a list of compactions.
    assert counts[0] - 2 * units <= 3
    assert counts[1] <= 6


# -- what goes wrong -------------------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def test_a_bucket_that_does_not_exist(s3) -> None:
    for call in (Lake.open, Lake.create, Lake.open_or_create):
        with pytest.raises(NoBucket) as error:
            call("s3://no-such-bucket/x.lake")
        assert "there is no bucket 'no-such-bucket' at http://127.0.0.1" in one_line(error)
        assert "AWS_ENDPOINT_URL" in str(error.value)


def test_a_bucket_without_a_lake(bucket) -> None:
    with pytest.raises(LakeNotFound, match=r"no lake at s3://.*/x.lake: make one with") as error:
        Lake.open(f"{bucket}/x.lake")
    one_line(error)


def test_a_whole_bucket_is_a_lake(bucket, write_unit) -> None:
    with Lake.create(f"{bucket}/") as lake:
        write_unit(lake, range(8), WEIGHTS)
        assert verify(lake).ok
        assert lake.sql("SELECT count(*) FROM training_steps").fetchall() == [(8,)]


def test_credentials_that_are_missing(remote, monkeypatch, tmp_path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(
        NoCredentials, match=r"no credentials for s3://.*: set AWS_ACCESS_KEY_ID and"
    ) as error:
        Lake.open(remote.uri)
    one_line(error)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(NoCredentials, match="nobody") as error:
        Lake.open(remote.uri)
    one_line(error)


def test_credentials_that_are_wrong(remote, write_unit, s3) -> None:
    from urllib.request import Request, urlopen

    write_unit(remote, range(8), WEIGHTS)

    def enforce(after: bytes) -> None:
        kind = {"Content-Type": "text/plain"}
        urlopen(Request(f"{s3.endpoint}/moto-api/reset-auth", after, kind, method="POST")).read()

    enforce(b"0")
    try:
        for call in (lambda: Lake.open(remote.uri), lambda: remote.storage.create("x", b""), remote.runs):
            with pytest.raises(NoCredentials, match=r"refuses .*: check AWS_ACCESS_KEY_ID and") as error:
                call()
            one_line(error)
    finally:
        enforce(b"inf")
    assert remote.runs() == ["ref"]


def test_a_refusal_in_the_middle_of_a_query_is_said_in_one_line(remote, write_unit, monkeypatch) -> None:
    write_unit(remote, range(8), WEIGHTS)
    remote.refresh()
    with remote.pinned():
        monkeypatch.setattr(S3Store, "read", _unreachable)
        for query in ("SELECT sum(loss) FROM training_steps", "SELECT sum(list_sum(values)) FROM gradients"):
            with pytest.raises(StoreUnreachable, match=r"^gone$"):
                with remote.session.errors():
                    remote.session.execute(query).fetchall()


def _unreachable(*_: object, **__: object) -> bytes:
    raise StoreUnreachable("gone")


def test_an_endpoint_that_nobody_listens_at(s3, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(StoreUnreachable, match=r"cannot reach http://127.0.0.1:9 for s3://b/x.lake") as error:
        Lake.open("s3://b/x.lake")
    one_line(error)
    assert time.monotonic() - started < 20
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(StorageRefused, match="Invalid endpoint: nonsense") as error:
        Lake.open("s3://b/x.lake")
    one_line(error)


def test_an_endpoint_that_never_answers(s3, monkeypatch) -> None:
    """Accepts, and says nothing: given up after the read timeouts."""
    from lakebed.lake import object_store

    monkeypatch.setitem(object_store._PATIENCE, "read_timeout", 0.2)
    monkeypatch.setitem(object_store._PATIENCE, "retries", {"mode": "standard", "max_attempts": 1})
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(StoreUnreachable, match="Read timeout") as error:
            Lake.open("s3://b/x.lake")
        one_line(error)
        assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        (
            "s4://b/x.lake",
            "cannot open s4://b/x.lake: Protocol not known: s4; a lake is a folder, or a URI such as s3://",
        ),
        ("S3://b/x.lake", "Protocol not known: S3; a lake is"),
        ("s3:/b/x.lake", "s3:/b/x.lake is neither a folder nor a URI: write s3://b/x.lake"),
        ("s3:b/x.lake", "write s3://b/x.lake"),
        ("s3://", "write s3://BUCKET/NAME"),
        ("s3:///x.lake", "names no bucket: give s3://BUCKET/NAME"),
        ("s3://A_b!/x.lake", "'A_b!' cannot be the name of a bucket"),
    ],
)
def test_a_uri_with_a_mistake(s3, uri, said) -> None:
    with pytest.raises(LakeNotFound) as error:
        Lake.open_or_create(uri)
    assert said in one_line(error)


def test_without_s3fs_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    import fsspec

    monkeypatch.delitem(sys.modules[fsspec.get_filesystem_class.__module__]._registry, "s3", raising=False)
    with pytest.raises(
        LakeNotFound, match=r"s3fs is not installed; run `pip install lakebed\[s3\]`"
    ) as error:
        Lake.open("s3://b/x.lake")
    one_line(error)


def test_a_lake_on_disk_needs_no_fsspec(lake, write_unit) -> None:
    write_unit(lake, range(8), WEIGHTS)
    script = """
        import sys
        from lakebed.lake import Lake
        with Lake.open(sys.argv[1]) as lake:
            assert lake.sql("SELECT count(*) FROM training_steps").fetchall() == [(8,)]
            assert lake.tensor("gradients", "a/b.w").read().shape == (8, 4, 3)
        print({"s3fs", "fsspec", "botocore"} & sys.modules.keys())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), lake.uri], check=True, capture_output=True, text=True
    )
    assert "s3fs" not in done.stdout
    assert "botocore" not in done.stdout
    assert Storage(lake.uri).local
    assert os.path.isdir(lake.uri)
