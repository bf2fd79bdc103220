"""Why a model is as it is, and what became of its versions, as people read it.

Pure: from the answers to `explain` and `history` to lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.text import Text

from splitlearn_manager.cli.render import clock_time, columns, phase_text, wrapped

_LABELS = ("because", "waits for", "would help")


def explain_lines(explanation: Mapping[str, object], width: int) -> list[Text]:
    """The headline, then what it rests on, what is waited for, and what would help."""
    head = Text(f"{explanation['model_id']}   ", style="bold")
    head.append_text(phase_text(explanation.get("phase")))
    lines = [head, *wrapped(str(explanation.get("headline") or ""), "  ", width)]
    label_width = max(len(label) for label in _LABELS) + 3
    indent = " " * (2 + label_width)
    for label in _LABELS:
        sentences = _sentences(explanation.get(label.replace(" ", "_")))
        for position, sentence in enumerate(sentences):
            first, *others = wrapped(sentence, indent, width)
            if position == 0:
                first = (
                    Text("  ")
                    .append(f"{label:{label_width}}", style="dim")
                    .append(first[len(indent) :])
                )
            lines += [first, *others]
    return lines


def history_lines(entries: Sequence[Mapping[str, object]], now: float) -> list[Text]:
    """One line a version, the latest last."""
    if not entries:
        return [Text("  no version has been accepted yet")]
    rows: list[list[Text | str]] = [
        [Text(head, style="dim") for head in ("gen", "accepted", "what", "from", "outcome")]
    ]
    for entry in entries:
        at = entry.get("at")
        outcome = str(entry.get("outcome") or "–")
        rows.append(
            [
                str(entry.get("generation")),
                clock_time(float(at), now) if isinstance(at, int | float) else "–",
                str(entry.get("what") or "–"),
                str(entry.get("source") or "–"),
                Text(outcome, style=_outcome_style(outcome)),
            ]
        )
    return columns(rows)


def _outcome_style(outcome: str) -> str:
    return "red" if "fail" in outcome.lower() else ""


def _sentences(value: object) -> list[str]:
    if isinstance(value, list):
        return [str(item) for item in value]
    return [str(value)] if value else []
