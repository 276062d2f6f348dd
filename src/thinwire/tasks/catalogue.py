"""The tasks of the catalogue, by task.kind."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from thinwire.config.run import RunConfig
from thinwire.layout import Layout
from thinwire.tasks.examples import ExampleTask

CATALOGUE: Mapping[str, str] = {
    "detection": "thinwire.tasks.detection:Detection",
    "image_classification": "thinwire.tasks.image_classification:ImageClassification",
    "intent_slots": "thinwire.tasks.intent_slots:IntentSlots",
    "lm_lstm": "thinwire.tasks.lm_lstm:LSTMLanguageModel",
    "qa": "thinwire.tasks.qa:QuestionAnswering",
    "recommendation": "thinwire.tasks.recommendation:Recommendation",
    "segmentation": "thinwire.tasks.segmentation:Segmentation",
    "sentiment": "thinwire.tasks.sentiment:Sentiment",
    "speech": "thinwire.tasks.speech:Speech",
    "summarisation": "thinwire.tasks.summarisation:Summarisation",
    "translation": "thinwire.tasks.translation:Translation",
}


def make_task(config: RunConfig, layout: Layout, cache_folder: Path) -> ExampleTask:
    """The one that [task] asks for, with its data. UserError if they cannot be had."""
    module, _, name = CATALOGUE[config.task.kind].partition(":")
    made: Any = getattr(import_module(module), name)(config, layout, cache_folder)
    found: ExampleTask = made
    return found
