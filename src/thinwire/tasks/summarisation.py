"""A text in one line: docstrings of Python's standard library, or a CSV or JSONL with the columns `text` and `summary`.

A docstring's first line is the summary, by the convention that its authors follow (PEP 257); the text is what it is of, as in
`class Fraction` or `def lstat(path)`, and the rest of the docstring, of at least eight words. What follows train.sequence
tokens is cut off. The model is that of translation; it writes the likeliest token each time. Score: ROUGE-1 (Lin 2004), the
mean over held-out texts of the F-measure of single words, in lower case. Baseline: the text's first ten words. Margin, stated
beforehand: 3 points.
"""

import ast
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from thinwire.data.source import find_files
from thinwire.tasks.examples import Tensors
from thinwire.tasks.own import columns_of
from thinwire.tasks.task import Score
from thinwire.tasks.text import END, cached
from thinwire.tasks.translation import Translation

LEAST_WORDS, LEAD_WORDS = 8, 10


class Summarisation(Translation):
    """See the top of the file."""

    item = "text"
    score_is = Score(name="ROUGE-1", unit="points", margin=3.0)
    num_measured = 2
    vocabulary = 3000

    def pairs(self) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        if self.config.task.source:
            found, about = columns_of(Path(self.config.task.source).expanduser(), ("text", "summary"))
            return [(one[0], one[1]) for one in found], about
        files = find_files("stdlib")
        stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        pairs = cached(self.cache_folder, f"docstrings {LEAST_WORDS} {stamps}", lambda: list(_documented(files)))
        source = f"docstrings of Python {sysconfig.get_python_version()}'s standard library"
        size = sum(size for _, size, _ in stamps)
        about = {"source": source, "licence": "PSF", "files": len(files), "bytes": size}
        return [(text, summary) for text, summary in pairs], about

    def as_kept(self, source: list[int], target: list[int]) -> tuple[list[int], list[int]]:
        longest = self.config.train.sequence - 1
        return [*source[:longest], END], [*target[:longest], END]

    def measure(self, model: nn.Module, batch: Tensors) -> Sequence[float]:
        wanted = [self._texts[row][1] for row in batch[2].tolist()]
        written = self.written(model, batch[0])
        return sum(rouge_1(one, other) for one, other in zip(written, wanted, strict=True)), float(len(wanted))

    def measured_score(self, sums: Sequence[float]) -> float:
        return 100.0 * sums[0] / sums[1] if sums[1] else float("nan")

    def baseline(self) -> tuple[str, float]:
        held = [self._texts[row] for row in self._parts["held_out"].tolist()]
        found = sum(rouge_1(" ".join(text.split()[:LEAD_WORDS]), summary) for text, summary in held)
        return f"the first {LEAD_WORDS} words", 100.0 * found / len(held)

    def written(self, model: nn.Module, source: Tensor) -> list[str]:
        return [" ".join(one.split()) for one in super().written(model, source)]


def rouge_1(written: str, wanted: str) -> float:
    """2 P R / (P + R) of words, counted as often as both have them; 0 where they share none."""
    one, other = (Counter(re.findall(r"\w+", text.lower())) for text in (written, wanted))
    shared = (one & other).total()
    return 2.0 * shared / (one.total() + other.total()) if shared else 0.0


def _documented(files: Sequence[Path]) -> Iterator[list[str]]:
    """[text, summary], in the order of the files; one of several alike."""
    seen = set[tuple[str, str]]()
    for path in files:
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # of templates and of tests of the parser
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            summary, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
            if len(rest.split()) < LEAST_WORDS or not summary.strip():
                continue
            what = f"class {node.name}" if isinstance(node, ast.ClassDef) else f"def {node.name}({ast.unparse(node.args)})"
            pair = f"{what} {' '.join(rest.split())}", " ".join(summary.split())
            if pair not in seen:
                seen.add(pair)
                yield list(pair)
