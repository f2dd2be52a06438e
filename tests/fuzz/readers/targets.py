"""Readers of what users write, fed with bytes: files of preferences, settings, logs, models, and the command line.

A target takes bytes and a folder of its own. It returns where the bytes were read rightly or refused in one sentence,
and raises otherwise: another exception than the promised one is a bug, and so is a result that breaks its promises.
"""

from tests.fuzz.readers.command import COMMAND
from tests.fuzz.readers.models import MODELS
from tests.fuzz.readers.preferences import PREFERENCES
from tests.fuzz.readers.results import RESULTS
from tests.fuzz.readers.studies import STUDIES

__all__ = ["TARGETS"]

TARGETS = {**PREFERENCES, **COMMAND, **MODELS, **RESULTS, **STUDIES}
