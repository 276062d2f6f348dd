"""What tasks find on the machine is what docs/tasks.md says; where a package is not installed, the test says which."""

from pathlib import Path

import pytest

from thinwire.tasks import fashion, verses

pytestmark = pytest.mark.long


@pytest.mark.skipif(not fashion.FOLDER.is_dir(), reason=f"apt-get install {fashion.PACKAGE}")
def test_fashion_mnist_is_whole() -> None:
    images, labels, about = fashion.load_fashion()
    assert images["train"].shape == (60_000, 28, 28, 1) and images["held_out"].shape == (10_000, 28, 28, 1)
    assert all((labels[part] == label).mean() == 0.1 for part in labels for label in range(10))
    assert about["files"] == 4 and about["bytes"] == 30_878_551


@pytest.mark.skipif(not verses.FOLDER.is_dir(), reason="apt-get install sword-text-kjv sword-text-sparv")
def test_verses_are_aligned(tmp_path: Path) -> None:
    pytest.importorskip("pysword", reason="pip install pysword")
    pairs, _ = verses.load_verses(tmp_path)
    assert len(pairs) == 31_084
    assert pairs[0] == (
        "In the beginning God created the heaven and the earth.",
        "EN el principio crió Dios los cielos y la tierra.",
    )
    assert verses.load_verses(tmp_path)[0] == pairs, "from the cache"
