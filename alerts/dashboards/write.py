"""The dashboards' files, and the rules as Kubernetes has them."""

from __future__ import annotations

from pathlib import Path

from alerts.dashboards import alerting, llm, objectives, resources
from alerts.dashboards.panels import document

MONITORING = Path(__file__).parents[2] / "cluster/monitoring"
BOARDS = (llm.BOARD, resources.BOARD, objectives.BOARD, alerting.BOARD)


def files() -> dict[str, str]:
    """Texts by their place in cluster/monitoring/."""
    return {f"grafana/dashboards/{board.uid}.json": document(board) for board in BOARDS}


def write(folder: Path = MONITORING) -> list[Path]:
    written = []
    for name, text in files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written
