"""Writing files so that a crash, a full disk or a second reader never meets half of one."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Generator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | Path) -> Generator[Path]:
    """Yield a temporary path beside ``path``; on success it takes the name ``path``, on any failure it is removed.

    Raises:
        OSError: one sentence that names ``path`` and the cause; what stood at ``path`` is untouched.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
    except OSError as error:
        raise _explained(error, path) from None
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())  # the new name must not outlive a power cut that the content did not
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise _explained(error, path) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _explained(error: OSError, path: Path) -> OSError:
    remedy = (
        "Free some space"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        else "Choose a folder that you may write to"
    )
    return OSError(f"cannot write {path}: {error.strerror or error}. {remedy}.")
