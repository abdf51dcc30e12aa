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
    module.add_row(file, {"method": "auto", "shots": 1, "seed": 0, "ms": float("nan"), "wall": 2.0})
    row = module.read_rows(file)["auto", 1, 0]
    assert math.isnan(row["ms"]) and math.isnan(row["gpu"]) and row["wall"] == 2
    assert file.read_text().splitlines()[-1].count("nan") == 0
    assert file.read_text().splitlines()[-1].startswith("auto,1,0,,")
    assert list(module.read_rows(file)) == [("mean", 1, 0), ("mean", 1, 1), ("auto", 1, 0)]
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
        (m, 1, s): {
            **dict.fromkeys(module.NUMBERS, math.nan),
            **dict.fromkeys(every, 0.5),
            **{"FSOD_nAP50": v, "GFSOD_HM50": 1 - v, "seconds": 10 * s},
        }
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
    assert lines[0] == (
        "| shots | method | nAP50 | nAP50-95 | COCO nAP50 | COCO nAP | nAP50 minus that of best stock | seconds |"
    )
    same = "| 0.500 ± 0.000 | 0.500 ± 0.000 | 0.500 ± 0.000 |"
    # Differences 0.1 and 0.3: s = 0.141421, so that 12.706 s / sqrt(2) = 1.2706.
    assert lines[2] == f"| 1 | {BASELINE} | 0.250 ± 0.635 {same} stock, freeze=10 | 5.0 |"
    assert lines[-1] == f"| 1 | mean | 0.450 ± 0.635 {same} +0.200 ± 1.271 | 5.0 |"
    rows, best = module.with_baseline(
        rows_of(figures), list(figures), [1], 2, "G-FSOD"
    )  # where all is the other way round
    assert best == {1: "stock_all-0"}
    lines = module.format_table("G-FSOD", rows, methods, [1], 2, best)
    assert " | stock_all, freeze=0 | " in lines[2]
    assert "| 0.550 ± 0.635 |" in lines[-1] and lines[-1].endswith("| -0.350 ± 0.635 | 5.0 |")
    lines = module.format_table("FSOD", rows_of({"two_way": [0.2], "full": [0.5]}), ["two_way", "full"], [1], 1, {})
    assert "| nAP50 minus that of full |" in lines[0] and lines[2:] == [
        "| 1 | two_way | 0.200 | 0.500 | 0.500 | 0.500 | -0.300 | 0.0 |",
        "| 1 | full | 0.500 | 0.500 | 0.500 | 0.500 |  | 0.0 |",
    ]
    rows, best = module.with_baseline(rows_of({"mean": [0.4]}), ["mean"], [1], 1, "FSOD")
    lines = module.format_table("FSOD", rows, ["mean"], [1], 1, best)
    assert lines[2:] == ["| 1 | mean | 0.400 | 0.500 | 0.500 | 0.500 |  | 0.0 |"]


def test_costs_that_were_measured_have_columns_and_empty_figures_empty_cells():
    rows = rows_of({"mean": [0.4], "graft-neck": [0.5]})
    rows["mean", 1, 0] |= {"ms": 12.34, "FSOD_cAP": math.nan}
    lines = module.format_table("FSOD", rows, ["mean", "graft-neck"], [1], 1, {})
    assert lines[0].endswith("| seconds | ms per image |")
    assert lines[2:] == [
        "| 1 | mean | 0.400 | 0.500 | 0.500 |  |  | 0.0 | 12.3 |",
        "| 1 | graft-neck | 0.500 | 0.500 | 0.500 | 0.500 |  | 0.0 |  |",
    ]
    lines = module.format_table("G-FSOD", rows, ["mean"], [1], 1, {})
    assert "| false alarms | " in lines[0] and lines[0].endswith("| seconds |")


def test_detectors_that_have_lost_the_old_classes_are_compared_by_the_new_ones():
    rows = rows_of({"stock-0": [1.0], "stock-22": [1.0]})  # a harmonic mean of 0
    rows["stock-22", 1, 0]["GFSOD_nAP50"] = 0.6
    assert module.with_baseline(rows, ["stock-0", "stock-22"], [1], 1, "G-FSOD")[1] == {1: "stock-22"}
    rows["stock-0", 1, 0]["GFSOD_nAP50"] = 0.7
    assert module.with_baseline(rows, ["stock-0", "stock-22"], [1], 1, "G-FSOD")[1] == {1: "stock-0"}
