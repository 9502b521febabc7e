"""What a run could not read, kept in its folder: a run that goes on does not meet every image again."""

import contextlib
import json
from collections.abc import Generator
from pathlib import Path

from wnq.data import Dataset, StreamedImages
from wnq.files import write_text


@contextlib.contextmanager
def remembering_unreadable(path: Path, data: Dataset, *, resume: bool, writes: bool) -> Generator[None]:
    """Keep what could not be read in a file, however the block ends.

    Args:
        path: of the file, ``unreadable.json``: path of the image -> reason.
        data: whose streamed splits are watched.
        resume: read the file first, if it is there.
        writes: whether this process writes; each knows what it met itself.

    Raises:
        OSError: the file cannot be written.
    """
    streamed = [split for split in (data.train, data.val) if isinstance(split, StreamedImages)]
    if resume and streamed and path.exists():
        with contextlib.suppress(OSError, ValueError):  # no loss: what matters is in the checkpoint
            streamed[0].unreadable.update(json.loads(path.read_text(encoding="utf-8")))
    try:
        yield
    finally:
        found = {place: reason for split in streamed for place, reason in split.unreadable.items()}
        if found and writes:
            write_text(path, json.dumps(found, indent=2) + "\n")
