"""[data] of run.toml: which text, what of each record, and how it becomes tokens."""

from __future__ import annotations

from pydantic import Field, model_validator

from thinwire.tomlfile import Section

STDLIB = "stdlib"


class DataSource(Section):
    """One of several sources."""

    path: str
    """A file, a folder, a glob or "stdlib", as data.source."""
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """How often an epoch shows this source's text: 2 is twice, 0.5 every second epoch."""
    field: str = ""
    """What of a record is its text; empty: data.field."""


class DataSection(Section):
    """The text."""

    source: str = STDLIB
    """A file, a folder or a glob of .txt .md .py .jsonl .json .csv .tsv (also .gz, .zst), .parquet, .arrow, or a folder that the
    `datasets` library saved; "stdlib": the Python standard library's own sources. .zst, .parquet, .arrow: extra `data`."""
    sources: tuple[DataSource, ...] = ()
    """Several, with weights, instead of `source`."""
    field: str = "text"
    """What of a record is its text: a key or column, also "meta.text" or a template "{prompt}\\n{response}". A list of messages
    (role, content) goes through the chat template."""
    chat_template: str = ""
    """A Jinja file; empty: the template in tokenizer_config.json, or chat_template.jinja, beside the tokenizer.json."""
    skip_bad: bool = False
    """Count and skip records that cannot be read, instead of ending with the first one's file and line."""
    tokenizer: str = "bytes"
    """"bytes", or the path of a tokenizer.json (extra `tokenizers`)."""
    windows: int = Field(0, ge=0)
    """So many sequences, spread evenly over the text, each of which is seen once an epoch: samples return, as in fine-tuning. A
    multiple of the sequences of a step. 0: all of the text, cut from another place in each epoch."""
    cache: str = ""
    """Folder for the token file; empty: ~/.cache/thinwire."""

    @model_validator(mode="after")
    def _one_of_both(self) -> DataSection:
        if self.sources and self.source != STDLIB:
            raise ValueError("source and sources are both given; write the source as one of the sources")
        if self.windows and len(self.sources) > 1:
            raise ValueError(
                f"data.windows = {self.windows} are of one text, and data.sources are {len(self.sources)}; leave one of both out"
            )
        return self

    def each(self) -> tuple[DataSource, ...]:
        """All sources, one or several, their fields filled in."""
        given = self.sources or (DataSource(path=self.source),)
        return tuple(source.model_copy(update={"field": source.field or self.field}) for source in given)

    def __str__(self) -> str:
        if not self.sources:
            return self.source
        return ", ".join(f"{source.path} x {source.weight:g}" for source in self.sources)
