"""A topology from a file: a matrix of capacities as ForestColl's, or NCCL's XML.

    .json   {"capacity": [[0, 300], ..], "switches": [8, 9], "names": ["gpu0", ..]}     GB/s from row to column, 0: no link
    .csv    the rows of the matrix; "# switches: 8, 9" and "# names: gpu0, .." in lines of their own
    .xml    NCCL's own topology files (`nccl_file`)

Switches are the nodes that only forward, by their row, from 0; without any, all compute. Names may be left out.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from thinwire.collectives.synthesis.graph import Graph, matrix_graph
from thinwire.collectives.synthesis.nccl_file import nccl_graph
from thinwire.errors import UserError

_KINDS = (".json", ".csv", ".xml")


class _Matrix(BaseModel):
    model_config = ConfigDict(extra="forbid")

    capacity: list[list[float]]
    switches: list[int] = []
    names: list[str] = []


def read_topology(path: Path, cpu_gbytes_per_s: float | None = None, **rates: float | None) -> Graph:
    """UserError in one line. The rates are for an XML: those of `nccl_graph`."""
    if path.suffix not in _KINDS:
        raise UserError(f"{path}: a topology is one of {', '.join(_KINDS)}")
    if path.suffix == ".xml":
        return nccl_graph(path, cpu_gbytes_per_s, **rates)
    if given := [name for name, rate in {"cpu_gbytes_per_s": cpu_gbytes_per_s, **rates}.items() if rate is not None]:
        raise UserError(f"--{given[0].replace('_', '-')} is for NCCL's .xml; a matrix has all rates")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        matrix = _Matrix.model_validate_json(text) if path.suffix == ".json" else _from_csv(text, path)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise UserError(f"{path}: {where}: {first['msg']}") from None
    return matrix_graph(matrix.capacity, switches=matrix.switches, names=matrix.names, name=str(path))


def _from_csv(text: str, path: Path) -> _Matrix:
    found: dict[str, list[str]] = {"switches": [], "names": []}
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#"):
            key, _, values = line[1:].partition(":")
            if key.strip() in found:
                found[key.strip()] = [value.strip() for value in values.split(",") if value.strip()]
        elif line.strip():
            try:
                rows.append([float(value) for value in line.split(",")])
            except ValueError:
                raise UserError(f"{path}: line {number}: {line.strip()[:40]!r} is not a row of numbers") from None
    return _Matrix.model_validate({"capacity": rows, **found})
