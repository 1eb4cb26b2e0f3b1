"""Remote file systems by URI: pyarrow's, with bounds on what a request may take, and fsspec's, with errors like its."""

from __future__ import annotations

import errno
from typing import Any

from configs.errors import UsageError

CONTACT_S = 30.0  # after which a store that has not answered yet is out of reach
# Of a request to S3: the connection; silence; and how often it is made before the store is out of reach.
_CONNECT_S, _SILENCE_S, _TRIES = 5.0, 10.0, 4


def open_file_system(uri: str) -> tuple[Any, str]:
    """(pyarrow file system, root path in it) for a URI. Raises UsageError for one that nobody serves, and OSErrors."""
    from pyarrow import ArrowInvalid, ArrowNotImplementedError
    from pyarrow.fs import FileSystem

    if uri.startswith(("gs://", "gcs://")) and "retry_limit_seconds=" not in uri:  # else it tries for 15 minutes
        uri += f"{'&' if '?' in uri else '?'}retry_limit_seconds={CONTACT_S:g}"
    if uri.startswith(("hf://", "fsspec+")):  # pyarrow hands these to fsspec too
        return _fsspec(uri.removeprefix("fsspec+"), None)
    try:
        file_system, root = FileSystem.from_uri(uri)
    except (ArrowInvalid, ArrowNotImplementedError) as error:
        if not str(error).startswith(("Unrecognized filesystem type", "Got ")):  # or pyarrow was built without it
            raise UsageError(
                f"The store {uri} is not understood: {error}. Use a local folder or a URI such as s3://bucket/path."
            ) from error
        return _fsspec(uri, error)
    return _with_limits(file_system), root


def _with_limits(file_system: Any) -> Any:
    """An S3 file system that gives a request up after a minute, and writes a small file in one request; others as is.

    pyarrow's own makes a request 31 times: within 6 s where it is refused, for 100 s where nothing comes. A small file
    takes it three requests, and leaves an upload without an end where the last one does not arrive.
    """
    from pyarrow.fs import AwsStandardS3RetryStrategy

    return s3_with(
        file_system,
        connect_timeout=_CONNECT_S,
        request_timeout=_SILENCE_S,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=_TRIES),
        allow_delayed_open=True,
    )


def s3_with(file_system: Any, **settings: Any) -> Any:
    """An S3 file system with some settings of pyarrow.fs.S3FileSystem changed; any other file system as it is.

    The others are those that it gives to be pickled with; should a later pyarrow give none, it stays as it is.
    """
    from pyarrow.fs import S3FileSystem

    if type(file_system) is not S3FileSystem:
        return file_system
    try:
        _, (own,) = file_system.__reduce__()
        return S3FileSystem(**own | settings)
    except (TypeError, ValueError):
        return file_system


def _fsspec(uri: str, refusal: Exception | None) -> tuple[Any, str]:
    """(pyarrow file system over fsspec's, root path in it) for a URI that pyarrow itself does not serve."""
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    scheme = uri.partition("://")[0]
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        file_system, root = url_to_fs(uri.partition("?")[0])
    except ImportError as error:
        raise UsageError(
            f"{uri} needs a package for {scheme}:// that is not installed: {error}. Install it, or copy the files to a "
            "local folder."
        ) from error
    except ValueError as error:
        raise UsageError(
            f"{uri} is not understood: {refusal or error}. Use a local folder or a URI such as s3://bucket/path."
        ) from error
    except OSError:
        raise
    except Exception as error:
        raise _os_error(error) from error
    return PyFileSystem(FSSpecHandler(_FsspecFiles(file_system))), root


class _OnlyOSErrors:
    """A file system of fsspec, or a file of one, whose calls raise OSErrors, whatever its network library raises."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                result = found(*args, **kwargs)
            except FileNotFoundError as error:
                raise _not_found(error) from error
            except OSError:
                raise
            except Exception as error:
                raise _os_error(error) from error
            return _OnlyOSErrors(result) if hasattr(result, "read") else result

        return call


def _os_error(error: Exception) -> OSError:
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, NotImplementedError):
        return OSError(errno.EROFS, text)
    only_forward = "Cannot seek" in text or "range requests" in text  # of an HTTP server that gives whole files
    return OSError(errno.ESPIPE if only_forward else errno.EREMOTEIO, text)


def _not_found(error: FileNotFoundError) -> OSError:
    """The error, or what is behind it: fsspec takes for missing whatever it cannot get of an HTTP server."""
    cause = error.__cause__
    if isinstance(cause, TimeoutError) or (isinstance(cause, OSError) and cause.errno not in (None, errno.ENOENT)):
        return cause
    status = getattr(cause, "status", 404)
    return error if status in (404, 410) else OSError(errno.EREMOTEIO, f"the server says {status}")


class _FsspecFiles(_OnlyOSErrors):
    """A file system of fsspec, where what cannot be looked up is an error, and not taken for what is not there."""

    def isfile(self, path: str) -> bool:
        """Whether there is a file of this name."""
        return self.exists(path) and self.info(path)["type"] == "file"

    def exists(self, path: str) -> bool:
        """Whether there is something of this name."""
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True
