"""Where a run's weights came from, as far as Hugging Face's small files go."""

from pathlib import Path

from llmjax.interop import folder as interop
from llmjax.run import Run, read

KEPT = "imported"  # the folder of a run directory with the checkpoint's small files, as they were


def origin_of(run: Run, home: Path, most: int = 8) -> Path | None:
    """The folder with the small files of the checkpoint that the run came from, through the runs in between."""
    if (home / KEPT / interop.CONFIG).is_file():
        return home / KEPT
    source = Path(run.weights)
    if not run.weights or not most or not source.is_dir():
        return None
    if (source / "run.json").is_file():
        return origin_of(read(source / "run.json"), source, most - 1)
    return source if (source / interop.CONFIG).is_file() else None
