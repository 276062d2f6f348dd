"""`thinwire export RUN FOLDER`: a trained model in a folder that Hugging Face's libraries load."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from thinwire.errors import UserError
from thinwire.units import show

BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""What belongs to a tokenizer, copied from its folder."""


def export(
    run: Annotated[Path, typer.Argument(help="A run folder of thinwire train; its newest checkpoint is taken.")],
    folder: Annotated[Path, typer.Argument(help="A folder to make.")],
) -> None:
    """Write a trained model as config.json and model.safetensors, with its tokenizer, as transformers loads it."""
    if folder.exists():
        raise UserError(f"{folder} is there already; give a folder to make")
    from thinwire.config.pretrained import CONFIG, config_of, read_config
    from thinwire.data.tokenizer import FileTokenizer
    from thinwire.models.llama import WEIGHTS, write_weights
    from thinwire.train.trained import open_weights

    weights = open_weights(run)
    content = config_of(weights.model.config, weights.tokenizer.end)
    if weights.source is not None:
        before = read_config(weights.source)
        content |= {key: before[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in before}
    tokenizer = weights.tokenizer
    try:
        folder.resolve().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.resolve().parent) as made:
            aside = Path(made) / "whole"
            aside.mkdir()
            (aside / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            write_weights(weights.model, aside / WEIGHTS)
            if isinstance(tokenizer, FileTokenizer):
                for path in (tokenizer.path.parent / name for name in BESIDE):
                    if path.is_file():
                        shutil.copy(path, aside)
            aside.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    typer.echo(f"wrote {folder}, {show((folder / WEIGHTS).stat().st_size, 'B')}: {weights.what}")
    if not isinstance(tokenizer, FileTokenizer):
        typer.echo("its tokens are bytes, for which Hugging Face has no tokenizer.json: token i is byte i, 0 ends a text")
