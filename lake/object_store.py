"""Objects: what a lake asks of a store that fsspec reaches, in as few requests as that takes, and in words for a person.

A put is atomic in every such store, and so takes the place of the rename on a disk. S3 has its own class: of what s3fs does
with an object, a lake needs single requests (a plain `cat_file` asks for the size first, `ls` of nothing lists its parent).
Listings are never cached: other machines write to the same lake.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .errors import LakebedError, LakeNotFound, NoBucket, NoCredentials, StorageRefused, StoreUnreachable

# Size in bytes, and when it was written in seconds since 1970 by the store's clock.
Stat = tuple[int, float]
# Requests that are under way at once.
CONNECTIONS = 16
# Of botocore. A store that cannot be reached is given up within half a minute, one that falls silent within three.
_PATIENCE = {
    "connect_timeout": 5,
    "read_timeout": 20,
    "retries": {"mode": "standard", "max_attempts": 3},
    "max_pool_connections": 2 * CONNECTIONS,
}
_CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"


def open_store(uri: str, options: Mapping[str, Any]) -> ObjectStore:
    """The store of a URI; raises LakeNotFound where fsspec knows none, or what it needs is not installed."""
    import fsspec

    protocol, found, _ = uri.partition("://")
    is_s3 = protocol in ("s3", "s3a") and bool(found)
    mine = {"use_listings_cache": False, "skip_instance_cache": True, "config_kwargs": _PATIENCE}
    try:
        fs, root = fsspec.core.url_to_fs(uri, **{**(mine if is_s3 else {}), **options})
    except ImportError as error:
        if is_s3:
            raise LakeNotFound(
                f"cannot open {uri}: s3fs is not installed; run `pip install lakebed[s3]`"
            ) from error
        raise LakeNotFound(f"cannot open {uri}: {error}") from error
    except ValueError as error:
        if found and protocol not in fsspec.available_protocols():
            raise LakeNotFound(
                f"cannot open {uri}: Protocol not known: {protocol}; a lake is a folder, or a URI such as s3://bucket/my.lake"
            ) from error
        raise LakeNotFound(f"cannot open {uri}: {error}") from error
    if is_s3 and not str(root).split("/")[0]:
        raise LakeNotFound(f"{uri} names no bucket: give s3://BUCKET/NAME")
    if is_s3:
        # Around those of botocore: for answers that break off.
        fs.retries = 2
    return (S3Store if is_s3 else ObjectStore)(uri, fs, str(root))


class ObjectStore:
    """Objects below `root` of an fsspec file system; keys are relative to it. A missing key is FileNotFoundError."""

    def __init__(self, uri: str, fs: Any, root: str) -> None:
        self.uri = uri
        self.fs = fs
        self.root = root

    def read(self, key: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Bytes start … stop of `key`, fewer where it ends before."""
        with self.told(key):
            return bytes(self.fs.cat_file(self._at(key), start=start, end=stop))

    def write(self, key: str, data: bytes | memoryview) -> None:
        """Puts `data` under `key`."""
        with self.told(key):
            self.fs.pipe_file(self._at(key), bytes(data))

    def create(self, key: str, data: bytes) -> bool:
        """Puts `data` under `key` unless something is there; says whether this call did."""
        with self.told(key):
            try:
                self.fs.pipe_file(self._at(key), data, mode="create")
            except FileExistsError:
                return False
        return True

    def stat(self, key: str) -> Stat:
        """Size and time of one object."""
        with self.told(key):
            return _stat_of(self.fs, self._at(key), self.fs.info(self._at(key)))

    def exists(self, key: str) -> bool:
        """Whether there is an object."""
        with self.told(key):
            return bool(self.fs.exists(self._at(key)))

    def names(self, key: str) -> list[str]:
        """Names directly below `key`, in no order."""
        with self.told(key):
            self.fs.invalidate_cache(self._at(key))
            try:
                found = self.fs.ls(self._at(key), detail=False)
            except FileNotFoundError:
                return []
        return [str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in found]

    def listing(self, key: str) -> Iterator[tuple[str, Stat]]:
        """Every object below `key`, with its size and time."""
        with self.told(key):
            self.fs.invalidate_cache(self._at(key))
            found = self.fs.find(self._at(key), detail=True)
        for path, about in found.items():
            yield str(path)[len(self.root) + 1 :], _stat_of(self.fs, str(path), about)

    def remove(self, key: str) -> None:
        """Removes one object; a missing one is no error."""
        with self.told(key):
            try:
                self.fs.rm_file(self._at(key))
            except FileNotFoundError:
                return

    @contextmanager
    def told(self, key: str) -> Iterator[None]:
        """Says what goes wrong inside in words for a person; FileNotFoundError and FileExistsError stay."""
        try:
            yield
        except (FileNotFoundError, FileExistsError, LakebedError):
            raise
        except OSError as error:
            raise StorageRefused(
                f"the store of {self.uri} failed at {key or 'its root'}: {error.strerror or error}"
            ) from error

    def _at(self, key: str) -> str:
        return f"{self.root}/{key}" if key else self.root


