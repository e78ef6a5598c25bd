"""What tests of figures share."""

from typing import Any

import matplotlib.figure
import pytest


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures that are saved."""
    figures: list[Any] = []
    savefig = matplotlib.figure.Figure.savefig

    def keep_it(figure: Any, *args: Any, **kwargs: Any) -> None:
        if figure not in figures:
            figures.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep_it)
    return figures
