import math

import pytest

from yolo_fewshot.evaluate import report as module
from yolo_fewshot.evaluate.report import BASELINE, COLUMNS
from yolo_fewshot.files import AtomicPath


def test_a_row_is_never_written_in_part(tmp_path, monkeypatch):
    file = tmp_path / "rows.csv"
    row = {**dict.fromkeys(COLUMNS, 0.123456789), "method": "mean", "shots": 1, "seed": 0}
    module.add_row(file, row)
    before = file.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        module.add_row(file, {**row, "seed": 1})
    assert file.read_bytes() == before and [x.name for x in tmp_path.iterdir()] == ["rows.csv"]
    monkeypatch.undo()
    module.add_row(file, {**row, "seed": 1})
    lines = file.read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS) and len(lines) == 3 and lines[1].startswith("mean,1,0,0.123457,")
    assert list(module.read_rows(file)) == [("mean", 1, 0), ("mean", 1, 1)]
    assert issubclass(AtomicPath, type(tmp_path))


def test_intervals_against_numbers_by_hand():
    assert module.interval([0.25]) == (0.25, None)
    mean, half = module.interval([0.1, 0.2, 0.4])  # s = 0.152753, sqrt(3) = 1.732051, t(2) = 4.303
    assert mean == pytest.approx(0.7 / 3) and half == pytest.approx(4.303 * 0.152753 / 1.732051, rel=1e-5)
    assert module.interval([1.0, 2.0])[1] == pytest.approx(12.706 / 2)  # s = 1 / sqrt(2)
    many = [(-1.0) ** i for i in range(40)]
    assert module.interval(many)[1] == pytest.approx(2.042 * math.sqrt(40 / 39) / math.sqrt(40))
    assert len(module.T) == 30 and list(module.T) == sorted(module.T, reverse=True)


def rows_of(figures):
    """Rows of one number of shots by method, with the same value of both protocols' main figures."""
    every = [f for kind in module.FIGURES.values() for f in kind]
    return {
        (m, 1, s): {**dict.fromkeys(every, 0.5), "FSOD_nAP50": v, "GFSOD_HM50": 1 - v, "seconds": 10 * s}
        for m, values in figures.items()
        for s, v in enumerate(values)
    }


def test_the_baseline_is_the_best_freeze_and_differences_are_paired():
    figures = {
        "stock-0": [0.1, 0.2],
        "stock-10": [0.3, 0.2],
        "stock-22": [0.0, 0.4],
        "stock_all-0": [0.1, 0.1],
        "mean": [0.4, 0.5],
    }
    methods = [BASELINE, *figures]
    rows, best = module.with_baseline(rows_of(figures), list(figures), [1], 2, "FSOD")
    assert best == {1: "stock-10"}
    lines = module.format_table("FSOD", rows, methods, [1], 2, best)
    assert lines[0] == "| shots | method | nAP50 | nAP50-95 | nAP50 minus that of best stock | seconds |"
    # Differences 0.1 and 0.3: s = 0.141421, so that 12.706 s / sqrt(2) = 1.2706.
    assert lines[2] == f"| 1 | {BASELINE} | 0.250 ± 0.635 | 0.500 ± 0.000 | stock, freeze=10 | 5.0 |"
    assert lines[-1] == "| 1 | mean | 0.450 ± 0.635 | 0.500 ± 0.000 | +0.200 ± 1.271 | 5.0 |"
    rows, best = module.with_baseline(
        rows_of(figures), list(figures), [1], 2, "G-FSOD"
    )  # where all is the other way round
    assert best == {1: "stock_all-0"}
    lines = module.format_table("G-FSOD", rows, methods, [1], 2, best)
    assert " | stock_all, freeze=0 | " in lines[2]
    assert "| 0.550 ± 0.635 |" in lines[-1] and lines[-1].endswith("| -0.350 ± 0.635 | 5.0 |")
    lines = module.format_table("FSOD", rows_of({"two_way": [0.2], "full": [0.5]}), ["two_way", "full"], [1], 1, {})
    assert "| nAP50 minus that of full |" in lines[0] and lines[2:] == [
        "| 1 | two_way | 0.200 | 0.500 | -0.300 | 0.0 |",
        "| 1 | full | 0.500 | 0.500 |  | 0.0 |",
    ]
    rows, best = module.with_baseline(rows_of({"mean": [0.4]}), ["mean"], [1], 1, "FSOD")
    assert module.format_table("FSOD", rows, ["mean"], [1], 1, best)[2:] == ["| 1 | mean | 0.400 | 0.500 |  | 0.0 |"]