class S3Store(ObjectStore):
    """A bucket, or a prefix of one: S3 itself, or what speaks its language."""

    def __init__(self, uri: str, fs: Any, root: str) -> None:
        super().__init__(uri, fs, root.rstrip("/"))
        self.bucket, _, self._prefix = self.root.partition("/")

    def read(self, key: str, start: int | None = None, stop: int | None = None) -> bytes:
        """One GET."""
        with self.told(key):
            return bytes(self.fs.cat_file(self._at(key), start=start, end=stop, max_concurrency=1))

    def create(self, key: str, data: bytes) -> bool:
        """One conditional PUT. Where the store knows no conditions, a look and a PUT: then of two at once the last wins."""
        for attempt in range(8):
            try:
                return super().create(key, data)
            except LakebedError as error:
                code = _code(error.__cause__)
                if code in ("PreconditionFailed", "412"):
                    return False
                if code in ("NotImplemented", "501"):
                    break
                # Another conditional PUT is under way: S3 asks to try again.
                if code not in ("ConditionalRequestConflict", "409", "OperationAborted"):
                    raise
                time.sleep(0.05 * 2**attempt)
        if self.exists(key):
            return False
        self.write(key, data)
        return True

    def stat(self, key: str) -> Stat:
        """One HEAD."""
        with self.told(key):
            head = self.fs.call_s3("head_object", Bucket=self.bucket, Key=self._key(key))
        return int(head["ContentLength"]), float(head["LastModified"].timestamp())

    def exists(self, key: str) -> bool:
        """One HEAD."""
        try:
            self.stat(key)
        except FileNotFoundError:
            return False
        return True

    def names(self, key: str) -> list[str]:
        """One LIST for a thousand names."""
        found = []
        prefix = self._folder(key)
        for page in self._pages(prefix, "/"):
            found += [of["Prefix"][len(prefix) :].rstrip("/") for of in page.get("CommonPrefixes", ())]
            found += [of["Key"][len(prefix) :] for of in page.get("Contents", ())]
        return [name for name in found if name]

    def listing(self, key: str) -> Iterator[tuple[str, Stat]]:
        """One LIST for a thousand objects."""
        cut = len(self._folder(""))
        for page in self._pages(self._folder(key), ""):
            for of in page.get("Contents", ()):
                yield of["Key"][cut:], (int(of["Size"]), float(of["LastModified"].timestamp()))

    def remove(self, key: str) -> None:
        """One DELETE."""
        with self.told(key):
            self.fs.call_s3("delete_object", Bucket=self.bucket, Key=self._key(key))

    def _pages(self, prefix: str, delimiter: str) -> Iterator[dict[str, Any]]:
        after: dict[str, str] = {}
        while True:
            with self.told(prefix):
                page = self.fs.call_s3(
                    "list_objects_v2", Bucket=self.bucket, Prefix=prefix, Delimiter=delimiter, **after
                )
            yield page
            if not page.get("IsTruncated"):
                return
            after = {"ContinuationToken": page["NextContinuationToken"]}

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    def _folder(self, key: str) -> str:
        whole = self._key(key).strip("/")
        return f"{whole}/" if whole else ""

    @contextmanager
    def told(self, key: str) -> Iterator[None]:
        """As of any store; what botocore raises is no OSError."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            with super().told(key):
                yield
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise self._no_bucket() from error
            raise
        except StorageRefused as error:
            raise self._refusal(key, error.__cause__ or error) from error.__cause__
        except (BotoCoreError, ClientError, ValueError) as error:
            raise self._refusal(key, error) from error

    def _no_bucket(self) -> NoBucket:
        return NoBucket(
            f"there is no bucket {self.bucket!r} at {_endpoint()}: make it (aws s3 mb s3://{self.bucket}), or check the "
            "name and AWS_ENDPOINT_URL"
        )

    def _refusal(self, key: str, error: BaseException) -> LakebedError:
        """What a request that failed says to a person."""
        from botocore import exceptions as boto

        said = " ".join(str(error).split()) or type(error).__name__
        where = f"{_endpoint()} for {self.uri}"
        if isinstance(error, boto.ParamValidationError):
            return NoBucket(
                f"{self.uri}: {self.bucket!r} cannot be the name of a bucket; give s3://BUCKET/NAME"
            )
        missing = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.ProfileNotFound)
        if isinstance(error, (*missing, boto.CredentialRetrievalError)):
            return NoCredentials(f"no credentials for {self.uri} ({said}): set {_CREDENTIALS}")
        if isinstance(error, PermissionError):
            return NoCredentials(
                f"{where} refuses {key or 'a listing'} ({said}): check {_CREDENTIALS}, and what they may do in bucket "
                f"{self.bucket!r}"
            )
        if isinstance(error, (boto.ConnectionError, boto.HTTPClientError, TimeoutError, ConnectionError)):
            return StoreUnreachable(
                f"cannot reach {where} ({said}): check AWS_ENDPOINT_URL and the network, and run the same command again; "
                "everything finished so far is kept"
            )
        return StorageRefused(f"{where} failed at {key or 'its root'}: {said}")


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "S3"


def _code(error: BaseException | None) -> str:
    """S3's own code for what went wrong; s3fs keeps it in the cause."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""


def _stat_of(fs: Any, path: str, about: Mapping[str, Any]) -> Stat:
    for name in ("LastModified", "mtime", "created", "last_modified"):
        if (when := about.get(name)) is not None:
            return int(about["size"]), float(when.timestamp() if hasattr(when, "timestamp") else when)
    return int(about["size"]), float(fs.modified(path).timestamp())
