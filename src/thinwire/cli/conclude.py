"""The end of a training command: the table of the run that was just made, and its page."""

from pathlib import Path


def conclude(run_folder: Path) -> None:
    """Print predicted beside measured, and write the report."""
    from rich.console import Console

    from thinwire.record import RunFolder
    from thinwire.report import gather, table, write_report

    folder = RunFolder.open(run_folder)
    page = write_report(folder)
    console = Console()
    console.print(table(gather(folder)))
    console.print(f"run folder: {folder.path}\nreport: {page}", soft_wrap=True, markup=False, highlight=False)
