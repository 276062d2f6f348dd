"""The end of a training command: the table of the run that was just made, and its page."""

from pathlib import Path


def conclude(results: Path) -> None:
    """`results`: where the ranks have left `run_folder`; without it (they failed) there is nothing to say."""
    told = results / "run_folder"
    if not told.is_file():
        return
    from rich.console import Console

    from thinwire.record import RunFolder
    from thinwire.report import gather, table, write_report

    folder = RunFolder.open(told.read_text(encoding="utf-8"))
    page = write_report(folder)
    console = Console()
    console.print(table(gather(folder)))
    console.print(f"run folder: {folder.path}\nreport: {page}", soft_wrap=True, markup=False, highlight=False)
