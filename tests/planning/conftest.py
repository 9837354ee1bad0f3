"""What the tests of planning share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.caches import corpus_text
from tests.corpus.test_chat import CHATML
from tests.tiny import save_tiny


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `teacher`, whose distributions are as uneven as a real one's, and `text.txt` of 22,000 tokens.

    Its tokenizer has a chat template.
    """
    folder = tmp_path_factory.mktemp("planned")
    save_tiny(folder / "teacher", initializer_range=1.0)
    (folder / "teacher" / "chat_template.jinja").write_text(CHATML)
    (folder / "text.txt").write_text(corpus_text(560))
    return folder
